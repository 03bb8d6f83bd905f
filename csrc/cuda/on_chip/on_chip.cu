// The on-chip kernels' host side: whether a problem fits, and the order of launches.
#include "on_chip.h"

#include "../dispatch.h"
#include "../gradients.cuh"
#include "../launch.h"
#include "kernels.h"
#include "../overlap.cuh"
#include "../per_device.h"
#include "../scratch.h"

namespace scse::cuda {
namespace on_chip {
namespace {

// With the largest blocks, which are the hardest to place.
Limits limits_of(const Problem& p) {
  static PerDevice<Limits> known;
  if (p.architecture < 90) return {0, 0};  // the kernels are empty
  return known.get(p.device, [&] { return Kernels<float>::limits(p.device); });
}

Plan plan_of(const Problem& p, bool backward) { return plan(p, backward, limits_of(p)); }

constexpr int kThreads = 256;

// The parameters' gradients have a launch of their own. They need all samples, and no cluster waits
// for another one. The cluster that ends last could form them. But it would need a counter that is
// zeroed before, which is a step on the stream as well. And the work would be left to the few SMs
// of one cluster.
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const __grid_constant__ ParameterGradients gradients) {
  wait_for_previous();
  gradients.compute(blockIdx.x);
}

PerSample per_sample(const Problem& p, Pieces& pieces) {
  PerSample sums;
  sums.d_excited = pieces.take(p.has_channel(), p.samples * p.channels);
  sums.d_hidden = pieces.take(p.has_channel(), p.samples * p.hidden_channels);
  sums.sample_ws = pieces.take(p.need_spatial(), p.samples * p.channels);
  sums.sample_bs = pieces.take(p.need_spatial(), p.samples);
  return sums;
}

int64_t backward_scratch(const Problem& p) {
  Pieces pieces(nullptr);
  per_sample(p, pieces);
  return pieces.size();
}

void forward(const Problem& p, float*) {
  with_dtype<Kernels>(p.dtype, [&](auto kernels) { kernels.forward(p, plan_of(p, false)); });
}

void backward(const Problem& p, float* scratch) {
  Pieces pieces(scratch);
  const PerSample sums = per_sample(p, pieces);
  with_dtype<Kernels>(p.dtype, [&](auto kernels) { kernels.backward(p, plan_of(p, true), sums); });
  const int64_t tasks =
      gradient_tasks(p.channels, p.hidden_channels, p.need_channel(), p.need_spatial());
  if (tasks == 0) return;
  Grid grid{tasks, kThreads};
  grid.overlap = true;
  launch("on_chip_gradients", gradients_kernel, grid, p, ParameterGradients(p, sums));
}

}  // namespace
}  // namespace on_chip

bool on_chip_forward_fits(const Problem& p) { return on_chip::plan_of(p, false).cluster > 0; }
bool on_chip_backward_fits(const Problem& p) { return on_chip::plan_of(p, true).cluster > 0; }
std::string on_chip_why_not(const Problem& p) {
  if (p.architecture < 90) {
    return "the device runs code for " + std::to_string(p.architecture / 10) + "." +
           std::to_string(p.architecture % 10) + ", and clusters need 9.0";
  }
  const int blocks = on_chip::limits_of(p).cluster;
  if (blocks == 0) return "the device offers no clusters";
  return "a sample of " + std::to_string(p.channels) + " channels and " +
         std::to_string(p.positions) + " positions does not fit a cluster of " +
         std::to_string(blocks) + " blocks";
}
int64_t on_chip_blocks(const Problem& p) { return p.samples * on_chip::plan_of(p, false).cluster; }

const Launcher on_chip_kernels{[](const Problem&) -> int64_t { return 0; }, on_chip::forward,
                               on_chip::backward_scratch, on_chip::backward};

}  // namespace scse::cuda
