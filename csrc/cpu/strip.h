// A strip of a sample's positions, and what is known of it position by position.
// Included once per instruction set.

struct Strip {
  int64_t n, index, begin, len;  // of sample n: positions begin to begin + len
  int64_t sums;                  // where the strip's sums over positions begin in Problem::partial

  template <typename T>
  Strip(const Problem<T>& p, int64_t n, int64_t index)
      : n(n),
        index(index),
        begin(index * p.width),
        len(std::min(p.width, p.positions - begin)),
        sums((n * p.strips + index) * p.channels) {}
};

// Per-position values (accumulators) that wait between the two passes over a sample, in the memory
// of the map that the second pass writes; see Problem::parking. Slot 0 is the spatial gate, slot 1
// its gradient dq. A strip is unparked before the first of its elements is written.

template <typename T>
constexpr int kParkingRows = sizeof(Accumulator<T>) / sizeof(T);  // rows of T that one slot takes

template <bool kStore, typename T, typename Values>
inline void exchange(const Problem<T>& p, const Strip& strip, int slot, Values* values) {
  char* local = (char*)values;
  const auto move = [&](T* parked, int64_t offset, int64_t bytes) {
    if constexpr (kStore) __builtin_memcpy(parked, local + offset, bytes);
    if constexpr (!kStore) __builtin_memcpy(local + offset, parked, bytes);
  };
  const int64_t begin = strip.begin, len = strip.len;
  T* sample = p.parking + strip.n * p.parking_sample;
  if (p.channels_last) {  // the strip's own block of [len, channels] begins with both slots
    T* block = sample + begin * p.parking_channels + slot * len * kParkingRows<T>;
    move(block, 0, len * sizeof(Accumulator<T>));
    return;
  }
  const int64_t piece = len * sizeof(T);  // cut into the strip's pieces of the first planes
  for (int row = 0; row < kParkingRows<T>; ++row) {
    move(sample + (slot * kParkingRows<T> + row) * p.positions + begin, row * piece, piece);
  }
}

template <typename T>
inline void park(const Problem<T>& p, const Strip& strip, int slot, const Accumulator<T>* values) {
  exchange<true>(p, strip, slot, values);
}

template <typename T>
inline void unpark(const Problem<T>& p, const Strip& strip, int slot, Accumulator<T>* values) {
  exchange<false>(p, strip, slot, values);
}

// s = gate_of(squeezed) over a strip. Buffers are whole vectors long; beyond the strip s is finite,
// whatever an infinite weight made of squeezed there.
template <typename A>
inline void close_gate(Gate k, const A* squeezed, A* s, int64_t len) {
  sweep<A>(len, [&](int64_t i, auto extent) {
    store_raw(s + i, gate_of<A>(k, load(squeezed + i, extent)));
  });
}

// dq, the gradient before the gate, over a strip, in place of t, that of s; returns the sum over
// its len positions.
template <typename A>
inline A close_gradient(Gate k, A* t, const A* s, int64_t len) {
  Vec<A> sum{};
  sweep<A>(len, [&](int64_t i, auto extent) {
    const Vec<A> d = load_raw<Vec<A>>(t + i), gate = load_raw<Vec<A>>(s + i);
    store_raw(t + i, gate_gradient<A>(k, d, gate));
    sum += load(t + i, extent);
  });
  return sum_lanes<A>(sum);
}
