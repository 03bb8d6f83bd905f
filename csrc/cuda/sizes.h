// Arithmetic of sizes.
#pragma once

#include <cstdint>

namespace scse::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that isn't less than `size`.
inline int64_t power_of_two(int64_t size) {
  int64_t power = 1;
  while (power < size) power *= 2;
  return power;
}

// The logarithm of a power of two.
inline int bits_of(int64_t power) {
  int bits = 0;
  while (int64_t{1} << bits < power) ++bits;
  return bits;
}

}  // namespace scse::cuda
