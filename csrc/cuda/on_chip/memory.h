// Where things are in the shared memory of a block, for the kernels and for who launches them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace scse::cuda::on_chip {

constexpr int kMostThreads = 512;

__host__ __device__ constexpr int padded(int count, int multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Gives out pieces that begin at multiples of 16 bytes.
class Carver {
 public:
  __host__ __device__ int take(int64_t count, int size = sizeof(float)) {
    const int64_t begin = bytes_;
    bytes_ += (count * size + 15) / 16 * 16;
    return static_cast<int>(begin);
  }
  __host__ __device__ int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Floats that ColumnSums wants to add up over a block's threads.
__host__ __device__ constexpr int partial_size(int W, int threads) {
  return (W < 4 ? 1 : W / 4) * (threads * (W < 4 ? W : 4) + 16);
}

// What decides the size of a block's memory. `slice`: positions to a block.
struct Sizes {
  int element, channels, hidden_channels, slice, cluster, threads;
  bool channels_last, concat;

  __host__ __device__ int W() const { return 16 / element; }
  __host__ __device__ int C() const { return padded(channels, W()); }
  __host__ __device__ int S() const { return padded(slice, W()); }
  __host__ __device__ int64_t map() const {
    return channels_last ? int64_t{slice} * C() : int64_t{channels} * S();
  }
  // Channels that a block excites.
  __host__ __device__ int own_channels() const { return (channels + cluster - 1) / cluster; }
};

struct ForwardMemory {
  int x, partial, ws, spatial_gate, channel_sum, pooled, hidden_part, hidden, own_gate;
  int channel_gate;
  int64_t bytes;

  explicit __host__ __device__ ForwardMemory(const Sizes& sizes) {
    Carver carve;
    x = carve.take(sizes.map(), sizes.element);
    partial = carve.take(partial_size(sizes.W(), sizes.threads));
    ws = carve.take(sizes.C());
    spatial_gate = carve.take(sizes.S());
    channel_sum = carve.take(sizes.C());
    pooled = carve.take(sizes.own_channels());
    hidden_part = carve.take(sizes.hidden_channels);
    hidden = carve.take(sizes.hidden_channels);
    own_gate = carve.take(sizes.own_channels());
    channel_gate = carve.take(sizes.C());
    bytes = carve.bytes();
  }
};

struct BackwardMemory {
  int x, dy, dy2, partial, ws, channel_gate, spatial_gate, dq, channel_sum, ws_sum, bs_sum;
  int d_excited, d_hidden_part, d_hidden, own_d_mean, d_mean;
  int64_t bytes;

  explicit __host__ __device__ BackwardMemory(const Sizes& sizes) {
    Carver carve;
    x = carve.take(sizes.map(), sizes.element);
    dy = carve.take(sizes.map(), sizes.element);
    dy2 = carve.take(sizes.concat ? sizes.map() : 0, sizes.element);
    partial = carve.take(partial_size(sizes.W(), sizes.threads));
    ws = carve.take(sizes.C());
    channel_gate = carve.take(sizes.C());
    spatial_gate = carve.take(sizes.S());
    dq = carve.take(sizes.S());
    channel_sum = carve.take(sizes.C());
    ws_sum = carve.take(sizes.C());
    bs_sum = carve.take(1);
    d_excited = carve.take(sizes.own_channels());
    d_hidden_part = carve.take(sizes.hidden_channels);
    d_hidden = carve.take(sizes.hidden_channels);
    own_d_mean = carve.take(sizes.own_channels());
    d_mean = carve.take(sizes.C());
    bytes = carve.bytes();
  }
};

}  // namespace scse::cuda::on_chip
