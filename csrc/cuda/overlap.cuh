// Programmatic dependent launch, on sm_90 and later: a kernel's blocks may start while the one
// before is still finishing. Elsewhere kernels run one after the other and these do nothing.
#pragma once

#include "vector.cuh"

namespace scse::cuda {

// Returns when the kernel before has ended; what it wrote can be read then. Before this call a
// kernel that is launched with `overlap` must not read what the kernel before writes, and must not
// write what that kernel reads.
SCSE_DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have called this (or ended), the next kernel's may start where there is room.
SCSE_DEVICE void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace scse::cuda
