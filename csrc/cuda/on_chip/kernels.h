// The on-chip kernels for one element type; defined in kernels.cuh.
#pragma once

#include "plan.h"

namespace scse::cuda::on_chip {

// What the backward leaves to be summed over the samples.
struct PerSample {
  float* d_excited;  // [N, C]: gradient before the channel gate; null without that branch
  float* d_hidden;   // [N, Cr]: gradient before the activation
  float* sample_ws;  // [N, C]: a sample's part of dws; null unless needed
  float* sample_bs;  // [N]
};

template <typename T>
struct Kernels {
  static void forward(const Problem& p, const Plan& plan);
  static void backward(const Problem& p, const Plan& plan, const PerSample& sums);
  // Of `device`, which is the current one. No clusters where it can't say how many blocks they may
  // have, as a part of a device (MIG, vGPU, MPS) may not.
  static Limits limits(int device);
};

}  // namespace scse::cuda::on_chip
