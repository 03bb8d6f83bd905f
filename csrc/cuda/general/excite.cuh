// The channel excitation, two small dense layers per sample, and its backward: a block to a sample.
// Where weights are many: excite_layers.cuh.
//
// These kernels mostly wait, for memory and for their own code. So the code is compiled for each
// dtype and stays short. And weights are asked for before the kernel before has ended, which
// does not write them. A thread's first ones go to its registers, all others to L2.
#pragma once

#include "block.cuh"
#include "../combine.cuh"
#include "../overlap.cuh"
#include "weights.cuh"

namespace scse::cuda {

template <bool WHOLE>
SCSE_DEVICE float4 four_of(const float* vector, int k, int size) {
  if (WHOLE)
    return k < size ? *reinterpret_cast<const float4*>(vector + k) : make_float4(0, 0, 0, 0);
  return make_float4(k < size ? vector[k] : 0.f, k + 1 < size ? vector[k + 1] : 0.f,
                     k + 2 < size ? vector[k + 2] : 0.f, k + 3 < size ? vector[k + 3] : 0.f);
}

// How many threads share a row of `columns` elements, four to each: a power of two, at most `most`.
// Returns the logarithm, since divisions are long code.
SCSE_DEVICE int lane_bits_of(int columns, int most) {
  return columns <= 4 ? 0 : min(31 - __clz(most), 32 - __clz((columns - 1) >> 2));
}

template <typename P>
SCSE_DEVICE void prefetch_all(const P* matrix, int rows, int columns) {
  prefetch(matrix, 128, rows * columns * static_cast<int>(sizeof(P)) / 128, 128, 32);
}

// sum_k matrix[r, k] * vector[k] for all rows r. A group of threads, four or more, takes four rows
// at a time. Where rows are long it takes one row, and four times as much of it.
template <typename P, bool WHOLE>
struct Rows {
  const Elements<P> matrix, bias;
  const int columns, rows, bits;
  const bool tall;  // four rows
  int row, base = 0;
  Four<P, WHOLE> next[4];
  float next_bias;

  SCSE_DEVICE Rows(const void* matrix, Dtype dtype, const void* bias, Dtype bias_dtype, int rows,
                   int columns)
      : matrix(matrix, dtype),
        bias(bias, bias_dtype),
        columns(columns),
        rows(rows),
        bits(max(2, lane_bits_of(columns, 32))),
        tall(columns <= 256),
        row(static_cast<int>(threadIdx.x) >> bits << (tall ? 2 : 0)) {
    if constexpr (!std::is_void_v<P>) prefetch_all(this->matrix.p, rows, columns);
    load();
  }
  SCSE_DEVICE int lane() const { return threadIdx.x & ((1 << bits) - 1); }
  // From one access of a thread to the next.
  SCSE_DEVICE int down() const { return tall ? 1 : 0; }
  SCSE_DEVICE int across() const { return tall ? 0 : 4 << bits; }
  SCSE_DEVICE void load() {
    const int k = base + lane() * 4;
    int64_t at = int64_t(row) * columns + k;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      next[u].load(matrix, at, row + u * down() < rows ? columns - k - u * across() : 0);
      at += tall ? columns : across();
    }
    const int r = row + min(lane(), 3) * down();
    next_bias = bias.p != nullptr && r < rows ? bias.at(r) : 0.f;
  }
  // body(r, sum), by one thread for each r.
  template <typename Body>
  SCSE_DEVICE void matvec(const float* vector, const Body& body) {
    const int step = tall ? 4 << bits : 16 << bits;
    const int down_all = static_cast<int>(blockDim.x) >> bits << (tall ? 2 : 0);
    int top = 0;
    float sum[4] = {};
#pragma unroll 1
    while (top < rows) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float4 v = four_of<WHOLE>(vector, base + lane() * 4 + u * across(), columns);
        sum[u] += next[u].of(0) * v.x;
        sum[u] += next[u].of(1) * v.y;
        sum[u] += next[u].of(2) * v.z;
        sum[u] += next[u].of(3) * v.w;
      }
      base += step;
      if (base >= columns) {
        sum_lanes(sum, 1 << bits);
        // Every lane has every sum: the first four take a row each.
        const int u = lane(), r = row + u;
        float total = u == 0 ? sum[0] : u == 1 ? sum[1] : u == 2 ? sum[2] : sum[3];
        if (!tall) total += sum[1] + sum[2] + sum[3];
        if (u < (tall ? 4 : 1) && r < rows) body(r, total + next_bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = 0;
        base = 0, row += down_all, top += down_all;
      }
      if (top < rows) load();
    }
  }
};

// sum_r vector[r] * matrix[r, k] for all columns k. A null vector is all ones.
template <typename P, bool WHOLE>
struct Columns {
  const Elements<P> matrix;
  const int rows, columns, bits;
  int first = 0, row;
  Four<P, WHOLE> next[4];

  SCSE_DEVICE Columns(const void* matrix, Dtype dtype, int rows, int columns)
      : matrix(matrix, dtype),
        rows(rows),
        columns(columns),
        bits(lane_bits_of(columns, blockDim.x)),
        row(threadIdx.x >> bits) {
    if constexpr (!std::is_void_v<P>) prefetch_all(this->matrix.p, rows, columns);
    load();
  }
  SCSE_DEVICE int lane() const { return threadIdx.x & ((1 << bits) - 1); }
  SCSE_DEVICE void load() {
    const int step = blockDim.x >> bits, k = first + lane() * 4;
    int64_t at = int64_t(row) * columns + k;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      next[u].load(matrix, at, row + u * step < rows ? columns - k : 0);
      at += int64_t(step) * columns;
    }
  }
  // body(k, sum), by one thread for each k. `shared`: four floats for each thread.
  template <typename Body>
  SCSE_DEVICE void vecmat(const float* vector, float* shared, const Body& body) {
    const int step = blockDim.x >> bits;
    // Rows of threads that are left to be summed after a warp has summed its own.
    const int left = blockDim.x >> max(5, bits);
    int top = 0;
    float sum[4] = {};
#pragma unroll 1
    while (first < columns) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int r = row + u * step;
        const float v = r < rows ? vector == nullptr ? 1.f : vector[r] : 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += next[u].of(i) * v;
      }
      top += 4 * step, row += 4 * step;
      if (top >= rows) {
        sum_groups(sum, 1 << bits);
        __syncthreads();  // the last sums have been read
        if (bits >= 5 || threadIdx.x % 32 < 1 << bits) {
          reinterpret_cast<float4*>(shared)[(threadIdx.x >> max(5, bits) << bits) + lane()] =
              make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < 4 << bits && first + i < columns; i += blockDim.x) {
          float total = 0;
#pragma unroll 4
          for (int part = 0; part < left; ++part) total += shared[(part << bits) * 4 + i];
          body(first + i, total);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = 0;
        top = 0, row = threadIdx.x >> bits, first += 4 << bits;
      }
      if (first < columns) load();
    }
  }
};

// A block for each sample.
template <typename P, bool WHOLE>
__global__ void __launch_bounds__(kExciteThreads, 1)
    excite(const __grid_constant__ ExciteArguments a) {
  __shared__ __align__(16) float shared[kExciteThreads * 4];
  extern __shared__ __align__(16) float vectors[];
  let_next_start();
  const int channels = a.channels, hidden_channels = a.hidden_channels;
  const int64_t n = blockIdx.x;
  Rows<P, WHOLE> first(a.w1, dtype_of(a.dtypes, Parameter::w1), a.b1,
                       dtype_of(a.dtypes, Parameter::b1), hidden_channels, channels);
  Rows<P, WHOLE> second(a.w2, dtype_of(a.dtypes, Parameter::w2), a.b2,
                        dtype_of(a.dtypes, Parameter::b2), channels, hidden_channels);
  const float* const partial = a.partial + n * a.strips * channels;
  float* const pooled = a.pooled + n * channels;
  float* const hidden = a.hidden + n * hidden_channels;
  float* const hidden_slope = a.hidden_slope + n * hidden_channels;
  float* const channel_gate = a.channel_gate + n * channels;
  float *const all_pooled = vectors, *const all_hidden = vectors + (channels + 3) / 4 * 4;

  wait_for_previous();
  Columns<float, WHOLE> sums(partial, Dtype::float32, a.strips, channels);
  sums.vecmat(nullptr, shared, [&](int c, float sum) {
    const float mean = sum / static_cast<float>(a.positions);
    all_pooled[c] = mean, pooled[c] = mean;
  });
  __syncthreads();
  first.matvec(all_pooled, [&](int j, float h) {
    const Activated<float> active = activate(a.activation, a.activation_parameter, h);
    all_hidden[j] = active.value;
    hidden[j] = active.value, hidden_slope[j] = active.slope;
  });
  __syncthreads();
  second.matvec(all_hidden,
                [&](int c, float excited) { channel_gate[c] = gate_of(a.gate, excited); });
}

// A block for each sample and branch that has sums to be added up.
template <typename P, bool WHOLE>
__global__ void __launch_bounds__(kExciteThreads, 1)
    excite_backward(const __grid_constant__ ExciteBackwardArguments a) {
  __shared__ __align__(16) float shared[kExciteThreads * 4];
  extern __shared__ __align__(16) float vectors[];
  let_next_start();
  const int channels = a.channels, hidden_channels = a.hidden_channels, strips = a.strips;
  const int branches = (a.partial != nullptr) + (a.partial_ws != nullptr);
  const int64_t n = branches == 2 ? blockIdx.x / 2 : blockIdx.x, sums_of = n * strips * channels;
  if (a.partial_ws != nullptr && (branches == 1 || blockIdx.x % 2 == 0)) {
    wait_for_previous();
    Columns<float, WHOLE> sums(a.partial_ws + sums_of, Dtype::float32, strips, channels);
    float* const sample_ws = a.sums.sample_ws + n * channels;
    sums.vecmat(nullptr, shared, [&](int c, float sum) { sample_ws[c] = sum; });
    float sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < strips; i += blockDim.x) sum += a.partial_bs[n * strips + i];
    sum = sum_block(sum, shared);
    if (threadIdx.x == 0) a.sums.sample_bs[n] = sum;
    return;
  }
  Columns<P, WHOLE> second(a.w2, dtype_of(a.dtypes, Parameter::w2), channels, hidden_channels);
  Columns<P, WHOLE> first(a.w1, dtype_of(a.dtypes, Parameter::w1), hidden_channels, channels);
  const float* const hidden_slope = a.hidden_slope + n * hidden_channels;
  const float* const channel_gate = a.channel_gate + n * channels;
  if (threadIdx.x < 32) {
    prefetch_row(channel_gate, channels), prefetch_row(hidden_slope, hidden_channels);
  }
  float* const d_excited = a.sums.d_excited + n * channels;
  float* const d_hidden = a.sums.d_hidden + n * hidden_channels;
  float *const all_excited = vectors, *const all_hidden = vectors + (channels + 3) / 4 * 4;

  wait_for_previous();
  Columns<float, WHOLE> sums(a.partial + sums_of, Dtype::float32, strips, channels);
  sums.vecmat(nullptr, shared, [&](int c, float sum) {
    const float d = gate_gradient(a.gate, sum, channel_gate[c]);
    all_excited[c] = d, d_excited[c] = d;
  });
  __syncthreads();
  second.vecmat(all_excited, shared, [&](int j, float d) {
    d = through(hidden_slope[j], d);
    all_hidden[j] = d, d_hidden[j] = d;
  });
  if (a.d_mean == nullptr) return;
  __syncthreads();
  first.vecmat(all_hidden, shared, [&](int c, float d) {
    a.d_mean[n * channels + c] = d / static_cast<float>(a.positions);
  });
}

}  // namespace scse::cuda
