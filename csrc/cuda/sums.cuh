// Sums over threads, always in the same order.
#pragma once

#include "vector.cuh"

namespace scse::cuda {

// Each of v summed over `lanes` neighbouring lanes (a power of two, at most 32, at multiples of
// which groups begin); every lane gets the sums. The width is known when running only, and several
// sums share a step's latency: hence not cooperative_groups::reduce. All lanes of the warp call.
template <int count>
SCSE_DEVICE void sum_lanes(float (&v)[count], int lanes) {
#pragma unroll 1  // short code
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], apart);
  }
}

// Each of v summed over the threads of a warp that have the same lane modulo `lanes`; every lane
// gets the sums.
template <int count>
SCSE_DEVICE void sum_groups(float (&v)[count], int lanes) {
#pragma unroll 1  // short code
  for (int apart = lanes; apart < 32; apart *= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], apart);
  }
}

}  // namespace scse::cuda
