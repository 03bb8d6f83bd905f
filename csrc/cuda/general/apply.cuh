// The second pass over the map, forward (y) and backward (dx, with the parameters' gradients). A
// block for each tile, from the last to the first: the end of x is what the pass before left in L2.
// These kernels overlap: what they read of the map is on its way while the excitation still works.
// So the maps they read are not __restrict__: loads of memory that never changes ptxas moves to
// where they are used, after the wait.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../gradients.cuh"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

// A thread's part of tile `tile` in a map of `rows` rows of `row` elements, and its sample. A
// sample has inner_tiles * outer_tiles tiles.
struct TilePart : Part {
  int64_t n;
  SCSE_DEVICE TilePart(int64_t tile, int lanes, int width, int inner_tiles, int outer_tiles,
                       int64_t rows, int64_t row) {
    const Place me(lanes);
    n = tile / outer_tiles / inner_tiles;
    inner = (tile / outer_tiles % inner_tiles * lanes + me.lane) * width;
    outer = (tile % outer_tiles * me.rows + me.row) * kOuter;
    this->rows = rows, this->row = row;
  }
};

// Reads x and the gates once, writes y.
template <typename T, int W, Combine K, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, 4)
    apply(const T* x,                 // [N, C, S] or [N, S, C]
          const float* channel_gate,  // [N, C]
          const float* spatial_gate,  // [N, S]
          T* __restrict__ y,          // as x; concat: with 2 * C channels
          int64_t x_sample,           // from one sample to the next
          int64_t x_pitch,            // from one row to the next
          bool residual,              // y has x added
          int64_t channels, int64_t positions, int lanes, int inner_tiles, int outer_tiles) {
  let_next_start();
  const int64_t row = CHANNELS_LAST ? channels : positions;
  const TilePart part(int64_t(gridDim.x) - 1 - blockIdx.x, lanes, W, inner_tiles, outer_tiles,
                      CHANNELS_LAST ? positions : channels, row);
  const int64_t inside = part.inside(), across = part.across();
  const bool whole = is_whole<W>(x, x_sample, x_pitch, row) && is_whole<W>(y, 0, 0, 0);
  const Accesses<T, W> in = load_part<W>(whole, x + part.n * x_sample, x_pitch, part);

  wait_for_previous();
  Along<W, CHANNELS_LAST> c;
  Along<W, !CHANNELS_LAST> s;
  if (has_channel(K)) c.load(channel_gate + part.n * channels, part);
  if (has_spatial(K)) s.load(spatial_gate + part.n * positions, part);

  constexpr int halves = K == Combine::concat ? 2 : 1;
  const int64_t y_pitch = CHANNELS_LAST ? halves * channels : positions;
  y = part.in(y + part.n * halves * channels * positions, y_pitch);
#pragma unroll
  for (int u = 0; u < kOuter; ++u) {
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
        out[i] = Formula<float, K>::value(f[i], c.at(u, i), s.at(u, i));
        if (residual) out[i] += f[i];
      }
    }
    store_access<W>(whole, y + u * y_pitch, narrow<T, W>(out), across);
  }
}

// Whether the backward below reads two maps: it then needs more registers.
template <Combine K>
constexpr bool reads_two = Formula<float, K>::by_gates || K == Combine::concat;

// Reads dy and the small tensors once, and x where the formula needs it; writes dx. The first
// blocks form the parameters' gradients meanwhile: started last they would be what the end waits
// for.
template <typename T, int W, Combine K, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, reads_two<K> ? 3 : 4)
    apply_backward(const T* dy,                // as y
                   const T* x,                 // [N, C, S] or [N, S, C]
                   const float* channel_gate,  // [N, C]
                   const float* spatial_gate,  // [N, S]
                   const float* dq,            // [N, S]: gradient before the spatial gate
                   const float* d_mean,        // [N, C]
                   const void* ws,             // [C]
                   int dtypes,                 // of the parameters, see dtypes.h
                   T* __restrict__ dx,         // as x
                   int64_t dy_sample, int64_t dy_pitch, int64_t x_sample, int64_t x_pitch,
                   int residual,  // all bits, or none: dx has dy added. A bool takes a register
                   int64_t channels, int64_t positions, int lanes, int inner_tiles, int outer_tiles,
                   int tasks,  // blocks for the parameters' gradients
                   // From here on: see ParameterGradients.
                   const float* d_excited, const float* d_hidden, const float* pooled,
                   const float* hidden, const float* sample_ws, const float* sample_bs, void* dw1,
                   void* db1, void* dw2, void* db2, void* dws, void* dbs, int samples,
                   int hidden_channels) {
  using F = Formula<float, K>;
  constexpr bool reads_x = F::by_gates;
  if (static_cast<int>(blockIdx.x) < tasks) {
    wait_for_previous();
    ParameterGradients{d_excited,
                       d_hidden,
                       pooled,
                       hidden,
                       sample_ws,
                       sample_bs,
                       dw1,
                       db1,
                       dw2,
                       db2,
                       dws,
                       dbs,
                       dtypes,
                       samples,
                       static_cast<int>(channels),
                       hidden_channels}
        .compute(blockIdx.x);
    return;
  }
  const int64_t row = CHANNELS_LAST ? channels : positions;
  const TilePart part(int64_t(gridDim.x) - 1 - blockIdx.x, lanes, W, inner_tiles, outer_tiles,
                      CHANNELS_LAST ? positions : channels, row);
  const int64_t inside = part.inside(), across = part.across();
  const bool whole = is_whole<W>(dy, dy_sample, dy_pitch, row) && is_whole<W>(dx, 0, 0, 0) &&
                     (!reads_x || is_whole<W>(x, x_sample, x_pitch, row));
  dy += part.n * dy_sample, x += part.n * x_sample;
  Accesses<T, W> d_in, d2_in{}, in{};
  with_whole<W, T>(whole, [&](auto all) {
    constexpr bool WHOLE = decltype(all)::value;
    d_in = load_part<W, WHOLE>(dy, dy_pitch, part);
    if (K == Combine::concat) {
      d2_in = load_part<W, WHOLE>(dy + channels * (CHANNELS_LAST ? 1 : dy_pitch), dy_pitch, part);
    }
    if (reads_x) in = load_part<W, WHOLE>(x, x_pitch, part);
  });
  Along<W, CHANNELS_LAST> c, mean, weight;
  Along<W, !CHANNELS_LAST> s, d;
  if (has_spatial(K)) weight.load(ws, dtype_of(dtypes, Parameter::ws), part);

  wait_for_previous();
  if (has_channel(K)) {
    c.load(channel_gate + part.n * channels, part);
    mean.load(d_mean + part.n * channels, part);
  }
  if (has_spatial(K)) {
    s.load(spatial_gate + part.n * positions, part);
    d.load(dq + part.n * positions, part);
  }
  dx = part.in(dx + part.n * channels * positions, row);
#pragma unroll
  for (int u = 0; u < kOuter; ++u) {
    if (u >= inside) break;
    const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d_in.at[u]),
                    g2 = widen<T, W>(d2_in.at[u]);
    Floats<W> out;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      out[i] = F::direct(f[i], g[i], g2[i], c.at(u, i), s.at(u, i));
      if (K != Combine::concat) out[i] += __int_as_float(__float_as_int(g[i]) & residual);
      if (has_channel(K)) out[i] += mean.at(u, i);
      if (has_spatial(K)) out[i] += weight.at(u, i) * d.at(u, i);
    }
    store_access<W>(whole, dx + u * row, narrow<T, W>(out), across);
  }
}

}  // namespace scse::cuda
