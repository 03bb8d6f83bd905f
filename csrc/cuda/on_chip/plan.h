// How a sample is spread over a cluster: the one place where it is chosen.
#pragma once

#include <algorithm>

#include "memory.h"
#include "../problem.h"

namespace scse::cuda::on_chip {

// Of a device: bytes of shared memory that a block may have, and blocks of that size to a cluster.
struct Limits {
  int64_t shared;
  int cluster;
};

struct Plan {
  int cluster = 0;  // blocks; 0: the sample doesn't fit
  int slice = 0;    // positions to a block
  int threads = 0;
  int64_t shared = 0;  // bytes
  int64_t most = 0;    // of any plan for the device
};

// The smallest cluster, a power of two, whose blocks hold at most 16 KiB of the maps each; where
// that takes more than eight blocks (what every device with clusters has) then eight, or sixteen if
// their slices would be larger than 64 KiB. Estimates, not timed: 16 KiB to a block is as much as
// several blocks on each SM need in flight, and small slices mean that many SMs work on a sample;
// below 64 KiB two or three blocks fit an SM, so that some load while others store. A block that
// fills an SM alone has twice the threads.
//
// Slices of contiguous maps are whole sectors of 32 bytes wide.
inline Plan plan(const Problem& p, bool backward, const Limits& limits) {
  if (p.dtype == Dtype::float64 || p.samples == 0) return {};
  const int64_t most = limits.shared * limits.cluster;
  if (p.channels * p.positions > most || p.hidden_channels > most) return {};
  const bool concat = p.combine == Combine::concat;
  const int size = itemsize(p.dtype), maps = backward ? 2 + concat : 1;
  const int unit = p.channels_last ? 1 : 32 / size;
  Plan best;
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    const int positions = static_cast<int>(p.positions);
    const int slice = padded((positions + cluster - 1) / cluster, unit);
    Sizes sizes{size,
                static_cast<int>(p.channels),
                static_cast<int>(p.hidden_channels),
                slice,
                cluster,
                kMostThreads / 2,
                p.channels_last,
                concat};
    const int64_t held = maps * sizes.map() * size;
    const int vectors = (p.channels_last ? sizes.C() : sizes.S()) / sizes.W();
    const auto bytes = [&] {
      return backward ? BackwardMemory(sizes).bytes : ForwardMemory(sizes).bytes;
    };
    if (bytes() > limits.shared / 2 || vectors > sizes.threads) sizes.threads = kMostThreads;
    const int64_t shared = bytes();
    if (shared <= limits.shared && vectors <= sizes.threads) {
      best = {cluster, slice, sizes.threads, shared, limits.shared};
      if (held <= (cluster < 8 ? 16 << 10 : 64 << 10)) break;
    }
    if (slice == unit) break;  // more blocks would have nothing to do
  }
  return best;
}

}  // namespace scse::cuda::on_chip
