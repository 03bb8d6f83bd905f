// The backward's first pass: every sum over positions or channels. With shares gc, gs of dy in the
// gradients of the two gates (see formulas.inc), for each sample
//
//   d channel_gate[c] = sum_s gc[c, s]
//   dq[s]             = gate'[s] * sum_c gs[c, s], gate' being the spatial gate's derivative
//   dws[c]            = sum_s dq[s] * x[c, s],  dbs = sum_s dq[s]
//
// A block for each sample and strip. Reads x and dy once from memory. For its later uses x waits in
// shared memory, where a thread reads only what it has written itself. If a tile has too many
// channels for that, the rest of x is read again, from a cache, since a tile is narrow.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../count.h"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

// What is not asked for has a null pointer: the sums for the channel gate (partial), those for ws
// and bs (partial_ws and partial_bs), the gates (spatial_gate and dq).
struct ReduceArguments {
  float* partial;               // [N, strips, C]: of gc
  float* partial_ws;            // [N, strips, C]: of dq * x
  float* partial_bs;            // [N, strips]: of dq
  float* spatial_gate;          // [N, S]
  float* dq;                    // [N, S]
  int64_t dy_sample, x_sample;  // from one sample to the next
  int64_t dy_pitch, x_pitch;    // from one row to the next
  int64_t positions;
  Count channels, lanes, tiles, strips;
  Count kept;  // accesses of a thread that wait in shared memory
  int dtypes;  // of ws and bs, see dtypes.h
  Gate gate;   // the spatial one
};

// What waits in shared memory.
template <typename T, int W>
struct Kept {
  Bits<T, W>* memory;
  int count;

  SCSE_DEVICE explicit Kept(int kept) : count(kept) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    memory = reinterpret_cast<Bits<T, W>*>(dynamic_shared) + threadIdx.x;
  }
  // A step's part of x: the first time from p, and later from where it waits.
  template <bool WHOLE>
  SCSE_DEVICE Accesses<T, W> load(int step, bool first, const T* p, int64_t pitch,
                                  const Part& part) const {
    const bool keep = (step + 1) * kOuter <= count;
    Bits<T, W>* at = memory + step * kOuter * blockDim.x;
    Accesses<T, W> in;
    if (keep && !first) {
#pragma unroll
      for (int u = 0; u < kOuter; ++u) in.at[u] = at[u * blockDim.x];
    } else {
      in = load_part<W, WHOLE>(p, pitch, part);
    }
    if (keep && first) {
#pragma unroll
      for (int u = 0; u < kOuter; ++u) at[u * blockDim.x] = in.at[u];
    }
    return in;
  }
};

// A strip's maps, as a thread reads them, and what a step adds to the sums. Sums over positions lie
// along the axis of channels, the gates and sums over channels along that of positions.
// CHANNELS_LAST: channels are the inner axis.
template <typename T, int W, Combine K, bool CHANNELS_LAST>
struct Reduce {
  using F = Formula<float, K>;
  using ByChannel = Along<W, CHANNELS_LAST>;
  using ByPosition = Along<W, !CHANNELS_LAST>;

  Kept<T, W> kept;
  const T *x, *dy;  // of the sample
  int64_t x_pitch, dy_pitch;
  int64_t half;  // from the first to the second half of dy
  bool whole;
  const float* channel_gate;  // of the sample
  const void* ws;
  Dtype dtype;

  SCSE_DEVICE Reduce(const T* dy, const T* x, const void* ws, const float* channel_gate,
                     const ReduceArguments& a, int64_t n)
      : kept(a.kept),
        x(x + n * a.x_sample),
        dy(dy + n * a.dy_sample),
        x_pitch(a.x_pitch),
        dy_pitch(a.dy_pitch),
        half(a.channels * (CHANNELS_LAST ? 1 : a.dy_pitch)),
        channel_gate(channel_gate + n * a.channels),
        ws(ws),
        dtype(dtype_of(a.dtypes, Parameter::ws)) {
    const int64_t row = CHANNELS_LAST ? int64_t{a.channels} : a.positions;
    whole = is_whole<W>(x, a.x_sample, x_pitch, row) && is_whole<W>(dy, a.dy_sample, dy_pitch, row);
  }

  SCSE_DEVICE Accesses<T, W> load_x(int step, bool first, const Part& part) const {
    Accesses<T, W> in;
    with_whole<W, T>(whole, [&](auto all) {
      in =
          kept.template load<decltype(all)::value>(step, first, part.in(x, x_pitch), x_pitch, part);
    });
    return in;
  }

  // q of the step's channels, before anything else reads x.
  SCSE_DEVICE void squeeze(int step, const Part& part, ByPosition& q) const {
    const Accesses<T, W> in = load_x(step, true, part);
    ByChannel weight;
    weight.load(ws, dtype, part);
#pragma unroll
    for (int u = 0; u < kOuter; ++u) add_q(u, widen<T, W>(in.at[u]), weight, q);
  }

  // The step's shares of both gates' gradients: over positions in `sum`, over channels in `d_gate`;
  // and q, where it isn't known yet and `spatial` asks for it.
  SCSE_DEVICE void shares(int step, const Part& part, bool spatial, const ByPosition& gate,
                          ByChannel& sum, ByPosition& d_gate, ByPosition& q) const {
    const T* const d = part.in(dy, dy_pitch);
    Accesses<T, W> in, d_in, d2_in{};
    with_whole<W, T>(whole, [&](auto all) {
      constexpr bool WHOLE = decltype(all)::value;
      in = kept.template load<WHOLE>(step, !F::by_gates, part.in(x, x_pitch), x_pitch, part);
      d_in = load_part<W, WHOLE>(d, dy_pitch, part);
      if (K == Combine::concat) d2_in = load_part<W, WHOLE>(d + half, dy_pitch, part);
    });
    ByChannel weight, channel;
    if (F::by_gates) {
      channel.load(channel_gate, part);
    } else if (spatial) {
      weight.load(ws, dtype, part);
    }
#pragma unroll
    for (int u = 0; u < kOuter; ++u) {
      const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d_in.at[u]),
                      g2 = widen<T, W>(d2_in.at[u]);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const Shares<float> share = F::shares(f[i], g[i], g2[i], channel.at(u, i), gate.at(u, i));
        sum.at(u, i) += share.c;
        d_gate.at(u, i) += share.s;
      }
      if (!F::by_gates) add_q(u, f, weight, q);
    }
  }

  // The step's terms of dws.
  SCSE_DEVICE void weigh(int step, const Part& part, const ByPosition& dq, ByChannel& sum) const {
    const Accesses<T, W> in = load_x(step, false, part);
#pragma unroll
    for (int u = 0; u < kOuter; ++u) {
      const Floats<W> f = widen<T, W>(in.at[u]);
#pragma unroll
      for (int i = 0; i < W; ++i) sum.at(u, i) += f[i] * dq.at(u, i);
    }
  }

 private:
  static SCSE_DEVICE void add_q(int u, const Floats<W>& f, const ByChannel& weight, ByPosition& q) {
#pragma unroll
    for (int i = 0; i < W; ++i) q.at(u, i) += f[i] * weight.at(u, i);
  }
};

// The inputs are not in the structure: __restrict__ works for parameters only.
//   dy as y, x [N, C, S] or [N, S, C], ws [C], bs [1] or null, channel_gate [N, C]
template <typename T, int W, Combine K>
__global__ void __launch_bounds__(kMaxThreads, K == Combine::concat ? 2 : 3)
    reduce_planes(const T* __restrict__ dy, const T* __restrict__ x, const void* __restrict__ ws,
                  const void* __restrict__ bs, const float* __restrict__ channel_gate,
                  const __grid_constant__ ReduceArguments a) {
  using F = Formula<float, K>;
  __shared__ __align__(16) float shared[kSumRows<W>], gates[kInner<W>], dqs[kInner<W>];
  static_assert(sizeof shared + sizeof gates + sizeof dqs <= 16 * 1024, "see kSharedByDefault");
  let_next_start();
  const int channels = a.channels, lanes = a.lanes, tiles = a.tiles;
  const int64_t positions = a.positions;
  const Place me(lanes);
  const int64_t n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int64_t strip_sums = int64_t(blockIdx.x) * channels;  // in partial and partial_ws
  const bool spatial = a.partial_ws != nullptr || a.dq != nullptr;
  float bias = 0, dbs = 0;
  if (bs != nullptr) bias = load_parameter(bs, dtype_of(a.dtypes, Parameter::bs), 0);
  const Reduce<T, W, K, false> reduce(dy, x, ws, channel_gate, a, n);

  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t begin = (strip * tiles + tile) * (lanes * W);
    // A step is `size` channels.
    const int size = me.rows * kOuter;
    const auto part_of = [&](int step) {
      return Part{step * size + me.row * kOuter, begin + me.lane * W, channels, positions};
    };
    const auto add_to = [&](float* sums, int step, Along<W, false>& sum) {
      const int c = step * size + me.row * kOuter;
      sum_and_add(sum.v.of, lanes, me.lane, sums + strip_sums + c, channels - c, tile == 0);
    };
    Along<W, true> gate, q, d_gate;
    const auto store_gates = [&] {
      // Outside of the map the gate is 0. An infinite weight would make it NaN, and NaN times the
      // zeros that stand there for x is NaN.
      sum_rows(q.v, lanes, shared, [&](int i, float sum) {
        const bool exists = begin + i < positions;
        gates[inner_index<W>(i, lanes)] = exists ? gate_of(a.gate, sum + bias) : 0.f;
      });
    };

    if (F::by_gates) {
      for (int step = 0; step * size < channels; ++step) reduce.squeeze(step, part_of(step), q);
      store_gates();
      __syncthreads();
      gate.v = load_inner<W>(gates, me.lane, lanes);
    }
    for (int step = 0; step * size < channels; ++step) {
      Along<W, false> sum;
      reduce.shares(step, part_of(step), spatial, gate, sum, d_gate, q);
      if (a.partial != nullptr) add_to(a.partial, step, sum);
    }
    if (!spatial) continue;

    if (!F::by_gates) store_gates();
    // The thread that sums up a position's gradient is the one that has written its gate.
    sum_rows(d_gate.v, lanes, shared, [&](int i, float sum) {
      const int64_t position = begin + i;
      const float g = gates[inner_index<W>(i, lanes)];
      const float d = position < positions ? gate_gradient(a.gate, sum, g) : 0.f;
      dqs[inner_index<W>(i, lanes)] = d;
      dbs += d;
      if (a.dq != nullptr && position < positions) {
        a.spatial_gate[n * positions + position] = g;
        a.dq[n * positions + position] = d;
      }
    });
    if (a.partial_ws == nullptr) continue;

    __syncthreads();
    Along<W, true> d;
    d.v = load_inner<W>(dqs, me.lane, lanes);
    for (int step = 0; step * size < channels; ++step) {
      Along<W, false> sum;
      reduce.weigh(step, part_of(step), d, sum);
      add_to(a.partial_ws, step, sum);
    }
  }
  if (a.partial_ws != nullptr) {
    const float sum = sum_block(dbs, shared);
    if (threadIdx.x == 0) a.partial_bs[blockIdx.x] = sum;
  }
}

template <typename T, int W, Combine K>
__global__ void __launch_bounds__(kMaxThreads, 2)
    reduce_channels_last(const T* __restrict__ dy, const T* __restrict__ x,
                         const void* __restrict__ ws, const void* __restrict__ bs,
                         const float* __restrict__ channel_gate,
                         const __grid_constant__ ReduceArguments a) {
  using F = Formula<float, K>;
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const int channels = a.channels, lanes = a.lanes, tiles = a.tiles;
  const int64_t positions = a.positions;
  const Place me(lanes);
  const int64_t n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int64_t strip_sums = int64_t(blockIdx.x) * channels;  // in partial and partial_ws
  const bool spatial = a.partial_ws != nullptr || a.dq != nullptr;
  const bool one_step = channels <= lanes * W;  // it has all channels
  float bias = 0, dbs = 0;
  if (bs != nullptr) bias = load_parameter(bs, dtype_of(a.dtypes, Parameter::bs), 0);
  const Reduce<T, W, K, true> reduce(dy, x, ws, channel_gate, a, n);

  Along<W, true> sum, sum_ws;
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t s = (strip * tiles + tile) * (me.rows * kOuter) + me.row * kOuter;
    // A step is `size` channels.
    const int size = lanes * W;
    const auto part_of = [&](int step) {
      return Part{s, step * size + me.lane * W, positions, channels};
    };
    // Adds sums over the tile's positions to the strip's. If one step has all channels, they wait
    // in registers until the strip ends.
    const auto flush = [&](Along<W, true>& sums, int step, float* p) {
      if (one_step && tile < tiles - 1) return;
      sum_rows(sums.v, lanes, shared, [&](int i, float total) {
        const int c = step * size + i;
        if (c < channels) {
          float* at = p + strip_sums + c;
          *at = (one_step || tile == 0 ? 0.f : *at) + total;
        }
      });
      sums = {};
    };
    Along<W, false> gate, q, d_gate;
    const auto find_gates = [&] {
      sum_lanes(q.v.of, lanes);
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        gate.v[u] = u < positions - s ? gate_of(a.gate, q.v[u] + bias) : 0.f;
      }
    };

    if (F::by_gates) {
      for (int step = 0; step * size < channels; ++step) reduce.squeeze(step, part_of(step), q);
      find_gates();
    }
    for (int step = 0; step * size < channels; ++step) {
      reduce.shares(step, part_of(step), spatial, gate, sum, d_gate, q);
      if (a.partial != nullptr) flush(sum, step, a.partial);
    }
    if (!spatial) continue;

    if (!F::by_gates) find_gates();
    sum_lanes(d_gate.v.of, lanes);
    Along<W, false> d;
#pragma unroll
    for (int u = 0; u < kOuter; ++u) {
      d.v[u] = u < positions - s ? gate_gradient(a.gate, d_gate.v[u], gate.v[u]) : 0.f;
      if (me.lane == 0) dbs += d.v[u];
    }
    if (a.dq != nullptr && me.lane == 0) {
      store_four(a.spatial_gate + n * positions + s, positions - s, gate.v.of);
      store_four(a.dq + n * positions + s, positions - s, d.v.of);
    }
    if (a.partial_ws == nullptr) continue;

    for (int step = 0; step * size < channels; ++step) {
      reduce.weigh(step, part_of(step), d, sum_ws);
      flush(sum_ws, step, a.partial_ws);
    }
  }
  if (a.partial_ws != nullptr) {
    const float total = sum_block(dbs, shared);
    if (threadIdx.x == 0) a.partial_bs[blockIdx.x] = total;
  }
}

}  // namespace scse::cuda
