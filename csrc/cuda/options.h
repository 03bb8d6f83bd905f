// What the environment asks of a call. Every call looks, so that a process can try both ways; it
// takes a tenth of a microsecond. Plain functions.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace scse::cuda {

// The place of the variable's value in `names`; 0 where it isn't set. `expected`: for the error.
template <int count>
int choice_of(const char* variable, const char* const (&names)[count], const char* expected) {
  const char* value = std::getenv(variable);
  if (value == nullptr) return 0;
  for (int i = 0; i < count; ++i) {
    if (std::string(names[i]) == value) return i;
  }
  throw std::runtime_error(std::string(variable) + " must be " + expected + ", got '" + value +
                           "'");
}

// Which kernels: those that choose.h prefers, or always the same.
enum class Family { automatic, general, on_chip };
inline Family wanted_family() {
  constexpr const char* names[] = {"auto", "general", "on_chip"};
  return static_cast<Family>(choice_of("SCSE_CUDA_KERNELS", names, "auto, general or on_chip"));
}

// Whether a kernel may start while the one before is still finishing, see overlap.cuh.
inline bool wanted_overlap() {
  constexpr const char* names[] = {"1", "0"};
  return choice_of("SCSE_CUDA_OVERLAP", names, "0 or 1") == 0;
}

}  // namespace scse::cuda
