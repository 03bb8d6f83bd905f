// A size as kernels take it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace scse::cuda {

// An int. Made of a size in 64 bits it throws where that does not fit: no cast hides it.
struct Count {
  int value;
  Count() = default;
  Count(int64_t size) : value(static_cast<int>(size)) {
    if (value != size) {
      throw std::runtime_error("scse_kernels: " + std::to_string(size) +
                               " is too large for a CUDA kernel");
    }
  }
  __host__ __device__ operator int() const { return value; }
};

}  // namespace scse::cuda
