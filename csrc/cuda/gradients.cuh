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
      const int of_dw2 = c * pieces_of<kPieceColumns>(hidden_channels);
      const int of_dw1 = h * pieces_of<kPieceColumns>(channels);
      if (task < of_dw2 + of_dw1) {
        const bool second = task < of_dw2;
        return dense(second ? task : task - of_dw2, second ? d_excited : d_hidden,
                     second ? hidden : pooled, second ? channels : hidden_channels,
                     second ? hidden_channels : channels, second ? dw2 : dw1,
                     dtype_of(dtypes, second ? Parameter::w2 : Parameter::w1));
      }
      task -= of_dw2 + of_dw1;
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
  template <int piece = kPiece>
  static SCSE_DEVICE int pieces_of(int size) {
    return (size + piece - 1) / piece;
  }

  // weight = left.T @ right, one piece of it. A warp has four rows at a time, and a thread of it
  // some columns, 32 apart. Samples wait in shared memory, and the next ones are on their way
  // meanwhile.
  SCSE_DEVICE void dense(int piece, const float* left, const float* right, int rows, int columns,
                         void* weight, Dtype dtype) const {
    constexpr int kAcross = kPieceColumns / 32;
    constexpr int kEach = 4;  // samples of a thread that are on their way
    __shared__ __align__(16) float of_left[kEach * kMostWarps][kPiece];
    __shared__ float of_right[kEach * kMostWarps][kPieceColumns];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int across = pieces_of<kPieceColumns>(columns), each = kEach * warps;
    const int first = piece / across * kPiece, column = piece % across * kPieceColumns + lane;
    float l[kEach], r[kEach][kAcross];
    // Calls body(i) for this warp's samples n + warp + i * warps.
    const auto with_samples = [&](int n, const auto& body) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (n + i * warps + warp >= samples) break;
        body(i);
      }
    };
    const auto ask = [&](int n) {
      const float* of_l = left + int64_t(n + warp) * rows + first + lane;
      const float* of_r = right + int64_t(n + warp) * columns + column;
      with_samples(n, [&](int i) {
        l[i] = first + lane < rows ? *of_l : 0.f;
#pragma unroll
        for (int u = 0; u < kAcross; ++u) r[i][u] = column + u * 32 < columns ? of_r[u * 32] : 0.f;
        of_l += int64_t(warps) * rows, of_r += int64_t(warps) * columns;
      });
    };
#pragma unroll 1
    for (int pass = 0; pass < kPiece / 4; pass += warps) {
      const int mine = (pass + warp) * 4;
      ask(0);
      float sum[4][kAcross] = {};
      for (int n = 0; n < samples; n += each) {
        __syncthreads();  // the samples before have been used
        with_samples(n, [&](int i) {
          const int at = warp + i * warps;
          of_left[at][lane] = l[i];
#pragma unroll
          for (int u = 0; u < kAcross; ++u) of_right[at][lane + u * 32] = r[i][u];
        });
        __syncthreads();
        ask(n + each);
        const int count = min(each, samples - n);
#pragma unroll 2
        for (int i = 0; i < count; ++i) {
          const float4 four = *reinterpret_cast<const float4*>(&of_left[i][mine]);
#pragma unroll
          for (int u = 0; u < kAcross; ++u) {
            const float v = of_right[i][lane + u * 32];
            sum[0][u] += four.x * v, sum[1][u] += four.y * v;
            sum[2][u] += four.z * v, sum[3][u] += four.w * v;
          }
        }
      }
      typed(weight, dtype, [&](auto* to) {
        to += int64_t(first + mine) * columns + column;
#pragma unroll
        for (int i = 0; i < 4; ++i, to += columns) {
#pragma unroll
          for (int u = 0; u < kAcross; ++u) {
            if (first + mine + i < rows && column + u * 32 < columns) {
              from_float(to[u * 32], sum[i][u]);
            }
          }
        }
      });
    }
  }

  // to = matrix.sum(0), one piece of it: by each warp over its samples, then over the warps.
  SCSE_DEVICE void sum(int piece, const float* matrix, int columns, void* to, Dtype dtype) const {
    __shared__ float of_warps[kMostWarps][kPiece];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int column = piece * kPiece + lane;
    float sum = 0;
    constexpr int kEach = 8;  // loads of a thread that are on their way
    for (int n = warp; n < samples; n += kEach * warps) {
      float of[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int sample = n + i * warps;
        of[i] =
            column < columns && sample < samples ? matrix[int64_t(sample) * columns + column] : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += of[i];
    }
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    for (int other = 1; other < warps; ++other) sum += of_warps[other][lane];
    store_parameter(to, dtype, column, sum);
  }
};

}  // namespace scse::cuda
