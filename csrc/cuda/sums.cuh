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

// The same, but each lane gets one of the sums, in v[0]: lane i that of v[i * several / lanes].
// That takes fewer steps. `lanes`: at least `several`.
template <int several>
SCSE_DEVICE void sum_and_scatter(float (&v)[several], int lanes) {
  int apart = lanes >> 1;
#pragma unroll
  for (int left = several / 2; left > 0; left /= 2) {
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float keep = upper ? v[i + left] : v[i], give = upper ? v[i] : v[i + left];
      v[i] = keep + __shfl_xor_sync(0xffffffffu, give, apart);
    }
    apart >>= 1;
  }
#pragma unroll
  for (int fixed = 16 / several; fixed > 0; fixed /= 2) {
    if (fixed <= apart) v[0] += __shfl_xor_sync(0xffffffffu, v[0], fixed);
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
