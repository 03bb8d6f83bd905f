// Launching a kernel. Errors become std::runtime_error, which torch hands to Python.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "per_device.h"
#include "problem.h"

namespace scse::cuda {

// Whether a call of the runtime succeeded. The runtime keeps a thread's last error until somebody
// asks for it. torch asks after its own launches, so this takes our error away before.
inline bool succeeded(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

inline void check(cudaError_t error, const char* what) {
  if (!succeeded(error)) {
    throw std::runtime_error(std::string("scse_kernels: ") + what + ": " +
                             cudaGetErrorString(error));
  }
}

// Sizes of a launch; computed by plain functions.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared = 0;    // bytes of dynamic shared memory
  int64_t most = 0;      // of `shared`, in any launch of this kernel on this device: a constant
  bool overlap = false;  // may start before the kernel before has ended, see overlap.cuh
};

// A kernel must ask for more dynamic shared memory than this. By default a block has 48 KiB; of
// those kernels that have dynamic memory, static memory takes at most 16 KiB of them.
constexpr int64_t kSharedByDefault = 32 * 1024;

// Asks for the memory that a kernel doesn't get by default; the runtime remembers it.
inline void ask_for_shared(const char* name, const void* kernel, const Grid& grid, int device) {
  static OncePerKernel once;
  if (grid.shared <= kSharedByDefault) return;
  once.run(kernel, device, [&] {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.most)),
          name);
  });
}

// The arguments have the types of the kernel's parameters: a conversion could lose something.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Problem& p,
            const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...));
  if (grid.blocks > INT32_MAX) {
    throw std::runtime_error(std::string("scse_kernels: ") + name + ": more than 2**31 - 1 blocks");
  }
  ask_for_shared(name, reinterpret_cast<const void*>(kernel), grid, p.device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = p.stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = grid.overlap && p.overlap && p.architecture >= 90;
  // What it returns is about this launch (or says that the device is lost); the runtime's last
  // error may be somebody else's.
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace scse::cuda
