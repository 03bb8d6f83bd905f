// The formulas of the combinations for one element to a thread.
#pragma once

#include "../combine.h"
#include "vector.cuh"

namespace scse::cuda {

template <typename A>
using Vec = A;

#define SCSE_INLINE SCSE_DEVICE
#include "../formulas.h"
#undef SCSE_INLINE

SCSE_DEVICE float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

__host__ __device__ constexpr bool has_channel(Combine k) { return k != Combine::spatial; }
__host__ __device__ constexpr bool has_spatial(Combine k) { return k != Combine::channel; }

}  // namespace scse::cuda
