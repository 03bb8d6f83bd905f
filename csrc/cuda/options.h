// What the environment asks of a call. Every call looks, so that a process can try both ways; it
// takes a tenth of a microsecond. Plain functions.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace scse::cuda {

// Whether a kernel may start while the one before is still finishing, see overlap.cuh.
inline bool wanted_overlap() {
  const char* value = std::getenv("SCSE_CUDA_OVERLAP");
  const std::string wanted = value == nullptr ? "1" : value;
  if (wanted == "1") return true;
  if (wanted == "0") return false;
  throw std::runtime_error("SCSE_CUDA_OVERLAP must be 0 or 1, got '" + wanted + "'");
}

}  // namespace scse::cuda
