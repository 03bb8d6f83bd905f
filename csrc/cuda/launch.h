// Launching a kernel. Errors become std::runtime_error, which torch hands to Python.
#pragma once

#include <cuda_runtime.h>

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
  int cluster = 1;       // blocks to a cluster
  bool overlap = false;  // may start before the kernel before has ended, see overlap.cuh
};

// More than this has to be asked for.
constexpr int64_t kSharedByDefault = 48 * 1024;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Problem& p,
            Arguments... arguments) {
  if (grid.shared > kSharedByDefault) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared)),
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
  if (grid.overlap && p.capability >= 90) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
  check(cudaGetLastError(), name);
}

}  // namespace scse::cuda
