// Contiguous maps, as in ../planes.h, with BatchNorm and ReLU between u and scSE's input.
// Included once per instruction set.

template <typename T, Combine K>
struct NormPlanes {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using F = Formula<A, K>;
  static constexpr bool kChannel = K != Combine::spatial, kSpatial = K != Combine::channel;
  static constexpr bool kConcat = K == Combine::concat;
  static constexpr int kRows = 4;
  static constexpr int kWeighed = 2;  // rows whose five sums fit the registers

  // One channel's way from u to v = BatchNorm(u).
  struct Norm {
    A mean, scale, shift;

    Norm() = default;
    Norm(const NormProblem<T>& p, int64_t c)
        : mean(p.mean[c]), scale(p.scale[c]), shift(p.shift[c]) {}

    template <typename Extent>
    SCSE_INLINE V operator()(V ud, Extent extent) const {
      return within<A>(ud * scale + shift, extent);
    }
  };
  template <int R>
  static SCSE_INLINE void norms_of(const NormProblem<T>& p, int64_t c, Norm (&norm)[R]) {
    for (int r = 0; r < R; ++r) norm[r] = Norm(p, c + r);
  }

  // Forward, second pass over a strip (the first is Statistics::of_strip). Reads u; writes the
  // channels' sums of z to `partial`, parks the gate.
  static __attribute__((noinline)) void squeeze(const NormProblem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer];
    if (kSpatial) std::fill(q, q + strip.len + lanes<A>, p.bs);
    const T* u = p.x + n * p.x_sample + strip.begin;
    A* partial = p.partial + strip.sums;
    in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
      squeeze_rows<decltype(group)::value, kChannel>(p, c, u, strip.len, q, partial);
    });
    if constexpr (kSpatial) {
      close_gate(p.gate, q, q, strip.len);
      park(p, strip, 0, q);
    }
  }

  template <int R, bool kSum>
  static SCSE_INLINE void squeeze_rows(const NormProblem<T>& p, int64_t c, const T* u, int64_t len,
                                       A* q, A* partial) {
    Norm norm[R];
    norms_of(p, c, norm);
    A w[R] = {};
    if (kSpatial) std::copy(p.ws + c, p.ws + c + R, w);
    V sum[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      V qv = kSpatial ? load_raw<V>(q + i) : V{};
      for (int r = 0; r < R; ++r) {
        const V v = norm[r](load(u + (c + r) * p.positions + i, extent) - norm[r].mean, extent);
        const V z = active<A>(v, v);
        if (kSum) sum[r] += z;
        if (kSpatial) qv += w[r] * z;
      }
      if (kSpatial) store_raw(q + i, qv);
    });
    for (int r = 0; kSum && r < R; ++r) partial[c + r] = sum_lanes<A>(sum[r]);
  }

  // Forward, third pass. Reads u (from cache) and the gates; writes y.
  template <bool kStream>
  static __attribute__((noinline)) void apply(const NormProblem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A s[kStripBuffer];
    if (kSpatial) unpark(p, strip, 0, s);
    for (int64_t c = 0; c < p.channels; ++c) {
      const Norm norm(p, c);
      const T* u = p.x + n * p.x_sample + c * p.positions + strip.begin;
      T* y = p.y + (n * p.out_channels + c) * p.positions + strip.begin;
      T* y2 = y + p.channels * p.positions;
      const V gate = broadcast<A>(kChannel ? p.channel_gate[n * p.channels + c] : A(0));
      sweep<A>(strip.len, [&](int64_t i, auto extent) {
        if (!kStream) prefetch_for_writing(y + p.positions + i);
        const V v = norm(load(u + i, extent) - norm.mean, extent), z = active<A>(v, v);
        const V sv = kSpatial ? load_raw<V>(s + i) : V{};
        if constexpr (kConcat) {
          put<kStream>(y + i, z * gate, extent);
          put<kStream>(y2 + i, z * sv, extent);
        } else {
          put<kStream>(y + i, F::value(z, gate, sv), extent);
        }
      });
    }
  }

  // Backward, first pass over a strip. Reads u and dy, and both once more (from L2) when the
  // position's gradients are known; u also ahead where the formula needs the spatial gate. Writes
  // the strip's sums for the channel gate, ws, bs and BatchNorm; parks the spatial gate and dq.
  static __attribute__((noinline)) void reduce(const NormProblem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer], s[kStripBuffer], t[kStripBuffer];
    const T* u = p.x + n * p.x_sample + strip.begin;
    const T* dy = p.dy + n * p.dy_sample + strip.begin;
    if (kSpatial) {
      std::fill(q, q + strip.len + lanes<A>, p.bs);
      std::fill(t, t + strip.len + lanes<A>, A(0));
    }
    if constexpr (F::by_gates) {
      in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
        squeeze_rows<decltype(group)::value, false>(p, c, u, strip.len, q, nullptr);
      });
      close_gate(p.gate, q, s, strip.len);
    }
    in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
      reduce_rows<decltype(group)::value>(p, n, c, u, dy, strip.len, q, s, t,
                                          p.partial + strip.sums);
    });
    if constexpr (kSpatial) {
      if (!F::by_gates) close_gate(p.gate, q, s, strip.len);
      p.partial_bs[n * p.strips + index] = close_gradient(p.gate, t, s, strip.len);
      if (p.need_du) {
        park(p, strip, 0, s);
        park(p, strip, 1, t);
      }
    }
    if (p.need_sums() || p.need_spatial) {
      in_groups<kWeighed>(0, p.channels, [&](int64_t c, auto group) {
        weigh_rows<decltype(group)::value>(p, strip, c, u, dy, s, t);
      });
    }
  }

  template <int R>
  static SCSE_INLINE void reduce_rows(const NormProblem<T>& p, int64_t n, int64_t c, const T* u,
                                      const T* dy, int64_t len, A* q, const A* s, A* t,
                                      A* partial) {
    Norm norm[R];
    norms_of(p, c, norm);
    A w[R] = {}, gate[R] = {};
    if (kSpatial) std::copy(p.ws + c, p.ws + c + R, w);
    if (kChannel) std::copy_n(p.channel_gate + n * p.channels + c, R, gate);
    const int64_t half = p.channels * p.positions;  // from the first to the second half of y
    V d_gate[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      V qv = kSpatial ? load_raw<V>(q + i) : V{}, tv = kSpatial ? load_raw<V>(t + i) : V{};
      const V sv = F::by_gates ? load_raw<V>(s + i) : V{};
      for (int r = 0; r < R; ++r) {
        const int64_t at = (c + r) * p.positions + i;
        const V v = norm[r](load(u + at, extent) - norm[r].mean, extent), z = active<A>(v, v);
        const V dyv = load(dy + at, extent), dyv2 = kConcat ? load(dy + half + at, extent) : V{};
        const Shares<A> share = F::gradient(z, dyv, dyv2, broadcast<A>(gate[r]), sv);
        if (kChannel) d_gate[r] += share.c;
        if (kSpatial) tv += share.s;
        if (kSpatial && !F::by_gates) qv += w[r] * z;
      }
      if (kSpatial) store_raw(t + i, tv);
      if (kSpatial && !F::by_gates) store_raw(q + i, qv);
    });
    for (int r = 0; kChannel && r < R; ++r) partial[c + r] = sum_lanes<A>(d_gate[r]);
  }

  template <int R>
  static SCSE_INLINE void weigh_rows(const NormProblem<T>& p, const Strip& strip, int64_t c,
                                     const T* u, const T* dy, const A* s, const A* dq) {
    Norm norm[R];
    norms_of(p, c, norm);
    A w[R] = {}, gate[R] = {};
    if (kSpatial) std::copy(p.ws + c, p.ws + c + R, w);
    if (kChannel) std::copy_n(p.channel_gate + strip.n * p.channels + c, R, gate);
    const int64_t half = p.channels * p.positions;
    V g_sum[R] = {}, gu_sum[R] = {}, one_sum[R] = {}, u_sum[R] = {}, ws_sum[R] = {};
    sweep<A>(strip.len, [&](int64_t i, auto extent) {
      const V sv = kSpatial ? load_raw<V>(s + i) : V{};
      const V dqv = kSpatial ? load(dq + i, extent) : V{};
      for (int r = 0; r < R; ++r) {
        const int64_t at = (c + r) * p.positions + i;
        const V ud = load(u + at, extent) - norm[r].mean, v = norm[r](ud, extent);
        const V z = active<A>(v, v);
        const V dyv2 = kConcat ? load(dy + half + at, extent) : V{};
        V k = F::direct(z, load(dy + at, extent), dyv2, broadcast<A>(gate[r]), sv);
        if (kSpatial) k += w[r] * dqv;
        const V g = active<A>(v, k);
        g_sum[r] += g;
        gu_sum[r] += g * ud;
        if (kChannel) one_sum[r] += active<A>(v, broadcast<A>(1));
        if (kChannel) u_sum[r] += active<A>(v, ud);
        if (kSpatial) ws_sum[r] += dqv * z;
      }
    });
    for (int r = 0; r < R; ++r) {
      const int64_t at = strip.sums + c + r;
      p.sum_g[at] = sum_lanes<A>(g_sum[r]);
      p.sum_gu[at] = sum_lanes<A>(gu_sum[r]);
      if (kChannel) p.sum_one[at] = sum_lanes<A>(one_sum[r]);
      if (kChannel) p.sum_u[at] = sum_lanes<A>(u_sum[r]);
      if (kSpatial) p.partial_ws[at] = sum_lanes<A>(ws_sum[r]);
    }
  }

  // Backward, second pass. Reads u and dy; writes du.
  template <bool kStream>
  static __attribute__((noinline)) void apply_backward(const NormProblem<T>& p, int64_t n,
                                                       int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A s[kStripBuffer], dq[kStripBuffer];
    if (kSpatial) {
      unpark(p, strip, 0, s);
      unpark(p, strip, 1, dq);
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      const Norm norm(p, c);
      const int64_t plane = c * p.positions + strip.begin;
      const T* u = p.x + n * p.x_sample + plane;
      const T* dy = p.dy + n * p.dy_sample + plane;
      const T* dy2 = dy + p.channels * p.positions;
      T* du = p.dx + n * p.channels * p.positions + plane;
      const int64_t nc = n * p.channels + c;
      const V gate = broadcast<A>(kChannel ? p.channel_gate[nc] : A(0));
      const A mean = kChannel ? p.d_mean[nc] : A(0), w = kSpatial ? p.ws[c] : A(0);
      const A du_one = p.du_one[c], du_u = p.du_u[c];
      sweep<A>(strip.len, [&](int64_t i, auto extent) {
        if (!kStream) prefetch_for_writing(du + p.positions + i);
        const V ud = load(u + i, extent) - norm.mean, v = norm(ud, extent);
        const V dyv2 = kConcat ? load(dy2 + i, extent) : V{};
        const V sv = kSpatial ? load_raw<V>(s + i) : V{};
        V d = F::direct(active<A>(v, v), load(dy + i, extent), dyv2, gate, sv);
        if (kChannel) d += mean;
        if (kSpatial) d += w * load_raw<V>(dq + i);
        put<kStream>(du + i, norm.scale * active<A>(v, d) + (du_u * ud + du_one), extent);
      });
    }
  }
};
