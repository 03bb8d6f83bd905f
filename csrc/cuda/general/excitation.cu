// Launches the channel excitation: as a whole, or a layer at a time.
#include "../dispatch.h"
#include "excite.cuh"
#include "excite_layers.cuh"
#include "general.h"
#include "../launch.h"
#include "../per_device.h"

namespace scse::cuda {
namespace {

// Calls body(const P*, std::bool_constant<WHOLE>) with what the excitation's kernels are compiled
// for: one dtype of all parameters used (void: several, or a rare one), and whether all rows are
// whole fours of elements.
template <typename Body>
void with_excitation(const Problem& p, bool biases, const Body& body) {
  const auto dtype_of = [&](Parameter parameter) { return cuda::dtype_of(p.dtypes, parameter); };
  const Dtype dtype = dtype_of(Parameter::w1);
  const bool one = dtype == dtype_of(Parameter::w2) &&
                   (!biases || p.b1 == nullptr || dtype == dtype_of(Parameter::b1)) &&
                   (!biases || p.b2 == nullptr || dtype == dtype_of(Parameter::b2));
  if (!one || dtype == Dtype::float64) {
    return body(static_cast<const void*>(nullptr), std::false_type());
  }
  const auto whole_or_not = [&](auto* type) {
    const auto at = reinterpret_cast<uintptr_t>(p.w1) | reinterpret_cast<uintptr_t>(p.w2);
    with_bool((p.channels | p.hidden_channels) % 4 == 0 && at % (4 * sizeof *type) == 0,
              [&](auto whole) { body(type, whole); });
  };
  if (dtype == Dtype::float32) return whole_or_not(static_cast<const float*>(nullptr));
  if (dtype == Dtype::float16) return whole_or_not(static_cast<const __half*>(nullptr));
  whole_or_not(static_cast<const __nv_bfloat16*>(nullptr));
}

// A launch of the excitation as a whole, a block for each of `blocks`.
Grid excitation_grid(const Problem& p, int64_t blocks, int64_t strips) {
  Grid grid{blocks, excite_threads(p.channels, p.hidden_channels, strips)};
  grid.shared = 4 * excite_vectors(p.channels, p.hidden_channels);
  grid.overlap = true;
  return grid;
}

// Calls body(std::integral_constant<int, SHARE>, grid) for a launch of one of its layers, whose
// results and sums are cut into so many parts and slices.
template <typename Body>
void with_layer(const Problem& p, int64_t parts, int64_t slices, const Body& body) {
  const int share = layer_share(p.samples, parts * slices);
  Grid grid{ceil_div(p.samples, share) * parts * slices, kLayerThreads};
  grid.overlap = true;
  share == 2 ? body(std::integral_constant<int, 2>(), grid)
             : body(std::integral_constant<int, 8>(), grid);
}

Layers layers_of(const Problem& p, float* slices) {
  Layers l{};
  if (slices == nullptr) return l;
  l.slices = slices, l.samples = p.samples, l.pitch = slices_pitch(p.hidden_channels);
  // Half the lanes, so twice the rows to a block: fewer blocks then add up the same partial sums.
  l.bits_of_slice = layer_lane_bits(ceil_div(p.channels, 2 * kSlices));
  l.bits_of_hidden = layer_lane_bits(p.hidden_channels);
  return l;
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
  a.layers = layers_of(p, f.slices);
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
  a.layers = layers_of(p, b.slices);
  return a;
}

}  // namespace

void excite(const Problem& p, const Forward& f) {
  with_excitation(p, true, [&](auto* type, auto whole) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    constexpr bool WHOLE = decltype(whole)::value;
    const ExciteArguments a = excite_arguments(p, f);
    if (f.slices == nullptr) {
      return launch("excite", excite<P, WHOLE>, excitation_grid(p, p.samples, a.strips), p, a);
    }
    const int64_t parts = ceil_div(p.hidden_channels, layer_rows(a.layers.bits_of_slice));
    with_layer(p, parts, kSlices, [&](auto share, const Grid& grid) {
      launch("excite_hidden", excite_hidden<P, WHOLE, decltype(share)::value>, grid, p, a);
    });
    const int64_t of_channels = ceil_div(p.channels, layer_rows(a.layers.bits_of_hidden));
    with_layer(p, of_channels, 1, [&](auto share, const Grid& grid) {
      launch("excite_gates", excite_gates<P, WHOLE, decltype(share)::value>, grid, p, a);
    });
  });
}

void excite_backward(const Problem& p, const Backward& b) {
  const int branches = (b.partial != nullptr) + (b.partial_ws != nullptr);
  with_excitation(p, false, [&](auto* type, auto whole) {
    using P = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    constexpr bool WHOLE = decltype(whole)::value;
    const ExciteBackwardArguments a = excite_backward_arguments(p, b);
    if (b.slices == nullptr) {
      return launch("excite_backward", excite_backward<P, WHOLE>,
                    excitation_grid(p, p.samples * branches, a.strips), p, a);
    }
    const int64_t parts = ceil_div(p.hidden_channels, kColumns) + (b.partial_ws != nullptr);
    with_layer(p, parts, kSlices, [&](auto share, const Grid& grid) {
      launch("excite_backward_hidden", excite_backward_hidden<P, WHOLE, decltype(share)::value>,
             grid, p, a);
    });
    const int64_t of_channels = b.d_mean == nullptr ? 1 : ceil_div(p.channels, kColumns);
    with_layer(p, of_channels, 1, [&](auto share, const Grid& grid) {
      launch("excite_backward_mean", excite_backward_mean<P, WHOLE, decltype(share)::value>, grid,
             p, a);
    });
  });
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

}  // namespace scse::cuda
