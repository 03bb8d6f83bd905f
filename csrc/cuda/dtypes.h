// Element types, and how kernels are told those of the parameters.
#pragma once

namespace scse::cuda {

enum class Dtype { float32, float64, float16, bfloat16 };

// Bytes of an element.
constexpr int itemsize(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// The parameters' dtypes travel in one integer, two bits for each.
enum class Parameter { w1, b1, w2, b2, ws, bs };

constexpr int packed(Parameter parameter, Dtype dtype) {
  return static_cast<int>(dtype) << 2 * static_cast<int>(parameter);
}
constexpr Dtype dtype_of(int dtypes, Parameter parameter) {
  return static_cast<Dtype>(dtypes >> 2 * static_cast<int>(parameter) & 3);
}

}  // namespace scse::cuda
