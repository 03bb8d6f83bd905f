// What one call works on. Plain data, shared by the operators (ops.cpp) and by the launchers, which
// know nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../activations.h"
#include "../combine.h"
#include "dtypes.h"

namespace scse::cuda {

struct Problem {
  Dtype dtype;  // of the maps; float64 is not served
  int64_t samples, channels, hidden_channels, positions;
  Combine combine;
  Activation activation;
  float activation_parameter;
  Gate gate;
  bool residual;  // y has x added, and so dx has dy
  bool channels_last;
  int device;
  int architecture;  // see architecture_of
  bool overlap;      // a kernel may start while the one before is finishing
  cudaStream_t stream;

  // Feature maps: [N, C, S] or [N, S, C]; y and dy hold 2 * C channels for concat. Rows are dense;
  // those of the inputs, and their samples, may be any distance apart.
  const void *x, *dy;
  void *y, *dx;                 // dx: null unless it is needed
  int64_t x_sample, dy_sample;  // elements from one sample to the next
  int64_t x_pitch, dy_pitch;    // and from one row to the next

  // Parameters, dense, null where absent; their dtypes as in dtypes.h.
  const void *w1, *b1, *w2, *b2, *ws, *bs;
  int dtypes;

  // [N, C], [N, Cr], [N, C]; outputs of the forward, inputs of the backward. hidden_slope: the
  // activation's derivative where hidden is its value.
  float *pooled, *hidden, *hidden_slope, *channel_gate;

  // The parameters' gradients, each in its parameter's dtype; null unless needed.
  void *dw1, *db1, *dw2, *db2, *dws, *dbs;

  int64_t out_channels() const { return combine == Combine::concat ? 2 * channels : channels; }
  bool has_channel() const { return combine != Combine::spatial; }
  bool has_spatial() const { return combine != Combine::channel; }
  bool need_channel() const { return dw1 != nullptr; }
  bool need_spatial() const { return dws != nullptr; }
  // Elements of a row of x: channels in channels_last maps, else positions.
  int64_t row() const { return channels_last ? channels : positions; }
};

// What the backward leaves to be summed over the samples.
struct PerSample {
  float* d_excited;  // [N, C]: gradient before the channel gate; null without that branch
  float* d_hidden;   // [N, Cr]: gradient before the activation
  float* sample_ws;  // [N, C]: a sample's part of dws; null unless needed
  float* sample_bs;  // [N]
};

}  // namespace scse::cuda
