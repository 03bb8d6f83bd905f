// Parameters and their gradients. Their dtypes are known only at run time: they may differ from
// that of the maps and from one another.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "vector.cuh"

namespace scse::cuda {

// Calls body(const T* or T*) with the pointer in its type.
template <typename Void, typename Body>
SCSE_DEVICE void typed(Void* p, Dtype dtype, const Body& body) {
  constexpr bool read = std::is_const_v<Void>;
  switch (dtype) {
    case Dtype::float32:
      return body(static_cast<std::conditional_t<read, const float*, float*>>(p));
    case Dtype::float64:
      return body(static_cast<std::conditional_t<read, const double*, double*>>(p));
    case Dtype::float16:
      return body(static_cast<std::conditional_t<read, const __half*, __half*>>(p));
    case Dtype::bfloat16:
      return body(static_cast<std::conditional_t<read, const __nv_bfloat16*, __nv_bfloat16*>>(p));
  }
}

SCSE_DEVICE float load_parameter(const void* p, Dtype dtype, int64_t i) {
  float value;
  typed(p, dtype, [&](auto* elements) { value = to_float(elements[i]); });
  return value;
}

// Elements i, i + 1, ..., of which the first `inside` exist; 0 for the others.
template <int count>
SCSE_DEVICE void load_parameters(const void* p, Dtype dtype, int64_t i, int inside,
                                 float (&v)[count]) {
  typed(p, dtype, [&](auto* elements) { load_some(elements + i, inside, v); });
}

SCSE_DEVICE void store_parameter(void* p, Dtype dtype, int64_t i, float value) {
  typed(p, dtype, [&](auto* elements) { from_float(elements[i], value); });
}

}  // namespace scse::cuda
