// Contiguous maps: a channel's positions lie side by side, vectors run along them. Rows are taken
// kRows at a time, so that per-position sums are loaded and stored once for all of them.
// Included once per instruction set.

template <typename T, Combine K>
struct Planes {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using F = Formula<A, K>;
  static constexpr bool kChannel = K != Combine::spatial, kSpatial = K != Combine::channel;
  static constexpr bool kConcat = K == Combine::concat;
  static constexpr bool kWeighLater = F::by_gates;  // the second pass over those reads x, too
  static constexpr int kRows = 4;

  // Forward, first pass over a strip. Reads x; writes channel sums to `partial`, parks the gate.
  static __attribute__((noinline)) void squeeze(const Problem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer];
    if (kSpatial) std::fill(q, q + strip.len + lanes<A>, p.bs);
    const T* x = p.x + n * p.x_sample + strip.begin;
    A* partial = p.partial + strip.sums;
    in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
      squeeze_rows<decltype(group)::value, kChannel>(p, c, x, strip.len, q, partial);
    });
    if constexpr (kSpatial) {
      close_gate(p.gate, q, q, strip.len);
      park(p, strip, 0, q);
    }
  }

  template <int R, bool kSum>
  static SCSE_INLINE void squeeze_rows(const Problem<T>& p, int64_t c, const T* x, int64_t len,
                                       A* q, A* partial) {
    A w[R] = {};
    if (kSpatial) std::copy(p.ws + c, p.ws + c + R, w);
    V sum[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      V qv = kSpatial ? load_raw<V>(q + i) : V{};
      for (int r = 0; r < R; ++r) {
        const V xv = load(x + (c + r) * p.x_pitch + i, extent);
        if (kSum) sum[r] += xv;
        if (kSpatial) qv += w[r] * xv;
      }
      if (kSpatial) store_raw(q + i, qv);
    });
    for (int r = 0; kSum && r < R; ++r) partial[c + r] = sum_lanes<A>(sum[r]);
  }

  // Forward, second pass. Reads x (from cache) and the gates; writes y.
  template <bool kStream>
  static __attribute__((noinline)) void apply(const Problem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A s[kStripBuffer];
    if (kSpatial) unpark(p, strip, 0, s);
    const bool residual = p.residual;
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* x = p.x + n * p.x_sample + c * p.x_pitch + strip.begin;
      T* y = p.y + (n * p.out_channels + c) * p.positions + strip.begin;
      T* y2 = y + p.channels * p.positions;
      const V gate = broadcast<A>(kChannel ? p.channel_gate[n * p.channels + c] : A(0));
      sweep<A>(strip.len, [&](int64_t i, auto extent) {
        if (!kStream) prefetch_for_writing(y + p.positions + i);
        const V xv = load(x + i, extent), sv = kSpatial ? load_raw<V>(s + i) : V{};
        if constexpr (kConcat) {
          put<kStream>(y + i, xv * gate, extent);
          put<kStream>(y2 + i, xv * sv, extent);
        } else {
          V value = F::value(xv, gate, sv);
          if (residual) value += xv;
          put<kStream>(y + i, value, extent);
        }
      });
    }
  }

  // Backward, first pass over a strip. Reads x and dy, and x once more (from L2): ahead where the
  // formula needs the spatial gate, behind to weigh it by dq. Writes the strip's sums for the
  // channel gate, ws and bs; parks the spatial gate and dq.
  static __attribute__((noinline)) void reduce(const Problem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer], s[kStripBuffer], t[kStripBuffer];
    const T* x = p.x + n * p.x_sample + strip.begin;
    const T* dy = p.dy + n * p.dy_sample + strip.begin;
    if (kSpatial) {
      std::fill(q, q + strip.len + lanes<A>, p.bs);
      std::fill(t, t + strip.len + lanes<A>, A(0));
    }
    if constexpr (F::by_gates) {
      in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
        squeeze_rows<decltype(group)::value, false>(p, c, x, strip.len, q, nullptr);
      });
      close_gate(p.gate, q, s, strip.len);
    }
    A* partial = p.partial + strip.sums;
    in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
      reduce_rows<decltype(group)::value>(p, n, c, x, dy, strip.len, q, s, t, partial);
    });
    if constexpr (kSpatial) {
      if (!F::by_gates) close_gate(p.gate, q, s, strip.len);
      p.partial_bs[n * p.strips + index] = close_gradient(p.gate, t, s, strip.len);
      if (p.need_dx) {
        park(p, strip, 0, s);
        park(p, strip, 1, t);
      }
      if (p.need_spatial && !(kWeighLater && p.need_dx)) {
        A* out = p.partial_ws + strip.sums;
        in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
          weigh_rows<decltype(group)::value>(p, c, x, strip.len, t, out);
        });
      }
    }
  }

  template <int R>
  static SCSE_INLINE void reduce_rows(const Problem<T>& p, int64_t n, int64_t c, const T* x,
                                      const T* dy, int64_t len, A* q, const A* s, A* t,
                                      A* partial) {
    A w[R] = {}, gate[R] = {};
    if (kSpatial) std::copy(p.ws + c, p.ws + c + R, w);
    if (kChannel) std::copy_n(p.channel_gate + n * p.channels + c, R, gate);
    const int64_t half = p.channels * p.dy_pitch;  // from the first to the second half of dy
    V d_gate[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      V qv = load_raw<V>(q + i), tv = load_raw<V>(t + i);
      const V sv = F::by_gates ? load_raw<V>(s + i) : V{};
      for (int r = 0; r < R; ++r) {
        const T* dyr = dy + (c + r) * p.dy_pitch + i;
        const V xv = load(x + (c + r) * p.x_pitch + i, extent), dyv = load(dyr, extent);
        const V dyv2 = kConcat ? load(dyr + half, extent) : V{};
        const Shares<A> share = F::gradient(xv, dyv, dyv2, broadcast<A>(gate[r]), sv);
        if (kChannel) d_gate[r] += share.c;
        if (kSpatial) tv += share.s;
        if (kSpatial && !F::by_gates) qv += w[r] * xv;
      }
      if (kSpatial) store_raw(t + i, tv);
      if (kSpatial && !F::by_gates) store_raw(q + i, qv);
    });
    for (int r = 0; kChannel && r < R; ++r) partial[c + r] = sum_lanes<A>(d_gate[r]);
  }

  template <int R>
  static SCSE_INLINE void weigh_rows(const Problem<T>& p, int64_t c, const T* x, int64_t len,
                                     const A* dq, A* out) {
    V sum[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      const V dqv = load_raw<V>(dq + i);
      for (int r = 0; r < R; ++r) sum[r] += dqv * load(x + (c + r) * p.x_pitch + i, extent);
    });
    for (int r = 0; r < R; ++r) out[c + r] = sum_lanes<A>(sum[r]);
  }

  // Backward, second pass. Reads dy (and x, where the formula needs it) from cache; writes dx, and
  // the strip's sums for ws where x is read anyway.
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
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* x = p.x + n * p.x_sample + c * p.x_pitch + strip.begin;
      const T* dy = p.dy + n * p.dy_sample + c * p.dy_pitch + strip.begin;
      const T* dy2 = dy + p.channels * p.dy_pitch;
      T* dx = p.dx + (n * p.channels + c) * p.positions + strip.begin;
      const int64_t nc = n * p.channels + c;
      const V gate = broadcast<A>(kChannel ? p.channel_gate[nc] : A(0));
      const A mean = kChannel ? p.d_mean[nc] : A(0), w = kSpatial ? p.ws[c] : A(0);
      V sum{};
      sweep<A>(strip.len, [&](int64_t i, auto extent) {
        if (!kStream) prefetch_for_writing(dx + p.positions + i);
        const V dyv2 = kConcat ? load(dy2 + i, extent) : V{};
        const V sv = kSpatial ? load_raw<V>(s + i) : V{};
        const V xv = load(x + i, extent), dyv = load(dy + i, extent);
        V d = F::direct(xv, dyv, dyv2, gate, sv);
        if (kChannel) d += mean;
        if (kSpatial) d += w * load_raw<V>(dq + i);
        if (!kConcat && residual) d += dyv;
        put<kStream>(dx + i, d, extent);
        if (kWeighLater) sum += xv * load(dq + i, extent);
      });
      if (kWeighLater && p.need_spatial) {
        p.partial_ws[strip.sums + c] = sum_lanes<A>(sum);
      }
    }
  }
};
