// The general kernels: the order of launches, their scratch memory and the excitation.
#include "general.h"

#include "excite.cuh"
#include "../gradient_tasks.h"
#include "../launch.h"
#include "../per_device.h"

namespace scse::cuda {
namespace {

// Cuts scratch memory into pieces that begin at multiples of 256 bytes.
class Pieces {
 public:
  explicit Pieces(float* memory) : memory_(memory) {}
  float* take(bool needed, int64_t floats) {
    if (!needed) return nullptr;
    float* piece = memory_ + size_;
    size_ += ceil_div(floats, 64) * 64;
    return piece;
  }
  int64_t size() const { return size_; }

 private:
  float* memory_;
  int64_t size_ = 0;
};

int itemsize(const Problem& p) { return p.dtype == Dtype::float32 ? 4 : 2; }

Tile tile_for(const Problem& p) {
  const int wide = 16 / itemsize(p);
  // Everything that a vector's address is made of. Zero for a map that is absent.
  int64_t parts = p.row() | p.x_sample | p.x_pitch | p.dy_sample | p.dy_pitch;
  for (const void* map :
       {p.x, p.dy, static_cast<const void*>(p.y), static_cast<const void*>(p.dx)}) {
    parts |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(map) / itemsize(p));
  }
  return tile_of(p.channels, p.positions, itemsize(p), parts % wide == 0 ? wide : 1,
                 p.channels_last);
}

// Calls body(Passes<T>()) with the map's element type.
template <typename Body>
void with_passes(const Problem& p, const Body& body) {
  switch (p.dtype) {
    case Dtype::float32:
      return body(Passes<float>());
    case Dtype::float16:
      return body(Passes<__half>());
    case Dtype::bfloat16:
      return body(Passes<__nv_bfloat16>());
    case Dtype::float64:
      throw std::runtime_error("scse_kernels: no CUDA kernels for float64");
  }
}

void forward(const Problem& p, float* scratch) {
  if (p.samples == 0) return;
  const Forward f = plan_forward(p, scratch);
  with_passes(p, [&](auto passes) {
    passes.squeeze(p, f);
    if (p.has_channel()) {
      Grid grid{p.samples, excite_threads(p.channels, p.hidden_channels, f.tile.strips)};
      grid.overlap = true;
      launch("excite", excite, grid, p, f.partial, p.w1, p.b1, p.w2, p.b2, p.dtypes, p.pooled,
             p.hidden, p.hidden_slope, p.channel_gate, p.activation, p.activation_parameter, p.gate,
             p.channels, p.hidden_channels, p.positions, f.tile.strips);
    }
    passes.apply(p, f);
  });
}

void backward(const Problem& p, float* scratch) {
  const Backward b = plan_backward(p, scratch);
  const bool sums = b.partial != nullptr || b.partial_ws != nullptr;
  with_passes(p, [&](auto passes) {
    if (p.samples > 0 && (sums || b.dq != nullptr)) passes.reduce(p, b);
    if (p.samples > 0 && sums) {
      const int branches = (b.partial != nullptr) + (b.partial_ws != nullptr);
      Grid grid{p.samples * branches, excite_threads(p.channels, p.hidden_channels, b.tile.strips)};
      grid.overlap = true;
      launch("excite_backward", excite_backward, grid, p, b.partial, b.partial_ws, b.partial_bs,
             p.w1, p.w2, p.dtypes, p.hidden_slope, p.channel_gate, b.d_excited, b.d_hidden,
             b.d_mean, b.sample_ws, b.sample_bs, p.gate, p.channels, p.hidden_channels, p.positions,
             b.tile.strips);
    }
    passes.apply_backward(p, b);
  });
}

}  // namespace

Forward plan_forward(const Problem& p, float* scratch) {
  Forward f{};
  f.tile = tile_for(p);
  Pieces pieces(scratch);
  f.partial = pieces.take(p.has_channel(), p.samples * f.tile.strips * p.channels);
  f.spatial_gate = pieces.take(p.has_spatial(), p.samples * p.positions);
  f.floats = pieces.size();
  return f;
}

Backward plan_backward(const Problem& p, float* scratch) {
  Backward b{};
  b.tile = tile_for(p);
  const bool need_dx = p.dx != nullptr;
  const bool channel = p.has_channel() && (need_dx || p.need_channel());
  const bool gates = p.has_spatial() && need_dx;
  const int64_t rows = p.samples * b.tile.strips, vector = p.samples * p.channels;
  Pieces pieces(scratch);
  b.partial = pieces.take(channel, rows * p.channels);
  b.partial_ws = pieces.take(p.need_spatial(), rows * p.channels);
  b.partial_bs = pieces.take(p.need_spatial(), rows);
  b.spatial_gate = pieces.take(gates, p.samples * p.positions);
  b.dq = pieces.take(gates, p.samples * p.positions);
  b.d_excited = pieces.take(channel, vector);
  b.d_hidden = pieces.take(channel, p.samples * p.hidden_channels);
  b.d_mean = pieces.take(channel && need_dx, vector);
  b.sample_ws = pieces.take(p.need_spatial(), vector);
  b.sample_bs = pieces.take(p.need_spatial(), p.samples);
  b.floats = pieces.size();
  b.tasks = gradient_tasks(p.channels, p.hidden_channels, p.need_channel(), p.need_spatial());
  return b;
}

int architecture_of(int device) {
  static PerDevice<int> known;
  return known.get(device, []() -> int {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, excite);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      succeeded(error);
      return 0;
    }
    check(error, "excite");
    return attributes.ptxVersion;
  });
}

const Launcher general{[](const Problem& p) { return plan_forward(p, nullptr).floats; }, forward,
                       [](const Problem& p) { return plan_backward(p, nullptr).floats; }, backward};

}  // namespace scse::cuda
