// What the on-chip kernels share: a sample lies in the shared memory of a cluster of blocks.
//
// Each block has all channels of a run of positions, its slice: a matrix whose rows are channels
// and columns positions (contiguous maps), or the other way round (channels_last maps). So sums
// over channels are a block's own, and sums over positions are added up over the cluster.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include "memory.h"
#include "../parameters.cuh"
#include "../sums.cuh"
#include "../vector.cuh"

// Compiled for older devices the kernels are empty; nobody launches them there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SCSE_HAS_CLUSTERS
#endif

namespace scse::cuda::on_chip {

SCSE_DEVICE int thread() { return threadIdx.x; }
SCSE_DEVICE int threads() { return blockDim.x; }

// Calls body(row, column) for all of rows x columns, spread over the block's threads.
template <typename Body>
SCSE_DEVICE void spread(int rows, int columns, const Body& body) {
  if (columns == 0) return;
  const unsigned across = min(columns, threads());
  const int down = threads() / across, first = thread() / across;
  if (first >= down) return;
  for (int column = thread() % across; column < columns; column += across) {
#pragma unroll 4
    for (int row = first; row < rows; row += down) body(row, column);
  }
}

// A large slice arrives in parts, some rows each, so that sums over the first are formed while the
// last is on its way.
struct Parts {
  const int rows, count, each;
  SCSE_DEVICE Parts(int rows, int vectors)
      : rows(rows),
        count(rows * vectors >= 8 * threads() ? 4 : 1),
        each((rows + count - 1) / static_cast<unsigned>(count)) {}

  SCSE_DEVICE int begin(int part) const { return min(rows, part * each); }
  SCSE_DEVICE int end(int part) const { return begin(part + 1); }
  // Each part's requests are one commit.
  SCSE_DEVICE void wait(int part) const {
    if (count == 1) {
      __pipeline_wait_prior(0);
    } else {
      __pipeline_wait_prior(3 - part);
    }
    __syncthreads();
  }
};

// The size of a slice. In shared memory rows are padded to whole vectors of W elements, with zeros.
template <typename T, bool channels_last>
struct Slice {
  static constexpr int W = wide<T>;
  int rows, columns, vectors;
  SCSE_DEVICE Slice(int channels, int positions)
      : rows(channels_last ? positions : channels),
        columns(channels_last ? channels : positions),
        vectors((columns + W - 1) / W) {}

  SCSE_DEVICE T* cell(T* slice, int row, int vector) const {
    return slice + (row * vectors + vector) * W;
  }
  SCSE_DEVICE Floats<W> read(T* slice, int row, int vector) const {
    return widen<T, W>(load<W>(cell(slice, row, vector)));
  }

  // Requests rows [begin, end) of the slice whose first element is map[0] and whose rows are
  // `pitch` elements apart. `bytes`: how much can be copied at once, at these addresses.
  SCSE_DEVICE void request(T* slice, const T* map, int64_t pitch, int begin, int end,
                           int bytes) const {
    if (bytes == 16) {
      request_in<16>(slice, map, pitch, begin, end);
    } else if (bytes == 4) {
      request_in<4>(slice, map, pitch, begin, end);
    } else {
      request_in<2>(slice, map, pitch, begin, end);
    }
    if (columns == vectors * W) return;
    spread(end - begin, vectors * W - columns, [&](int row, int column) {
      from_float(cell(slice, begin + row, 0)[columns + column], 0.f);
    });
  }

  // Writes a map of this size whose first element is map[0]. prepare(vector) gives a function
  // (row, put), which calls put(offset, values) to have a vector stored that many elements further
  // on. `bytes`: 16 if vectors can be stored whole, at these addresses.
  template <typename Prepare>
  SCSE_DEVICE void write(T* map, int pitch, int bytes, const Prepare& prepare) const {
    if (vectors == 0) return;
    const unsigned across = vectors;
    const int vector = thread() % across, step = threads() / across, first = thread() / across;
    if (first >= step) return;
    const auto values_of = prepare(vector);
    T* const out = map + vector * W;
    if (bytes == 16) {
#pragma unroll 4
      for (int row = first; row < rows; row += step) {
        values_of(row, [&](int64_t offset, const Floats<W>& values) {
          store<W>(out + static_cast<int64_t>(row) * pitch + offset, narrow<T, W>(values));
        });
      }
    } else {
      const int count = min(W, columns - vector * W);
      for (int row = first; row < rows; row += step) {
        values_of(row, [&](int64_t offset, const Floats<W>& values) {
#pragma unroll
          for (int i = 0; i < W; ++i) {
            if (i < count)
              from_float(out[static_cast<int64_t>(row) * pitch + offset + i], values[i]);
          }
        });
      }
    }
  }

 private:
  template <int bytes>
  SCSE_DEVICE void request_in(T* slice, const T* map, int64_t pitch, int begin, int end) const {
    if constexpr (bytes >= static_cast<int>(sizeof(T))) {
      constexpr int n = bytes / sizeof(T);
      spread(end - begin, columns / n, [&](int row, int piece) {
        T* to = cell(slice, begin + row, 0) + piece * n;
        const T* from = map + (begin + row) * pitch + piece * n;
        if constexpr (bytes >= 4) {
          __pipeline_memcpy_async(to, from, bytes);
        } else {
          *to = *from;
        }
      });
    }
  }
};

// W neighbouring values of a vector in shared memory that has one for each column, or W times the
// one that it has for a row.
template <bool per_column, int W>
struct Values {
  Floats<W> of;
  SCSE_DEVICE Values(const float* p, int vector) {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + vector * W + i);
      of[i] = four.x, of[i + 1] = four.y, of[i + 2] = four.z, of[i + 3] = four.w;
    }
  }
  SCSE_DEVICE float at(int, int i) const { return of[i]; }
};
template <int W>
struct Values<false, W> {
  const float* p;
  SCSE_DEVICE Values(const float* p, int) : p(p) {}
  SCSE_DEVICE float at(int row, int) const { return p[row]; }
};

// Writes of(i) for i < count, and zeros up to the end of the last vector.
template <int W, typename Of>
SCSE_DEVICE void fill(float* to, int count, const Of& of) {
  for (int i = thread(); i < padded(count, W); i += threads()) to[i] = i < count ? of(i) : 0.f;
}

// --- sums over a matrix's rows and columns ---
//
// Both kinds are used alike: advance(begin, end, prepare, use) for one range of rows after the
// other, then finish(partial, use). prepare(vector) gives a function (row, sum) that adds its W
// terms with sum.add(which, i, term); use(which, index, sum) gets each of the `count` sums.

// Neighbouring lanes that sum `terms` terms together: a power of two of them, at least `least`.
struct Lanes {
  int shift;  // log2
  SCSE_DEVICE Lanes(int least, int terms) {
    shift = __ffs(least) - 1;
    while (shift < 5 && 2 << shift <= terms) ++shift;
  }
  SCSE_DEVICE int count() const { return 1 << shift; }
  SCSE_DEVICE int lane() const { return thread() & (count() - 1); }
  SCSE_DEVICE int group() const { return thread() >> shift; }
  SCSE_DEVICE int groups() const { return threads() >> shift; }
};

// Which of the sums this lane gets of sum_and_scatter.
template <int several>
SCSE_DEVICE int scattered_index(const Lanes& lanes) {
  return lanes.lane() * several >> lanes.shift;
}
// Whether this lane is the one, of those with the same sum, to use it.
template <int several>
SCSE_DEVICE bool uses_scattered(const Lanes& lanes) {
  return (lanes.lane() * several & (lanes.count() - 1)) == 0;
}

// One sum for each row: some neighbouring lanes take a row, several rows at a time.
template <int count, int several>
struct RowSums {
  const int vectors;
  const Lanes lanes;
  explicit SCSE_DEVICE RowSums(int vectors) : vectors(vectors), lanes(several, vectors) {}

  // Of one row; [which][row] so that a kind's sums lie side by side.
  struct Sum {
    float (&of)[count][several];
    int row;
    SCSE_DEVICE void add(int which, int, float term) { of[which][row] += term; }
  };

  template <typename Prepare, typename Use>
  SCSE_DEVICE void advance(int begin, int end, const Prepare& prepare, const Use& use) const {
    const int step = lanes.groups();
    for (int first = begin; first < end; first += several * step) {
      const int row = first + lanes.group();
      float sums[count][several] = {};
      for (int vector = lanes.lane(); vector < vectors; vector += lanes.count()) {
        const auto add = prepare(vector);
#pragma unroll
        for (int r = 0; r < several; ++r) {
          Sum sum{sums, r};
          if (row + r * step < end) add(row + r * step, sum);
        }
      }
#pragma unroll
      for (int k = 0; k < count; ++k) sum_and_scatter(sums[k], lanes.count());
      const int mine = row + scattered_index<several>(lanes) * step;
      if (mine < end && uses_scattered<several>(lanes)) {
#pragma unroll
        for (int k = 0; k < count; ++k) use(k, mine, sums[k][0]);
      }
    }
  }

  template <typename Use>
  SCSE_DEVICE void finish(float*, const Use&) const {}
};

// One sum for each column: a thread keeps to one vector of columns (there must not be more vectors
// than threads) and goes down some of the rows.
template <int W, int count>
struct ColumnSums {
  const int vectors;
  int vector = 0, row = INT32_MAX, step = 1;
  float sums[count][W] = {};
  explicit SCSE_DEVICE ColumnSums(int vectors) : vectors(vectors) {
    if (vectors == 0) return;
    const unsigned across = vectors;
    vector = thread() % across, row = thread() / across, step = threads() / across;
    if (row >= step) row = INT32_MAX;
  }

  template <typename Prepare, typename Use>
  SCSE_DEVICE void advance(int, int end, const Prepare& prepare, const Use&) {
    if (row >= end) return;
    const auto add = prepare(vector);
#pragma unroll 4
    for (; row < end; row += step) add(row, *this);
  }

  // `partial`: shared memory for partial_size<W>(threads) floats.
  template <typename Use>
  SCSE_DEVICE void finish(float* partial, const Use& use) {
    if (vectors == 0) return;
    constexpr int n = W < 4 ? W : 4;  // elements of a store, each from a plane of its own
    const int plane = threads() * n + 16;
    // Lanes with the same columns add up first, if they divide a warp evenly.
    const bool even = vectors < 32 && (vectors & (vectors - 1)) == 0;
    const int warp = thread() / 32, lane = thread() % 32;
    const int group = even ? warp : thread() / static_cast<unsigned>(vectors);
    const int groups = even ? threads() / 32 : step;
    const bool has_one = even ? lane < vectors : group < groups;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (even) sum_groups(sums[k], vectors);
      __syncthreads();
      if (has_one) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          partial[i / n * plane + (group * vectors + vector) * n + i % n] = sums[k][i];
        }
      }
      __syncthreads();
      for (int column = thread(); column < vectors * W; column += threads()) {
        const float* part = partial + column % W / n * plane + column / W * n + column % n;
        float sum = 0;
#pragma unroll 8
        for (int g = 0; g < groups; ++g) sum += part[g * vectors * n];
        use(k, column, sum);
      }
    }
  }

  SCSE_DEVICE void add(int which, int i, float term) { sums[which][i] += term; }
};

// Of a slice: sums over its positions, one for each channel, and sums over its channels.
template <typename T, bool channels_last, int count>
using OverPositions =
    std::conditional_t<channels_last, ColumnSums<wide<T>, count>, RowSums<count, 4 / count>>;
template <typename T, bool channels_last, int count>
using OverChannels = OverPositions<T, !channels_last, count>;

// --- the cluster ---

#ifdef SCSE_HAS_CLUSTERS
using Cluster = cooperative_groups::cluster_group;

// sum over the cluster's blocks, in their order, of what each has at p[i].
SCSE_DEVICE float sum_over_blocks(const Cluster& cluster, float* p, int i) {
  const int blocks = cluster.num_blocks();
  float sum = 0;
#pragma unroll 8
  for (int b = 0; b < blocks; ++b) sum += cluster.map_shared_rank(p, b)[i];
  return sum;
}

// Copies own[i], i < size, to p[begin + i] of every block. All threads call this, and find what
// their block's others have written to `own`.
SCSE_DEVICE void give_to_blocks(const Cluster& cluster, const float* own, int size, float* p,
                                int begin) {
  __syncthreads();
  spread(cluster.num_blocks(), size,
         [&](int block, int i) { cluster.map_shared_rank(p, block)[begin + i] = own[i]; });
}

// The channels that a block excites for all.
struct OwnChannels {
  int begin, end;
  SCSE_DEVICE OwnChannels(const Cluster& cluster, int channels) {
    const int blocks = cluster.num_blocks(), each = (channels + blocks - 1) / blocks;
    begin = min(channels, static_cast<int>(cluster.block_rank()) * each);
    end = min(channels, begin + each);
  }
  SCSE_DEVICE int size() const { return end - begin; }
};

#endif

// --- dense layers ---

// to[i] = parameter[at + i * pitch] while i * step < inside, and 0 for the others. The dtype is
// looked at once for all of them. Around whole loops the code for four dtypes would be most of a
// kernel.
template <int count>
SCSE_DEVICE void load_apart(const void* parameter, Dtype dtype, int64_t at, int64_t pitch,
                            int inside, int step, float (&to)[count]) {
  typed(parameter, dtype, [&](auto* elements) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      to[i] = i * step < inside ? to_float(elements[at + i * pitch]) : 0.f;
    }
  });
}

// A parameter [rows, columns] with `pitch` elements from row to row.
struct Matrix {
  const void* elements;
  Dtype dtype;
  int64_t begin, pitch;
  int rows, columns;
};

// to[row] = m[row, :] . v, all in shared memory but the matrix.
SCSE_DEVICE void matvec(const Matrix& m, const float* v, float* to) {
  constexpr int several = 8;
  const Lanes lanes(several, m.columns);
  const int step = lanes.groups();
  for (int first = 0; first < m.rows; first += several * step) {
    const int row = first + lanes.group();
    float sums[several] = {};
    for (int column = lanes.lane(); column < m.columns; column += lanes.count()) {
      float terms[several];
      load_apart(m.elements, m.dtype, m.begin + row * m.pitch + column, step * m.pitch,
                 m.rows - row, step, terms);
#pragma unroll
      for (int r = 0; r < several; ++r) sums[r] += terms[r] * v[column];
    }
    sum_and_scatter(sums, lanes.count());
    const int mine = row + scattered_index<several>(lanes) * step;
    if (mine < m.rows && uses_scattered<several>(lanes)) to[mine] = sums[0];
  }
}

// to[column] = m[:, column] . v
SCSE_DEVICE void vecmat(const Matrix& m, const float* v, float* partial, float* to) {
  constexpr int several = 16;
  for (int begin = 0; begin < m.columns; begin += threads()) {
    ColumnSums<1, 1> sums(min(m.columns - begin, threads()));
    for (int row = sums.row; row < m.rows; row += several * sums.step) {
      float terms[several];
      load_apart(m.elements, m.dtype, m.begin + row * m.pitch + begin + sums.vector,
                 sums.step * m.pitch, m.rows - row, sums.step, terms);
#pragma unroll
      for (int r = 0; r < several; ++r) {
        if (row + r * sums.step < m.rows) sums.add(0, 0, terms[r] * v[row + r * sums.step]);
      }
    }
    sums.finish(partial, [&](int, int column, float sum) { to[begin + column] = sum; });
  }
}

}  // namespace scse::cuda::on_chip
