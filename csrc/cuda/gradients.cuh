// Sums over the batch: the parameters' gradients, once every sample has its own part of them. Each
// is a matrix product over the samples, or the sum of a matrix's rows.
//
// It reads few bytes, and its time is spent on waiting for them. So each thread has many loads on
// their way at once. A load is of one element, and neighbouring threads load neighbours: nothing
// has to be aligned. Shapes alone decide the order of sums.
#pragma once

#include "count.h"
#include "gradient_tasks.h"
#include "parameters.cuh"
#include "problem.h"

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
  Count samples, channels, hidden_channels;

  ParameterGradients(const Problem& p, const PerSample& sums)
      : d_excited(sums.d_excited),
        d_hidden(sums.d_hidden),
        pooled(p.pooled),
        hidden(p.hidden),
        sample_ws(sums.sample_ws),
        sample_bs(sums.sample_bs),
        dw1(p.dw1),
        db1(p.db1),
        dw2(p.dw2),
        db2(p.db2),
        dws(p.dws),
        dbs(p.dbs),
        dtypes(p.dtypes),
        samples(p.samples),
        channels(p.channels),
        hidden_channels(p.hidden_channels) {}

  // The task-th piece of work; their number: `gradient_tasks`. Blocks have a power of two of warps,
  // kMostWarps at most.
  SCSE_DEVICE void compute(int task) const {
    const int c = pieces_of(channels), h = pieces_of(hidden_channels);
    if (dw1 != nullptr) {
      if (task < 2 * c * h) {
        const bool second = task < c * h;
        return dense(second ? task : task - c * h, second ? d_excited : d_hidden,
                     second ? hidden : pooled, second ? channels : hidden_channels,
                     second ? hidden_channels : channels, second ? dw2 : dw1,
                     dtype_of(dtypes, second ? Parameter::w2 : Parameter::w1));
      }
      task -= 2 * c * h;
    }
    const float* matrix = sample_ws;
    int columns = channels;
    void* to = dws;
    Parameter parameter = Parameter::ws;
    if (dw1 != nullptr && task < c) {
      matrix = d_excited, to = db2, parameter = Parameter::b2;
    } else if (dw1 != nullptr && task < c + h) {
      matrix = d_hidden, columns = hidden_channels, to = db1, parameter = Parameter::b1, task -= c;
    } else {
      if (dw1 != nullptr) task -= c + h;
      if (task == c) matrix = sample_bs, columns = 1, to = dbs, parameter = Parameter::bs, task = 0;
    }
    if (to != nullptr) sum(task, matrix, columns, to, dtype_of(dtypes, parameter));
  }

 private:
  static constexpr int kMostWarps = 8;
  static constexpr int kEach = 8;  // accesses of a thread to a matrix that are on their way
  static SCSE_DEVICE int pieces_of(int size) { return (size + kPiece - 1) / kPiece; }

  // A thread's part of some samples: its warp's of each `warps` samples, its lane's column.
  struct Part {
    float of[kEach];
    SCSE_DEVICE void load(const float* matrix, int columns, int column, int sample, int samples) {
      const int step = blockDim.x / 32;
      const float* p = matrix + int64_t(sample) * columns + column;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        of[i] = column < columns && sample + i * step < samples ? *p : 0.f;
        p += int64_t(step) * columns;
      }
    }
  };

  // weight = left.T @ right, one piece of it; a thread has four rows of a column. Samples wait in
  // shared memory, and the next ones are on their way meanwhile.
  SCSE_DEVICE void dense(int piece, const float* left, const float* right, int rows, int columns,
                         void* weight, Dtype dtype) const {
    __shared__ __align__(16) float of_left[kEach * kMostWarps][kPiece];
    __shared__ float of_right[kEach * kMostWarps][kPiece];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int across = pieces_of(columns), each = kEach * warps;
    const int first = piece / across * kPiece, column = piece % across * kPiece + lane;
    for (int pass = 0; pass < kPiece / 4; pass += warps) {
      const int mine = (pass + warp) * 4;
      Part l, r;
      l.load(left, rows, first + lane, warp, samples);
      r.load(right, columns, column, warp, samples);
      float sum[4] = {};
      for (int n = 0; n < samples; n += each) {
        __syncthreads();  // the samples before have been used
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          of_left[warp + i * warps][lane] = l.of[i], of_right[warp + i * warps][lane] = r.of[i];
        }
        __syncthreads();
        l.load(left, rows, first + lane, n + each + warp, samples);
        r.load(right, columns, column, n + each + warp, samples);
        const int count = min(each, samples - n);
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          const float4 four = *reinterpret_cast<const float4*>(&of_left[i][mine]);
          const float v = of_right[i][lane];
          sum[0] += four.x * v, sum[1] += four.y * v, sum[2] += four.z * v, sum[3] += four.w * v;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + mine + i;
        if (row < rows && column < columns) {
          store_parameter(weight, dtype, int64_t(row) * columns + column, sum[i]);
        }
      }
    }
  }

  // to = matrix.sum(0), one piece of it: by each warp over its samples, then over the warps.
  SCSE_DEVICE void sum(int piece, const float* matrix, int columns, void* to, Dtype dtype) const {
    __shared__ float of_warps[kMostWarps][kPiece];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int column = piece * kPiece + lane;
    float sum = 0;
    for (int n = warp; n < samples; n += kEach * warps) {
      Part part;
      part.load(matrix, columns, column, n, samples);
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += part.of[i];
    }
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    for (int other = 1; other < warps; ++other) sum += of_warps[other][lane];
    store_parameter(to, dtype, column, sum);
  }
};

}  // namespace scse::cuda
