// Which kernels a call gets: the on-chip ones or the general ones. The one place where it is
// chosen.
#pragma once

#include <cstdint>

namespace scse::cuda {

// Forward. Timed on an H100 (microseconds, on chip / general, float16, reduction 16, add), before
// the general kernels became faster: 8 samples of 1/8 MiB 10 / 18, 1/4 MiB 12 / 18, 1/2 MiB 14 /
// 18, 1 MiB 19 / 21; 256 of 1/2 MiB 158 / 148. After it on an H200: 9.4 / 8.9, 10.9 / 8.6, 13.3 /
// 9.5, 17.3 / 11.8. So only the smallest maps go on chip, where both are alike. A large excitation
// (512 channels, reduction 2) takes 29 on chip, most of it for weights that pass through one
// cluster; general 15.
//
// `bytes`: of x. `blocks`: that the on-chip kernel would take, none where a sample doesn't fit.
inline bool prefer_on_chip_forward(int64_t bytes, int64_t blocks, int64_t channels,
                                   int64_t hidden_channels) {
  constexpr int64_t kBytes = 1 << 20, kBytesOfBlock = 32 << 10, kWeights = 8192;
  return blocks > 0 && bytes <= kBytes && bytes <= kBytesOfBlock * blocks &&
         channels * hidden_channels <= kWeights;
}

// Backward: never, unless SCSE_CUDA_KERNELS asks for it. Two launches in a row wait for one another
// there as three do, and few blocks fit an SM: 23 / 25, 26 / 24, 28 / 25, 54 / 32 and 462 / 343 for
// the maps above, before the general kernels became faster.

}  // namespace scse::cuda
