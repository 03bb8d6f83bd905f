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
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], apart);
  }
}

// Sums each of v over the threads of a warp that have the same lane modulo `lanes`. Every lane gets
// the sums.
template <int count>
SCSE_DEVICE void sum_groups(float (&v)[count], int lanes) {
#pragma unroll 1  // short code
  for (int apart = lanes; apart < 32; apart *= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], apart);
  }
}

}  // namespace scse::cuda
