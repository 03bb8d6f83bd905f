// What the kernels share: how a block's threads lie on a map, see tile.h, and its sums.
#pragma once

#include <type_traits>

#include "../parameters.cuh"
#include "../sums.cuh"
#include "tile.h"
#include "../vector.cuh"

namespace scse::cuda {

// How many rows a thread works on in the passes that sum, see tile.h.
template <typename T, int W>
constexpr int kOuter = outer_of(W * sizeof(T));

// A thread's place in its block, 1 << lane_bits threads to a row. (Divisions would take long.)
template <int OUTER>
struct Place {
  int lane, row, rows;
  SCSE_DEVICE Place(int lanes, int lane_bits)
      : lane(threadIdx.x & (lanes - 1)),
        row(threadIdx.x >> lane_bits),
        rows(blockDim.x >> lane_bits) {}
  // Its first row of a step.
  SCSE_DEVICE int outer() const { return row * OUTER; }
  // From a step's first element to its own, in a map with that distance between rows.
  template <int W>
  SCSE_DEVICE int64_t offset(int64_t pitch) const {
    return static_cast<unsigned>(outer()) * pitch + lane * W;
  }
};

SCSE_DEVICE int clamped(int size) { return size; }
SCSE_DEVICE int clamped(int64_t size) {
  return static_cast<int>(min(size, static_cast<int64_t>(INT32_MAX)));
}

// A thread's part of a step in a map of `rows` rows of `row` elements: OUTER rows from `outer` on,
// and of each one access, to W elements from `inner` on.
template <int OUTER>
struct Part {
  int64_t outer, inner;
  int inside;  // rows that are left; none or less where the part is outside of the map
  int below;   // the same wherever the part lies in its rows
  int across;  // elements that are left in the row
  template <typename Outer, typename Inner>
  SCSE_DEVICE Part(Outer outer, Inner inner, Outer rows, Inner row)
      : outer(outer),
        inner(inner),
        inside(inner < row ? clamped(rows - outer) : 0),
        below(clamped(rows - outer)),
        across(clamped(row - inner)) {}
  // Its first element, in a map with that distance between rows.
  template <typename T>
  SCSE_DEVICE T* in(T* map, int64_t pitch) const {
    return map + outer * pitch + inner;
  }
};

// Values for a thread's part that lie along one axis: W of them along the inner one, or OUTER along
// the outer one.
template <int W, bool INNER, int OUTER>
struct Along {
  using Part = cuda::Part<OUTER>;
  Floats<INNER ? W : OUTER> v{};
  // The value for element i of access u.
  SCSE_DEVICE float& at(int u, int i) { return v[INNER ? i : u]; }
  SCSE_DEVICE float at(int u, int i) const { return v[INNER ? i : u]; }
  SCSE_DEVICE void load(const float* p, const Part& part) {
    load_some(p + begin(part), left(part), v.of);
  }
  SCSE_DEVICE void load(const void* p, Dtype dtype, const Part& part) {
    load_parameters(p, dtype, begin(part), left(part), v.of);
  }

 private:
  static SCSE_DEVICE int64_t begin(const Part& part) { return INNER ? part.inner : part.outer; }
  static SCSE_DEVICE int left(const Part& part) { return INNER ? part.across : part.below; }
};

// What a thread loads in a step: an access of each row of its part, 0 outside of the map.
template <typename T, int W, int OUTER = kOuter<T, W>>
struct Accesses {
  Bits<T, W> at[OUTER];
};

// Whether every access to a map can move its W elements as a whole, or only one by one. With W = 4
// a contiguous map of 14 x 14 (rows of 196 elements) is moved as a whole, one of 7 x 7 (rows of 49)
// is not. W = wide<T> is chosen only where every access can move a whole.
template <int W, typename T>
SCSE_DEVICE bool is_whole(const T* p, int64_t sample, int64_t pitch, int64_t row) {
  const auto elements = reinterpret_cast<uintptr_t>(p) / sizeof(T);
  return W == wide<T> || (elements | sample | pitch | row) % W == 0;
}

// Calls body(std::bool_constant<whole>). One branch for all loads of a step, so that all of them
// are on their way together.
template <int W, typename T, typename Body>
SCSE_DEVICE void with_whole(bool whole, const Body& body) {
  if (W == wide<T> || whole) {
    body(std::true_type());
  } else if constexpr (W != wide<T>) {
    body(std::false_type());
  }
}

// `p`: where the part begins.
template <int W, bool WHOLE, typename T, int OUTER>
SCSE_DEVICE Accesses<T, W, OUTER> load_part(const T* p, int64_t pitch, const Part<OUTER>& part) {
  Accesses<T, W, OUTER> in;
  if (WHOLE && part.inside >= OUTER) {  // the usual case: one question for all rows
#pragma unroll
    for (int u = 0; u < OUTER; ++u, p += pitch) in.at[u] = load<W>(p);
    return in;
  }
#pragma unroll
  for (int u = 0; u < OUTER; ++u, p += pitch) {
    if constexpr (WHOLE) {
      in.at[u] = u < part.inside ? load<W>(p) : Bits<T, W>{};
    } else {
      in.at[u] = load_singly<W>(p, u < part.inside ? part.across : 0);
    }
  }
  return in;
}
template <int W, typename T, int OUTER>
SCSE_DEVICE Accesses<T, W, OUTER> load_part(bool whole, const T* p, int64_t pitch,
                                            const Part<OUTER>& part) {
  Accesses<T, W, OUTER> in;
  with_whole<W, T>(whole,
                   [&](auto all) { in = load_part<W, decltype(all)::value>(p, pitch, part); });
  return in;
}
template <int W, typename T>
SCSE_DEVICE void store_access(bool whole, T* p, const Bits<T, W>& bits, int across) {
  with_whole<W, T>(whole, [&](auto all) {
    if constexpr (decltype(all)::value) {
      store<W>(p, bits);
    } else {
      store_singly<W>(p, bits, across);
    }
  });
}

// --- vectors over a step's inner elements, in shared memory ---
//
// `lanes` threads hold them in pieces of W, one thread its own. Pieces of 8 are kept as two of 4,
// apart, so that neighbouring lanes touch neighbouring 16 bytes: no bank conflicts.

constexpr int kApart = 16;
template <int W>
constexpr int kInner = W < 4 ? 32 * W : W / 4 * (32 * 4 + kApart);  // floats, at most

template <int W>
SCSE_DEVICE int inner_index(unsigned i, int lanes) {
  if constexpr (W < 8) return i;
  return i % W / 4 * (lanes * 4 + kApart) + i / W * 4 + i % 4;
}
template <int W>
SCSE_DEVICE void store_inner(float* shared, int lane, int lanes, const Floats<W>& f) {
  if constexpr (W < 4) {
#pragma unroll
    for (int i = 0; i < W; ++i) shared[lane * W + i] = f[i];
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      reinterpret_cast<float4*>(shared + inner_index<W>(lane * W + i, lanes))[0] =
          make_float4(f[i], f[i + 1], f[i + 2], f[i + 3]);
    }
  }
}
template <int W>
SCSE_DEVICE Floats<W> load_inner(const float* shared, int lane, int lanes) {
  Floats<W> f;
  if constexpr (W < 4) {
#pragma unroll
    for (int i = 0; i < W; ++i) f[i] = shared[lane * W + i];
  } else {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const float4 four =
          reinterpret_cast<const float4*>(shared + inner_index<W>(lane * W + i, lanes))[0];
      f[i] = four.x, f[i + 1] = four.y, f[i + 2] = four.z, f[i + 3] = four.w;
    }
  }
  return f;
}

// --- sums over the rows of threads of a block ---

// Shared memory of these sums, in floats.
template <int W>
constexpr int kSumRows = W < 4 ? kMaxThreads * W : W / 4 * (kMaxThreads * 4 + kApart);

// Sums f over the rows of `lanes` threads; then one thread, always the same, calls body(i, sums)
// for N neighbours of the step's inner elements, from i on. All threads of the block call this.
template <int N, int W, typename Body>
SCSE_DEVICE void sum_rows(Floats<W> f, Lanes lanes, float* shared, const Body& body) {
  struct alignas(4 * N) Neighbours {
    float of[N];
  };
  // Where rows are short and many, their sums would be few and long.
  constexpr int least = 3;
  sum_groups(f.of, lanes.count, 1 << least);
  const int row = max(lanes.bits, least), down = (W < 4 ? W : 4) << row;
  __syncthreads();  // the last sums have been read
  store_inner(shared, threadIdx.x, kMaxThreads, f);
  __syncthreads();
  for (int i = threadIdx.x * N; i < lanes.count * W; i += blockDim.x * N) {
    const float* p = shared + inner_index<W>(i, kMaxThreads);
    float sums[N] = {};
    int left = blockDim.x >> row;
#pragma unroll 4
    do {  // there is a row
      const Neighbours v = *reinterpret_cast<const Neighbours*>(p);
#pragma unroll
      for (int k = 0; k < N; ++k) sums[k] += v.of[k];
      p += down;
    } while (--left > 0);
    body(i, sums);
  }
}

// Adds some neighbours to partial sums, of which the first `inside` exist; `begin`: writes them
// there.
template <int N>
SCSE_DEVICE void add_some(float* p, int inside, bool begin, float (&v)[N]) {
  if (!begin) {
    float before[N];
    load_some(p, inside, before);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] += before[k];
  }
  store_some(p, inside, v);
}

// The sum of v over the block, in thread 0.
SCSE_DEVICE float sum_block(float v, float* shared) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) v += __shfl_xor_sync(0xffffffffu, v, apart);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += shared[warp];
  }
  return total;
}

// --- sums over the lanes of a row, one for each of a thread's OUTER elements ---

// The lanes of a row share the sums: each has some neighbours of them, or several lanes have the
// same. So what is made of a sum is made once.
template <int OUTER>
class LaneSums {
 public:
  SCSE_DEVICE explicit LaneSums(Lanes lanes)
      : lanes_(lanes.count),
        each_(lanes.sums),
        shift_(lanes.shift),
        writes_((threadIdx.x & lanes.same) == 0),
        first_((static_cast<int>(threadIdx.x & (lanes_ - 1)) >> lanes.shift) * each_) {}
  // All lanes of the warp call this.
  SCSE_DEVICE void sum(float (&v)[OUTER]) const {
    each_ == 1 ? sum_and_scatter(v, lanes_) : sum_and_scatter<true>(v, lanes_);
  }
  // Calls body(i, u) for each sum of this lane: v[i] is that of element u.
  template <typename Body>
  SCSE_DEVICE void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < OUTER; ++i) {
      if (i > 0 && i >= each_) break;
      body(i, first_ + i);
    }
  }
  // Whether this lane, of all that have the same sums, is the one to write them.
  SCSE_DEVICE bool writes() const { return writes_; }
  // The same as `each`, in the lanes that write.
  template <typename Body>
  SCSE_DEVICE void write(const Body& body) const {
    if (writes()) each(body);
  }
  // The same to all lanes. All lanes of the warp call this.
  SCSE_DEVICE void give(float (&v)[OUTER]) const {
    if (each_ > 1) return gather<2>(v, lanes_);
    const float mine = v[0];
#pragma unroll
    for (int u = 0; u < OUTER; ++u) {
      v[u] = __shfl_sync(0xffffffffu, mine, u << shift_, lanes_);
    }
  }
  // Sums v, and adds the sums to partial sums; `begin`: writes them there. Each is always added by
  // the same thread. All lanes of the warp call this.
  SCSE_DEVICE void add(float (&v)[OUTER], float* p, int inside, bool begin) const {
    sum(v);
    write([&](int i, int u) {
      if (u < inside) p[u] = begin ? v[i] : p[u] + v[i];
    });
  }

 private:
  const int lanes_, each_, shift_;
  const bool writes_;
  const int first_;
};

}  // namespace scse::cuda
