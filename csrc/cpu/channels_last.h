// channels_last maps: a position's channels lie side by side, vectors run along them. Positions
// are taken kPositions at a time, so that per-channel values are loaded and stored once for all.
// Included once per instruction set.

template <typename T, Combine K>
struct ChannelsLast {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using F = Formula<A, K>;
  static constexpr bool kChannel = K != Combine::spatial, kSpatial = K != Combine::channel;
  static constexpr bool kConcat = K == Combine::concat;
  static constexpr int kPositions = 4;
  static constexpr int64_t kAhead = 512;  // elements between a store and its prefetch
  static constexpr int64_t kBlock = 16;   // positions whose channels stay in L1 for a second use

  static const T* x_of(const Problem<T>& p, const Strip& strip) {
    return p.x + strip.n * p.x_sample + strip.begin * p.x_pitch;
  }
  static const T* dy_of(const Problem<T>& p, const Strip& strip) {
    return p.dy + strip.n * p.dy_sample + strip.begin * p.dy_pitch;
  }

  // Forward, first pass over a strip. Reads x; writes channel sums to `partial`, parks the gate.
  static __attribute__((noinline)) void squeeze(const Problem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer];
    A* partial = p.partial + strip.sums;
    if (kChannel) std::fill(partial, partial + p.channels, A(0));
    const T* x = x_of(p, strip);
    in_groups<kPositions>(0, strip.len, [&](int64_t i, auto group) {
      squeeze_positions<decltype(group)::value, kChannel>(p, x, i, q, partial);
    });
    if constexpr (kSpatial) {
      close_gate(p.gate, q, q, strip.len);
      park(p, strip, 0, q);
    }
  }

  template <int P, bool kSum>
  static SCSE_INLINE void squeeze_positions(const Problem<T>& p, const T* x, int64_t i, A* q,
                                            A* partial) {
    V dot[P] = {};
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      V sum{};
      const V w = kSpatial ? load(p.ws + c, extent) : V{};
      for (int k = 0; k < P; ++k) {
        const V xv = load(x + (i + k) * p.x_pitch + c, extent);
        if (kSum) sum += xv;
        if (kSpatial) dot[k] += w * xv;
      }
      if (kSum) store(partial + c, load(partial + c, extent) + sum, extent);
    });
    if (kSpatial) sum_lanes_of<A>(dot, p.bs, q + i);
  }

  // Forward, second pass. Reads x (from cache) and the gates; writes y.
  template <bool kStream>
  static __attribute__((noinline)) void apply(const Problem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A s[kStripBuffer];
    if (kSpatial) unpark(p, strip, 0, s);
    const bool residual = p.residual;
    const T* x = x_of(p, strip);
    T* y = p.y + (n * p.positions + strip.begin) * p.out_channels;
    const A* gate = p.channel_gate + n * p.channels;
    for (int64_t i = 0; i < strip.len; ++i, x += p.x_pitch, y += p.out_channels) {
      const V sv = broadcast<A>(kSpatial ? s[i] : A(0));
      sweep<A>(p.channels, [&](int64_t c, auto extent) {
        const V xv = load(x + c, extent), cv = kChannel ? load(gate + c, extent) : V{};
        if constexpr (kConcat) {
          put<kStream>(y + c, xv * cv, extent);
          put<kStream>(y + p.channels + c, xv * sv, extent);
        } else {
          if (!kStream) prefetch_for_writing(y + c + kAhead);
          V value = F::value(xv, cv, sv);
          if (residual) value += xv;
          put<kStream>(y + c, value, extent);
        }
      });
    }
  }

  // Backward, first pass over a strip, a block of positions at a time. Reads x and dy, then x again
  // (from L1); writes the strip's sums for the channel gate, ws and bs; parks the gate and dq.
  static __attribute__((noinline)) void reduce(const Problem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer], s[kStripBuffer], t[kStripBuffer];
    const T* x = x_of(p, strip);
    const T* dy = dy_of(p, strip);
    A* partial = p.partial + strip.sums;
    A* out = p.partial_ws + strip.sums;
    if (kChannel) std::fill(partial, partial + p.channels, A(0));
    if (kSpatial && p.need_spatial) std::fill(out, out + p.channels, A(0));
    const A* gate = p.channel_gate + n * p.channels;
    A sum_dq = 0;
    for (int64_t b = 0; b < strip.len; b += kBlock) {
      const int64_t end = std::min(b + kBlock, strip.len);
      if (kSpatial) std::fill(t + end, t + end + lanes<A>, A(0));  // whole vectors are closed below
      if constexpr (F::by_gates) {
        in_groups<kPositions>(b, end, [&](int64_t i, auto group) {
          squeeze_positions<decltype(group)::value, false>(p, x, i, q, nullptr);
        });
        close_gate(p.gate, q + b, s + b, end - b);
      }
      in_groups<kPositions>(b, end, [&](int64_t i, auto group) {
        reduce_positions<decltype(group)::value>(p, x, dy, gate, i, q, s, t, partial);
      });
      if constexpr (kSpatial) {
        if (!F::by_gates) close_gate(p.gate, q + b, s + b, end - b);
        sum_dq += close_gradient(p.gate, t + b, s + b, end - b);
        if (p.need_spatial) {
          in_groups<kPositions>(b, end, [&](int64_t i, auto group) {
            weigh_positions<decltype(group)::value>(p, x, i, t, out);
          });
        }
      }
    }
    if constexpr (kSpatial) {
      p.partial_bs[n * p.strips + index] = sum_dq;
      if (p.need_dx) {
        park(p, strip, 0, s);
        park(p, strip, 1, t);
      }
    }
  }

  template <int P>
  static SCSE_INLINE void reduce_positions(const Problem<T>& p, const T* x, const T* dy,
                                           const A* gate, int64_t i, A* q, const A* s, A* t,
                                           A* partial) {
    V dot[P] = {}, d_gate_s[P] = {};
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      V d_gate_c{};
      const V cv = kChannel ? load(gate + c, extent) : V{};
      const V w = kSpatial ? load(p.ws + c, extent) : V{};
      for (int k = 0; k < P; ++k) {
        const T* dyk = dy + (i + k) * p.dy_pitch + c;
        const V xv = load(x + (i + k) * p.x_pitch + c, extent), dyv = load(dyk, extent);
        const V dyv2 = kConcat ? load(dyk + p.channels, extent) : V{};
        const V sv = F::by_gates ? broadcast<A>(s[i + k]) : V{};
        const Shares<A> share = F::gradient(xv, dyv, dyv2, cv, sv);
        if (kChannel) d_gate_c += share.c;
        if (kSpatial) d_gate_s[k] += share.s;
        if (kSpatial && !F::by_gates) dot[k] += w * xv;
      }
      if (kChannel) store(partial + c, load(partial + c, extent) + d_gate_c, extent);
    });
    if (kSpatial) sum_lanes_of<A>(d_gate_s, A(0), t + i);
    if (kSpatial && !F::by_gates) sum_lanes_of<A>(dot, p.bs, q + i);
  }

  template <int P>
  static SCSE_INLINE void weigh_positions(const Problem<T>& p, const T* x, int64_t i, const A* dq,
                                          A* out) {
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      V sum{};
      for (int k = 0; k < P; ++k) sum += dq[i + k] * load(x + (i + k) * p.x_pitch + c, extent);
      store(out + c, load(out + c, extent) + sum, extent);
    });
  }

  // Backward, second pass. Reads dy (and x, where the formula needs it) from cache; writes dx.
  template <bool kStream>
  static __attribute__((noinline)) void apply_backward(const Problem<T>& p, int64_t n,
                                                       int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A s[kStripBuffer], dq[kStripBuffer];
    if (kSpatial) {
      unpark(p, strip, 0, s);
      unpark(p, strip, 1, dq);
    }
    const bool residual = p.residual;
    const T* x = x_of(p, strip);
    const T* dy = dy_of(p, strip);
    T* dx = p.dx + (n * p.positions + strip.begin) * p.channels;
    const A* gate = p.channel_gate + n * p.channels;
    const A* mean = p.d_mean + n * p.channels;
    for (int64_t i = 0; i < strip.len; ++i, x += p.x_pitch, dy += p.dy_pitch, dx += p.channels) {
      const V sv = broadcast<A>(kSpatial ? s[i] : A(0));
      const A dqv = kSpatial ? dq[i] : A(0);
      sweep<A>(p.channels, [&](int64_t c, auto extent) {
        const V dyv2 = kConcat ? load(dy + p.channels + c, extent) : V{};
        const V cv = kChannel ? load(gate + c, extent) : V{};
        const V dyv = load(dy + c, extent);
        V d = F::direct(load(x + c, extent), dyv, dyv2, cv, sv);
        if (kChannel) d += load(mean + c, extent);
        if (kSpatial) d += dqv * load(p.ws + c, extent);
        if (!kConcat && residual) d += dyv;
        if (!kStream) prefetch_for_writing(dx + c + kAhead);
        put<kStream>(dx + c, d, extent);
      });
    }
  }
};
