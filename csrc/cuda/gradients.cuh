// Sums over the batch: the parameters' gradients, once every sample has its own part of them.
#pragma once

#include "gradient_tasks.h"
#include "parameters.cuh"

namespace scse::cuda {

struct ParameterGradients {
  const float* d_excited;                   // [N, C]: gradient before the channel gate
  const float* d_hidden;                    // [N, Cr]: gradient before the activation
  const float* pooled;                      // [N, C]
  const float* hidden;                      // [N, Cr]
  const float* sample_ws;                   // [N, C]: a sample's part of dws
  const float* sample_bs;                   // [N]
  void *dw1, *db1, *dw2, *db2, *dws, *dbs;  // null: not needed
  int dtypes;
  int samples, channels, hidden_channels;

  // The task-th piece of work: of dw2, of dw1, or of dws. Their number: `gradient_tasks`.
  SCSE_DEVICE void compute(int64_t task) const {
    int64_t pieces = 0;
    if (dw1 != nullptr) {
      pieces = pieces_of(channels) * pieces_of(hidden_channels);
      if (task < pieces) {
        dense(task, d_excited, hidden, channels, hidden_channels, dw2,
              dtype_of(dtypes, Parameter::w2), db2, dtype_of(dtypes, Parameter::b2));
        return;
      }
      if (task < 2 * pieces) {
        dense(task - pieces, d_hidden, pooled, hidden_channels, channels, dw1,
              dtype_of(dtypes, Parameter::w1), db1, dtype_of(dtypes, Parameter::b1));
        return;
      }
    }
    const int64_t c = (task - 2 * pieces) * blockDim.x + threadIdx.x;
    if (c < channels) {
      float sum = 0;
      for (int n = 0; n < samples; ++n) sum += sample_ws[int64_t(n) * channels + c];
      store_parameter(dws, dtype_of(dtypes, Parameter::ws), c, sum);
    }
    if (c == 0 && dbs != nullptr) {
      float sum = 0;
      for (int n = 0; n < samples; ++n) sum += sample_bs[n];
      store_parameter(dbs, dtype_of(dtypes, Parameter::bs), 0, sum);
    }
  }

 private:
  static SCSE_DEVICE int64_t pieces_of(int size) { return (size + kPiece - 1) / kPiece; }

  // weight = left.T @ right and bias = left.sum(0), one piece of it; a thread has four rows at a
  // time.
  SCSE_DEVICE void dense(int64_t piece, const float* left, const float* right, int rows,
                         int columns, void* weight, Dtype weight_dtype, void* bias,
                         Dtype bias_dtype) const {
    const int64_t across = pieces_of(columns);
    const int k = static_cast<int>(piece % across) * kPiece + threadIdx.x % kPiece;
    const int first = static_cast<int>(piece / across) * kPiece;
    for (int r = first + threadIdx.x / kPiece * 4; r < first + kPiece;
         r += blockDim.x / kPiece * 4) {
      float sum[4] = {}, total[4] = {};
#pragma unroll 4
      for (int n = 0; n < samples; ++n) {
        float l[4];
        load_some(left + int64_t(n) * rows + r, rows - r, l);
        const float v = k < columns ? right[int64_t(n) * columns + k] : 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += l[i] * v, total[i] += l[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (r + i < rows && k < columns) {
          store_parameter(weight, weight_dtype, int64_t(r + i) * columns + k, sum[i]);
        }
        if (r + i < rows && k == 0 && bias != nullptr) {
          store_parameter(bias, bias_dtype, r + i, total[i]);
        }
      }
    }
  }
};

}  // namespace scse::cuda
