// How the parameters' gradients are cut into blocks. Plain functions.
#pragma once

#include "sizes.h"

namespace scse::cuda {

// The gradient of a dense layer is formed in pieces of [kPiece, kPieceColumns], that of a vector in
// pieces of kPiece.
constexpr int kPiece = 32, kPieceColumns = 64;

// Blocks that form the parameters' gradients: see ParameterGradients.
inline int64_t gradient_tasks(int64_t channels, int64_t hidden_channels, bool need_channel,
                              bool need_spatial) {
  const int64_t c = ceil_div(channels, kPiece), h = ceil_div(hidden_channels, kPiece);
  const int64_t layers = c * ceil_div(hidden_channels, kPieceColumns) +  // dw2
                         h * ceil_div(channels, kPieceColumns);          // dw1
  return (need_channel ? layers + c + h : 0) + (need_spatial ? c + 1 : 0);
}

}  // namespace scse::cuda
