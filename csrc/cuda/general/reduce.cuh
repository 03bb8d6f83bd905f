// The backward's first pass: every sum over positions or channels. With shares gc, gs of dy in the
// gradients of the two gates (see formulas.inc), for each sample
//
//   d channel_gate[c] = sum_s gc[c, s]
//   dq[s]             = gate'[s] * sum_c gs[c, s], gate' being the spatial gate's derivative
//   dws[c]            = sum_s dq[s] * x[c, s],  dbs = sum_s dq[s]
//
// A block for each sample and strip. Reads x and dy once from memory. For its later uses x waits in
// shared memory, where a thread reads only what it has written itself. If a tile has too many
// channels for that, the rest of x is read again, from a cache, since a tile is narrow. dy is asked
// for before x is used, also where gates come first: memory is waited for once.
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
  int64_t dy_down, x_down;      // from one step's rows to the next ones
  int64_t positions;
  Count channels, tiles, strips;
  Lanes lanes;
  Count steps;  // of a tile
  Count kept;   // of these: whose x waits in shared memory
  Dtype ws_dtype, bs_dtype;
  Gate gate;  // the spatial one
};

// What waits in shared memory: of a step first all of one warp, then of the next.
template <typename T, int W>
struct Kept {
  static constexpr int OUTER = kOuter<T, W>;
  Bits<T, W>* memory;
  int count;

  SCSE_DEVICE explicit Kept(int kept) : count(kept) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    memory = reinterpret_cast<Bits<T, W>*>(dynamic_shared) + threadIdx.x / 32 * 32 * OUTER +
             threadIdx.x % 32;
  }
  SCSE_DEVICE bool has(int step) const { return step < count; }
  // A step's part of x.
  SCSE_DEVICE void store(int step, const Accesses<T, W>& in) const {
    Bits<T, W>* at = memory + step * OUTER * blockDim.x;
#pragma unroll
    for (int u = 0; u < OUTER; ++u) at[32 * u] = in.at[u];
  }
  SCSE_DEVICE Accesses<T, W> load(int step) const {
    const Bits<T, W>* at = memory + step * OUTER * blockDim.x;
    Accesses<T, W> in;
#pragma unroll
    for (int u = 0; u < OUTER; ++u) in.at[u] = at[32 * u];
    return in;
  }
};

// A step's part of dy; `second`: of its second half.
template <typename T, int W, Combine K>
struct Gradient {
  Accesses<T, W> first, second{};
};

// A strip's maps, as a thread reads them, and what a step adds to the sums. Sums over positions lie
// along the axis of channels, the gates and sums over channels along that of positions.
// CHANNELS_LAST: channels are the inner axis.
template <typename T, int W, Combine K, bool CHANNELS_LAST>
struct Reduce {
  static constexpr int OUTER = kOuter<T, W>;
  using F = Formula<float, K>;
  using ByChannel = Along<W, CHANNELS_LAST, OUTER>;
  using ByPosition = Along<W, !CHANNELS_LAST, OUTER>;

  Kept<T, W> kept;
  int64_t x_pitch, dy_pitch;
  int64_t half;  // from the first to the second half of dy
  bool whole;
  const float* channel_gate;  // of the sample
  const void* ws;
  Dtype dtype;

  SCSE_DEVICE Reduce(const T* dy, const T* x, const void* ws, const float* channel_gate,
                     const ReduceArguments& a, unsigned n)
      : kept(a.kept),
        x_pitch(a.x_pitch),
        dy_pitch(a.dy_pitch),
        half(a.channels * (CHANNELS_LAST ? 1 : a.dy_pitch)),
        channel_gate(channel_gate + int64_t{n} * a.channels),
        ws(ws),
        dtype(a.ws_dtype) {
    const int64_t row = CHANNELS_LAST ? int64_t{a.channels} : a.positions;
    whole = is_whole<W>(x, a.x_sample, x_pitch, row) && is_whole<W>(dy, a.dy_sample, dy_pitch, row);
  }

  // x, whose part begins at `p`; where it was used before, from where it waits.
  SCSE_DEVICE Accesses<T, W> load_x(int step, bool first, const T* p,
                                    const Part<OUTER>& part) const {
    if (!first && kept.has(step)) return kept.load(step);
    return load_part<W>(whole, p, x_pitch, part);
  }
  // Comes after all loads of a step, since it waits for x.
  SCSE_DEVICE void keep_x(int step, const Accesses<T, W>& in) const {
    if (kept.has(step)) kept.store(step, in);
  }
  SCSE_DEVICE Gradient<T, W, K> load_dy(const T* p, const Part<OUTER>& part) const {
    Gradient<T, W, K> in;
    in.first = load_part<W>(whole, p, dy_pitch, part);
    if (K == Combine::concat) in.second = load_part<W>(whole, p + half, dy_pitch, part);
    return in;
  }

  // q of the step's channels, before anything else reads x.
  SCSE_DEVICE void squeeze(int step, const T* x, const Part<OUTER>& part, ByPosition& q) const {
    const Accesses<T, W> in = load_x(step, true, x, part);
    ByChannel weight;
    weight.load(ws, dtype, part);
    keep_x(step, in);
#pragma unroll
    for (int u = 0; u < OUTER; ++u) add_q(u, widen<T, W>(in.at[u]), weight, q);
  }

  // The step's shares of both gates' gradients: over positions in `sum`, over channels in `d_gate`;
  // and q, where it isn't known yet and `spatial` asks for it.
  SCSE_DEVICE void shares(int step, const T* x, const Part<OUTER>& part, const Gradient<T, W, K>& d,
                          bool spatial, const ByPosition& gate, ByChannel& sum, ByPosition& d_gate,
                          ByPosition& q) const {
    const Accesses<T, W> in = load_x(step, !F::by_gates, x, part);
    ByChannel weight, channel;
    if (F::by_gates) {
      channel.load(channel_gate, part);
    } else if (spatial) {
      weight.load(ws, dtype, part);
    }
    if (!F::by_gates) keep_x(step, in);
#pragma unroll
    for (int u = 0; u < OUTER; ++u) {
      const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d.first.at[u]),
                      g2 = widen<T, W>(d.second.at[u]);
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
  SCSE_DEVICE void weigh(int step, const T* x, const Part<OUTER>& part, const ByPosition& dq,
                         ByChannel& sum) const {
    const Accesses<T, W> in = load_x(step, false, x, part);
#pragma unroll
    for (int u = 0; u < OUTER; ++u) {
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
__global__ void __launch_bounds__(kMaxThreads, (W == wide<T> ? 2 : 3) - (K == Combine::concat))
    reduce_planes(const T* __restrict__ dy, const T* __restrict__ x, const void* __restrict__ ws,
                  const void* __restrict__ bs, const float* __restrict__ channel_gate,
                  const __grid_constant__ ReduceArguments a) {
  using F = Formula<float, K>;
  constexpr int OUTER = kOuter<T, W>;
  __shared__ __align__(16) float shared[kSumRows<W>], gates[kInner<W>], dqs[kInner<W>];
  static_assert(sizeof shared + sizeof gates + sizeof dqs <= 16 * 1024, "see kSharedByDefault");
  let_next_start();
  const int channels = a.channels, lanes = a.lanes.count, tiles = a.tiles, steps = a.steps;
  const int64_t positions = a.positions;
  const Place<OUTER> me(lanes, a.lanes.bits);
  const LaneSums<OUTER> over_positions(a.lanes);
  const unsigned n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int64_t strip_sums = int64_t{blockIdx.x} * channels;  // in partial and partial_ws
  const bool spatial = a.partial_ws != nullptr || a.dq != nullptr;
  float bias = 0, dbs = 0;
  if (bs != nullptr) bias = load_parameter(bs, a.bs_dtype, 0);
  const Reduce<T, W, K, false> reduce(dy, x, ws, channel_gate, a, n);

  const int size = me.rows * OUTER;  // channels of a step
  const int64_t x_step = a.x_down, dy_step = a.dy_down;
  const int64_t begin = int64_t{strip} * (tiles * lanes * W);
  int64_t s = n * positions + begin;
  int left = clamped(positions - begin);
  x += n * a.x_sample + begin + me.offset<W>(a.x_pitch);
  dy += n * a.dy_sample + begin + me.offset<W>(a.dy_pitch);
  for (int tile = 0; tile < tiles;
       ++tile, left -= lanes * W, s += lanes * W, x += lanes * W, dy += lanes * W) {
    const auto part_of = [&](int step) {
      return Part<OUTER>{step * size + me.outer(), me.lane * W, channels, left};
    };
    const auto add_to = [&](float* sums, int step, Along<W, false, OUTER>& sum) {
      const int c = step * size + me.outer();
      over_positions.add(sum.v.of, sums + strip_sums + c, channels - c, tile == 0);
    };
    Along<W, true, OUTER> gate, q, d_gate;
    const auto store_gates = [&] {
      // Outside of the map the gate is 0. An infinite weight would make it NaN, and NaN times the
      // zeros that stand there for x is NaN.
      sum_rows<2>(q.v, a.lanes, shared, [&](int i, const float (&sums)[2]) {
        float* const to = gates + inner_index<W>(i, lanes);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          to[k] = i + k < left ? gate_of(a.gate, sums[k] + bias) : 0.f;
        }
      });
    };

    const T *x_at = x, *dy_at = dy;
    Gradient<T, W, K> dy_in = reduce.load_dy(dy_at, part_of(0));
    if (F::by_gates) {
      for (int step = 0; step < steps; ++step, x_at += x_step) {
        reduce.squeeze(step, x_at, part_of(step), q);
      }
      x_at = x;
      store_gates();
      __syncthreads();
      gate.v = load_inner<W>(gates, me.lane, lanes);
    }
    for (int step = 0; step < steps; ++step, x_at += x_step) {
      Along<W, false, OUTER> sum;
      reduce.shares(step, x_at, part_of(step), dy_in, spatial, gate, sum, d_gate, q);
      dy_at += dy_step;
      if (step + 1 < steps) dy_in = reduce.load_dy(dy_at, part_of(step + 1));
      if (a.partial != nullptr) add_to(a.partial, step, sum);
    }
    if (!spatial) continue;

    if (!F::by_gates) store_gates();
    // The thread that sums up a position's gradient is the one that has written its gate.
    sum_rows<2>(d_gate.v, a.lanes, shared, [&](int i, const float (&sums)[2]) {
      const int at = inner_index<W>(i, lanes);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float g = gates[at + k];
        const float d = i + k < left ? gate_gradient(a.gate, sums[k], g) : 0.f;
        dqs[at + k] = d;
        dbs += d;
        if (a.dq != nullptr && i + k < left) a.spatial_gate[s + i + k] = g, a.dq[s + i + k] = d;
      }
    });
    if (a.partial_ws == nullptr) continue;

    __syncthreads();
    Along<W, true, OUTER> d;
    d.v = load_inner<W>(dqs, me.lane, lanes);
    x_at = x;
    for (int step = 0; step < steps; ++step, x_at += x_step) {
      Along<W, false, OUTER> sum;
      reduce.weigh(step, x_at, part_of(step), d, sum);
      add_to(a.partial_ws, step, sum);
    }
  }
  if (a.partial_ws != nullptr) {
    const float sum = sum_block(dbs, shared);
    if (threadIdx.x == 0) a.partial_bs[blockIdx.x] = sum;
  }
}

template <typename T, int W, Combine K>
__global__ void __launch_bounds__(most_threads(true, kOuter<T, W>), W == wide<T> ? 3 : 2)
    reduce_channels_last(const T* __restrict__ dy, const T* __restrict__ x,
                         const void* __restrict__ ws, const void* __restrict__ bs,
                         const float* __restrict__ channel_gate,
                         const __grid_constant__ ReduceArguments a) {
  using F = Formula<float, K>;
  constexpr int OUTER = kOuter<T, W>;
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const int channels = a.channels, lanes = a.lanes.count, tiles = a.tiles, steps = a.steps;
  const int64_t positions = a.positions;
  const Place<OUTER> me(lanes, a.lanes.bits);
  const LaneSums<OUTER> over_channels(a.lanes);
  const unsigned n = blockIdx.x / a.strips, strip = blockIdx.x % a.strips;
  const int64_t strip_sums = int64_t{blockIdx.x} * channels;  // in partial and partial_ws
  const bool spatial = a.partial_ws != nullptr || a.dq != nullptr;
  const bool one_step = steps == 1;  // it has all channels
  float bias = 0, dbs = 0;
  if (bs != nullptr) bias = load_parameter(bs, a.bs_dtype, 0);
  const Reduce<T, W, K, true> reduce(dy, x, ws, channel_gate, a, n);

  Along<W, true, OUTER> sum, sum_ws;
  const int size = lanes * W, x_step = size, dy_step = size;  // channels of a step
  const int along = me.rows * OUTER;                          // positions of a tile
  const int64_t begin = int64_t{strip} * (tiles * along);
  int64_t s = n * positions + begin + me.outer();
  int left = clamped(positions - begin - me.outer());
  x += n * a.x_sample + begin * a.x_pitch + me.offset<W>(a.x_pitch);
  dy += n * a.dy_sample + begin * a.dy_pitch + me.offset<W>(a.dy_pitch);
  for (int tile = 0; tile < tiles;
       ++tile, left -= along, s += along, x += a.x_down, dy += a.dy_down) {
    const auto part_of = [&](int step) {
      return Part<OUTER>{0, step * size + me.lane * W, left, channels};
    };
    // Adds sums over the tile's positions to the strip's. If one step has all channels, they wait
    // in registers until the strip ends.
    const auto flush = [&](Along<W, true, OUTER>& sums, int step, float* p) {
      if (one_step && tile < tiles - 1) return;
      constexpr int N = W < 4 ? W : 4;
      sum_rows<N>(sums.v, a.lanes, shared, [&](int i, float (&totals)[N]) {
        const int c = step * size + i;
        add_some(p + strip_sums + c, channels - c, one_step || tile == 0, totals);
      });
      sums = {};
    };
    Along<W, false, OUTER> gate, q, d_gate;
    const auto find_gates = [&] {
      over_channels.sum(q.v.of);
      over_channels.each([&](int i, int u) {
        q.v[i] = u < left ? gate_of(a.gate, q.v[i] + bias) : 0.f;  // see reduce_planes
      });
    };

    const T *x_at = x, *dy_at = dy;
    Gradient<T, W, K> dy_in = reduce.load_dy(dy_at, part_of(0));
    if (F::by_gates) {
      for (int step = 0; step < steps; ++step, x_at += x_step) {
        reduce.squeeze(step, x_at, part_of(step), q);
      }
      x_at = x;
      find_gates();
      gate = q;
      over_channels.give(gate.v.of);
    }
    for (int step = 0; step < steps; ++step, x_at += x_step) {
      reduce.shares(step, x_at, part_of(step), dy_in, spatial, gate, sum, d_gate, q);
      dy_at += dy_step;
      if (step + 1 < steps) dy_in = reduce.load_dy(dy_at, part_of(step + 1));
      if (a.partial != nullptr) flush(sum, step, a.partial);
    }
    if (!spatial) continue;

    if (!F::by_gates) find_gates();
    // From here on q has this lane's gates, and d their gradients.
    Along<W, false, OUTER> d = d_gate;
    over_channels.sum(d.v.of);
    over_channels.each([&](int i, int u) {
      d.v[i] = u < left ? gate_gradient(a.gate, d.v[i], q.v[i]) : 0.f;
      if (over_channels.writes()) dbs += d.v[i];
    });
    if (a.dq != nullptr) {
      over_channels.write([&](int i, int u) {
        if (u < left) a.spatial_gate[s + u] = q.v[i], a.dq[s + u] = d.v[i];
      });
    }
    if (a.partial_ws == nullptr) continue;

    over_channels.give(d.v.of);
    x_at = x;
    for (int step = 0; step < steps; ++step, x_at += x_step) {
      reduce.weigh(step, x_at, part_of(step), d, sum_ws);
      flush(sum_ws, step, a.partial_ws);
    }
  }
  if (a.partial_ws != nullptr) {
    const float total = sum_block(dbs, shared);
    if (threadIdx.x == 0) a.partial_bs[blockIdx.x] = total;
  }
}

}  // namespace scse::cuda
