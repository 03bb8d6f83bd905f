// The formulas of the excitation and of the combinations for one element to a thread.
#pragma once

#include <cmath>

#include "../activations.h"
#include "../combine.h"
#include "vector.cuh"

namespace scse::cuda {

template <typename A>
using Vec = A;

template <typename A>
SCSE_DEVICE A sigmoid(A v) {
  return A(1) / (A(1) + std::exp(-v));
}

// One instruction: 2**126 * v + 1/2, and what is not in [0, 1] is cut off. (Of |v| below 2**-127 it
// is something between.)
template <typename A>
SCSE_DEVICE A heaviside(A v) {
  A result;
  asm("fma.rn.sat.f32 %0, %1, 0f7E800000, 0f3F000000;" : "=f"(result) : "f"(v));
  return result;
}

#define SCSE_INLINE SCSE_DEVICE
#include "../formulas.inc"
#undef SCSE_INLINE

__host__ __device__ constexpr bool has_channel(Combine k) { return k != Combine::spatial; }
__host__ __device__ constexpr bool has_spatial(Combine k) { return k != Combine::channel; }

}  // namespace scse::cuda
