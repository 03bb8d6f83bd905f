// channels_last maps, as in ../channels_last.h, with BatchNorm and ReLU between u and scSE's input.
// Included once per instruction set.

template <typename T, Combine K>
struct NormChannelsLast {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using F = Formula<A, K>;
  static constexpr bool kChannel = K != Combine::spatial, kSpatial = K != Combine::channel;
  static constexpr bool kConcat = K == Combine::concat;
  static constexpr int kPositions = 4;
  static constexpr int64_t kAhead = 512;  // elements between a store and its prefetch
  static constexpr int64_t kBlock = 16;   // positions whose channels stay near for a second use

  // A vector of channels' way from u to v = BatchNorm(u). Beyond the last channel all is zero.
  struct Norm {
    V mean, scale, shift;

    template <typename Extent>
    SCSE_INLINE Norm(const NormProblem<T>& p, int64_t c, Extent extent)
        : mean(load(p.mean + c, extent)),
          scale(load(p.scale + c, extent)),
          shift(load(p.shift + c, extent)) {}

    SCSE_INLINE V operator()(V ud) const { return ud * scale + shift; }
  };

  static const T* u_of(const NormProblem<T>& p, const Strip& strip) {
    return p.x + strip.n * p.x_sample + strip.begin * p.channels;
  }
  static const T* dy_of(const NormProblem<T>& p, const Strip& strip) {
    return p.dy + strip.n * p.dy_sample + strip.begin * p.out_channels;
  }

  // Forward, second pass over a strip (the first is Statistics::of_strip). Reads u; writes the
  // channels' sums of z to `partial`, parks the gate.
  static __attribute__((noinline)) void squeeze(const NormProblem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer];
    A* partial = p.partial + strip.sums;
    if (kChannel) std::fill(partial, partial + p.channels, A(0));
    const T* u = u_of(p, strip);
    in_groups<kPositions>(0, strip.len, [&](int64_t i, auto group) {
      squeeze_positions<decltype(group)::value, kChannel>(p, u, i, q, partial);
    });
    if constexpr (kSpatial) {
      close_gate(p.gate, q, q, strip.len);
      park(p, strip, 0, q);
    }
  }

  template <int P, bool kSum>
  static SCSE_INLINE void squeeze_positions(const NormProblem<T>& p, const T* u, int64_t i, A* q,
                                            A* partial) {
    V dot[P] = {};
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      const Norm norm(p, c, extent);
      V sum{};
      const V w = kSpatial ? load(p.ws + c, extent) : V{};
      for (int k = 0; k < P; ++k) {
        const V v = norm(load(u + (i + k) * p.channels + c, extent) - norm.mean);
        const V z = active<A>(v, v);
        if (kSum) sum += z;
        if (kSpatial) dot[k] += w * z;
      }
      if (kSum) store(partial + c, load(partial + c, extent) + sum, extent);
    });
    if (kSpatial) sum_lanes_of<A>(dot, p.bs, q + i);
  }

  // Forward, third pass. Reads u (from cache) and the gates; writes y.
  template <bool kStream>
  static __attribute__((noinline)) void apply(const NormProblem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A s[kStripBuffer];
    if (kSpatial) unpark(p, strip, 0, s);
    const T* u = u_of(p, strip);
    T* y = p.y + (n * p.positions + strip.begin) * p.out_channels;
    const A* gate = p.channel_gate + n * p.channels;
    for (int64_t i = 0; i < strip.len; ++i, u += p.channels, y += p.out_channels) {
      const V sv = broadcast<A>(kSpatial ? s[i] : A(0));
      sweep<A>(p.channels, [&](int64_t c, auto extent) {
        const Norm norm(p, c, extent);
        const V v = norm(load(u + c, extent) - norm.mean), z = active<A>(v, v);
        const V cv = kChannel ? load(gate + c, extent) : V{};
        if constexpr (kConcat) {
          put<kStream>(y + c, z * cv, extent);
          put<kStream>(y + p.channels + c, z * sv, extent);
        } else {
          if (!kStream) prefetch_for_writing(y + c + kAhead);
          put<kStream>(y + c, F::value(z, cv, sv), extent);
        }
      });
    }
  }

  // Backward, first pass over a strip, a block of positions at a time. Reads u and dy, then both
  // again (from L1 or L2) when the positions' gradients are known; u also ahead where the formula
  // needs the spatial gate. Writes the strip's sums for the channel gate, ws, bs and BatchNorm;
  // parks the spatial gate and dq.
  static __attribute__((noinline)) void reduce(const NormProblem<T>& p, int64_t n, int64_t index) {
    const Strip strip(p, n, index);
    alignas(64) A q[kStripBuffer], s[kStripBuffer], t[kStripBuffer];
    const T* u = u_of(p, strip);
    const T* dy = dy_of(p, strip);
    const auto clear = [&](A* sums) {
      if (sums) std::fill(sums + strip.sums, sums + strip.sums + p.channels, A(0));
    };
    if (kChannel) clear(p.partial);
    for (A* sums : {p.sum_g, p.sum_gu, p.sum_one, p.sum_u, p.partial_ws}) clear(sums);
    A sum_dq = 0;
    for (int64_t b = 0; b < strip.len; b += kBlock) {
      const int64_t end = std::min(b + kBlock, strip.len);
      if (kSpatial) std::fill(t + end, t + end + lanes<A>, A(0));  // whole vectors are closed below
      if constexpr (F::by_gates) {
        in_groups<kPositions>(b, end, [&](int64_t i, auto group) {
          squeeze_positions<decltype(group)::value, false>(p, u, i, q, nullptr);
        });
        close_gate(p.gate, q + b, s + b, end - b);
      }
      in_groups<kPositions>(b, end, [&](int64_t i, auto group) {
        reduce_positions<decltype(group)::value>(p, strip, u, dy, i, q, s, t);
      });
      if constexpr (kSpatial) {
        if (!F::by_gates) close_gate(p.gate, q + b, s + b, end - b);
        sum_dq += close_gradient(p.gate, t + b, s + b, end - b);
      }
      if (p.need_sums() || p.need_spatial) {
        in_groups<kPositions>(b, end, [&](int64_t i, auto group) {
          weigh_positions<decltype(group)::value>(p, strip, u, dy, i, s, t);
        });
      }
    }
    if constexpr (kSpatial) {
      p.partial_bs[n * p.strips + index] = sum_dq;
      if (p.need_du) {
        park(p, strip, 0, s);
        park(p, strip, 1, t);
      }
    }
  }

  template <int P>
  static SCSE_INLINE void reduce_positions(const NormProblem<T>& p, const Strip& strip, const T* u,
                                           const T* dy, int64_t i, A* q, const A* s, A* t) {
    const A* gate = p.channel_gate + strip.n * p.channels;
    A* partial = p.partial + strip.sums;
    V dot[P] = {}, d_gate_s[P] = {};
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      const Norm norm(p, c, extent);
      V d_gate_c{};
      const V cv = kChannel ? load(gate + c, extent) : V{};
      const V w = kSpatial ? load(p.ws + c, extent) : V{};
      for (int k = 0; k < P; ++k) {
        const T* dyk = dy + (i + k) * p.out_channels + c;
        const V v = norm(load(u + (i + k) * p.channels + c, extent) - norm.mean);
        const V z = active<A>(v, v);
        const V dyv = load(dyk, extent), dyv2 = kConcat ? load(dyk + p.channels, extent) : V{};
        const V sv = F::by_gates ? broadcast<A>(s[i + k]) : V{};
        const Shares<A> share = F::gradient(z, dyv, dyv2, cv, sv);
        if (kChannel) d_gate_c += share.c;
        if (kSpatial) d_gate_s[k] += share.s;
        if (kSpatial && !F::by_gates) dot[k] += w * z;
      }
      if (kChannel) store(partial + c, load(partial + c, extent) + d_gate_c, extent);
    });
    if (kSpatial) sum_lanes_of<A>(d_gate_s, A(0), t + i);
    if (kSpatial && !F::by_gates) sum_lanes_of<A>(dot, p.bs, q + i);
  }

  template <int P>
  static SCSE_INLINE void weigh_positions(const NormProblem<T>& p, const Strip& strip, const T* u,
                                          const T* dy, int64_t i, const A* s, const A* dq) {
    const A* gate = p.channel_gate + strip.n * p.channels;
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      const Norm norm(p, c, extent);
      const V cv = kChannel ? load(gate + c, extent) : V{};
      const V w = kSpatial ? load(p.ws + c, extent) : V{};
      V g_sum{}, gu_sum{}, one_sum{}, u_sum{}, ws_sum{};
      for (int k = 0; k < P; ++k) {
        const T* dyk = dy + (i + k) * p.out_channels + c;
        const V ud = load(u + (i + k) * p.channels + c, extent) - norm.mean, v = norm(ud);
        const V z = active<A>(v, v), dyv2 = kConcat ? load(dyk + p.channels, extent) : V{};
        V d = F::direct(z, load(dyk, extent), dyv2, cv, broadcast<A>(kSpatial ? s[i + k] : A(0)));
        if (kSpatial) d += dq[i + k] * w;
        const V g = active<A>(v, d);
        g_sum += g;
        gu_sum += g * ud;
        if (kChannel) one_sum += active<A>(v, broadcast<A>(1));
        if (kChannel) u_sum += active<A>(v, ud);
        if (kSpatial) ws_sum += dq[i + k] * z;
      }
      const auto add = [&](A* sums, V more) {
        store(sums + strip.sums + c, load(sums + strip.sums + c, extent) + more, extent);
      };
      add(p.sum_g, g_sum);
      add(p.sum_gu, gu_sum);
      if (kChannel) add(p.sum_one, one_sum);
      if (kChannel) add(p.sum_u, u_sum);
      if (kSpatial) add(p.partial_ws, ws_sum);
    });
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
    const T* u = u_of(p, strip);
    const T* dy = dy_of(p, strip);
    T* du = p.dx + (n * p.positions + strip.begin) * p.channels;
    const A* gate = p.channel_gate + n * p.channels;
    const A* mean = p.d_mean + n * p.channels;
    for (int64_t i = 0; i < strip.len;
         ++i, u += p.channels, dy += p.out_channels, du += p.channels) {
      const V sv = broadcast<A>(kSpatial ? s[i] : A(0));
      const A dqv = kSpatial ? dq[i] : A(0);
      sweep<A>(p.channels, [&](int64_t c, auto extent) {
        const Norm norm(p, c, extent);
        const V ud = load(u + c, extent) - norm.mean, v = norm(ud);
        const V dyv2 = kConcat ? load(dy + p.channels + c, extent) : V{};
        const V cv = kChannel ? load(gate + c, extent) : V{};
        V d = F::direct(active<A>(v, v), load(dy + c, extent), dyv2, cv, sv);
        if (kChannel) d += load(mean + c, extent);
        if (kSpatial) d += dqv * load(p.ws + c, extent);
        const V rest = load(p.du_u + c, extent) * ud + load(p.du_one + c, extent);
        if (!kStream) prefetch_for_writing(du + c + kAhead);
        put<kStream>(du + c, norm.scale * active<A>(v, d) + rest, extent);
      });
    }
  }
};
