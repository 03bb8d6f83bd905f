// How the parameters' gradients are cut into blocks. Plain functions.
#pragma once

#include "sizes.h"

namespace scse::cuda {

// The gradient of a dense layer is formed in pieces of [kPiece, kPiece].
constexpr int kPiece = 32;

// Blocks of `threads` threads that form the parameters' gradients: see ParameterGradients.
inline int64_t gradient_tasks(int64_t channels, int64_t hidden_channels, int threads,
                              bool need_channel, bool need_spatial) {
  const int64_t pieces = ceil_div(channels, kPiece) * ceil_div(hidden_channels, kPiece);
  return (need_channel ? 2 * pieces : 0) + (need_spatial ? ceil_div(channels, threads) : 0);
}

}  // namespace scse::cuda
