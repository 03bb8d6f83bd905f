// The second pass over the map, forward (y) and backward (dx, with the parameters' gradients). A
// block for each tile, from the last to the first: the end of x is what the pass before has left in
// L2. These kernels overlap: what they read of the map is on its way while the excitation still
// works. Do not add __restrict__ to x or dy. ptxas would move their loads behind the wait, and the
// overlap would be lost. Most maps whose rows are no multiples of 16 bytes have kernels of their
// own, see apply_flat.cuh.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../count.h"
#include "../gradients.cuh"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

using ApplyPart = Part<kApplyOuter>;

// Which part of which sample a thread has. A sample has inner_tiles * outer_tiles tiles.
struct Walk {
  int lane_bits;
  Count inner_tiles, outer_tiles;

  // In tile `tile`, in a map of `rows` rows of `row` elements. `width`: of an access.
  SCSE_DEVICE ApplyPart part(unsigned tile, int width, int64_t rows, int64_t row) const {
    const Place<kApplyOuter> me(1 << lane_bits, lane_bits);
    const unsigned outer = tile % outer_tiles, inner = tile / outer_tiles % inner_tiles;
    return {(int64_t{outer} * me.rows + me.row) * kApplyOuter,
            ((int64_t{inner} << lane_bits) + me.lane) * width, rows, row};
  }
  SCSE_DEVICE int64_t sample(unsigned tile) const { return tile / outer_tiles / inner_tiles; }
};

// `Walk`: this one, or that of flat maps.
template <typename T, typename Walk = cuda::Walk>
struct ApplyArguments {
  const T* x;                 // [N, C, S] or [N, S, C]
  const float* channel_gate;  // [N, C]
  const float* spatial_gate;  // [N, S]
  T* y;                       // as x; concat: with 2 * C channels
  int64_t x_sample;           // from one sample to the next
  int64_t x_pitch;            // from one row to the next
  int64_t channels, positions;
  Walk walk;
  bool residual;  // y has x added
};

// An element of y, but for concat.
template <Combine K>
SCSE_DEVICE float value_of(float x, float c, float s, bool residual) {
  float y = Formula<float, K>::value(x, c, s);
  if (residual) y += x;
  return y;
}

// Reads x and the gates once, writes y.
template <typename T, int W, Combine K, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, 4)
    apply(const __grid_constant__ ApplyArguments<T> a) {
  let_next_start();
  const int64_t channels = a.channels, positions = a.positions;
  const int64_t row = CHANNELS_LAST ? channels : positions;
  const unsigned tile = gridDim.x - 1 - blockIdx.x;
  const int64_t n = a.walk.sample(tile);
  const ApplyPart part = a.walk.part(tile, W, CHANNELS_LAST ? positions : channels, row);
  const int inside = part.inside, across = part.across;
  const bool whole = is_whole<W>(a.x, a.x_sample, a.x_pitch, row) && is_whole<W>(a.y, 0, 0, 0);
  const Accesses<T, W, kApplyOuter> in =
      load_part<W>(whole, part.in(a.x + n * a.x_sample, a.x_pitch), a.x_pitch, part);

  wait_for_previous();
  Along<W, CHANNELS_LAST, kApplyOuter> c;
  Along<W, !CHANNELS_LAST, kApplyOuter> s;
  if (has_channel(K)) c.load(a.channel_gate + n * channels, part);
  if (has_spatial(K)) s.load(a.spatial_gate + n * positions, part);

  constexpr int halves = K == Combine::concat ? 2 : 1;
  const int64_t y_pitch = CHANNELS_LAST ? halves * channels : positions;
  T* const y = part.in(a.y + n * halves * channels * positions, y_pitch);
#pragma unroll
  for (int u = 0; u < kApplyOuter; ++u) {
    if (u >= inside) break;
    const Floats<W> f = widen<T, W>(in.at[u]);
    Floats<W> out;
    if constexpr (K == Combine::concat) {
      Floats<W> second;
#pragma unroll
      for (int i = 0; i < W; ++i) out[i] = f[i] * c.at(u, i), second[i] = f[i] * s.at(u, i);
      store_access<W>(whole, y + channels * (CHANNELS_LAST ? 1 : positions) + u * y_pitch,
                      narrow<T, W>(second), across);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        out[i] = value_of<K>(f[i], c.at(u, i), s.at(u, i), a.residual);
      }
    }
    store_access<W>(whole, y + u * y_pitch, narrow<T, W>(out), across);
  }
}

// Whether the backward below reads two maps: it then needs more registers.
template <Combine K>
constexpr bool reads_two = Formula<float, K>::by_gates || K == Combine::concat;

template <typename T, typename Walk = cuda::Walk>
struct ApplyBackwardArguments {
  const T* dy;                  // as y
  const T* x;                   // [N, C, S] or [N, S, C]
  const float* channel_gate;    // [N, C]
  const float* spatial_gate;    // [N, S]
  const float* dq;              // [N, S]: gradient before the spatial gate
  const float* d_mean;          // [N, C]
  const void* ws;               // [C]
  int64_t dy_sample, x_sample;  // from one sample to the next
  int64_t dy_pitch, x_pitch;    // from one row to the next
  int64_t channels, positions;
  Walk walk;
  int dtypes;    // of the parameters, see dtypes.h
  int residual;  // all bits, or none: dx has dy added. A bool takes a register
  Count tasks;   // blocks for the parameters' gradients
};

// An element of dx, from x, dy (concat: and that of the second half), the gates, d_mean, ws and dq.
template <Combine K>
SCSE_DEVICE float gradient_of(float x, float dy, float dy2, float c, float s, float mean,
                              float weight, float dq, int residual) {
  float dx = Formula<float, K>::direct(x, dy, dy2, c, s);
  if (K != Combine::concat) dx += __int_as_float(__float_as_int(dy) & residual);
  if (has_channel(K)) dx += mean;
  if (has_spatial(K)) dx += weight * dq;
  return dx;
}

// Reads dy and the small tensors once, and x if the formula needs it; writes dx. The first blocks
// form the parameters' gradients. If they came last, the launch would end later. dx is not in the
// structure, and the structures are not __grid_constant__: some of these kernels would spill
// registers.
template <typename T, int W, Combine K, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, reads_two<K> ? 3 : 4)
    apply_backward(T* __restrict__ dx,  // as x
                   ApplyBackwardArguments<T> a, ParameterGradients gradients) {
  constexpr bool reads_x = Formula<float, K>::by_gates;
  if (static_cast<int>(blockIdx.x) < a.tasks) {
    wait_for_previous();
    return gradients.compute(blockIdx.x);
  }
  const int64_t channels = a.channels, positions = a.positions;
  const int64_t row = CHANNELS_LAST ? channels : positions;
  const unsigned tile = gridDim.x - 1 - blockIdx.x;
  const int64_t n = a.walk.sample(tile);
  const ApplyPart part = a.walk.part(tile, W, CHANNELS_LAST ? positions : channels, row);
  const int inside = part.inside, across = part.across;
  const bool whole = is_whole<W>(a.dy, a.dy_sample, a.dy_pitch, row) && is_whole<W>(dx, 0, 0, 0) &&
                     (!reads_x || is_whole<W>(a.x, a.x_sample, a.x_pitch, row));
  const T* const dy = part.in(a.dy + n * a.dy_sample, a.dy_pitch);
  const T* const x = part.in(a.x + n * a.x_sample, a.x_pitch);
  Accesses<T, W, kApplyOuter> d_in, d2_in{}, in{};
  with_whole<W, T>(whole, [&](auto all) {
    constexpr bool WHOLE = decltype(all)::value;
    d_in = load_part<W, WHOLE>(dy, a.dy_pitch, part);
    if (K == Combine::concat) {
      const int64_t half = channels * (CHANNELS_LAST ? 1 : a.dy_pitch);
      d2_in = load_part<W, WHOLE>(dy + half, a.dy_pitch, part);
    }
    if (reads_x) in = load_part<W, WHOLE>(x, a.x_pitch, part);
  });
  Along<W, CHANNELS_LAST, kApplyOuter> c, mean, weight;
  Along<W, !CHANNELS_LAST, kApplyOuter> s, d;
  if (has_spatial(K)) weight.load(a.ws, dtype_of(a.dtypes, Parameter::ws), part);

  wait_for_previous();
  if (has_channel(K)) {
    c.load(a.channel_gate + n * channels, part);
    mean.load(a.d_mean + n * channels, part);
  }
  if (has_spatial(K)) {
    s.load(a.spatial_gate + n * positions, part);
    d.load(a.dq + n * positions, part);
  }
  dx = part.in(dx + n * channels * positions, row);
#pragma unroll
  for (int u = 0; u < kApplyOuter; ++u) {
    if (u >= inside) break;
    const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d_in.at[u]),
                    g2 = widen<T, W>(d2_in.at[u]);
    Floats<W> out;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      out[i] = gradient_of<K>(f[i], g[i], g2[i], c.at(u, i), s.at(u, i), mean.at(u, i),
                              weight.at(u, i), d.at(u, i), a.residual);
    }
    store_access<W>(whole, dx + u * row, narrow<T, W>(out), across);
  }
}

}  // namespace scse::cuda
