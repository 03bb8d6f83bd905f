// The excitation of many weights, and its backward. With a block to a sample all weights would come
// through one multiprocessor, and again for each sample. Here each of the two layers is a launch. A
// block has some of a layer's results for SHARE samples, so weights are read once for so many.
//
// The first launch sums over channels. A block of it sums over a slice of them, so that it adds up
// the strips' partial sums of its own channels alone. The second launch adds up the slices' results
// where it reads them. No bit depends on how many samples there are, or on which share a block.
//
// Each sample's vector is prepared by some of a block's warps; then all of them multiply.
#pragma once

#include "../combine.cuh"
#include "../overlap.cuh"
#include "../sums.cuh"
#include "tile.h"
#include "weights.cuh"

namespace scse::cuda {

constexpr int kWarps = kLayerThreads / 32;

SCSE_DEVICE int round_up(int size, int step) { return (size + step - 1) / step * step; }

// What a block has: a part of the layer's results, a slice of the sum, SHARE samples. A warp
// prepares the vector of one, or every kWarps / SHARE-th piece of it.
template <int SHARE>
struct Work {
  int part, slice;
  int own, piece;  // of this warp: which of the block's samples, and which pieces
  int64_t sample;
  bool exists;
  SCSE_DEVICE Work(int slices, int samples) {
    const unsigned all = (samples + SHARE - 1) / SHARE, block = blockIdx.x / slices;
    slice = blockIdx.x % slices, part = block / all;
    const int warp = threadIdx.x / 32;
    own = warp % SHARE, piece = warp / SHARE;
    first_ = static_cast<int64_t>(block % all) * SHARE, samples_ = samples;
    sample = first_ + own, exists = sample < samples;
  }
  // Calls body(n) if there is a sample number i of this block.
  template <typename Body>
  SCSE_DEVICE void with_sample(int i, const Body& body) const {
    if (first_ + i < samples_) body(first_ + i);
  }

 private:
  int64_t first_;
  int samples_;
};

// Where a sum needs nothing besides.
SCSE_DEVICE float nothing(int) { return 0; }

// The channels of a slice: whole fours, [first, second).
SCSE_DEVICE int2 slice_of(int channels, int slice) {
  const int each = (channels + 4 * kSlices - 1) / (4 * kSlices) * 4;
  return make_int2(min(channels, slice * each), min(channels, (slice + 1) * each));
}

// Sums the rows of a matrix over its columns [begin, end): every so many pieces of 32 of them are
// this warp's. Calls body(column, sum, more) for them and, with 0, for those up to begin + `count`
// or a few more; `more` is what ask(column) returned, which is asked for with the sums' own
// elements. Four lanes share four columns. PIECES at a time, four accesses of a thread are on their
// way.
template <bool WHOLE, int PIECES, int SHARE, typename Ask, typename Body>
SCSE_DEVICE void sum_columns(const Work<SHARE>& work, const float* matrix, int64_t pitch, int rows,
                             int begin, int end, int count, const Ask& ask, const Body& body) {
  constexpr int kRows = 4 / PIECES, kStep = 32 * (kWarps / SHARE);
  const Elements<float> from(matrix, Dtype::float32);
  const int lane = threadIdx.x % 32, part = lane % 4;
#pragma unroll 1
  for (int i = 32 * work.piece; i < count; i += PIECES * kStep) {
    const int k = begin + i + lane - part;
    float sum[PIECES][4] = {}, more[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; ++p) more[p] = ask(k + part + p * kStep);
#pragma unroll 1
    for (int top = part; top < rows; top += 4 * kRows) {
      Four<float, WHOLE> four[PIECES][kRows];
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          const int row = top + 4 * u, column = k + p * kStep;
          four[p][u].load(from, row * pitch + column, row < rows ? end - column : 0);
        }
      }
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[p][j] += four[p][u].of(j);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
      if (i + p * kStep >= count) break;
      sum_and_scatter(sum[p], 4);
      body(k + part + p * kStep, sum[p][0], more[p]);
    }
  }
}

// The same for the strips' partial sums of this warp's sample. Where a block has eight samples, a
// warp has one alone, and so more pieces than most maps have strips.
template <bool WHOLE, int SHARE, typename Ask, typename Body>
SCSE_DEVICE void sum_strips(const Work<SHARE>& work, const float* partial, int strips, int channels,
                            int begin, int end, int count, const Ask& ask, const Body& body) {
  sum_columns<WHOLE, SHARE == 8 ? 2 : 1>(work, partial + work.sample * strips * channels, channels,
                                         work.exists ? strips : 0, begin, end, count, ask, body);
}

// The same for what the slices have left for [begin, end) hidden channels.
template <int SHARE, typename Ask, typename Body>
SCSE_DEVICE void sum_slices(const Work<SHARE>& work, const Layers& layers, int begin, int end,
                            int count, const Ask& ask, const Body& body) {
  sum_columns<true, 2>(work, layers.row(0, work.sample), int64_t(layers.samples) * layers.pitch,
                       work.exists ? kSlices : 0, begin, end, count, ask, body);
}

// bias[r] + sum_k matrix[r, k] * vector[n, k] for SHARE samples n. A group of 1 << bits lanes has
// four rows r, and a lane of it kFours fours of each row at a time.
template <typename P, bool WHOLE, int SHARE>
class RowProduct {
 public:
  // Asks for the first weights. `span`: of k.
  SCSE_DEVICE RowProduct(const void* matrix, Dtype dtype, int rows, int columns, int bits, int part,
                         int2 span)
      : matrix_(matrix, dtype),
        rows_(rows),
        columns_(columns),
        end_(span.y),
        bits_(bits),
        lane_(threadIdx.x & ((1 << bits) - 1)),
        row_((part * (kLayerThreads >> bits) + static_cast<int>(threadIdx.x >> bits)) * 4) {
    if constexpr (!std::is_void_v<P>) {
      const int top = part * (kLayerThreads >> bits) * 4;
      prefetch(matrix_.p + int64_t(top) * columns + span.x, columns * sizeof(P),
               min(rows - top, kLayerThreads >> bits << 2), (span.y - span.x) * sizeof(P),
               sizeof(next_));
    }
    load(span.x);
  }
  // Asks for the bias, which may be null.
  SCSE_DEVICE void load_bias(const Elements<P>& bias) {
    if (bias.p == nullptr) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int r = row_ + number(i) % 4;
      if (i < 1 << each() && r < rows_) bias_[i] = bias.at(r);
    }
  }
  // Vectors must have zeros up to a multiple of it.
  SCSE_DEVICE int granule() const { return 4 << bits_; }
  // Adds what k in [begin, end) make. `vectors`: [SHARE][kChunk], from `begin` on, 0 beyond `end`.
  SCSE_DEVICE void add(const float* vectors, int begin, int end) {
#pragma unroll 1
    for (int k = begin; k < end; k += kFours * granule()) {
#pragma unroll
      for (int u = 0; u < kFours; ++u) {
        if (u > 0 && k + u * granule() >= end) break;
        const float* p = vectors + k - begin + (((u << bits_) + lane_) << 2);
#pragma unroll
        for (int n = 0; n < SHARE; ++n) {
          const float4 v = *reinterpret_cast<const float4*>(p + n * kChunk);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float& sum = sum_[n * 4 + r];
            sum += next_[u][r].of(0) * v.x;
            sum += next_[u][r].of(1) * v.y;
            sum += next_[u][r].of(2) * v.z;
            sum += next_[u][r].of(3) * v.w;
          }
        }
      }
      if (k + kFours * granule() < end_) load(k + kFours * granule());
    }
  }
  // Calls body(n, r, sum), each by one lane. All lanes of the warp call this.
  template <typename Body>
  SCSE_DEVICE void finish(const Body& body) {
    sum_and_scatter<true>(sum_, 1 << bits_);
    if (lane_ & ((1 << same()) - 1)) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i < 1 << each()) body(number(i) / 4, row_ + number(i) % 4, sum_[i] + bias_[i]);
    }
  }

 private:
  static constexpr int kFours = SHARE == 8 ? 2 : 4;
  static constexpr int kSums = SHARE == 8 ? 5 : 3;  // their logarithm
  static_assert(SHARE * 4 == 1 << kSums);
  static constexpr int kOwn = 1 << (kSums > kLeastLaneBits ? kSums - kLeastLaneBits : 0);
  // Sums of a lane, or else lanes of a sum, as logarithms; and the number of a lane's i-th sum.
  SCSE_DEVICE int each() const { return max(0, kSums - bits_); }
  SCSE_DEVICE int same() const { return max(0, bits_ - kSums); }
  SCSE_DEVICE int number(int i) const { return (lane_ >> same() << each()) + i; }
  SCSE_DEVICE void load(int k) {
#pragma unroll
    for (int u = 0; u < kFours; ++u) {
      if (u > 0 && k + u * granule() >= end_) break;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = k + (((u << bits_) + lane_) << 2);
        next_[u][r].load(matrix_, int64_t(row_ + r) * columns_ + at,
                         row_ + r < rows_ ? end_ - at : 0);
      }
    }
  }
  const Elements<P> matrix_;
  const int rows_, columns_, end_, bits_, lane_, row_;
  Four<P, WHOLE> next_[kFours][4];
  float sum_[SHARE * 4] = {}, bias_[kOwn] = {};
};

// sum_r matrix[r, k] * vector[n, r] for SHARE samples n. A lane has four columns k, and a warp
// every eighth row r.
template <typename P, bool WHOLE, int SHARE>
class ColumnProduct {
 public:
  static constexpr int kAhead = SHARE == 8 ? 8 : 16;  // rows of a warp at a time
  // Asks for the first weights. `span`: of r.
  SCSE_DEVICE ColumnProduct(const void* matrix, Dtype dtype, int columns, int part, int2 span)
      : matrix_(matrix, dtype),
        columns_(columns),
        end_(span.y),
        column_(part * kColumns + static_cast<int>(threadIdx.x % 32) * 4) {
    if constexpr (!std::is_void_v<P>) {
      const int left = part * kColumns;
      prefetch(matrix_.p + int64_t(span.x) * columns + left, columns * sizeof(P), span.y - span.x,
               min(columns - left, kColumns) * sizeof(P), sizeof(next_));
    }
    load(span.x);
  }
  // How many r a block has at a time.
  static constexpr int kStep = kAhead * kWarps;
  // Adds what r in [begin, end) make. `vectors`: [kChunk][SHARE], from `begin` on, 0 beyond `end`.
  SCSE_DEVICE void add(const float* vectors, int begin, int end) {
#pragma unroll 1
    for (int top = begin; top < end; top += kStep) {
      const float* p = vectors + (top - begin + static_cast<int>(threadIdx.x / 32)) * SHARE;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        float v[SHARE];
#pragma unroll
        for (int n = 0; n < SHARE; ++n) v[n] = p[u * kWarps * SHARE + n];
#pragma unroll
        for (int n = 0; n < SHARE; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum_[n * 4 + i] += next_[u].of(i) * v[n];
        }
      }
      if (top + kStep < end_) load(top + kStep);
    }
  }
  // Calls body(k, sums of the columns from k on), by warp n for sample n. All threads of the block
  // call this. `shared`: SHARE * 4 floats for each thread.
  template <typename Body>
  SCSE_DEVICE void finish(float* shared, const Body& body) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // the vectors have been read
#pragma unroll
    for (int i = 0; i < SHARE * 4; ++i) shared[(warp * SHARE * 4 + i) * 32 + lane] = sum_[i];
    __syncthreads();
    if (warp >= SHARE) return;
    float total[4] = {};
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[i] += shared[((other * SHARE + warp) * 4 + i) * 32 + lane];
      }
    }
    body(column_, total);
  }

 private:
  SCSE_DEVICE void load(int top) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int row = top + static_cast<int>(threadIdx.x / 32) + u * kWarps;
      next_[u].load(matrix_, int64_t(row) * columns_ + column_,
                    row < end_ ? columns_ - column_ : 0);
    }
  }
  const Elements<P> matrix_;
  const int columns_, end_, column_;
  Four<P, WHOLE> next_[kAhead];
  float sum_[SHARE * 4] = {};
};

// w1's product with the pooled values. Reads the partial sums of a block's own channels, and its
// weights, once.
template <typename P, bool WHOLE, int SHARE>
__global__ void __launch_bounds__(kLayerThreads, SHARE == 8 ? 2 : 1)
    excite_hidden(const __grid_constant__ ExciteArguments a) {
  __shared__ __align__(16) float vectors[SHARE * kChunk];
  let_next_start();
  const Work<SHARE> work(kSlices, a.layers.samples);
  const int channels = a.channels, hidden_channels = a.hidden_channels;
  const int2 own = slice_of(channels, work.slice);
  RowProduct<P, WHOLE, SHARE> product(a.w1, dtype_of(a.dtypes, Parameter::w1), hidden_channels,
                                      channels, a.layers.bits_of_slice, work.part, own);
  float* const pooled = a.pooled + work.sample * channels;
  float* const mine = vectors + work.own * kChunk;

  wait_for_previous();
#pragma unroll 1
  for (int k = own.x; k < own.y; k += kChunk) {
    const int end = min(own.y, k + kChunk);
    if (k > own.x) __syncthreads();
    sum_strips<WHOLE>(work, a.partial, a.strips, channels, k, end,
                      round_up(end - k, product.granule()), nothing, [&](int c, float sum, float) {
                        const float mean = sum / static_cast<float>(a.positions);
                        mine[c - k] = mean;
                        if (work.part == 0 && work.exists && c < end) pooled[c] = mean;
                      });
    __syncthreads();
    product.add(vectors, k, end);
  }
  product.finish([&](int i, int j, float sum) {
    if (j >= a.layers.pitch) return;
    work.with_sample(i, [&](int64_t n) { a.layers.row(work.slice, n)[j] = sum; });
  });
}

// The activation, and the channel gates. Reads the slices' results, and a block's own weights,
// once.
template <typename P, bool WHOLE, int SHARE>
__global__ void __launch_bounds__(kLayerThreads, SHARE == 8 ? 2 : 1)
    excite_gates(const __grid_constant__ ExciteArguments a) {
  __shared__ __align__(16) float vectors[SHARE * kChunk];
  let_next_start();
  const Work<SHARE> work(1, a.layers.samples);
  const int channels = a.channels, hidden_channels = a.hidden_channels;
  RowProduct<P, WHOLE, SHARE> product(a.w2, dtype_of(a.dtypes, Parameter::w2), channels,
                                      hidden_channels, a.layers.bits_of_hidden, work.part,
                                      make_int2(0, hidden_channels));
  const Elements<P> b1(a.b1, dtype_of(a.dtypes, Parameter::b1));
  product.load_bias({a.b2, dtype_of(a.dtypes, Parameter::b2)});
  if constexpr (!std::is_void_v<P>) prefetch_row(b1.p, hidden_channels);
  float* const hidden = a.hidden + work.sample * hidden_channels;
  float* const hidden_slope = a.hidden_slope + work.sample * hidden_channels;
  float* const mine = vectors + work.own * kChunk;

  wait_for_previous();
#pragma unroll 1
  for (int k = 0; k < hidden_channels; k += kChunk) {
    const int end = min(hidden_channels, k + kChunk);
    if (k > 0) __syncthreads();
    const auto bias = [&](int j) { return b1.p != nullptr && j < end ? b1.at(j) : 0.f; };
    sum_slices(work, a.layers, k, end, round_up(end - k, product.granule()), bias,
               [&](int j, float sum, float b) {
                 if (j >= end) {
                   mine[j - k] = 0;
                   return;
                 }
                 const Activated<float> active =
                     activate(a.activation, a.activation_parameter, sum + b);
                 mine[j - k] = active.value;
                 if (work.part == 0 && work.exists) {
                   hidden[j] = active.value, hidden_slope[j] = active.slope;
                 }
               });
    __syncthreads();
    product.add(vectors, k, end);
  }
  product.finish([&](int i, int c, float excited) {
    if (c >= channels) return;
    const float gate = gate_of(a.gate, excited);
    work.with_sample(i, [&](int64_t n) { a.channel_gate[n * channels + c] = gate; });
  });
}

// w2's transposed product with the gradient before the gates; and, by blocks of their own, the sums
// of the spatial branch. Reads the partial sums of a block's own channels, and its weights, once.
template <typename P, bool WHOLE, int SHARE>
__global__ void __launch_bounds__(kLayerThreads, SHARE == 8 ? 2 : 1)
    excite_backward_hidden(const __grid_constant__ ExciteBackwardArguments a) {
  __shared__ __align__(16) float shared[kLayerThreads * SHARE * 4];
  let_next_start();
  const Work<SHARE> work(kSlices, a.layers.samples);
  const int channels = a.channels, hidden_channels = a.hidden_channels;
  const int64_t at = work.sample * channels;
  const int2 own = slice_of(channels, work.slice);
  if (work.part * kColumns >= hidden_channels) {
    wait_for_previous();
    sum_strips<WHOLE>(work, a.partial_ws, a.strips, channels, own.x, own.y, own.y - own.x, nothing,
                      [&](int c, float sum, float) {
                        if (work.exists && c < own.y) a.sums.sample_ws[at + c] = sum;
                      });
    if (work.slice > 0 || work.piece > 0 || !work.exists) return;
    float sum[1] = {};
    for (int i = threadIdx.x % 32; i < a.strips; i += 32) {
      sum[0] += a.partial_bs[work.sample * a.strips + i];
    }
    sum_lanes(sum, 32);
    if (threadIdx.x % 32 == 0) a.sums.sample_bs[work.sample] = sum[0];
    return;
  }
  ColumnProduct<P, WHOLE, SHARE> product(a.w2, dtype_of(a.dtypes, Parameter::w2), hidden_channels,
                                         work.part, own);
  if (work.exists) prefetch_row(a.channel_gate + at + own.x, own.y - own.x);
  float* const mine = shared + work.own;

  wait_for_previous();
#pragma unroll 1
  for (int k = own.x; k < own.y; k += kChunk) {
    const int end = min(own.y, k + kChunk);
    if (k > own.x) __syncthreads();
    const auto gate = [&](int c) { return work.exists && c < end ? a.channel_gate[at + c] : 0.f; };
    sum_strips<WHOLE>(work, a.partial, a.strips, channels, k, end, round_up(end - k, product.kStep),
                      gate, [&](int c, float sum, float g) {
                        const bool is_one = work.exists && c < end;
                        const float d = is_one ? gate_gradient(a.gate, sum, g) : 0.f;
                        mine[(c - k) * SHARE] = d;
                        if (work.part == 0 && is_one) a.sums.d_excited[at + c] = d;
                      });
    __syncthreads();
    product.add(shared, k, end);
  }
  product.finish(shared, [&](int j, const float (&sums)[4]) {
    if (!work.exists || j >= a.layers.pitch) return;
    *reinterpret_cast<float4*>(a.layers.row(work.slice, work.sample) + j) =
        make_float4(sums[0], sums[1], sums[2], sums[3]);
  });
}

// The gradient before the activation, and w1's transposed product with it. Reads the slices'
// results, and a block's own weights, once.
template <typename P, bool WHOLE, int SHARE>
__global__ void __launch_bounds__(kLayerThreads, SHARE == 8 ? 2 : 1)
    excite_backward_mean(const __grid_constant__ ExciteBackwardArguments a) {
  __shared__ __align__(16) float shared[kLayerThreads * SHARE * 4];
  let_next_start();
  const Work<SHARE> work(1, a.layers.samples);
  const int channels = a.channels, hidden_channels = a.hidden_channels;
  // Without d_mean nothing is multiplied.
  ColumnProduct<P, WHOLE, SHARE> product(a.w1, dtype_of(a.dtypes, Parameter::w1), channels,
                                         work.part,
                                         make_int2(0, a.d_mean == nullptr ? 0 : hidden_channels));
  const int64_t at = work.sample * hidden_channels;
  if (work.exists) prefetch_row(a.hidden_slope + at, hidden_channels);
  float* const mine = shared + work.own;

  wait_for_previous();
#pragma unroll 1
  for (int k = 0; k < hidden_channels; k += kChunk) {
    const int end = min(hidden_channels, k + kChunk);
    if (k > 0) __syncthreads();
    const auto slope = [&](int j) { return work.exists && j < end ? a.hidden_slope[at + j] : 0.f; };
    sum_slices(work, a.layers, k, end, round_up(end - k, product.kStep), slope,
               [&](int j, float sum, float s) {
                 const float d = work.exists && j < end ? through(s, sum) : 0.f;
                 mine[(j - k) * SHARE] = d;
                 if (work.part == 0 && work.exists && j < end) a.sums.d_hidden[at + j] = d;
               });
    if (a.d_mean == nullptr) continue;
    __syncthreads();
    product.add(shared, k, end);
  }
  if (a.d_mean == nullptr) return;
  product.finish(shared, [&](int c, const float (&sums)[4]) {
    if (!work.exists) return;
    float* const d_mean = a.d_mean + work.sample * channels;
    float means[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) means[i] = sums[i] / static_cast<float>(a.positions);
    if (WHOLE && c < channels) {
      *reinterpret_cast<float4*>(d_mean + c) = make_float4(means[0], means[1], means[2], means[3]);
    } else if (!WHOLE) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i < channels) d_mean[c + i] = means[i];
      }
    }
  });
}

}  // namespace scse::cuda
