// How maps are walked whose rows are no multiples of an access. Plain functions.
//
// Where a sample is dense, it is one run of elements in which every access of 16 bytes is aligned,
// whatever its rows are. Accesses and rows begin together again after their least common multiple:
// 8 rows of 7 x 7, 49 accesses of 8 elements. So a thread whose accesses are some such periods
// apart has the same places of a row in each of them. What lies along the rows is then loaded once
// for all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "../dtypes.h"
#include "../problem.h"
#include "../sizes.h"
#include "tile.h"

namespace scse::cuda {

struct Flat {
  int64_t row, size;                 // elements of a row and of a sample; 0: the map is not flat
  int64_t run;                       // elements from a thread's access to its next: whole periods
  int64_t inner_tiles, outer_tiles;  // blocks to a run; to a sample, kApplyOuter runs each
  int64_t tiles() const { return inner_tiles * outer_tiles; }
};

// `width`: elements to an access; rows * row is a multiple of it.
inline Flat flat_of(int64_t rows, int64_t row, int width) {
  const int64_t size = rows * row, period = std::lcm(row, int64_t{width});
  const int64_t threads = period / width;  // of a period
  const int64_t fewest = ceil_div(size / width, kApplyOuter * kMaxThreads);
  Flat best{};
  // Of up to eight blocks to a run those that cover a sample with the fewest. (49 threads fill a
  // block five times, but 169 only three blocks.)
  const int64_t least = ceil_div(threads, kMaxThreads);
  for (int64_t blocks = least; blocks <= std::max<int64_t>(least, 8); ++blocks) {
    Flat f{};
    f.row = row, f.size = size;
    f.run = std::min(blocks * kMaxThreads / threads, size / period) * period;
    f.inner_tiles = ceil_div(f.run / width, kMaxThreads);
    f.outer_tiles = ceil_div(size, kApplyOuter * f.run);
    if (best.size == 0 || f.tiles() < best.tiles()) best = f;
    if (best.tiles() == fewest) break;
  }
  return best;
}

// Whether the map of a call is flat: dense in a sample and aligned but for its rows, of which an
// access touches two at most, and of a size that leaves all places inside a sample 32-bit numbers.
// The halves of a concatenation lie apart only in contiguous maps.
inline bool is_flat(const Problem& p) {
  const int size = itemsize(p.dtype), width = 16 / size;
  const int64_t row = p.row(), elements = p.channels * p.positions;
  if (row % width == 0 || row < width || elements > int64_t{1} << 29) return false;
  if (p.channels_last && p.combine == Combine::concat) return false;
  if (p.x_pitch != row || (p.dy != nullptr && p.dy_pitch != row)) return false;
  int64_t parts = elements | p.x_sample | p.dy_sample;
  for (const void* map :
       {p.x, p.dy, static_cast<const void*>(p.y), static_cast<const void*>(p.dx)}) {
    parts |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(map) / size);
  }
  return parts % width == 0;
}

inline Flat flat_for(const Problem& p) {
  const int64_t rows = p.channels_last ? p.positions : p.channels;
  return is_flat(p) ? flat_of(rows, p.row(), 16 / itemsize(p.dtype)) : Flat{};
}

}  // namespace scse::cuda
