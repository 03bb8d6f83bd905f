// The on-chip kernels for one element type; defined in kernels.cuh.
#pragma once

#include "plan.h"

namespace scse::cuda::on_chip {

template <typename T>
struct Kernels {
  static void forward(const Problem& p, const Plan& plan);
  static void backward(const Problem& p, const Plan& plan, const PerSample& sums);
  // Of `device`, which is the current one. No clusters where it can't say how many blocks they may
  // have, as a part of a device (MIG, vGPU, MPS) may not.
  static Limits limits(int device);
};

}  // namespace scse::cuda::on_chip
