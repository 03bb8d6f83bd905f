// The forward's first pass: both squeezes of x. A block for each sample and strip of positions.
// Reads x once; writes the strip's sums over positions and its spatial gates.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../count.h"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

struct SqueezeArguments {
  float* partial;       // [N, strips, C]: sums of x
  float* spatial_gate;  // [N, S]
  int64_t x_sample;     // from one sample to the next
  int64_t x_pitch;      // from one row to the next
  int64_t positions;
  Count channels, lanes, tiles, strips;
  int dtypes;  // of ws and bs, see dtypes.h
  Gate gate;   // the spatial one
};

// A strip's x, as a thread reads it, and what a step adds to the sums: `sum` over positions, q over
// channels. CHANNELS_LAST: channels are the inner axis.
template <typename T, int W, bool CHANNEL, bool SPATIAL, bool CHANNELS_LAST>
struct Squeeze {
  const T* x;  // of the sample
  int64_t x_pitch;
  bool whole;
  const void* ws;
  Dtype dtype;

  SCSE_DEVICE Squeeze(const T* x, const void* ws, const SqueezeArguments& a, int64_t n)
      : x(x + n * a.x_sample),
        x_pitch(a.x_pitch),
        whole(is_whole<W>(x, a.x_sample, a.x_pitch,
                          CHANNELS_LAST ? int64_t{a.channels} : a.positions)),
        ws(ws),
        dtype(dtype_of(a.dtypes, Parameter::ws)) {}

  SCSE_DEVICE void step(const Part& part, Along<W, CHANNELS_LAST>& sum,
                        Along<W, !CHANNELS_LAST>& q) const {
    const Accesses<T, W> in = load_part<W>(whole, part.in(x, x_pitch), x_pitch, part);
    Along<W, CHANNELS_LAST> weight;
    if (SPATIAL) weight.load(ws, dtype, part);
#pragma unroll
    for (int u = 0; u < kOuter; ++u) {
      const Floats<W> f = widen<T, W>(in.at[u]);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (CHANNEL) sum.at(u, i) += f[i];
        if (SPATIAL) q.at(u, i) += f[i] * weight.at(u, i);
      }
    }
  }
};

// x, ws and bs are not in the structure: __restrict__ works for parameters only.
//   x [N, C, S] or [N, S, C], ws [C], bs [1] or null
template <typename T, int W, bool CHANNEL, bool SPATIAL>
__global__ void __launch_bounds__(kMaxThreads, 4)
    squeeze_planes(const T* __restrict__ x, const void* __restrict__ ws,
                   const void* __restrict__ bs, const __grid_constant__ SqueezeArguments a) {
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const int channels = a.channels, lanes = a.lanes, tiles = a.tiles;
  const int64_t positions = a.positions;
  const Place me(lanes);
  const int64_t n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const Squeeze<T, W, CHANNEL, SPATIAL, false> squeeze(x, ws, a, n);
  float* const spatial_gate = a.spatial_gate + n * positions;
  float* const partial = a.partial + int64_t(blockIdx.x) * channels;
  float bias = 0;
  if (SPATIAL && bs != nullptr) bias = load_parameter(bs, dtype_of(a.dtypes, Parameter::bs), 0);

  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t begin = (strip * tiles + tile) * (lanes * W);
    Along<W, true> q;
    for (int first = 0; first < channels; first += me.rows * kOuter) {
      const int c = first + me.row * kOuter;
      Along<W, false> sum;
      squeeze.step({c, begin + me.lane * W, channels, positions}, sum, q);
      if (CHANNEL) {
        sum_and_add(sum.v.of, lanes, me.lane, partial + c, channels - c, tile == 0);
      }
    }
    if (SPATIAL) {
      sum_rows(q.v, lanes, shared, [&](int i, float sum) {
        if (begin + i < positions) spatial_gate[begin + i] = gate_of(a.gate, sum + bias);
      });
    }
  }
}

template <typename T, int W, bool CHANNEL, bool SPATIAL>
__global__ void __launch_bounds__(kMaxThreads, 4)
    squeeze_channels_last(const T* __restrict__ x, const void* __restrict__ ws,
                          const void* __restrict__ bs, const __grid_constant__ SqueezeArguments a) {
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const int channels = a.channels, lanes = a.lanes, tiles = a.tiles;
  const int64_t positions = a.positions;
  const Place me(lanes);
  const int64_t n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const Squeeze<T, W, CHANNEL, SPATIAL, true> squeeze(x, ws, a, n);
  float* const spatial_gate = a.spatial_gate + n * positions;
  float* const partial = a.partial + int64_t(blockIdx.x) * channels;
  const bool one_step = channels <= lanes * W;  // it has all channels
  float bias = 0;
  if (SPATIAL && bs != nullptr) bias = load_parameter(bs, dtype_of(a.dtypes, Parameter::bs), 0);

  Along<W, true> sum;
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t s = (strip * tiles + tile) * (me.rows * kOuter) + me.row * kOuter;
    Along<W, false> q;
    for (int first = 0; first < channels; first += lanes * W) {
      squeeze.step({s, first + me.lane * W, positions, channels}, sum, q);
      if (CHANNEL && (!one_step || tile == tiles - 1)) {
        sum_rows(sum.v, lanes, shared, [&](int i, float total) {
          if (first + i < channels) {
            const bool begin = one_step || tile == 0;
            partial[first + i] = (begin ? 0.f : partial[first + i]) + total;
          }
        });
        sum = {};
      }
    }
    if (SPATIAL) {
      sum_lanes(q.v.of, lanes);
#pragma unroll
      for (int u = 0; u < kOuter; ++u) q.v[u] = gate_of(a.gate, q.v[u] + bias);
      if (me.lane == 0) store_four(spatial_gate + s, positions - s, q.v.of);
    }
  }
}

}  // namespace scse::cuda
