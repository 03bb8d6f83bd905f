// What the general kernels share: how a block's threads lie on a map, see tile.h, and its sums.
#pragma once

#include <type_traits>

#include "../parameters.cuh"
#include "../sums.cuh"
#include "tile.h"
#include "../vector.cuh"

namespace scse::cuda {

// A thread's place in its block, `lanes` threads to a row.
struct Place {
  int lane, row, rows;
  SCSE_DEVICE explicit Place(int lanes)
      : lane(threadIdx.x % lanes), row(threadIdx.x / lanes), rows(blockDim.x / lanes) {}
};

// A thread's part of a step in a map of `rows` rows of `row` elements: kOuter rows from `outer` on,
// and of each one access, to W elements from `inner` on.
struct Part {
  int64_t outer, inner, rows, row;
  // The rows that are left; none or less where the part is outside of the map.
  SCSE_DEVICE int64_t inside() const { return inner < row ? rows - outer : 0; }
  // The elements that are left in the row.
  SCSE_DEVICE int64_t across() const { return row - inner; }
  // Its first element, in a map with that distance between rows.
  template <typename T>
  SCSE_DEVICE T* in(T* map, int64_t pitch) const {
    return map + outer * pitch + inner;
  }
};

// Values for a thread's part that lie along one axis: W of them along the inner one, or kOuter
// along the outer one.
template <int W, bool INNER>
struct Along {
  Floats<INNER ? W : kOuter> v{};
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
  static SCSE_DEVICE int64_t left(const Part& part) {
    return INNER ? part.across() : part.rows - part.outer;
  }
};

// What a thread loads in a step: an access of each row of its part, 0 outside of the map.
template <typename T, int W>
struct Accesses {
  Bits<T, W> at[kOuter];
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
template <int W, bool WHOLE, typename T>
SCSE_DEVICE Accesses<T, W> load_part(const T* p, int64_t pitch, const Part& part) {
  const int64_t inside = part.inside(), across = part.across();
  Accesses<T, W> in;
#pragma unroll
  for (int u = 0; u < kOuter; ++u) {
    if constexpr (WHOLE) {
      in.at[u] = u < inside ? load<W>(p + u * pitch) : Bits<T, W>{};
    } else {
      in.at[u] = load_singly<W>(p + u * pitch, u < inside ? static_cast<int>(across) : 0);
    }
  }
  return in;
}
template <int W, typename T>
SCSE_DEVICE Accesses<T, W> load_part(bool whole, const T* p, int64_t pitch, const Part& part) {
  Accesses<T, W> in;
  with_whole<W, T>(whole,
                   [&](auto all) { in = load_part<W, decltype(all)::value>(p, pitch, part); });
  return in;
}
template <int W, typename T>
SCSE_DEVICE void store_access(bool whole, T* p, const Bits<T, W>& bits, int64_t across) {
  with_whole<W, T>(whole, [&](auto all) {
    if constexpr (decltype(all)::value) {
      store<W>(p, bits);
    } else {
      store_singly<W>(p, bits, static_cast<int>(across));
    }
  });
}

// --- vectors over a step's inner elements, in shared memory ---
//
// Threads hold them in pieces of W, one thread its own. Pieces of 8 are kept as two of 4, apart, so
// that neighbouring lanes touch neighbouring 16 bytes: no bank conflicts.

constexpr int kApart = 16;
template <int W>
constexpr int kInner = W < 4 ? 32 * W : W / 4 * (32 * 4 + kApart);  // floats, at most

template <int W>
SCSE_DEVICE int inner_size(int lanes) {
  return W < 4 ? lanes * W : W / 4 * (lanes * 4 + kApart);
}
template <int W>
SCSE_DEVICE int inner_index(int i, int lanes) {
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

// --- sums over the whole block ---

// Shared memory of the sums below, in floats.
template <int W>
constexpr int kSumRows = kMaxThreads / 32 * kInner<W>;

// Sums f over the rows; then one thread, always the same, calls body(i, sum) for each of the step's
// inner elements i. All threads of the block call this.
template <int W, typename Body>
SCSE_DEVICE void sum_rows(Floats<W> f, int lanes, float* shared, const Body& body) {
  sum_groups(f.of, lanes);
  const int lane = threadIdx.x % 32, size = inner_size<W>(lanes), warps = blockDim.x / 32;
  __syncthreads();  // the last sums have been read
  if (lane < lanes) store_inner(shared + threadIdx.x / 32 * size, lane, lanes, f);
  __syncthreads();
  for (int i = threadIdx.x; i < lanes * W; i += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) {
      sum += shared[warp * size + inner_index<W>(i, lanes)];
    }
    body(i, sum);
  }
}

// The sum of v over the block, in thread 0.
SCSE_DEVICE float sum_block(float v, float* shared) {
  float sum[1] = {v};
  sum_lanes(sum, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum[0];
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) total += shared[warp];
  return total;
}

// Sums each of four values over `lanes` lanes, and adds the four sums to four neighbouring partial
// sums; `begin`: writes them there. Each is always added by the same thread. At the first two steps
// a lane gives away half of what it has: fewer shuffles than if every lane had every sum. The order
// of additions is that of sum_lanes. All lanes of the warp call this.
SCSE_DEVICE void sum_and_add(float (&sum)[kOuter], int lanes, int lane, float* p, int64_t inside,
                             bool begin) {
  static_assert(kOuter == 4, "two steps");
  if (lanes >= 4) {
    const bool upper = lane & lanes / 2, odd = lane & lanes / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float given = upper ? sum[i] : sum[i + 2], kept = upper ? sum[i + 2] : sum[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, lanes / 2);
    }
    const float given = odd ? sum[0] : sum[1], kept = odd ? sum[1] : sum[0];
    float one[1] = {kept + __shfl_xor_sync(0xffffffffu, given, lanes / 4)};
    sum_lanes(one, lanes / 4);
    const int mine = upper * 2 + odd;
    if ((lane & (lanes / 4 - 1)) == 0 && mine < inside) {
      p[mine] = begin ? one[0] : p[mine] + one[0];
    }
    return;
  }
  sum_lanes(sum, lanes);
  if (lane > 0) return;
#pragma unroll
  for (int u = 0; u < kOuter; ++u) {
    if (u < inside) p[u] = begin ? sum[u] : p[u] + sum[u];
  }
}

}  // namespace scse::cuda
