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
  int64_t x_down;       // from one step's rows to the next ones
  int64_t positions;
  Count channels, tiles, strips;
  Lanes lanes;
  Dtype ws_dtype, bs_dtype;
  Gate gate;  // the spatial one
};

// A strip's x, as a thread reads it, and what a step adds to the sums: `sum` over positions, q over
// channels. CHANNELS_LAST: channels are the inner axis.
template <typename T, int W, bool CHANNEL, bool SPATIAL, bool CHANNELS_LAST>
struct Squeeze {
  static constexpr int OUTER = kOuter<T, W>;
  int64_t pitch;
  bool whole;
  const void* ws;
  Dtype dtype;

  SCSE_DEVICE Squeeze(const T* x, const void* ws, const SqueezeArguments& a)
      : pitch(a.x_pitch),
        whole(is_whole<W>(x, a.x_sample, pitch, CHANNELS_LAST ? int64_t{a.channels} : a.positions)),
        ws(ws),
        dtype(a.ws_dtype) {}

  // `x`: where the part begins.
  SCSE_DEVICE void step(const T* x, const Part<OUTER>& part, Along<W, CHANNELS_LAST, OUTER>& sum,
                        Along<W, !CHANNELS_LAST, OUTER>& q) const {
    const Accesses<T, W> in = load_part<W>(whole, x, pitch, part);
    Along<W, CHANNELS_LAST, OUTER> weight;
    if (SPATIAL) weight.load(ws, dtype, part);
#pragma unroll
    for (int u = 0; u < OUTER; ++u) {
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
__global__ void __launch_bounds__(kMaxThreads, W == wide<T> ? 3 : 4)
    squeeze_planes(const T* __restrict__ x, const void* __restrict__ ws,
                   const void* __restrict__ bs, const __grid_constant__ SqueezeArguments a) {
  constexpr int OUTER = kOuter<T, W>;
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const int channels = a.channels, lanes = a.lanes.count, tiles = a.tiles;
  const int64_t positions = a.positions, pitch = a.x_pitch;
  const Place<OUTER> me(lanes, a.lanes.bits);
  const LaneSums<OUTER> over_positions(a.lanes);
  const unsigned n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int size = me.rows * OUTER;  // channels of a step
  const Squeeze<T, W, CHANNEL, SPATIAL, false> squeeze(x, ws, a);
  float* const partial = a.partial + int64_t{blockIdx.x} * channels;
  float bias = 0;
  if (SPATIAL && bs != nullptr) bias = load_parameter(bs, a.bs_dtype, 0);

  const int64_t begin = int64_t{strip} * (tiles * lanes * W);
  int left = clamped(positions - begin);
  x += n * a.x_sample + begin + me.offset<W>(pitch);
  float* spatial_gate = a.spatial_gate + n * positions + begin;
  for (int tile = 0; tile < tiles; ++tile) {
    Along<W, true, OUTER> q;
    const T* at = x;
    for (int first = 0; first < channels; first += size, at += a.x_down) {
      const int c = first + me.outer();
      Along<W, false, OUTER> sum;
      squeeze.step(at, {c, me.lane * W, channels, left}, sum, q);
      if (CHANNEL) over_positions.add(sum.v.of, partial + c, channels - c, tile == 0);
    }
    if (SPATIAL) {
      // One gate to a thread would take more instructions, and four longer.
      sum_rows<2>(q.v, a.lanes, shared, [&](int i, const float (&sums)[2]) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (i + k < left) spatial_gate[i + k] = gate_of(a.gate, sums[k] + bias);
        }
      });
    }
    left -= lanes * W, x += lanes * W, spatial_gate += lanes * W;
  }
}

template <typename T, int W, bool CHANNEL, bool SPATIAL>
__global__ void __launch_bounds__(most_threads(true, kOuter<T, W>), W == wide<T> ? 6 : 4)
    squeeze_channels_last(const T* __restrict__ x, const void* __restrict__ ws,
                          const void* __restrict__ bs, const __grid_constant__ SqueezeArguments a) {
  constexpr int OUTER = kOuter<T, W>;
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const int channels = a.channels, lanes = a.lanes.count, tiles = a.tiles;
  const int64_t positions = a.positions, pitch = a.x_pitch;
  const Place<OUTER> me(lanes, a.lanes.bits);
  const LaneSums<OUTER> over_channels(a.lanes);
  const unsigned n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int size = me.rows * OUTER;  // positions of a tile
  const Squeeze<T, W, CHANNEL, SPATIAL, true> squeeze(x, ws, a);
  float* const partial = a.partial + int64_t{blockIdx.x} * channels;
  const bool one_step = channels <= lanes * W;  // it has all channels
  float bias = 0;
  if (SPATIAL && bs != nullptr) bias = load_parameter(bs, a.bs_dtype, 0);

  const int64_t begin = int64_t{strip} * (tiles * size);
  int left = clamped(positions - begin - me.outer());
  x += n * a.x_sample + begin * pitch + me.offset<W>(pitch);
  float* spatial_gate = a.spatial_gate + n * positions + begin + me.outer();
  Along<W, true, OUTER> sum;
  for (int tile = 0; tile < tiles; ++tile) {
    Along<W, false, OUTER> q;
    const T* at = x;
    for (int first = 0; first < channels; first += lanes * W, at += lanes * W) {
      squeeze.step(at, {0, first + me.lane * W, left, channels}, sum, q);
      if (CHANNEL && (!one_step || tile == tiles - 1)) {
        constexpr int N = W < 4 ? W : 4;
        sum_rows<N>(sum.v, a.lanes, shared, [&](int i, float (&totals)[N]) {
          const int c = first + i;
          add_some(partial + c, channels - c, one_step || tile == 0, totals);
        });
        sum = {};
      }
    }
    if (SPATIAL) {
      over_channels.sum(q.v.of);
      over_channels.write([&](int i, int u) {
        if (u < left) spatial_gate[u] = gate_of(a.gate, q.v[i] + bias);
      });
    }
    left -= size, x += a.x_down, spatial_gate += size;
  }
}

}  // namespace scse::cuda
