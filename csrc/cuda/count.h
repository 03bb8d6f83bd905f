// Sizes as kernels take them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "sizes.h"

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

// A count of at least one that divides numbers below 2**31 by a product and a shift: some twenty
// instructions less than a division takes. (Granlund & Montgomery, Division by Invariant Integers
// using Multiplication, 1994.) With d > 2**(l - 1) the factor 2**(31 + l) / d, rounded up, has 32
// bits, and its error, times a number below 2**31, is less than 2**(31 + l) / d: too little to
// reach the next quotient.
struct Divisor {
  Count value;
  unsigned factor;
  int shift;
  Divisor() = default;
  Divisor(int64_t size) : value(size), shift(31 + bits_of(size)) {
    factor = static_cast<unsigned>(ceil_div(int64_t{1} << shift, size));
  }
  __host__ __device__ int divide(int number) const {
    return static_cast<int>(uint64_t{static_cast<unsigned>(number)} * factor >> shift);
  }
};

}  // namespace scse::cuda
