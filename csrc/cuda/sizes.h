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

}  // namespace scse::cuda
