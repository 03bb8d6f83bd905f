// How the kernels walk a map: tile sizes and grids, from shape and dtype alone, never from
// the device or the number of samples, so that a sum has the same order everywhere. Plain
// functions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../sizes.h"

namespace scse::cuda {

// A map has an inner axis (stride 1: positions, or channels in channels_last maps) and an outer
// one. A thread works on some neighbours of the outer axis at a time, OUTER, and at each of them on
// one access along the inner axis, so that as many loads of each map are on their way. In the
// passes that apply the gates these are kApplyOuter. Those that sum have twice as many, since each
// warp pays for its addresses and its sums; but not where accesses are narrow: the code for
// elements one by one would be long and take too many registers.
constexpr int kApplyOuter = 4;
constexpr int outer_of(int bytes_of_access) {
  return bytes_of_access == 16 ? 2 * kApplyOuter : kApplyOuter;
}
constexpr int kMaxThreads = 256;
// Of channels_last maps the passes that sum have blocks of fewer, as fewer positions are left for
// each: more blocks are worth more than large ones.
constexpr int most_threads(bool channels_last, int outer) {
  return channels_last ? kMaxThreads * kApplyOuter / outer : kMaxThreads;
}
// How much of x waits in shared memory: all of a tile's up to 2048 channels. One block then fits an
// SM of 100 KiB, three fit one of 228 KiB.
constexpr int64_t kKeptBytes = 64 * 1024;

// Threads that lie side by side in a row: `count`, which is 1 << bits. The rest is for LaneSums, so
// that no thread has to work it out.
struct Lanes {
  int count, bits;
  int sums;   // of the OUTER that a lane has
  int shift;  // a lane's number >> shift is that of its sum
  int same;   // lanes with the same sum differ in these bits
};

// Threads of a block: `rows` rows of `lanes` threads along the inner axis; in the passes that apply
// the gates `apply_rows`. A row is part of one warp, so that warps sum over the inner axis alone.
struct Tile {
  int width;                         // elements to an access, W: 16 bytes or 8
  int each;                          // OUTER
  int lanes, rows, apply_rows;       // powers of two
  int inner, outer;                  // elements of a step of the block
  int64_t steps;                     // of a tile
  int tiles;                         // of a strip, one after the other
  int64_t positions;                 // of a tile
  int64_t strips;                    // of a sample: each has a row of partial sums
  int64_t inner_tiles, outer_tiles;  // of the map where gates are applied
  int threads() const { return lanes * rows; }
  int apply_threads() const { return lanes * apply_rows; }
  Lanes of_row() const {
    const int bits = bits_of(lanes), shift = std::max(0, bits - bits_of(each));
    return {lanes, bits, std::max(1, each / lanes), shift, (1 << shift) - 1};
  }
};

inline Tile tile_of(int64_t channels, int64_t positions, int itemsize, int width,
                    bool channels_last) {
  Tile t{};
  t.width = width, t.each = outer_of(width * itemsize);
  const int64_t inner = channels_last ? channels : positions;
  const int64_t outer = channels_last ? positions : channels;
  const int64_t accesses = power_of_two(ceil_div(inner, width));
  if (channels_last) {
    // All of a position's channels, as far as a warp has lanes: it then sums alone.
    t.lanes = static_cast<int>(std::min<int64_t>(accesses, 32));
  } else {
    // Where channels are many: at most 8 lanes, 128 bytes of a row, or fewer if all channels then
    // take one step, since each step waits for memory. Where channels are few: more lanes.
    const int64_t wanted = 1024 / power_of_two(channels);
    const int64_t least = std::clamp<int64_t>(2 * wanted, 2, 8);
    t.lanes = static_cast<int>(std::min(std::clamp<int64_t>(wanted, least, 32), accesses));
  }
  const auto rows = [&](int each, int most) {
    return static_cast<int>(std::clamp<int64_t>(power_of_two(ceil_div(outer, each)),
                                                std::max(1, 32 / t.lanes), most / t.lanes));
  };
  t.rows = rows(t.each, most_threads(channels_last, t.each));
  t.apply_rows = rows(kApplyOuter, kMaxThreads);
  t.inner = t.lanes * width, t.outer = t.rows * t.each;
  t.steps = ceil_div(channels, channels_last ? t.inner : t.outer);
  t.inner_tiles = ceil_div(inner, t.inner);
  t.outer_tiles = ceil_div(outer, t.apply_rows * kApplyOuter);

  // Each strip has `channels` floats of partial sums. Strips of 256 bytes keep these below 2 % of
  // the map. Shorter strips are made longer only while there are more than 16, which are worked on
  // at once. More than 512 strips would take the one block that adds them up too long.
  t.positions = channels_last ? t.outer : t.inner;
  t.tiles = 1;
  const auto strips = [&] { return ceil_div(positions, t.positions * t.tiles); };
  while ((t.positions * t.tiles * itemsize < 256 && strips() > 16) || strips() > 512) t.tiles *= 2;
  t.strips = strips();
  return t;
}

// Floats of the vectors between the steps of an excitation that is one launch.
inline int64_t excite_vectors(int64_t channels, int64_t hidden_channels) {
  return ceil_div(channels, 4) * 4 + ceil_div(hidden_channels, 4) * 4;
}

// Threads of a block of it: 16 elements of the largest matrix for each, four loads of 16 bytes, as
// fewer cost more in sums across warps than they save.
constexpr int kExciteThreads = 512;
inline int excite_threads(int64_t channels, int64_t hidden_channels, int64_t strips) {
  const int64_t largest = channels * std::max(hidden_channels, strips);
  return static_cast<int>(std::clamp<int64_t>(power_of_two(largest / 16), 64, kExciteThreads));
}

// Whether each layer of the excitation has a launch: see excite_layers.cuh. One SM draws 64 bytes a
// cycle at most: 16,384 weights of each layer in 1.2 microseconds, about what a launch more takes.
inline bool has_layers(int64_t channels, int64_t hidden_channels) {
  return channels * hidden_channels >= 16384 || excite_vectors(channels, hidden_channels) > 8192;
}

constexpr int kLayerThreads = 256;
constexpr int kSlices = 8;     // of the channels
constexpr int kChunk = 512;    // elements of each sample's vector in shared memory
constexpr int kColumns = 128;  // results to a block of the backward

// Floats of a sample's row of a slice's results: whole fours.
inline int64_t slices_pitch(int64_t hidden_channels) { return ceil_div(hidden_channels, 4) * 4; }
inline int64_t slices_floats(int64_t samples, int64_t hidden_channels) {
  return kSlices * samples * slices_pitch(hidden_channels);
}

// Samples that share a block's weights: two, as long as that leaves few blocks, which run at once.
inline int layer_share(int64_t samples, int64_t parts) {
  return ceil_div(samples, 2) * parts <= 256 ? 2 : 8;
}

// Lanes that share a row of so many weights, as a logarithm: sixteen weights to each.
constexpr int kLeastLaneBits = 3;
inline int layer_lane_bits(int64_t columns) { return columns <= 128 ? 3 : columns <= 256 ? 4 : 5; }
// Rows of weights to a block of the forward.
inline int64_t layer_rows(int lane_bits) { return kLayerThreads / (1 << lane_bits) * 4; }

}  // namespace scse::cuda
