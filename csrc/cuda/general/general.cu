// The general kernels: the order of launches, their scratch memory and the excitation.
#include "general.h"

#include "../dispatch.h"
#include "excite.cuh"
#include "../gradient_tasks.h"
#include "../launch.h"
#include "../per_device.h"
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

// Blocks to a cluster that any launch of the excitation may have on p.device, see Team.
int clusters_of(const Problem& p) {
  static PerDevice<int> known;
  if (p.architecture < 90) return 1;
  return known.get(p.device, [] {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kClusterByDefault);
    config.blockDim = dim3(kExciteThreads);
    config.dynamicSmemBytes = kSharedByDefault;
    int cluster = 0;
    // A part of a device may not be able to say.
    if (!succeeded(cudaOccupancyMaxPotentialClusterSize(&cluster, excite_backward<float, true>,
                                                        &config))) {
      return 1;
    }
    return std::clamp(cluster, 1, kClusterByDefault);
  });
}

// A launch of the excitation, each of whose `teams` begins with the sums of `strips` strips.
Grid excitation_grid(const Problem& p, int64_t teams, int64_t strips, bool vectors_fit) {
  Grid grid{};
  if (vectors_fit) {
    grid.cluster = excite_cluster(p.channels, p.hidden_channels);
    while (grid.cluster > 1 && grid.cluster > clusters_of(p)) grid.cluster /= 2;
    grid.shared = 4 * excite_vectors(p.channels, p.hidden_channels);
  }
  grid.blocks = teams * grid.cluster;
  grid.threads = excite_threads(p.channels, ceil_div(p.hidden_channels, grid.cluster), strips);
  grid.overlap = true;
  return grid;
}

// Calls body(const P*, std::bool_constant<WHOLE>, whether vectors fit shared memory) with what the
// excitation's kernels are compiled for: one dtype of all parameters used (void: several, or a
// rare one), and whether all rows are whole fours of elements.
template <typename Body>
void with_excitation(const Problem& p, bool biases, const Body& body) {
  const auto dtype_of = [&](Parameter parameter) { return cuda::dtype_of(p.dtypes, parameter); };
  const Dtype dtype = dtype_of(Parameter::w1);
  const bool fit = 4 * excite_vectors(p.channels, p.hidden_channels) <= kSharedByDefault;
  const bool one = dtype == dtype_of(Parameter::w2) &&
                   (!biases || p.b1 == nullptr || dtype == dtype_of(Parameter::b1)) &&
                   (!biases || p.b2 == nullptr || dtype == dtype_of(Parameter::b2));
  if (!one || !fit || dtype == Dtype::float64) {
    return body(static_cast<const void*>(nullptr), std::false_type(), false);
  }
  const auto whole_or_not = [&](auto* type) {
    const auto at = reinterpret_cast<uintptr_t>(p.w1) | reinterpret_cast<uintptr_t>(p.w2);
    with_bool((p.channels | p.hidden_channels) % 4 == 0 && at % (4 * sizeof *type) == 0,
              [&](auto whole) { body(type, whole, true); });
  };
  if (dtype == Dtype::float32) return whole_or_not(static_cast<const float*>(nullptr));
  if (dtype == Dtype::float16) return whole_or_not(static_cast<const __half*>(nullptr));
  whole_or_not(static_cast<const __nv_bfloat16*>(nullptr));
}

ExciteArguments excite_arguments(const Problem& p, const Forward& f) {
  ExciteArguments a{};
  a.partial = f.partial;
  a.w1 = p.w1, a.b1 = p.b1, a.w2 = p.w2, a.b2 = p.b2, a.dtypes = p.dtypes;
  a.pooled = p.pooled, a.hidden = p.hidden, a.hidden_slope = p.hidden_slope;
  a.channel_gate = p.channel_gate;
  a.activation = p.activation, a.activation_parameter = p.activation_parameter, a.gate = p.gate;
  a.channels = p.channels, a.hidden_channels = p.hidden_channels, a.positions = p.positions;
  a.strips = f.tile.strips;
  return a;
}

ExciteBackwardArguments excite_backward_arguments(const Problem& p, const Backward& b) {
  ExciteBackwardArguments a{};
  a.partial = b.partial, a.partial_ws = b.partial_ws, a.partial_bs = b.partial_bs;
  a.w1 = p.w1, a.w2 = p.w2, a.dtypes = p.dtypes;
  a.hidden_slope = p.hidden_slope, a.channel_gate = p.channel_gate, a.gate = p.gate;
  a.d_mean = b.d_mean, a.sums = b;
  a.channels = p.channels, a.hidden_channels = p.hidden_channels, a.positions = p.positions;
  a.strips = b.tile.strips;
  return a;
}

void forward(const Problem& p, float* scratch) {
  if (p.samples == 0) return;
  const Forward f = plan_forward(p, scratch);
  with_dtype<Passes>(p.dtype, [&](auto passes) {
    passes.squeeze(p, f);
    if (p.has_channel()) {
      with_excitation(p, true, [&](auto* type, auto whole, bool fit) {
        using P = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        launch("excite", excite<P, decltype(whole)::value>,
               excitation_grid(p, p.samples, f.tile.strips, fit), p, excite_arguments(p, f));
      });
    }
    passes.apply(p, f);
  });
}

void backward(const Problem& p, float* scratch) {
  const Backward b = plan_backward(p, scratch);
  const bool sums = b.partial != nullptr || b.partial_ws != nullptr;
  with_dtype<Passes>(p.dtype, [&](auto passes) {
    if (p.samples > 0 && (sums || b.dq != nullptr)) passes.reduce(p, b);
    if (p.samples > 0 && sums) {
      const int branches = (b.partial != nullptr) + (b.partial_ws != nullptr);
      with_excitation(p, false, [&](auto* type, auto whole, bool fit) {
        using P = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        launch("excite_backward", excite_backward<P, decltype(whole)::value>,
               excitation_grid(p, p.samples * branches, b.tile.strips, fit), p,
               excite_backward_arguments(p, b));
      });
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
  b.floats = pieces.size();
  b.tasks = gradient_tasks(p.channels, p.hidden_channels, p.need_channel(), p.need_spatial());
  return b;
}

int architecture_of(int device) {
  static PerDevice<int> known;
  return known.get(device, []() -> int {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, excite<float, true>);
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
