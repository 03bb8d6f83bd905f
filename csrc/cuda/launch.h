// Launching a kernel. Errors become std::runtime_error, which torch hands to Python.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace scse::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("scse_kernels: ") + what + ": " +
                             cudaGetErrorString(error));
  }
}

// Sizes of a launch; computed by plain functions.
struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared = 0;    // bytes of dynamic shared memory
  int64_t most = 0;      // of `shared`, in any launch of this kernel on this device
  int cluster = 1;       // blocks to a cluster
  bool overlap = false;  // may start before the kernel before has ended, see overlap.cuh
};

// More dynamic shared memory than this has to be asked for: what a kernel's static memory, 16 KiB
// of it at most, leaves of 48 KiB.
constexpr int64_t kSharedByDefault = 32 * 1024;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Problem& p,
            Arguments... arguments) {
  if (grid.blocks > INT32_MAX) {
    throw std::runtime_error(std::string("scse_kernels: ") + name + ": more than 2**31 - 1 blocks");
  }
  if (grid.shared > kSharedByDefault) {
    // Always the same number: another thread may be about to launch this kernel with more.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.most)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = p.stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = grid.cluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  }
  if (grid.overlap && p.architecture >= 90) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
  check(cudaGetLastError(), name);
}

}  // namespace scse::cuda
