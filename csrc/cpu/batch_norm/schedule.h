// The order of work. The statistics want all samples before any is squeezed, and du all samples'
// sums, so there the second pass begins where the first has ended, with what is still in cache.
// Included once per instruction set.

// Channels for which another thread pays, in the sums over all strips.
template <typename T>
inline int64_t columns_grain(const NormProblem<T>& p) {
  return std::max<int64_t>(64, (1 << 14) / (p.samples * p.strips + 1));
}
// Strips for which it pays.
template <typename T>
inline int64_t strips_grain(const NormProblem<T>& p) {
  return std::max<int64_t>(1, (1 << 15) / (p.channels * std::min(p.width, p.positions)));
}

template <typename T, typename Maps>
inline void norm_forward(const NormProblem<T>& p) {
  const int64_t strips = p.samples * p.strips;
  const Stage statistics{p.of_batch ? strips : 0, strips_grain(p), [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i) {
                             Statistics<T>::of_strip(p, i / p.strips, i % p.strips);
                           }
                         }};
  const Stage merge{p.channels, columns_grain(p), [&](int64_t begin, int64_t end) {
                      if (p.of_batch) merge_statistics(p, begin, end);
                      prepare(p, begin, end);
                    }};
  const auto back = [&](int64_t n) { return p.samples - 1 - n; };
  by_sample(
      p, std::tuple{statistics, merge}, [&](int64_t n, int64_t i) { Maps::squeeze(p, back(n), i); },
      [&](int64_t n) { excite(p, back(n)); },
      [&](int64_t n, int64_t i) {
        storing(p,
                [&](auto stream) { Maps::template apply<decltype(stream)::value>(p, back(n), i); });
      });
}

template <typename T, typename Maps>
inline void norm_backward(const NormProblem<T>& p) {
  const auto apply = [&](int64_t n, int64_t i) {
    storing(p,
            [&](auto stream) { Maps::template apply_backward<decltype(stream)::value>(p, n, i); });
  };
  const Stage prepared{1, 1, [&](int64_t, int64_t) { prepare(p, 0, p.channels); }};
  const Stage sums{p.need_sums() ? p.channels : 0, columns_grain(p),
                   [&](int64_t begin, int64_t end) { close_sums(p, begin, end); }};
  const int64_t strips = p.samples * p.strips;
  const Stage applies{p.need_du && p.of_batch ? strips : 0, strips_grain(p),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) {
                          const int64_t back = strips - 1 - i;
                          apply(back / p.strips, back % p.strips);
                        }
                      }};
  by_sample(
      p, std::tuple{prepared}, [&](int64_t n, int64_t i) { Maps::reduce(p, n, i); },
      [&](int64_t n) {
        if (p.need_du || p.need_affine || p.need_channel) excite_backward(p, n);
      },
      [&](int64_t n, int64_t i) {
        if (p.need_du && !p.of_batch) apply(n, i);
      },
      sums, applies,
      Stage{p.need_spatial || p.need_channel, 1, [&](int64_t, int64_t) { vector_gradients(p); }},
      matrix_gradient(p, p.d_hidden, p.hidden_channels, p.pooled, p.channels, p.dw1),
      matrix_gradient(p, p.d_excited, p.channels, p.hidden, p.hidden_channels, p.dw2));
}

// From run-time values to the code compiled for them.
template <typename T, Combine K, bool kForward>
inline void run_norm_combine(const NormProblem<T>& p) {
  if (p.channels_last) {
    return kForward ? norm_forward<T, NormChannelsLast<T, K>>(p)
                    : norm_backward<T, NormChannelsLast<T, K>>(p);
  }
  return kForward ? norm_forward<T, NormPlanes<T, K>>(p) : norm_backward<T, NormPlanes<T, K>>(p);
}

template <typename T, bool kForward>
inline void run_norm(const NormProblem<T>& p) {
  switch (p.combine) {
    case Combine::add:
      return run_norm_combine<T, Combine::add, kForward>(p);
    case Combine::max:
      return run_norm_combine<T, Combine::max, kForward>(p);
    case Combine::mul:
      return run_norm_combine<T, Combine::mul, kForward>(p);
    case Combine::concat:
      return run_norm_combine<T, Combine::concat, kForward>(p);
    case Combine::channel:
      return run_norm_combine<T, Combine::channel, kForward>(p);
    case Combine::spatial:
      return run_norm_combine<T, Combine::spatial, kForward>(p);
  }
}
