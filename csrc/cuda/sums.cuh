// Sums over threads, always in the same order.
#pragma once

#include "vector.cuh"

namespace scse::cuda {

// Sums each of v over groups of `lanes` neighbouring lanes (a power of two, at most 32). Every lane
// gets the sums of its group. This is not cooperative_groups::reduce, since `lanes` is known only
// at run time and several sums share the waiting time of a step. All lanes of the warp call this.
template <int count>
SCSE_DEVICE void sum_lanes(float (&v)[count], int lanes) {
#pragma unroll 1  // short code
  for (int apart = lanes >> 1; apart > 0; apart >>= 1) {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], apart);
  }
}

// The steps of the function below from the one on that leaves `left` sums to a lane. (A recursion,
// since the compiler does not unroll a loop so large.)
template <bool FEW, int left, int several>
SCSE_DEVICE void sum_and_scatter_from(float (&v)[several], int apart) {
  if (FEW && apart == 0) return;
  const bool upper = threadIdx.x & apart;
#pragma unroll
  for (int i = 0; i < left; ++i) {
    const float keep = upper ? v[i + left] : v[i], give = upper ? v[i] : v[i + left];
    v[i] = keep + __shfl_xor_sync(0xffffffffu, give, apart);
  }
  apart >>= 1;
  if constexpr (left > 1) {
    sum_and_scatter_from<FEW, left / 2>(v, apart);
  } else {
#pragma unroll
    for (int fixed = 16 / several; fixed > 0; fixed /= 2) {
      if (fixed <= apart) v[0] += __shfl_xor_sync(0xffffffffu, v[0], fixed);
    }
  }
}

// The same, but the lanes share the sums, in order: of `several` lanes or more each gets one, in
// v[0]; of fewer, which FEW allows, each gets as many as it takes, in v[0], v[1], ... That takes
// fewer steps.
template <bool FEW = false, int several>
SCSE_DEVICE void sum_and_scatter(float (&v)[several], int lanes) {
  sum_and_scatter_from<FEW, several / 2>(v, lanes >> 1);
}

// Gives what sum_and_scatter has shared out, `least` sums or more to a lane, to all lanes.
template <int least, int several>
SCSE_DEVICE void gather(float (&v)[several], int lanes) {
#pragma unroll
  for (int has = least; has < several; has *= 2) {
    const int apart = static_cast<unsigned>(lanes) / (several / has);
    if (apart == 0) continue;
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < has; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, v[i], apart);
      v[i + has] = upper ? v[i] : other;
      v[i] = upper ? other : v[i];
    }
  }
}

// Sums each of v over the threads that have the same lane modulo `lanes`, of each `all` neighbours
// of a warp. Every lane gets the sums.
template <int count>
SCSE_DEVICE void sum_groups(float (&v)[count], int lanes, int all = 32) {
#pragma unroll 1  // short code
  for (int apart = lanes; apart < all; apart *= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], apart);
  }
}

}  // namespace scse::cuda
