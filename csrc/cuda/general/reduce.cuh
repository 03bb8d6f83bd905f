// The backward's first pass: every sum over positions or channels. With shares gc, gs of dy in the
// gradients of the two gates (see formulas.inc), for each sample
//
//   d channel_gate[c] = sum_s gc[c, s]
//   dq[s]             = gate'[s] * sum_c gs[c, s], gate' being the spatial gate's derivative
//   dws[c]            = sum_s dq[s] * x[c, s],  dbs = sum_s dq[s]
//
// A block for each sample and strip. Reads x and dy once from memory: x waits in shared memory for
// its later uses, each thread's part for that thread alone. Of maps with so many channels that not
// all of it fits there, the rest is read again, from a cache, as a tile is narrow.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

// Results with a null pointer are not asked for: the sums for the channel gate (partial), those for
// ws and bs (partial_ws), the gates (spatial_gate and dq).
#define SCSE_REDUCE_ARGUMENTS                                                  \
  const T *__restrict__ dy,                   /* as y */                       \
      const T *__restrict__ x,                /* [N, C, S] or [N, S, C] */     \
      const void *__restrict__ ws,            /* [C] */                        \
      const void *__restrict__ bs,            /* [1] or null */                \
      int dtypes,                             /* of ws and bs, see dtypes.h */ \
      const float *__restrict__ channel_gate, /* [N, C] */                     \
      float *partial,                         /* [N, strips, C]: of gc */      \
      float *partial_ws,                      /* [N, strips, C]: of dq * x */  \
      float *partial_bs,                      /* [N, strips]: of dq */         \
      float *spatial_gate,                    /* [N, S] */                     \
      float *dq,                              /* [N, S] */                     \
      int64_t dy_sample, int64_t dy_pitch,    /* to the next sample, row */    \
      int64_t x_sample, int64_t x_pitch,      /* the same of x */              \
      Gate gating,                            /* the spatial gate */           \
      int channels, int64_t positions, int lanes, int tiles, int strips,       \
      int kept /* accesses of a thread that wait in shared memory */

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
  SCSE_DEVICE Accesses<T, W> load(int step, bool first, const T* p, int64_t pitch, int64_t inside,
                                  int64_t across) const {
    const bool keep = (step + 1) * kOuter <= count;
    Bits<T, W>* at = memory + step * kOuter * blockDim.x;
    Accesses<T, W> in;
    if (keep && !first) {
#pragma unroll
      for (int u = 0; u < kOuter; ++u) in.at[u] = at[u * blockDim.x];
    } else {
      in = load_accesses<W, WHOLE>(p, pitch, inside, across);
    }
    if (keep && first) {
#pragma unroll
      for (int u = 0; u < kOuter; ++u) at[u * blockDim.x] = in.at[u];
    }
    return in;
  }
};

template <typename T, int W, Combine K>
__global__ void __launch_bounds__(kMaxThreads, K == Combine::concat ? 2 : 3)
    reduce_planes(SCSE_REDUCE_ARGUMENTS) {
  using F = Formula<float, K>;
  __shared__ __align__(16) float shared[kSumRows<W>], gates[kInner<W>], dqs[kInner<W>];
  static_assert(sizeof shared + sizeof gates + sizeof dqs <= 16 * 1024, "see kSharedByDefault");
  let_next_start();
  const Place me(lanes);
  const Kept<T, W> xs(kept);
  const int64_t n = blockIdx.x / strips, strip = blockIdx.x % strips;
  const int64_t strip_sums = int64_t(blockIdx.x) * channels;  // in partial and partial_ws
  const bool spatial = partial_ws != nullptr || dq != nullptr;
  const Dtype ws_dtype = dtype_of(dtypes, Parameter::ws);
  float bias = 0, dbs = 0;
  if (bs != nullptr) bias = load_parameter(bs, dtype_of(dtypes, Parameter::bs), 0);
  const bool whole = is_whole<W>(x, x_sample, x_pitch, positions) &&
                     is_whole<W>(dy, dy_sample, dy_pitch, positions);
  x += n * x_sample, dy += n * dy_sample, channel_gate += n * channels;

  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t begin = (strip * tiles + tile) * (lanes * W);
    const int64_t s = begin + me.lane * W;
    // A step is `me.rows * kOuter` channels.
    const int size = me.rows * kOuter, mine = me.row * kOuter;
    const auto inside = [&](int c) { return s < positions ? channels - c : 0; };
    const auto load_x_of = [&](auto all, int step, bool first) {
      const int c = step * size + mine;
      return xs.template load<decltype(all)::value>(step, first, x + c * x_pitch + s, x_pitch,
                                                    inside(c), positions - s);
    };
    const auto load_x = [&](int step, bool first) {
      Accesses<T, W> in;
      with_whole<W, T>(whole, [&](auto all) { in = load_x_of(all, step, first); });
      return in;
    };
    Floats<W> gate{}, q{}, d_gate{};
    const auto squeeze = [&](const Floats<W>& f, float weight) {
#pragma unroll
      for (int i = 0; i < W; ++i) q[i] += f[i] * weight;
    };
    const auto store_gates = [&] {
      // Zero outside of the map: an infinite weight would make it NaN there, and NaN times the
      // zeros that x has there is NaN.
      sum_rows(q, lanes, shared, [&](int i, float sum) {
        const bool exists = begin + i < positions;
        gates[inner_index<W>(i, lanes)] = exists ? gate_of(gating, sum + bias) : 0.f;
      });
    };

    if (F::by_gates) {
      for (int step = 0; step * size < channels; ++step) {
        const int c = step * size + mine;
        const Accesses<T, W> in = load_x(step, true);
        float weight[kOuter];
        load_parameters(ws, ws_dtype, c, channels - c, weight);
#pragma unroll
        for (int u = 0; u < kOuter; ++u) squeeze(widen<T, W>(in.at[u]), weight[u]);
      }
      store_gates();
      __syncthreads();
      gate = load_inner<W>(gates, me.lane, lanes);
    }

    for (int step = 0; step * size < channels; ++step) {
      const int c = step * size + mine;
      const T* d = dy + c * dy_pitch + s;
      Accesses<T, W> in, d_in, d2_in{};
      with_whole<W, T>(whole, [&](auto all) {
        constexpr bool WHOLE = decltype(all)::value;
        in = load_x_of(all, step, !F::by_gates);
        d_in = load_accesses<W, WHOLE>(d, dy_pitch, inside(c), positions - s);
        if (K == Combine::concat) {
          d2_in =
              load_accesses<W, WHOLE>(d + channels * dy_pitch, dy_pitch, inside(c), positions - s);
        }
      });
      float weight[kOuter] = {}, channel[kOuter] = {}, sum[kOuter] = {};
      if (F::by_gates) {
        load_some(channel_gate + c, channels - c, channel);
      } else if (spatial) {
        load_parameters(ws, ws_dtype, c, channels - c, weight);
      }
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d_in.at[u]),
                        g2 = widen<T, W>(d2_in.at[u]);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const Shares<float> share = F::shares(f[i], g[i], g2[i], channel[u], gate[i]);
          sum[u] += share.c;
          d_gate[i] += share.s;
        }
        if (!F::by_gates) squeeze(f, weight[u]);
      }
      if (partial != nullptr) {
        sum_and_add(sum, lanes, me.lane, partial + strip_sums + c, channels - c, tile == 0);
      }
    }

    if (spatial) {
      if (!F::by_gates) store_gates();
      // The thread that sums up a position's gradient is the one that has written its gate.
      sum_rows(d_gate, lanes, shared, [&](int i, float sum) {
        const int64_t position = begin + i;
        const float g = gates[inner_index<W>(i, lanes)];
        const float d = position < positions ? gate_gradient(gating, sum, g) : 0.f;
        dqs[inner_index<W>(i, lanes)] = d;
        dbs += d;
        if (dq != nullptr && position < positions) {
          spatial_gate[n * positions + position] = g;
          dq[n * positions + position] = d;
        }
      });
      if (partial_ws != nullptr) {
        __syncthreads();
        const Floats<W> d = load_inner<W>(dqs, me.lane, lanes);
        for (int step = 0; step * size < channels; ++step) {
          const int c = step * size + mine;
          const Accesses<T, W> in = load_x(step, false);
          float sum[kOuter] = {};
#pragma unroll
          for (int u = 0; u < kOuter; ++u) {
            const Floats<W> f = widen<T, W>(in.at[u]);
#pragma unroll
            for (int i = 0; i < W; ++i) sum[u] += f[i] * d[i];
          }
          sum_and_add(sum, lanes, me.lane, partial_ws + strip_sums + c, channels - c, tile == 0);
        }
      }
    }
  }
  if (partial_ws != nullptr) {
    const float sum = sum_block(dbs, shared);
    if (threadIdx.x == 0) partial_bs[blockIdx.x] = sum;
  }
}

template <typename T, int W, Combine K>
__global__ void __launch_bounds__(kMaxThreads, 2) reduce_channels_last(SCSE_REDUCE_ARGUMENTS) {
  using F = Formula<float, K>;
  __shared__ __align__(16) float shared[kSumRows<W>];
  let_next_start();
  const Place me(lanes);
  const Kept<T, W> xs(kept);
  const int64_t n = blockIdx.x / strips, strip = blockIdx.x % strips;
  const int64_t strip_sums = int64_t(blockIdx.x) * channels;  // in partial and partial_ws
  const bool spatial = partial_ws != nullptr || dq != nullptr;
  const bool one_step = channels <= lanes * W;  // it has all channels
  const Dtype ws_dtype = dtype_of(dtypes, Parameter::ws);
  float bias = 0, dbs = 0;
  if (bs != nullptr) bias = load_parameter(bs, dtype_of(dtypes, Parameter::bs), 0);
  const bool whole =
      is_whole<W>(x, x_sample, x_pitch, channels) && is_whole<W>(dy, dy_sample, dy_pitch, channels);
  x += n * x_sample, dy += n * dy_sample, channel_gate += n * channels;

  Floats<W> sum{}, sum_ws{};
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t s = (strip * tiles + tile) * (me.rows * kOuter) + me.row * kOuter;
    // A step is `size` channels.
    const int size = lanes * W, mine = me.lane * W;
    const auto inside = [&](int c) { return c < channels ? positions - s : 0; };
    const auto load_x_of = [&](auto all, int step, bool first) {
      const int c = step * size + mine;
      return xs.template load<decltype(all)::value>(step, first, x + s * x_pitch + c, x_pitch,
                                                    inside(c), channels - c);
    };
    const auto load_x = [&](int step, bool first) {
      Accesses<T, W> in;
      with_whole<W, T>(whole, [&](auto all) { in = load_x_of(all, step, first); });
      return in;
    };
    // Adds sums over the tile's positions to the strip's, or keeps them for the strip's end.
    const auto flush = [&](Floats<W>& sums, int first, float* p) {
      if (one_step && tile < tiles - 1) return;
      sum_rows(sums, lanes, shared, [&](int i, float total) {
        if (first + i < channels) {
          float* at = p + strip_sums + first + i;
          *at = (one_step || tile == 0 ? 0.f : *at) + total;
        }
      });
      sums = {};
    };
    float gate[kOuter] = {}, q[kOuter] = {}, d_gate[kOuter] = {};
    const auto squeeze = [&](int u, const Floats<W>& f, const float (&weight)[W]) {
#pragma unroll
      for (int i = 0; i < W; ++i) q[u] += f[i] * weight[i];
    };
    const auto find_gates = [&] {
      sum_lanes(q, lanes);
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        gate[u] = u < positions - s ? gate_of(gating, q[u] + bias) : 0.f;
      }
    };

    if (F::by_gates) {
      for (int step = 0; step * size < channels; ++step) {
        const int c = step * size + mine;
        const Accesses<T, W> in = load_x(step, true);
        float weight[W];
        load_parameters(ws, ws_dtype, c, channels - c, weight);
#pragma unroll
        for (int u = 0; u < kOuter; ++u) squeeze(u, widen<T, W>(in.at[u]), weight);
      }
      find_gates();
    }

    for (int step = 0; step * size < channels; ++step) {
      const int c = step * size + mine;
      const T* d = dy + s * dy_pitch + c;
      Accesses<T, W> in, d_in, d2_in{};
      with_whole<W, T>(whole, [&](auto all) {
        constexpr bool WHOLE = decltype(all)::value;
        in = load_x_of(all, step, !F::by_gates);
        d_in = load_accesses<W, WHOLE>(d, dy_pitch, inside(c), channels - c);
        if (K == Combine::concat) {
          d2_in = load_accesses<W, WHOLE>(d + channels, dy_pitch, inside(c), channels - c);
        }
      });
      float weight[W] = {}, channel[W] = {};
      if (F::by_gates) {
        load_some(channel_gate + c, channels - c, channel);
      } else if (spatial) {
        load_parameters(ws, ws_dtype, c, channels - c, weight);
      }
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d_in.at[u]),
                        g2 = widen<T, W>(d2_in.at[u]);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const Shares<float> share = F::shares(f[i], g[i], g2[i], channel[i], gate[u]);
          sum[i] += share.c;
          d_gate[u] += share.s;
        }
        if (!F::by_gates) squeeze(u, f, weight);
      }
      if (partial != nullptr) flush(sum, step * size, partial);
    }

    if (spatial) {
      if (!F::by_gates) find_gates();
      sum_lanes(d_gate, lanes);
      float d[kOuter];
#pragma unroll
      for (int u = 0; u < kOuter; ++u) {
        d[u] = u < positions - s ? gate_gradient(gating, d_gate[u], gate[u]) : 0.f;
        if (me.lane == 0) dbs += d[u];
      }
      if (dq != nullptr && me.lane == 0) {
        store_four(spatial_gate + n * positions + s, positions - s, gate);
        store_four(dq + n * positions + s, positions - s, d);
      }
      if (partial_ws != nullptr) {
        for (int step = 0; step * size < channels; ++step) {
          const Accesses<T, W> in = load_x(step, false);
#pragma unroll
          for (int u = 0; u < kOuter; ++u) {
            const Floats<W> f = widen<T, W>(in.at[u]);
#pragma unroll
            for (int i = 0; i < W; ++i) sum_ws[i] += f[i] * d[u];
          }
          flush(sum_ws, step * size, partial_ws);
        }
      }
    }
  }
  if (partial_ws != nullptr) {
    const float total = sum_block(dbs, shared);
    if (threadIdx.x == 0) partial_bs[blockIdx.x] = total;
  }
}

}  // namespace scse::cuda
