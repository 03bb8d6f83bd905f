// The backward in one launch, a cluster to a sample. Reads x and dy once and writes dx once; what
// is left are sums over the samples, of vectors with a value for each channel.
//
// With shares gc, gs of dy in the gradients of the two gates (see formulas.inc), for each sample
//
//     dq[s]             = gate'[s] * sum_c gs[c, s], gate' being the spatial gate's derivative
//     d channel_gate[c] = sum_s gc[c, s]
//     dws[c]            = sum_s dq[s] * x[c, s],  dbs = sum_s dq[s]
//     dx[c, s]          = direct[c, s] + d_mean[c] + ws[c] * dq[s]
#pragma once

#include "../combine.cuh"
#include "../count.h"
#include "on_chip.cuh"
#include "../overlap.cuh"
#include "../problem.h"

namespace scse::cuda::on_chip {

template <typename T>
struct BackwardArguments {
  const T* dy;                  // [N, C, S]; concat: [N, 2 * C, S]
  const T* x;                   // [N, C, S]
  const void* w1;               // [Cr, C]
  const void* w2;               // [C, Cr]
  const void* ws;               // [C]
  const void* bs;               // [1] or null
  const float* hidden_slope;    // [N, Cr]
  const float* channel_gate;    // [N, C]
  T* dx;                        // [N, C, S] or null: not needed
  PerSample sums;               // what is null is not needed
  int64_t dy_sample, x_sample;  // elements from one sample to the next
  int64_t dy_pitch, x_pitch;    // and from one row to the next
  Count channels, hidden_channels, positions, slice;
  int dy_bytes, x_bytes;  // that can be read at once
  int dx_bytes;           // that can be written at once: 16 or one element's
  int dtypes;             // of the parameters, see dtypes.h
  Gate gate;
  bool residual;  // dx has dy added
};

// Block b of a cluster has the positions [b * slice, (b + 1) * slice) of its sample.
template <typename T, Combine K, bool channels_last>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments<T> a) {
#ifdef SCSE_HAS_CLUSTERS
  using F = Formula<float, K>;
  constexpr int W = wide<T>;
  constexpr bool by_channel = has_channel(K), by_position = has_spatial(K);
  constexpr int halves = K == Combine::concat ? 2 : 1;
  let_next_start();
  const int C = a.channels, Cr = a.hidden_channels, S = a.positions, slice = a.slice;
  const Cluster cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int64_t n = blockIdx.x / blocks;
  const int position = min(S, rank * slice), positions = min(S, position + slice) - position;
  const Slice<T, channels_last> here(C, positions);

  extern __shared__ uint4 memory[];
  char* const base = reinterpret_cast<char*>(memory);
  const BackwardMemory at({sizeof(T), C, Cr, slice, blocks, threads(), channels_last, halves == 2});
  const auto elements = [&](int offset) { return reinterpret_cast<T*>(base + offset); };
  const auto floats = [&](int offset) { return reinterpret_cast<float*>(base + offset); };
  T *const slice_x = elements(at.x), *const slice_dy = elements(at.dy);
  T* const slice_dy2 = elements(at.dy2);
  float *const slice_ws = floats(at.ws), *const gate_c = floats(at.channel_gate);
  float *const gate_s = floats(at.spatial_gate), *const dq = floats(at.dq);
  float *const channel_sum = floats(at.channel_sum), *const ws_sum = floats(at.ws_sum);
  float *const bs_sum = floats(at.bs_sum), *const d_mean = floats(at.d_mean);
  float* const partial = floats(at.partial);

  // Of the block's first row, in a map with that distance between rows.
  const auto first = [&](int64_t pitch) { return channels_last ? position * pitch : position; };
  const T* const from_x = a.x + n * a.x_sample + first(a.x_pitch);
  const T* const from_dy = a.dy + n * a.dy_sample + first(a.dy_pitch);
  const Parts parts(here.rows, here.vectors);
#pragma unroll 1
  for (int part = 0; part < parts.count; ++part) {
    const int begin = parts.begin(part), end = parts.end(part);
    here.request(slice_x, from_x, a.x_pitch, begin, end, a.x_bytes);
    here.request(slice_dy, from_dy, a.dy_pitch, begin, end, a.dy_bytes);
    if constexpr (halves == 2) {
      const int64_t half = channels_last ? C : C * a.dy_pitch;
      here.request(slice_dy2, from_dy + half, a.dy_pitch, begin, end, a.dy_bytes);
    }
    __pipeline_commit();
  }
  if constexpr (by_position) {
    fill<W>(slice_ws, C,
            [&](int c) { return load_parameter(a.ws, dtype_of(a.dtypes, Parameter::ws), c); });
  }
  if constexpr (by_channel) {
    fill<W>(gate_c, C, [&](int c) { return a.channel_gate[n * C + c]; });
    for (int c = C + thread(); c < padded(C, W); c += threads()) d_mean[c] = 0.f;
  }
  const float bias = a.bs ? load_parameter(a.bs, dtype_of(a.dtypes, Parameter::bs), 0) : 0.f;

  // A sweep over the slice: sums.advance() for all of it, waiting for its parts the first time.
  bool waited = false;
  const auto sweep = [&](auto sums, const auto& prepare, const auto& use) {
#pragma unroll 1
    for (int part = 0; part < parts.count; ++part) {
      if (!waited) parts.wait(part);
      sums.advance(parts.begin(part), parts.end(part), prepare, use);
    }
    waited = true;
    sums.finish(partial, use);
    __syncthreads();
  };

  // The spatial gate, and its gradient. Where the gradient needs the gate, one after the other.
  if constexpr (by_position) {
    constexpr int both = F::by_gates ? 1 : 2;
    // Padding gets zeros: an infinite weight would make it NaN, and NaN times its zeros is NaN.
    const auto use_gate = [&](float sum, int s) {
      gate_s[s] = s < positions ? gate_of(a.gate, sum + bias) : 0.f;
    };
    const auto use_gradient = [&](float sum, int s) {
      dq[s] = s < positions ? gate_gradient(a.gate, sum, gate_s[s]) : 0.f;
    };
    if constexpr (F::by_gates) {
      sweep(
          OverChannels<T, channels_last, 1>(here.vectors),
          [&](int vector) {
            const Values<channels_last, W> w(slice_ws, vector);
            return [&, vector, w](int row, auto& sum) {
              const Floats<W> xs = here.read(slice_x, row, vector);
#pragma unroll
              for (int i = 0; i < W; ++i) sum.add(0, i, w.at(row, i) * xs[i]);
            };
          },
          [&](int, int s, float sum) { use_gate(sum, s); });
    }
    sweep(
        OverChannels<T, channels_last, both>(here.vectors),
        [&](int vector) {
          const Values<channels_last, W> w(slice_ws, vector), c(gate_c, vector);
          const Values<!channels_last, W> s(gate_s, vector);
          return [&, vector, w, c, s](int row, auto& sum) {
            const Floats<W> xs = here.read(slice_x, row, vector);
            const Floats<W> dys = here.read(halves == 2 ? slice_dy2 : slice_dy, row, vector);
#pragma unroll
            for (int i = 0; i < W; ++i) {
              const float gc = F::by_gates ? c.at(row, i) : 0.f;
              const float gs = F::by_gates ? s.at(row, i) : 0.f;
              if constexpr (!F::by_gates) sum.add(0, i, w.at(row, i) * xs[i]);
              sum.add(both - 1, i, F::shares(xs[i], dys[i], dys[i], gc, gs).s);
            }
          };
        },
        [&](int which, int s, float sum) {
          if (which == 0 && !F::by_gates) {
            use_gate(sum, s);
          } else {
            use_gradient(sum, s);
          }
        });
  }

  // What is summed over positions.
  if (by_channel || a.sums.sample_ws) {
    constexpr int branches = by_channel + by_position;
    sweep(
        OverPositions<T, channels_last, branches>(here.vectors),
        [&](int vector) {
          const Values<channels_last, W> c(gate_c, vector);
          const Values<!channels_last, W> s(gate_s, vector), d(dq, vector);
          return [&, vector, c, s, d](int row, auto& sum) {
            const Floats<W> xs = here.read(slice_x, row, vector);
            const Floats<W> dys = by_channel ? here.read(slice_dy, row, vector) : xs;
#pragma unroll
            for (int i = 0; i < W; ++i) {
              const float gc = F::by_gates ? c.at(row, i) : 0.f;
              const float gs = F::by_gates ? s.at(row, i) : 0.f;
              if (by_channel) sum.add(0, i, F::shares(xs[i], dys[i], dys[i], gc, gs).c);
              if (by_position) sum.add(branches - 1, i, d.at(row, i) * xs[i]);
            }
          };
        },
        [&](int which, int c, float sum) {
          (by_channel && which == 0 ? channel_sum : ws_sum)[c] = sum;
        });
  }
  if (by_position && thread() < 32) {
    float sum[1] = {};
    for (int s = thread(); s < positions; s += 32) sum[0] += dq[s];
    sum_lanes(sum, 32);
    if (thread() == 0) *bs_sum = sum[0];
  }

  // Excite, backwards. Each block has some of the channels as its own. It adds up their sums over
  // the cluster. It forms their part of the hidden layer's gradient; and once it has all parts,
  // their d_mean.
  const OwnChannels own(cluster, C);
  if (by_channel || a.sums.sample_ws) cluster.sync();
  if (by_position && a.sums.sample_ws) {
    for (int c = own.begin + thread(); c < own.end; c += threads()) {
      a.sums.sample_ws[n * C + c] = sum_over_blocks(cluster, ws_sum, c);
    }
    if (rank == 0 && thread() == 0) a.sums.sample_bs[n] = sum_over_blocks(cluster, bs_sum, 0);
  }
  if constexpr (by_channel) {
    float *const own_excited = floats(at.d_excited), *const part = floats(at.d_hidden_part);
    float *const all_hidden = floats(at.d_hidden), *const own_mean = floats(at.own_d_mean);
    for (int i = thread(); i < own.size(); i += threads()) {
      const float sum = sum_over_blocks(cluster, channel_sum, own.begin + i);
      const float d = gate_gradient(a.gate, sum, gate_c[own.begin + i]);
      own_excited[i] = d;
      a.sums.d_excited[n * C + own.begin + i] = d;
    }
    __syncthreads();
    vecmat({a.w2, dtype_of(a.dtypes, Parameter::w2), int64_t{own.begin} * Cr, Cr, own.size(), Cr},
           own_excited, partial, part);
    cluster.sync();
    for (int j = thread(); j < Cr; j += threads()) {
      const float sum = sum_over_blocks(cluster, part, j);
      const float d = through(a.hidden_slope[n * Cr + j], sum);
      all_hidden[j] = d;
      if (j % blocks == rank) a.sums.d_hidden[n * Cr + j] = d;
    }
    __syncthreads();
    vecmat({a.w1, dtype_of(a.dtypes, Parameter::w1), own.begin, C, Cr, own.size()}, all_hidden,
           partial, own_mean);
    __syncthreads();
    for (int i = thread(); i < own.size(); i += threads()) own_mean[i] /= S;
    give_to_blocks(cluster, own_mean, own.size(), d_mean, own.begin);
    cluster.sync();
  }

  if (a.dx) {
    here.write(a.dx + n * C * S + first(C), channels_last ? C : S, a.dx_bytes, [&](int vector) {
      const Values<channels_last, W> c(gate_c, vector), w(slice_ws, vector), m(d_mean, vector);
      const Values<!channels_last, W> s(gate_s, vector), d(dq, vector);
      return [&, vector, c, w, m, s, d](int row, const auto& put) {
        const Floats<W> dys = here.read(slice_dy, row, vector);
        const Floats<W> dys2 = halves == 2 ? here.read(slice_dy2, row, vector) : dys;
        const Floats<W> xs = F::by_gates ? here.read(slice_x, row, vector) : dys;
        Floats<W> dxs;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const float gc = by_channel ? c.at(row, i) : 0.f, gs = by_position ? s.at(row, i) : 0.f;
          dxs[i] = F::direct(xs[i], dys[i], dys2[i], gc, gs);
          if (by_channel) dxs[i] += m.at(row, i);
          if (by_position) dxs[i] += w.at(row, i) * d.at(row, i);
          if (halves == 1 && a.residual) dxs[i] += dys[i];
        }
        put(0, dxs);
      };
    });
  }
  // The other blocks have read this one's sums.
  if (!by_channel && a.sums.sample_ws) cluster.sync();
#endif
}

}  // namespace scse::cuda::on_chip
