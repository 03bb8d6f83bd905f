// The channel excitation, two small dense layers per sample, and its backward. A sample has one
// block; where its weights are many, a cluster of blocks, each with a part of both layers' results.
//
// These kernels mostly wait, for memory and for their own code. So the code is compiled for each
// dtype and stays short. And weights are asked for before the kernel before has ended, which
// does not write them. A thread's first ones go to its registers, all others to L2.
#pragma once

#include <cooperative_groups.h>

#include "block.cuh"
#include "../combine.cuh"
#include "../count.h"
#include "../overlap.cuh"
#include "../parameters.cuh"
#include "../problem.h"

namespace scse::cuda {

// The blocks that share a sample: a power of two of them.
class Team {
 public:
  SCSE_DEVICE Team() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    count_ = cluster.num_blocks(), rank_ = cluster.block_rank(), bits_ = 31 - __clz(count_);
    if (count_ > 1) cluster.barrier_arrive();
#endif
  }
  // Its number in the grid.
  SCSE_DEVICE unsigned number() const { return blockIdx.x >> bits_; }
  // This block's part of `size` values: whole fours, [first, second).
  SCSE_DEVICE int2 part(int size) const {
    const int each = (((size + count_ - 1) >> bits_) + 3) / 4 * 4;
    return make_int2(min(size, rank_ * each), min(size, (rank_ + 1) * each));
  }
  // Returns once the others' shared memory is there. All threads call this once, before `give`.
  SCSE_DEVICE void meet() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (count_ > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
  }
  // p[i] = value in every block's shared memory.
  SCSE_DEVICE void give(float* p, int i, float value) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll 1
    for (int block = 0; block < count_; ++block) {
      cooperative_groups::this_cluster().map_shared_rank(p, block)[i] = value;
    }
#else
    p[i] = value;
#endif
  }
  SCSE_DEVICE void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (count_ > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }

 private:
  int count_ = 1, bits_ = 0, rank_ = 0;
};

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

template <bool WHOLE>
SCSE_DEVICE float4 four_of(const float* vector, int k, int size) {
  if (WHOLE)
    return k < size ? *reinterpret_cast<const float4*>(vector + k) : make_float4(0, 0, 0, 0);
  return make_float4(k < size ? vector[k] : 0.f, k + 1 < size ? vector[k + 1] : 0.f,
                     k + 2 < size ? vector[k + 2] : 0.f, k + 3 < size ? vector[k + 3] : 0.f);
}

// Brings `rows` rows of `bytes` bytes to L2, unless a thread's first accesses are all there is.
SCSE_DEVICE void prefetch(const void* p, int64_t pitch, int rows, int bytes) {
  if (int64_t(rows) * bytes <= int64_t(blockDim.x) * 32) return;
#pragma unroll 1
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
#pragma unroll 1
    for (int byte = 0; byte < bytes; byte += 128) {
      const char* at = static_cast<const char*>(p) + row * pitch + byte;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    }
  }
}

// How many threads share a row of `columns` elements, four to each: a power of two, at most `most`.
// Returns the logarithm, since divisions are long code.
SCSE_DEVICE int lane_bits_of(int columns, int most) {
  return columns <= 4 ? 0 : min(31 - __clz(most), 32 - __clz((columns - 1) >> 2));
}

// sum_k matrix[r, k] * vector[k] for the rows r of a part. A group of threads, four or more, takes
// four rows at a time. Where rows are long it takes one row, and four times as much of it.
template <typename P, bool WHOLE>
struct Rows {
  const Elements<P> matrix, bias;
  const int columns, end, bits;
  const bool tall;  // four rows
  int row, base = 0;
  Four<P, WHOLE> next[4];
  float next_bias;

  SCSE_DEVICE Rows(const void* matrix, Dtype dtype, const void* bias, Dtype bias_dtype, int columns,
                   int2 part)
      : matrix(matrix, dtype),
        bias(bias, bias_dtype),
        columns(columns),
        end(part.y),
        bits(max(2, lane_bits_of(columns, 32))),
        tall(columns <= 256),
        row(part.x + (static_cast<int>(threadIdx.x) >> bits << (tall ? 2 : 0))) {
    if constexpr (!std::is_void_v<P>) {
      const int lines = (part.y - part.x) * columns * static_cast<int>(sizeof(P)) / 128;
      prefetch(this->matrix.p + int64_t(part.x) * columns, 128, lines, 128);
    }
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
      next[u].load(matrix, at, row + u * down() < end ? columns - k - u * across() : 0);
      at += tall ? columns : across();
    }
    const int r = row + min(lane(), 3) * down();
    next_bias = bias.p != nullptr && r < end ? bias.at(r) : 0.f;
  }
  // body(r, sum), by one thread for each r.
  template <typename Body>
  SCSE_DEVICE void matvec(const float* vector, int first, const Body& body) {
    const int step = tall ? 4 << bits : 16 << bits;
    const int rows = static_cast<int>(blockDim.x) >> bits << (tall ? 2 : 0);
    float sum[4] = {};
#pragma unroll 1
    while (first < end) {
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
        if (u < (tall ? 4 : 1) && r < end) body(r, total + next_bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = 0;
        base = 0, row += rows, first += rows;
      }
      if (first < end) load();
    }
  }
};

// sum_r vector[r] * matrix[r, k] for the columns k of a part. A null vector is all ones.
template <typename P, bool WHOLE>
struct Columns {
  const Elements<P> matrix;
  const int rows, columns, end, bits;
  int first, row;
  Four<P, WHOLE> next[4];

  SCSE_DEVICE Columns(const void* matrix, Dtype dtype, int rows, int columns, int2 part)
      : matrix(matrix, dtype),
        rows(rows),
        columns(columns),
        end(part.y),
        bits(lane_bits_of(part.y - part.x, blockDim.x)),
        first(part.x),
        row(threadIdx.x >> bits) {
    if constexpr (!std::is_void_v<P>) {
      constexpr int size = sizeof(P);
      prefetch(this->matrix.p + first, int64_t(columns) * size, rows, (end - first) * size);
    }
    load();
  }
  SCSE_DEVICE int lane() const { return threadIdx.x & ((1 << bits) - 1); }
  SCSE_DEVICE void load() {
    const int step = blockDim.x >> bits, k = first + lane() * 4;
    int64_t at = int64_t(row) * columns + k;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      next[u].load(matrix, at, row + u * step < rows ? end - k : 0);
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
    while (first < end) {
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
        for (int i = threadIdx.x; i < 4 << bits && first + i < end; i += blockDim.x) {
          float total = 0;
#pragma unroll 4
          for (int part = 0; part < left; ++part) total += shared[(part << bits) * 4 + i];
          body(first + i, total);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = 0;
        top = 0, row = threadIdx.x >> bits, first += 4 << bits;
      }
      if (first < end) load();
    }
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
  int64_t positions;
  Count channels, hidden_channels, strips;
  int dtypes;  // of the parameters, see dtypes.h
  Activation activation;
  float activation_parameter;
  Gate gate;
};

// A team for each sample. P void: vectors between the steps are in global memory, of any size.
template <typename P, bool WHOLE>
__global__ void __launch_bounds__(kExciteThreads, 1)
    excite(const __grid_constant__ ExciteArguments a) {
  __shared__ __align__(16) float shared[kExciteThreads * 4];
  extern __shared__ __align__(16) float vectors[];
  const Team team;
  let_next_start();
  const int channels = a.channels, hidden_channels = a.hidden_channels;
  const int64_t n = team.number();
  const int2 own = team.part(channels), own_hidden = team.part(hidden_channels);
  Rows<P, WHOLE> first(a.w1, dtype_of(a.dtypes, Parameter::w1), a.b1,
                       dtype_of(a.dtypes, Parameter::b1), channels, own_hidden);
  Rows<P, WHOLE> second(a.w2, dtype_of(a.dtypes, Parameter::w2), a.b2,
                        dtype_of(a.dtypes, Parameter::b2), hidden_channels, own);
  const float* const partial = a.partial + n * a.strips * channels;
  float *const pooled = a.pooled + n * channels, *const channel_gate =
                                                     a.channel_gate + n * channels;
  float* const hidden = a.hidden + n * hidden_channels;
  float* const hidden_slope = a.hidden_slope + n * hidden_channels;
  float* const all_pooled = std::is_void_v<P> ? pooled : vectors;
  float* const all_hidden = std::is_void_v<P> ? hidden : vectors + (channels + 3) / 4 * 4;

  wait_for_previous();
  Columns<float, WHOLE> sums(partial, Dtype::float32, a.strips, channels, make_int2(0, channels));
  sums.vecmat(nullptr, shared, [&](int c, float sum) {
    const float mean = sum / static_cast<float>(a.positions);
    all_pooled[c] = mean;
    if (!std::is_void_v<P> && c >= own.x && c < own.y) pooled[c] = mean;
  });
  team.meet();
  __syncthreads();
  first.matvec(all_pooled, own_hidden.x, [&](int j, float h) {
    const Activated<float> active = activate(a.activation, a.activation_parameter, h);
    if constexpr (!std::is_void_v<P>) team.give(all_hidden, j, active.value);
    hidden[j] = active.value, hidden_slope[j] = active.slope;
  });
  team.sync();
  second.matvec(all_hidden, own.x,
                [&](int c, float excited) { channel_gate[c] = gate_of(a.gate, excited); });
}

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
  int64_t positions;
  Count channels, hidden_channels, strips;
  int dtypes;  // of the parameters, see dtypes.h
  Gate gate;
};

// A team for each sample and branch that has sums to be added up.
template <typename P, bool WHOLE>
__global__ void __launch_bounds__(kExciteThreads, 1)
    excite_backward(const __grid_constant__ ExciteBackwardArguments a) {
  __shared__ __align__(16) float shared[kExciteThreads * 4];
  extern __shared__ __align__(16) float vectors[];
  const Team team;
  let_next_start();
  const int channels = a.channels, hidden_channels = a.hidden_channels, strips = a.strips;
  const int branches = (a.partial != nullptr) + (a.partial_ws != nullptr);
  const unsigned number = team.number();
  const int64_t n = branches == 2 ? number / 2 : number, sums_of = n * strips * channels;
  const int2 own = team.part(channels), own_hidden = team.part(hidden_channels);
  if (a.partial_ws != nullptr && (branches == 1 || number % 2 == 0)) {
    wait_for_previous();
    Columns<float, WHOLE> sums(a.partial_ws + sums_of, Dtype::float32, strips, channels, own);
    float* const sample_ws = a.sums.sample_ws + n * channels;
    sums.vecmat(nullptr, shared, [&](int c, float sum) { sample_ws[c] = sum; });
    if (own.x > 0) return team.meet();
    float sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < strips; i += blockDim.x) sum += a.partial_bs[n * strips + i];
    sum = sum_block(sum, shared);
    if (threadIdx.x == 0) a.sums.sample_bs[n] = sum;
    return team.meet();
  }
  Columns<P, WHOLE> second(a.w2, dtype_of(a.dtypes, Parameter::w2), channels, hidden_channels,
                           own_hidden);
  Columns<P, WHOLE> first(a.w1, dtype_of(a.dtypes, Parameter::w1), hidden_channels, channels, own);
  const float* const hidden_slope = a.hidden_slope + n * hidden_channels;
  const float* const channel_gate = a.channel_gate + n * channels;
  float* const d_excited = a.sums.d_excited + n * channels;
  float* const d_hidden = a.sums.d_hidden + n * hidden_channels;
  float* const all_excited = std::is_void_v<P> ? d_excited : vectors;
  float* const all_hidden = std::is_void_v<P> ? d_hidden : vectors + (channels + 3) / 4 * 4;

  wait_for_previous();
  Columns<float, WHOLE> sums(a.partial + sums_of, Dtype::float32, strips, channels,
                             make_int2(0, channels));
  sums.vecmat(nullptr, shared, [&](int c, float sum) {
    const float d = gate_gradient(a.gate, sum, channel_gate[c]);
    all_excited[c] = d;
    if (!std::is_void_v<P> && c >= own.x && c < own.y) d_excited[c] = d;
  });
  team.meet();
  __syncthreads();
  second.vecmat(all_excited, shared, [&](int j, float d) {
    d = through(hidden_slope[j], d);
    if constexpr (!std::is_void_v<P>) team.give(all_hidden, j, d);
    d_hidden[j] = d;
  });
  team.sync();
  if (a.d_mean == nullptr) return;
  first.vecmat(all_hidden, shared, [&](int c, float d) {
    a.d_mean[n * channels + c] = d / static_cast<float>(a.positions);
  });
}

}  // namespace scse::cuda
