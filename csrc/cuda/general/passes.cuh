// Launches the passes over the map: from what is known at run time to the kernel that was compiled
// for it.
#pragma once

#include <type_traits>

#include "apply.cuh"
#include "apply_flat.cuh"
#include "general.h"
#include "../dispatch.h"
#include "../launch.h"
#include "reduce.cuh"
#include "squeeze.cuh"

namespace scse::cuda {

// Calls body(std::integral_constant<int, W>).
template <typename T, typename Body>
void with_width(int width, const Body& body) {
  width == wide<T> ? body(std::integral_constant<int, wide<T>>())
                   : body(std::integral_constant<int, wide<T> / 2>());
}

// Calls body(std::integral_constant<Combine, k>, std::bool_constant<channels last>) for a flat map.
template <typename Body>
void with_flat(const Problem& p, const Body& body) {
  with_combine(p.combine, [&](auto combine) {
    with_bool(p.channels_last, [&](auto last) {
      constexpr bool apart = decltype(combine)::value == Combine::concat && decltype(last)::value;
      if constexpr (!apart) body(combine, last);  // see is_flat
    });
  });
}

// What of the arguments does not depend on the walk.
template <typename T, typename Walk>
ApplyArguments<T, Walk> apply_arguments(const Problem& p, const Forward& f, const Walk& walk) {
  ApplyArguments<T, Walk> a{};
  a.x = static_cast<const T*>(p.x), a.y = static_cast<T*>(p.y);
  a.channel_gate = p.channel_gate, a.spatial_gate = f.spatial_gate;
  a.x_sample = p.x_sample, a.x_pitch = p.x_pitch;
  a.channels = p.channels, a.positions = p.positions;
  a.walk = walk;
  a.residual = p.residual;
  return a;
}
template <typename T, typename Walk>
ApplyBackwardArguments<T, Walk> apply_arguments(const Problem& p, const Backward& b,
                                                const Walk& walk) {
  ApplyBackwardArguments<T, Walk> a{};
  a.dy = static_cast<const T*>(p.dy), a.x = static_cast<const T*>(p.x);
  a.channel_gate = p.channel_gate, a.spatial_gate = b.spatial_gate, a.dq = b.dq;
  a.d_mean = b.d_mean, a.ws = p.ws;
  a.dy_sample = p.dy_sample, a.dy_pitch = p.dy_pitch;
  a.x_sample = p.x_sample, a.x_pitch = p.x_pitch;
  a.channels = p.channels, a.positions = p.positions;
  a.walk = walk;
  a.dtypes = p.dtypes, a.residual = p.residual ? -1 : 0, a.tasks = b.tasks;
  return a;
}

template <typename T>
void Passes<T>::squeeze(const Problem& p, const Forward& f) {
  const Tile& t = f.tile;
  SqueezeArguments a{};
  a.partial = f.partial, a.spatial_gate = f.spatial_gate;
  a.x_sample = p.x_sample, a.x_pitch = p.x_pitch, a.x_down = t.outer * p.x_pitch;
  a.channels = p.channels, a.positions = p.positions;
  a.lanes = t.of_row(), a.tiles = t.tiles, a.strips = t.strips;
  a.ws_dtype = dtype_of(p.dtypes, Parameter::ws), a.bs_dtype = dtype_of(p.dtypes, Parameter::bs);
  a.gate = p.gate;
  with_width<T>(t.width, [&](auto width) {
    constexpr int W = decltype(width)::value;
    const auto run = [&](auto channel, auto spatial) {
      constexpr bool CHANNEL = decltype(channel)::value, SPATIAL = decltype(spatial)::value;
      launch("squeeze",
             p.channels_last ? squeeze_channels_last<T, W, CHANNEL, SPATIAL>
                             : squeeze_planes<T, W, CHANNEL, SPATIAL>,
             Grid{p.samples * t.strips, t.threads()}, p, static_cast<const T*>(p.x), p.ws, p.bs, a);
    };
    if (!p.has_channel()) return run(std::false_type(), std::true_type());
    with_bool(p.has_spatial(), [&](auto spatial) { run(std::true_type(), spatial); });
  });
}

template <typename T>
void Passes<T>::apply(const Problem& p, const Forward& f) {
  const Tile& t = f.tile;
  Grid grid{p.samples * t.inner_tiles * t.outer_tiles, t.apply_threads()};
  grid.overlap = true;
  if (f.flat.size > 0) {
    grid.blocks = p.samples * f.flat.tiles(), grid.threads = kMaxThreads;
    return with_flat(p, [&](auto combine, auto last) {
      launch("apply_flat", apply_flat<T, decltype(combine)::value, decltype(last)::value>, grid, p,
             apply_arguments<T>(p, f, FlatWalk(f.flat)));
    });
  }
  const Walk walk{t.of_row().bits, t.inner_tiles, t.outer_tiles};
  with_width<T>(t.width, [&](auto width) {
    with_combine(p.combine, [&](auto combine) {
      with_bool(p.channels_last, [&](auto last) {
        launch(
            "apply",
            cuda::apply<T, decltype(width)::value, decltype(combine)::value, decltype(last)::value>,
            grid, p, apply_arguments<T>(p, f, walk));
      });
    });
  });
}

template <typename T>
void Passes<T>::reduce(const Problem& p, const Backward& b) {
  const Tile& t = b.tile;
  // A branch alone has the same shares of dy as the sum.
  const bool alone = p.combine == Combine::channel || p.combine == Combine::spatial;
  with_combine(alone ? Combine::add : p.combine, [&](auto combine) {
    constexpr Combine K = decltype(combine)::value;
    if constexpr (K != Combine::channel && K != Combine::spatial) {
      // x is used again where the gates must be known first, and for dws.
      const bool again = Formula<float, K>::by_gates || b.partial_ws != nullptr;
      const int64_t step = static_cast<int64_t>(sizeof(T)) * t.inner * t.outer;
      const int64_t kept = again ? std::min(t.steps, kKeptBytes / step) : 0;
      const Grid grid{p.samples * t.strips, t.threads(), kept * step, kKeptBytes};
      ReduceArguments a{};
      a.partial = b.partial, a.partial_ws = b.partial_ws, a.partial_bs = b.partial_bs;
      a.spatial_gate = b.spatial_gate, a.dq = b.dq;
      a.dy_sample = p.dy_sample, a.dy_pitch = p.dy_pitch;
      a.x_sample = p.x_sample, a.x_pitch = p.x_pitch;
      a.dy_down = t.outer * p.dy_pitch, a.x_down = t.outer * p.x_pitch;
      a.channels = p.channels, a.positions = p.positions;
      a.lanes = t.of_row(), a.tiles = t.tiles, a.strips = t.strips;
      a.steps = t.steps, a.kept = kept;
      a.ws_dtype = dtype_of(p.dtypes, Parameter::ws);
      a.bs_dtype = dtype_of(p.dtypes, Parameter::bs);
      a.gate = p.gate;
      with_width<T>(t.width, [&](auto width) {
        constexpr int W = decltype(width)::value;
        launch("reduce", p.channels_last ? reduce_channels_last<T, W, K> : reduce_planes<T, W, K>,
               grid, p, static_cast<const T*>(p.dy), static_cast<const T*>(p.x), p.ws, p.bs,
               static_cast<const float*>(p.channel_gate), a);
      });
    }
  });
}

template <typename T>
void Passes<T>::apply_backward(const Problem& p, const Backward& b) {
  const Tile& t = b.tile;
  const bool flat = b.flat.size > 0;
  const int64_t of_sample = flat ? b.flat.tiles() : t.inner_tiles * t.outer_tiles;
  const int64_t tiles = p.dx == nullptr ? 0 : p.samples * of_sample;
  if (tiles + b.tasks == 0) return;
  Grid grid{tiles + b.tasks, flat ? kMaxThreads : t.apply_threads()};
  grid.overlap = true;
  const ParameterGradients gradients(p, b);
  if (flat) {
    return with_flat(p, [&](auto combine, auto last) {
      launch("apply_backward_flat",
             apply_backward_flat<T, decltype(combine)::value, decltype(last)::value>, grid, p,
             static_cast<T*>(p.dx), apply_arguments<T>(p, b, FlatWalk(b.flat)), gradients);
    });
  }
  Walk walk{};
  if (tiles > 0) walk = {t.of_row().bits, t.inner_tiles, t.outer_tiles};
  with_width<T>(t.width, [&](auto width) {
    with_combine(p.combine, [&](auto combine) {
      with_bool(p.channels_last, [&](auto last) {
        launch("apply_backward",
               cuda::apply_backward<T, decltype(width)::value, decltype(combine)::value,
                                    decltype(last)::value>,
               grid, p, static_cast<T*>(p.dx), apply_arguments<T>(p, b, walk), gradients);
      });
    });
  });
}

}  // namespace scse::cuda
