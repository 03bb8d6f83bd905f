// The order of launches and their scratch memory.
#include "general.h"

#include "../dispatch.h"
#include "../gradient_tasks.h"
#include "../scratch.h"

namespace scse::cuda {
namespace {

Tile tile_for(const Problem& p) {
  const int size = itemsize(p.dtype), wide = 16 / size;
  // Everything that a vector's address is made of. Zero for a map that is absent.
  int64_t parts = p.row() | p.x_sample | p.x_pitch | p.dy_sample | p.dy_pitch;
  for (const void* map :
       {p.x, p.dy, static_cast<const void*>(p.y), static_cast<const void*>(p.dx)}) {
    parts |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(map) / size);
  }
  return tile_of(p.channels, p.positions, size, parts % wide == 0 ? wide : wide / 2,
                 p.channels_last);
}

}  // namespace

Forward plan_forward(const Problem& p, float* scratch) {
  Forward f{};
  f.tile = tile_for(p), f.flat = flat_for(p);
  Pieces pieces(scratch);
  f.partial = pieces.take(p.has_channel(), p.samples * f.tile.strips * p.channels);
  f.spatial_gate = pieces.take(p.has_spatial(), p.samples * p.positions);
  f.slices = pieces.take(p.has_channel() && has_layers(p.channels, p.hidden_channels),
                         slices_floats(p.samples, p.hidden_channels));
  f.floats = pieces.size();
  return f;
}

Backward plan_backward(const Problem& p, float* scratch) {
  Backward b{};
  b.tile = tile_for(p), b.flat = flat_for(p);
  const bool need_dx = p.dx != nullptr;
  const bool channel = p.has_channel() && (need_dx || p.need_channel());
  const bool gates = p.has_spatial() && need_dx;
  const int64_t all_strips = p.samples * b.tile.strips, vector = p.samples * p.channels;
  Pieces pieces(scratch);
  b.partial = pieces.take(channel, all_strips * p.channels);
  b.partial_ws = pieces.take(p.need_spatial(), all_strips * p.channels);
  b.partial_bs = pieces.take(p.need_spatial(), all_strips);
  b.spatial_gate = pieces.take(gates, p.samples * p.positions);
  b.dq = pieces.take(gates, p.samples * p.positions);
  b.d_excited = pieces.take(channel, vector);
  b.d_hidden = pieces.take(channel, p.samples * p.hidden_channels);
  b.d_mean = pieces.take(channel && need_dx, vector);
  b.sample_ws = pieces.take(p.need_spatial(), vector);
  b.sample_bs = pieces.take(p.need_spatial(), p.samples);
  b.slices = pieces.take(channel && has_layers(p.channels, p.hidden_channels),
                         slices_floats(p.samples, p.hidden_channels));
  b.floats = pieces.size();
  b.tasks = gradient_tasks(p.channels, p.hidden_channels, p.need_channel(), p.need_spatial());
  return b;
}

int64_t forward_scratch(const Problem& p) { return plan_forward(p, nullptr).floats; }
int64_t backward_scratch(const Problem& p) { return plan_backward(p, nullptr).floats; }

void forward(const Problem& p, float* scratch) {
  if (p.samples == 0) return;
  const Forward f = plan_forward(p, scratch);
  with_dtype<Passes>(p.dtype, [&](auto passes) {
    passes.squeeze(p, f);
    if (p.has_channel()) excite(p, f);
    passes.apply(p, f);
  });
}

void backward(const Problem& p, float* scratch) {
  const Backward b = plan_backward(p, scratch);
  const bool sums = b.partial != nullptr || b.partial_ws != nullptr;
  with_dtype<Passes>(p.dtype, [&](auto passes) {
    if (p.samples > 0 && (sums || b.dq != nullptr)) passes.reduce(p, b);
    if (p.samples > 0 && sums) excite_backward(p, b);
    passes.apply_backward(p, b);
  });
}

}  // namespace scse::cuda
