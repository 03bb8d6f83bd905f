// The channel excitation, two small dense layers per sample, and its backward. A block for each
// sample; it reads the weights once, with up to 32 KiB on their way. Vectors between the steps are
// in global memory, which a block reads back as it wrote it.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../overlap.cuh"
#include "../parameters.cuh"

namespace scse::cuda {

// Four neighbours of a row, 0 beyond its end. WHOLE: rows are multiples of four, aligned to them.
template <bool WHOLE, typename T>
SCSE_DEVICE void load_four(const T* p, int64_t inside, float (&v)[4]) {
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Pack {
    T of[4];
  };
  if constexpr (WHOLE) {
    Pack pack{};
    if (inside > 0) pack = *reinterpret_cast<const Pack*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(pack.of[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < inside ? to_float(p[i]) : 0.f;
  }
}

template <typename T>
SCSE_DEVICE bool rows_are_whole(const T* matrix, int columns) {
  return columns % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
}

// Threads that share a row of `columns` elements, four to each: a power of two, at most `most`.
SCSE_DEVICE int lanes_of(int columns, int most) {
  return columns <= 4 ? 1 : min(most, 1 << (32 - __clz((columns - 1) / 4)));
}

// body(r, sum_k matrix[r, k] * vector[k]) for each row r, by one thread. Groups of `lanes` threads
// take four rows at a time.
template <bool WHOLE, typename T, typename Body>
SCSE_DEVICE void multiply(const T* matrix, const float* vector, int rows, int columns,
                          const Body& body) {
  const int lanes = lanes_of(columns, 32);
  const Place me(lanes);
  for (int first = 0; first < rows; first += me.rows * 4) {
    const int r = first + me.row * 4;
    float sum[4] = {};
    for (int k = me.lane * 4; k < columns; k += lanes * 4) {
      float m[4][4], v[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        load_four<WHOLE>(matrix + int64_t(r + u) * columns + k, r + u < rows ? columns - k : 0,
                         m[u]);
      }
      load_some(vector + k, columns - k, v);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[u] += m[u][i] * v[i];
      }
    }
    sum_lanes(sum, lanes);
    if (me.lane == 0) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        if (r + u < rows) body(r + u, sum[u]);
      }
    }
  }
}

// body(k, sum_r vector[r] * matrix[r, k]) for each column k, by one thread. A null vector is all
// ones. `shared`: kExciteThreads / 32 * 4 * 32 floats at least, and as many for wider rows.
template <bool WHOLE, typename T, typename Body>
SCSE_DEVICE void multiply_transposed(const T* matrix, const float* vector, int rows, int columns,
                                     float* shared, const Body& body) {
  const int lanes = lanes_of(columns, blockDim.x);
  const Place me(lanes);
  // Rows of threads that are left to be summed after a warp has summed its own.
  const int left = lanes < 32 ? blockDim.x / 32 : me.rows;
  for (int first = 0; first < columns; first += lanes * 4) {
    const int k = first + me.lane * 4;
    float sum[4] = {};
    for (int r = me.row; r < rows; r += me.rows * 4) {
      float m[4][4], v[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int row = r + u * me.rows;
        load_four<WHOLE>(matrix + int64_t(row) * columns + k, row < rows ? columns - k : 0, m[u]);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int row = r + u * me.rows;
        v[u] = vector == nullptr ? 1.f : row < rows ? vector[row] : 0.f;
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += m[u][i] * v[u];
      }
    }
    sum_groups(sum, lanes);
    __syncthreads();  // the last sums have been read
    const int row = lanes < 32 ? threadIdx.x / 32 : me.row;
    if (lanes >= 32 || threadIdx.x % 32 < lanes) {
      reinterpret_cast<float4*>(shared)[row * lanes + me.lane] =
          make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < lanes * 4 && first + i < columns; i += blockDim.x) {
      float total = 0;
      for (int part = 0; part < left; ++part) total += shared[part * lanes * 4 + i];
      body(first + i, total);
    }
  }
}

// The same for a matrix of partial sums and for a parameter.
template <typename Body>
SCSE_DEVICE void sum_strips(const float* partial, int strips, int columns, float* shared,
                            const Body& body) {
  if (rows_are_whole(partial, columns)) {
    multiply_transposed<true>(partial, nullptr, strips, columns, shared, body);
  } else {
    multiply_transposed<false>(partial, nullptr, strips, columns, shared, body);
  }
}
template <typename Body>
SCSE_DEVICE void multiply(const void* matrix, Dtype dtype, const float* vector, int rows,
                          int columns, const Body& body) {
  typed(matrix, dtype, [&](auto* elements) {
    if (rows_are_whole(elements, columns)) {
      multiply<true>(elements, vector, rows, columns, body);
    } else {
      multiply<false>(elements, vector, rows, columns, body);
    }
  });
}
template <typename Body>
SCSE_DEVICE void multiply_transposed(const void* matrix, Dtype dtype, const float* vector, int rows,
                                     int columns, float* shared, const Body& body) {
  typed(matrix, dtype, [&](auto* elements) {
    if (rows_are_whole(elements, columns)) {
      multiply_transposed<true>(elements, vector, rows, columns, shared, body);
    } else {
      multiply_transposed<false>(elements, vector, rows, columns, shared, body);
    }
  });
}

// A block for each sample.
__global__ void __launch_bounds__(kExciteThreads, 1)
    excite(const float* partial,  // [N, strips, C]: sums of x
           const void* w1,        // [Cr, C]
           const void* b1,        // [Cr] or null
           const void* w2,        // [C, Cr]
           const void* b2,        // [C] or null
           int dtypes,            // of the parameters, see dtypes.h
           float* pooled,         // [N, C]
           float* hidden,         // [N, Cr]
           float* hidden_slope,   // [N, Cr]: the activation's derivative
           float* channel_gate,   // [N, C]
           Activation activation, float activation_parameter, Gate gate, int channels,
           int hidden_channels, int64_t positions, int strips) {
  __shared__ __align__(16) float shared[kExciteThreads * 4];
  let_next_start();
  wait_for_previous();
  const int64_t n = blockIdx.x;
  partial += n * strips * channels;
  pooled += n * channels, channel_gate += n * channels;
  hidden += n * hidden_channels, hidden_slope += n * hidden_channels;

  sum_strips(partial, strips, channels, shared,
             [&](int c, float sum) { pooled[c] = sum / static_cast<float>(positions); });
  __syncthreads();
  multiply(w1, dtype_of(dtypes, Parameter::w1), pooled, hidden_channels, channels,
           [&](int j, float h) {
             if (b1 != nullptr) h += load_parameter(b1, dtype_of(dtypes, Parameter::b1), j);
             const Activated<float> a = activate(activation, activation_parameter, h);
             hidden[j] = a.value, hidden_slope[j] = a.slope;
           });
  __syncthreads();
  multiply(w2, dtype_of(dtypes, Parameter::w2), hidden, channels, hidden_channels,
           [&](int c, float excited) {
             if (b2 != nullptr) excited += load_parameter(b2, dtype_of(dtypes, Parameter::b2), c);
             channel_gate[c] = gate_of(gate, excited);
           });
}

// A block for each sample and branch that has sums to be added up.
__global__ void __launch_bounds__(kExciteThreads, 1)
    excite_backward(const float* partial,       // [N, strips, C]: for the channel gate, or null
                    const float* partial_ws,    // [N, strips, C]: sums of dq * x, or null
                    const float* partial_bs,    // [N, strips]: sums of dq
                    const void* w1,             // [Cr, C]
                    const void* w2,             // [C, Cr]
                    int dtypes,                 // of the parameters, see dtypes.h
                    const float* hidden_slope,  // [N, Cr]
                    const float* channel_gate,  // [N, C]
                    float* d_excited,           // [N, C]: gradient before the channel gate
                    float* d_hidden,            // [N, Cr]: gradient before the activation
                    float* d_mean,              // [N, C]: the pooled value's gradient / S, or null
                    float* sample_ws,           // [N, C]: the sample's part of dws
                    float* sample_bs,           // [N]: the sample's part of dbs
                    Gate gate, int channels, int hidden_channels, int64_t positions, int strips) {
  __shared__ __align__(16) float shared[kExciteThreads * 4];
  let_next_start();
  wait_for_previous();
  const int branches = (partial != nullptr) + (partial_ws != nullptr);
  const int64_t n = blockIdx.x / branches, sums = n * strips * channels;
  if (partial_ws != nullptr && blockIdx.x % branches == 0) {
    sum_strips(partial_ws + sums, strips, channels, shared,
               [&](int c, float sum) { sample_ws[n * channels + c] = sum; });
    sum_strips(partial_bs + n * strips, strips, 1, shared,
               [&](int, float sum) { sample_bs[n] = sum; });
    return;
  }
  hidden_slope += n * hidden_channels, channel_gate += n * channels;
  d_excited += n * channels, d_hidden += n * hidden_channels;
  sum_strips(partial + sums, strips, channels, shared,
             [&](int c, float sum) { d_excited[c] = gate_gradient(gate, sum, channel_gate[c]); });
  __syncthreads();
  multiply_transposed(w2, dtype_of(dtypes, Parameter::w2), d_excited, channels, hidden_channels,
                      shared, [&](int j, float d) { d_hidden[j] = through(hidden_slope[j], d); });
  if (d_mean == nullptr) return;
  __syncthreads();
  multiply_transposed(
      w1, dtype_of(dtypes, Parameter::w1), d_hidden, hidden_channels, channels, shared,
      [&](int c, float d) { d_mean[n * channels + c] = d / static_cast<float>(positions); });
}

}  // namespace scse::cuda
