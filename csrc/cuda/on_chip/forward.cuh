// The forward in one launch, a cluster to a sample. Reads x once and writes y once.
#pragma once

#include "../combine.cuh"
#include "../count.h"
#include "on_chip.cuh"

namespace scse::cuda::on_chip {

template <typename T>
struct ForwardArguments {
  const T* x;           // [N, C, S]
  const void* w1;       // [Cr, C]
  const void* b1;       // [Cr] or null
  const void* w2;       // [C, Cr]
  const void* b2;       // [C] or null
  const void* ws;       // [C]
  const void* bs;       // [1] or null
  T* y;                 // [N, C, S]; concat: [N, 2 * C, S]
  float* pooled;        // [N, C]
  float* hidden;        // [N, Cr]
  float* hidden_slope;  // [N, Cr]: the activation's derivative
  float* channel_gate;  // [N, C]
  int64_t x_sample;     // elements from one sample to the next
  int64_t x_pitch;      // and from one row to the next
  Count channels, hidden_channels, positions, slice;
  int x_bytes;  // that can be read at once
  int y_bytes;  // that can be written at once: 16 or one element's
  int dtypes;   // of the parameters, see dtypes.h
  Activation activation;
  float activation_parameter;
  Gate gate;
  bool residual;  // y has x added
};

// Block b of a cluster has the positions [b * slice, (b + 1) * slice) of its sample.
template <typename T, Combine K, bool channels_last>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments<T> a) {
#ifdef SCSE_HAS_CLUSTERS
  constexpr int W = wide<T>;
  constexpr bool by_channel = has_channel(K), by_position = has_spatial(K);
  constexpr int halves = K == Combine::concat ? 2 : 1;
  const int C = a.channels, Cr = a.hidden_channels, S = a.positions, slice = a.slice;
  const Cluster cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int64_t n = blockIdx.x / blocks;
  const int position = min(S, rank * slice);
  const Slice<T, channels_last> here(C, min(S, position + slice) - position);

  extern __shared__ uint4 memory[];
  char* const base = reinterpret_cast<char*>(memory);
  const ForwardMemory at({sizeof(T), C, Cr, slice, blocks, threads(), channels_last, halves == 2});
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(base + offset); };
  T* const slice_x = reinterpret_cast<T*>(base + at.x);
  float *const slice_ws = floats(at.ws), *const gate_s = floats(at.spatial_gate);
  float *const channel_sum = floats(at.channel_sum), *const gate_c = floats(at.channel_gate);

  const T* const from = a.x + n * a.x_sample + (channels_last ? position * a.x_pitch : position);
  const Parts parts(here.rows, here.vectors);
#pragma unroll 1
  for (int part = 0; part < parts.count; ++part) {
    const int begin = parts.begin(part), end = parts.end(part);
    here.request(slice_x, from, a.x_pitch, begin, end, a.x_bytes);
    __pipeline_commit();
  }
  if constexpr (by_position) {
    fill<W>(slice_ws, C,
            [&](int c) { return load_parameter(a.ws, dtype_of(a.dtypes, Parameter::ws), c); });
  }
  if constexpr (by_channel) {  // its padding, that is, since the cluster writes the rest
    for (int c = C + thread(); c < padded(C, W); c += threads()) gate_c[c] = 0.f;
  }
  const float bias = a.bs ? load_parameter(a.bs, dtype_of(a.dtypes, Parameter::bs), 0) : 0.f;

  // Squeeze.
  OverPositions<T, channels_last, 1> sums_c(here.vectors);
  const auto pool = [&](int vector) {
    return [&, vector](int row, auto& sum) {
      const Floats<W> xs = here.read(slice_x, row, vector);
#pragma unroll
      for (int i = 0; i < W; ++i) sum.add(0, i, xs[i]);
    };
  };
  const auto take_channel = [&](int, int c, float sum) { channel_sum[c] = sum; };
  OverChannels<T, channels_last, 1> sums_s(here.vectors);
  const auto weigh = [&](int vector) {
    const Values<channels_last, W> w(slice_ws, vector);
    return [&, vector, w](int row, auto& sum) {
      const Floats<W> xs = here.read(slice_x, row, vector);
#pragma unroll
      for (int i = 0; i < W; ++i) sum.add(0, i, w.at(row, i) * xs[i]);
    };
  };
  const auto take_position = [&](int, int s, float sum) {
    gate_s[s] = gate_of(a.gate, sum + bias);
  };
#pragma unroll 1
  for (int part = 0; part < parts.count; ++part) {
    parts.wait(part);
    const int begin = parts.begin(part), end = parts.end(part);
    if constexpr (by_position) sums_s.advance(begin, end, weigh, take_position);
    if constexpr (by_channel) sums_c.advance(begin, end, pool, take_channel);
  }
  float* const partial = floats(at.partial);
  if constexpr (by_position) sums_s.finish(partial, take_position);
  if constexpr (by_channel) sums_c.finish(partial, take_channel);

  // Excite. Each block has some of the channels as its own. It adds up their sums over the cluster.
  // It forms their part of the hidden layer; and once it has all parts, their gates.
  if constexpr (by_channel) {
    const OwnChannels own(cluster, C);
    float *const own_pooled = floats(at.pooled), *const own_gate = floats(at.own_gate);
    float* const part = floats(at.hidden_part);
    float* const all_hidden = floats(at.hidden);
    cluster.sync();
    for (int i = thread(); i < own.size(); i += threads()) {
      const float mean = sum_over_blocks(cluster, channel_sum, own.begin + i) / S;
      own_pooled[i] = mean;
      a.pooled[n * C + own.begin + i] = mean;
    }
    __syncthreads();
    matvec({a.w1, dtype_of(a.dtypes, Parameter::w1), own.begin, C, Cr, own.size()}, own_pooled,
           part);
    cluster.sync();
    for (int j = thread(); j < Cr; j += threads()) {
      float h = sum_over_blocks(cluster, part, j);
      if (a.b1) h += load_parameter(a.b1, dtype_of(a.dtypes, Parameter::b1), j);
      const Activated<float> active = activate(a.activation, a.activation_parameter, h);
      all_hidden[j] = active.value;
      if (j % blocks == rank)
        a.hidden[n * Cr + j] = active.value, a.hidden_slope[n * Cr + j] = active.slope;
    }
    __syncthreads();
    matvec({a.w2, dtype_of(a.dtypes, Parameter::w2), int64_t{own.begin} * Cr, Cr, own.size(), Cr},
           all_hidden, own_gate);
    __syncthreads();
    for (int i = thread(); i < own.size(); i += threads()) {
      float excited = own_gate[i];
      if (a.b2) excited += load_parameter(a.b2, dtype_of(a.dtypes, Parameter::b2), own.begin + i);
      const float gate = gate_of(a.gate, excited);
      own_gate[i] = gate;
      a.channel_gate[n * C + own.begin + i] = gate;
    }
    give_to_blocks(cluster, own_gate, own.size(), gate_c, own.begin);
    cluster.sync();
  } else {
    __syncthreads();
  }

  // Recalibrate.
  using F = Formula<float, K>;
  T* const out =
      a.y + n * halves * C * S + (channels_last ? int64_t{position} * halves * C : position);
  const int64_t half = channels_last ? C : int64_t{C} * S;
  here.write(out, channels_last ? halves * C : S, a.y_bytes, [&](int vector) {
    const Values<channels_last, W> c(gate_c, vector);
    const Values<!channels_last, W> s(gate_s, vector);
    return [&, vector, c, s](int row, const auto& put) {
      const Floats<W> xs = here.read(slice_x, row, vector);
      Floats<W> ys;
      if constexpr (K == Combine::concat) {
#pragma unroll
        for (int i = 0; i < W; ++i) ys[i] = xs[i] * c.at(row, i);
        put(0, ys);
#pragma unroll
        for (int i = 0; i < W; ++i) ys[i] = xs[i] * s.at(row, i);
        put(half, ys);
      } else {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          ys[i] = F::value(xs[i], c.at(row, i), s.at(row, i));
          if (a.residual) ys[i] += xs[i];
        }
        put(0, ys);
      }
    };
  });
#endif
}

}  // namespace scse::cuda::on_chip
