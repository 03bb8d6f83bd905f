// Which kernels a call gets: the on-chip ones or the general ones. The one place where it is
// chosen.
#pragma once

#include <algorithm>
#include <cstdint>

namespace scse::cuda {

// Estimates, not timed, in bytes per microsecond and microseconds. On chip a map passes through
// DRAM once less and there is one launch instead of three; but only the blocks of the samples'
// clusters work, and few of them can't draw what the device's memory gives.
constexpr double kBandwidthOfSM = 25e3;     // its share of the memory's, all of them busy (H100)
constexpr double kBandwidthOfBlock = 50e3;  // 64 KiB on their way, 1.3 us of latency
constexpr double kNextLaunch = 2;

// `bytes`: of x. `blocks`: that the on-chip kernels would take, none where the sample doesn't fit.
// `passes`: of the general kernels, 3 forward, 4 or 5 backward.
inline bool prefer_on_chip(int64_t bytes, int64_t blocks, int passes, int multiprocessors) {
  if (blocks == 0) return false;
  const double all = kBandwidthOfSM * multiprocessors;
  const double on_chip = (passes - 1) * bytes / std::min(all, kBandwidthOfBlock * blocks);
  const double general = passes * bytes / all + 2 * kNextLaunch;
  return on_chip <= general;
}

}  // namespace scse::cuda
