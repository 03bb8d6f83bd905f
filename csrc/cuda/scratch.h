// Scratch memory of a call, which the operators allocate as a whole.
#pragma once

#include "sizes.h"

namespace scse::cuda {

// Cuts it into pieces that begin at multiples of 256 bytes. Without memory it only adds up sizes.
class Pieces {
 public:
  explicit Pieces(float* memory) : memory_(memory) {}
  float* take(bool needed, int64_t floats) {
    if (!needed) return nullptr;
    float* piece = memory_ + size_;
    size_ += ceil_div(floats, 64) * 64;
    return piece;
  }
  int64_t size() const { return size_; }

 private:
  float* memory_;
  int64_t size_ = 0;
};

}  // namespace scse::cuda
