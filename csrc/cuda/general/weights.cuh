// What both forms of the excitation share (excite.cuh, excite_layers.cuh): their arguments, and how
// a weight is read.
#pragma once

#include <type_traits>

#include "../count.h"
#include "../parameters.cuh"
#include "../problem.h"

namespace scse::cuda {

// Elements of dtype P; void: of a dtype that is known when running.
template <typename P>
struct Elements {
  const P* p;
  SCSE_DEVICE Elements(const void* p, Dtype) : p(static_cast<const P*>(p)) {}
  SCSE_DEVICE float at(int64_t i) const { return to_float(p[i]); }
};
template <>
struct Elements<void> {
  const void* p;
  Dtype dtype;
  SCSE_DEVICE Elements(const void* p, Dtype dtype) : p(p), dtype(dtype) {}
  SCSE_DEVICE float at(int64_t i) const { return load_parameter(p, dtype, i); }
};

// Four neighbours of a row as memory has them, 0 where there are none. WHOLE: rows are multiples of
// four elements, and aligned to four.
template <typename P, bool WHOLE>
struct Four {
  float v[4];
  SCSE_DEVICE void load(const Elements<P>& from, int64_t i, int inside) {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = k < inside ? from.at(i + k) : 0.f;
  }
  SCSE_DEVICE float of(int k) const { return v[k]; }
};
template <typename P>
struct Four<P, true> {
  struct alignas(4 * sizeof(P)) Pack {
    P of[4];
  } pack;
  SCSE_DEVICE void load(const Elements<P>& from, int64_t i, int inside) {
    pack = inside > 0 ? *reinterpret_cast<const Pack*>(from.p + i) : Pack{};
  }
  SCSE_DEVICE float of(int k) const { return to_float(pack.of[k]); }
};

// Brings the line of 128 bytes around p to L2.
SCSE_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Brings `rows` rows of `bytes` bytes to L2, unless the block's first accesses, `mine` bytes of
// each thread, are all there is.
SCSE_DEVICE void prefetch(const void* p, int64_t pitch, int rows, int bytes, int mine) {
  if (int64_t(rows) * bytes <= int64_t(blockDim.x) * mine) return;
#pragma unroll 1
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
#pragma unroll 1
    for (int byte = 0; byte < bytes; byte += 128) {
      prefetch(static_cast<const char*>(p) + row * pitch + byte);
    }
  }
}

// Brings a row of so many elements to L2, by the lanes of each warp that calls this.
template <typename T>
SCSE_DEVICE void prefetch_row(const T* p, int count) {
  constexpr int kLine = 128 / sizeof(T);
#pragma unroll 1
  for (int i = threadIdx.x % 32 * kLine; p != nullptr && i < count; i += 32 * kLine) {
    prefetch(p + i);
  }
}

// What excite_layers.cuh has besides.
struct Layers {
  float* slices;  // [kSlices, N, pitch]: the first launch's results, to be added up by the second
  Count samples, pitch;
  int bits_of_slice, bits_of_hidden;  // lanes for a row of w1's slice and of w2, as logarithms
  SCSE_DEVICE float* row(int slice, int64_t sample) const {
    return slices + (slice * int64_t(samples) + sample) * pitch;
  }
};

struct ExciteArguments {
  const float* partial;  // [N, strips, C]: sums of x
  const void* w1;        // [Cr, C]
  const void* b1;        // [Cr] or null
  const void* w2;        // [C, Cr]
  const void* b2;        // [C] or null
  float* pooled;         // [N, C]
  float* hidden;         // [N, Cr]
  float* hidden_slope;   // [N, Cr]: the activation's derivative
  float* channel_gate;   // [N, C]
  Layers layers;
  int64_t positions;
  Count channels, hidden_channels, strips;
  int dtypes;  // of the parameters, see dtypes.h
  Activation activation;
  float activation_parameter;
  Gate gate;
};

struct ExciteBackwardArguments {
  const float* partial;       // [N, strips, C]: for the channel gate, or null
  const float* partial_ws;    // [N, strips, C]: sums of dq * x, or null
  const float* partial_bs;    // [N, strips]: sums of dq
  const void* w1;             // [Cr, C]
  const void* w2;             // [C, Cr]
  const float* hidden_slope;  // [N, Cr]
  const float* channel_gate;  // [N, C]
  float* d_mean;              // [N, C]: the pooled value's gradient / S, or null
  PerSample sums;
  Layers layers;
  int64_t positions;
  Count channels, hidden_channels, strips;
  int dtypes;  // of the parameters, see dtypes.h
  Gate gate;
};

}  // namespace scse::cuda
