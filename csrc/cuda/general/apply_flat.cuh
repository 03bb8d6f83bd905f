// The second pass over maps whose rows are no multiples of an access (7 x 7, 14 x 14 in half
// precision), forward and backward: what apply.cuh does, with the same formulas and so the same
// bits. A sample is one run of elements: flat.h says which maps and why. Each thread moves 16 bytes
// at a time, kApplyOuter times, some rows further each time.
//
// An access has elements of one row or of two neighbours. What lies along the outer axis (in
// contiguous maps: a value for each channel) is loaded for both, and each element takes one of
// them. What lies along the inner axis is at the same place in all accesses of a thread: it is
// loaded once, element by element, since it can begin anywhere, and stays in registers. So no
// element of the map costs a division, or a load beside its share of the access. A table of the
// inner values in shared memory would take eight loads from it for each access.
//
// Blocks go from the last to the first, and the map is on its way before the kernel before has
// ended, as in apply.cuh.
#pragma once

#include "apply.cuh"
#include "flat.h"

namespace scse::cuda {

// A thread's accesses to a sample.
template <int W>
struct FlatPart {
  int sample;
  int begin;   // its first element
  int left;    // elements of the sample from there on; 0: the thread has none
  int run;     // elements from an access to the next one
  int outer;   // the row where it begins
  int step;    // rows from an access to the next one
  int inner;   // its place in the row
  int row;     // elements of a row
  int across;  // elements from there to the row's end: less than W where an access has two rows
  // From its first access to access u.
  SCSE_DEVICE unsigned place(int u) const { return u * run; }
  // Whether access u exists.
  SCSE_DEVICE bool has(int u) const { return left > u * run; }
  // Whether element i of an access is of the row where the access begins.
  SCSE_DEVICE bool in_first_row(int i) const { return i == 0 || i < across; }
};

struct FlatWalk {
  Divisor tiles, inner_tiles, row;  // of a sample; of a run; elements of a row
  Count size, run, step;            // elements of a sample, elements and rows of a run
  FlatWalk() = default;
  explicit FlatWalk(const Flat& f)
      : tiles(f.tiles()),
        inner_tiles(f.inner_tiles),
        row(f.row),
        size(f.size),
        run(f.run),
        step(f.run / f.row) {}

  template <int W>
  SCSE_DEVICE FlatPart<W> part(int tile) const {
    FlatPart<W> part;
    part.sample = tiles.divide(tile);
    tile -= part.sample * tiles.value;
    const int outer = inner_tiles.divide(tile), inner = tile - outer * inner_tiles.value;
    const int place = (inner * kMaxThreads + static_cast<int>(threadIdx.x)) * W;  // in its run
    const int rows = row.divide(place);
    part.begin = outer * kApplyOuter * run + place;
    part.left = place < run ? size - part.begin : 0;
    part.run = run, part.step = step, part.row = row.value;
    part.outer = outer * kApplyOuter * step + rows;
    part.inner = place - rows * row.value;
    part.across = row.value - part.inner;
    return part;
  }
};

// The same pointer, but the compiler does not see how it came about. Else it adds up the address of
// each load from the kernel's arguments on, which takes up to eight instructions; to this one it
// adds a place of 32 bits in one.
template <typename T>
SCSE_DEVICE T* settled(T* p) {
  size_t address = __cvta_generic_to_global(p);
  asm("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// Values for a thread's accesses that lie along one axis.
template <int W, bool INNER>
struct AlongFlat;

template <int W>
struct AlongFlat<W, true> {
  float v[W]{};
  template <typename T>
  SCSE_DEVICE void load(const T* p, const FlatPart<W>& part) {
    const T* const first = settled(p + part.inner);
    const T* const next = first - part.row;
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = to_float((part.in_first_row(i) ? first : next)[i]);
  }
  SCSE_DEVICE float at(int, int i, const FlatPart<W>&) const { return v[i]; }
};

template <int W>
struct AlongFlat<W, false> {
  float first[kApplyOuter]{}, next[kApplyOuter]{};
  template <typename T>
  SCSE_DEVICE void load(const T* p, const FlatPart<W>& part) {
    const T* const one = settled(p + part.outer);
    const T* const other = settled(one + (part.across < W ? 1 : 0));
#pragma unroll
    for (int u = 0; u < kApplyOuter; ++u) {
      const unsigned place = u * part.step;
      if (part.has(u)) first[u] = to_float(one[place]), next[u] = to_float(other[place]);
    }
  }
  SCSE_DEVICE float at(int u, int i, const FlatPart<W>& part) const {
    return part.in_first_row(i) ? first[u] : next[u];
  }
};

// `p`: where the part begins.
template <int W, typename T>
SCSE_DEVICE Accesses<T, W, kApplyOuter> load_flat(const T* p, const FlatPart<W>& part) {
  p = settled(p);
  Accesses<T, W, kApplyOuter> in;
#pragma unroll
  for (int u = 0; u < kApplyOuter; ++u) {
    if (part.has(u)) in.at[u] = load<W>(p + part.place(u));
  }
  return in;
}

// Reads x and the gates once, writes y.
template <typename T, Combine K, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, 4)
    apply_flat(const __grid_constant__ ApplyArguments<T, FlatWalk> a) {
  constexpr int W = wide<T>;
  let_next_start();
  const FlatPart<W> part = a.walk.template part<W>(gridDim.x - 1 - blockIdx.x);
  const int64_t n = part.sample;
  const Accesses<T, W, kApplyOuter> in = load_flat(a.x + n * a.x_sample + part.begin, part);

  wait_for_previous();
  AlongFlat<W, CHANNELS_LAST> c;
  AlongFlat<W, !CHANNELS_LAST> s;
  if (has_channel(K)) c.load(a.channel_gate + n * a.channels, part);
  if (has_spatial(K)) s.load(a.spatial_gate + n * a.positions, part);

  constexpr int halves = K == Combine::concat ? 2 : 1;
  T* const y = settled(a.y + n * halves * a.walk.size + part.begin);
#pragma unroll
  for (int u = 0; u < kApplyOuter; ++u) {
    if (!part.has(u)) break;
    const Floats<W> f = widen<T, W>(in.at[u]);
    Floats<W> out;
    if constexpr (K == Combine::concat) {
      Floats<W> second;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        out[i] = f[i] * c.at(u, i, part), second[i] = f[i] * s.at(u, i, part);
      }
      store<W>(y + a.walk.size + part.place(u), narrow<T, W>(second));
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        out[i] = value_of<K>(f[i], c.at(u, i, part), s.at(u, i, part), a.residual);
      }
    }
    store<W>(y + part.place(u), narrow<T, W>(out));
  }
}

// Reads dy and the small tensors once, and x if the formula needs it; writes dx. The first blocks
// form the parameters' gradients.
template <typename T, Combine K, bool CHANNELS_LAST>
__global__ void __launch_bounds__(kMaxThreads, reads_two<K> ? 2 : 3)
    apply_backward_flat(T* __restrict__ dx,  // as x
                        ApplyBackwardArguments<T, FlatWalk> a, ParameterGradients gradients) {
  constexpr int W = wide<T>;
  constexpr bool reads_x = Formula<float, K>::by_gates;
  if (static_cast<int>(blockIdx.x) < a.tasks) {
    wait_for_previous();
    return gradients.compute(blockIdx.x);
  }
  const FlatPart<W> part = a.walk.template part<W>(gridDim.x - 1 - blockIdx.x);
  const int64_t n = part.sample;
  const T* const dy = a.dy + n * a.dy_sample + part.begin;
  Accesses<T, W, kApplyOuter> d_in = load_flat(dy, part), d2_in{}, in{};
  if (K == Combine::concat) d2_in = load_flat(dy + a.walk.size, part);
  if (reads_x) in = load_flat(a.x + n * a.x_sample + part.begin, part);
  AlongFlat<W, CHANNELS_LAST> c, mean, weight;
  AlongFlat<W, !CHANNELS_LAST> s, d;
  if (has_spatial(K)) {
    typed(a.ws, dtype_of(a.dtypes, Parameter::ws),
          [&](auto* elements) { weight.load(elements, part); });
  }

  wait_for_previous();
  const auto load_channel = [&] {
    if (!has_channel(K)) return;
    c.load(a.channel_gate + n * a.channels, part);
    mean.load(a.d_mean + n * a.channels, part);
  };
  // What lies along the outer axis comes first: else registers would be spilled.
  if (!CHANNELS_LAST) load_channel();
  if (has_spatial(K)) {
    s.load(a.spatial_gate + n * a.positions, part);
    d.load(a.dq + n * a.positions, part);
  }
  if (CHANNELS_LAST) load_channel();
  dx += n * a.walk.size + part.begin;
#pragma unroll
  for (int u = 0; u < kApplyOuter; ++u) {
    if (!part.has(u)) break;
    const Floats<W> f = widen<T, W>(in.at[u]), g = widen<T, W>(d_in.at[u]),
                    g2 = widen<T, W>(d2_in.at[u]);
    Floats<W> out;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      out[i] =
          gradient_of<K>(f[i], g[i], g2[i], c.at(u, i, part), s.at(u, i, part), mean.at(u, i, part),
                         weight.at(u, i, part), d.at(u, i, part), a.residual);
    }
    store<W>(dx + part.place(u), narrow<T, W>(out));
  }
}

}  // namespace scse::cuda
