// The forward's first pass: both squeezes of x. A block for each sample and strip of positions.
// Reads x once; writes the strip's sums over positions and its spatial gates.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

#define SCSE_SQUEEZE_ARGUMENTS                                       \
  const T *__restrict__ x,         /* [N, C, S] or [N, S, C] */      \
      const void *__restrict__ ws, /* [C] */                         \
      const void *__restrict__ bs, /* [1] or null */                 \
      int dtypes,                  /* of ws and bs, see dtypes.h */  \
      float *partial,              /* [N, strips, C]: sums of x */   \
      float *spatial_gate,         /* [N, S] */                      \
      int64_t x_sample,            /* from one sample to the next */ \
      int64_t x_pitch,             /* from one row to the next */    \
      Gate gate,                   /* the spatial one */             \
      int channels, int64_t positions, int lanes, int tiles, int strips

template <typename T, int W, bool CHANNEL, bool SPATIAL>
__global__ void __launch_bounds__(kMaxThreads, 4) squeeze_planes(SCSE_SQUEEZE_ARGUMENTS) {
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const Place me(lanes);
  const bool whole = is_whole<W>(x, x_sample, x_pitch, positions);
  x += blockIdx.x / strips * x_sample;
  spatial_gate += blockIdx.x / strips * positions;
  partial += int64_t(blockIdx.x) * channels;
  float bias = 0;
  if (SPATIAL && bs != nullptr) bias = load_parameter(bs, dtype_of(dtypes, Parameter::bs), 0);

  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t begin = (int64_t(blockIdx.x % strips) * tiles + tile) * (lanes * W);
    const int64_t s = begin + me.lane * W;
    Floats<W> q{};
    for (int first = 0; first < channels; first += me.rows * kOuter) {
      const int c = first + me.row * kOuter;
      const Accesses<T, W> in = load_accesses<W>(whole, x + c * x_pitch + s, x_pitch,
                                                 s < positions ? channels - c : 0, positions - s);
      float weight[kOuter], sum[kOuter] = {};
      if (SPATIAL) {
        load_parameters(ws, dtype_of(dtypes, Parameter::ws), c, channels - c, weight);
      }
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        const Floats<W> f = widen<T, W>(in.at[u]);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          if (CHANNEL) sum[u] += f[i];
          if (SPATIAL) q[i] += f[i] * weight[u];
        }
      }
      if (CHANNEL) {
        sum_and_add(sum, lanes, me.lane, partial + c, channels - c, tile == 0);
      }
    }
    if (SPATIAL) {
      sum_rows(q, lanes, shared, [&](int i, float sum) {
        if (begin + i < positions) spatial_gate[begin + i] = gate_of(gate, sum + bias);
      });
    }
  }
}

template <typename T, int W, bool CHANNEL, bool SPATIAL>
__global__ void __launch_bounds__(kMaxThreads, 4) squeeze_channels_last(SCSE_SQUEEZE_ARGUMENTS) {
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const Place me(lanes);
  const bool whole = is_whole<W>(x, x_sample, x_pitch, channels);
  x += blockIdx.x / strips * x_sample;
  spatial_gate += blockIdx.x / strips * positions;
  partial += int64_t(blockIdx.x) * channels;
  const bool one_step = channels <= lanes * W;  // it has all channels
  float bias = 0;
  if (SPATIAL && bs != nullptr) bias = load_parameter(bs, dtype_of(dtypes, Parameter::bs), 0);

  Floats<W> sum{};
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t s =
        (int64_t(blockIdx.x % strips) * tiles + tile) * (me.rows * kOuter) + me.row * kOuter;
    float q[kOuter] = {};
    for (int first = 0; first < channels; first += lanes * W) {
      const int c = first + me.lane * W;
      const Accesses<T, W> in = load_accesses<W>(whole, x + s * x_pitch + c, x_pitch,
                                                 c < channels ? positions - s : 0, channels - c);
      float weight[W];
      if (SPATIAL) {
        load_parameters(ws, dtype_of(dtypes, Parameter::ws), c, channels - c, weight);
      }
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        const Floats<W> f = widen<T, W>(in.at[u]);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          if (CHANNEL) sum[i] += f[i];
          if (SPATIAL) q[u] += f[i] * weight[i];
        }
      }
      if (CHANNEL && (!one_step || tile == tiles - 1)) {
        sum_rows(sum, lanes, shared, [&](int i, float total) {
          if (first + i < channels) {
            const bool begin = one_step || tile == 0;
            partial[first + i] = (begin ? 0.f : partial[first + i]) + total;
          }
        });
        sum = {};
      }
    }
    if (SPATIAL) {
      sum_lanes(q, lanes);
#pragma unroll
      for (int u = 0; u < kOuter; ++u) q[u] = gate_of(gate, q[u] + bias);
      if (me.lane == 0) store_four(spatial_gate + s, positions - s, q);
    }
  }
}

}  // namespace scse::cuda
