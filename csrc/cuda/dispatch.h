// From what is known at run time to the kernel that was compiled for it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <type_traits>

#include "../combine.h"
#include "dtypes.h"

namespace scse::cuda {

// Calls body(Kernels<T>()), T being the type of a map's elements.
template <template <typename> typename Kernels, typename Body>
void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(Kernels<float>());
    case Dtype::float16:
      return body(Kernels<__half>());
    case Dtype::bfloat16:
      return body(Kernels<__nv_bfloat16>());
    case Dtype::float64:
      throw std::runtime_error("scse_kernels: no CUDA kernels for float64");
  }
}

// Calls body(std::integral_constant<Combine, k>).
template <typename Body>
void with_combine(Combine k, const Body& body) {
  switch (k) {
    case Combine::add:
      return body(std::integral_constant<Combine, Combine::add>());
    case Combine::max:
      return body(std::integral_constant<Combine, Combine::max>());
    case Combine::mul:
      return body(std::integral_constant<Combine, Combine::mul>());
    case Combine::concat:
      return body(std::integral_constant<Combine, Combine::concat>());
    case Combine::channel:
      return body(std::integral_constant<Combine, Combine::channel>());
    case Combine::spatial:
      return body(std::integral_constant<Combine, Combine::spatial>());
  }
}

// Calls body(std::bool_constant<value>).
template <typename Body>
void with_bool(bool value, const Body& body) {
  value ? body(std::true_type()) : body(std::false_type());
}

}  // namespace scse::cuda
