// The order of work: which thread does which strip of which sample when.
// Included once per instruction set.
//
// A sample's second pass follows its first while the sample is still in cache, and runs backwards,
// so that it begins with what was touched last. Each thread takes whole samples; those that are
// left over when the threads don't divide the batch are shared strip by strip. Either way a strip
// is computed by the same code and sums are added in the same order, so threads don't change
// results.

// The stages `before`; then first(n, strip) for all strips of a sample, then between(n), then
// second(n, strip); when all samples are done, `last`.
template <typename T, typename... Before, typename First, typename Between, typename Second,
          typename... Last>
inline void by_sample(const Problem<T>& p, const std::tuple<Stage<Before>...>& before,
                      const First& first, const Between& between, const Second& second,
                      const Stage<Last>&... last) {
  const auto in_turn = [&](const auto&... stages) {
    std::apply([&](const auto&... early) { p.in_turn(early..., stages..., last...); }, before);
  };
  const int64_t worth = 1 << 15;  // elements for which another thread pays
  const int64_t per_strip =
      std::max<int64_t>(1, worth / (p.channels * std::min(p.width, p.positions)));
  const int64_t per_sample = std::max<int64_t>(1, worth / (p.channels * p.positions));
  if (!p.has_channel()) {  // nothing crosses strips
    const Stage strips{p.samples * p.strips, per_strip, [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           first(i / p.strips, i % p.strips);
                           second(i / p.strips, i % p.strips);
                         }
                       }};
    return in_turn(strips);
  }
  const int64_t whole = p.samples - p.samples % p.threads;
  const int64_t shared = (p.samples - whole) * p.strips;
  const Stage samples{whole, per_sample, [&](int64_t begin, int64_t end) {
                        for (int64_t n = begin; n < end; ++n) {
                          for (int64_t i = 0; i < p.strips; ++i) first(n, i);
                          between(n);
                          for (int64_t i = p.strips - 1; i >= 0; --i) second(n, i);
                        }
                      }};
  const Stage firsts{shared, per_strip, [&](int64_t begin, int64_t end) {
                       for (int64_t i = begin; i < end; ++i)
                         first(whole + i / p.strips, i % p.strips);
                     }};
  const Stage betweens{p.samples - whole, per_sample, [&](int64_t begin, int64_t end) {
                         for (int64_t n = begin; n < end; ++n) between(whole + n);
                       }};
  const Stage seconds{shared, per_strip, [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) {
                          const int64_t back = shared - 1 - i;
                          second(whole + back / p.strips, back % p.strips);
                        }
                      }};
  in_turn(samples, firsts, betweens, seconds);
}

// Calls pass(std::bool_constant): whether it is to store past the caches.
template <typename T, typename Pass>
inline void storing(const Problem<T>& p, const Pass& pass) {
  if (!p.stream) return pass(std::false_type{});
  pass(std::true_type{});
  end_streams();
}

template <typename T, typename Maps>
inline void forward(const Problem<T>& p) {
  by_sample(
      p, std::tuple<>{}, [&](int64_t n, int64_t i) { Maps::squeeze(p, n, i); },
      [&](int64_t n) { excite(p, n); },
      [&](int64_t n, int64_t i) {
        storing(p, [&](auto stream) { Maps::template apply<decltype(stream)::value>(p, n, i); });
      });
}

template <typename T, typename Maps>
inline void backward(const Problem<T>& p) {
  by_sample(
      p, std::tuple<>{}, [&](int64_t n, int64_t i) { Maps::reduce(p, n, i); },
      [&](int64_t n) {
        if (p.need_dx || p.need_channel) excite_backward(p, n);
      },
      [&](int64_t n, int64_t i) {
        if (!p.need_dx) return;
        storing(p, [&](auto stream) {
          Maps::template apply_backward<decltype(stream)::value>(p, n, i);
        });
      },
      Stage{p.need_spatial || p.need_channel, 1, [&](int64_t, int64_t) { vector_gradients(p); }},
      matrix_gradient(p, p.d_hidden, p.hidden_channels, p.pooled, p.channels, p.dw1),
      matrix_gradient(p, p.d_excited, p.channels, p.hidden, p.hidden_channels, p.dw2));
}

// From run-time values to the code compiled for them.
template <typename T, Combine K, bool kForward>
inline void run_combine(const Problem<T>& p) {
  if (p.channels_last)
    return kForward ? forward<T, ChannelsLast<T, K>>(p) : backward<T, ChannelsLast<T, K>>(p);
  return kForward ? forward<T, Planes<T, K>>(p) : backward<T, Planes<T, K>>(p);
}

template <typename T, bool kForward>
inline void run(const Problem<T>& p) {
  switch (p.combine) {
    case Combine::add:
      return run_combine<T, Combine::add, kForward>(p);
    case Combine::max:
      return run_combine<T, Combine::max, kForward>(p);
    case Combine::mul:
      return run_combine<T, Combine::mul, kForward>(p);
    case Combine::concat:
      return run_combine<T, Combine::concat, kForward>(p);
    case Combine::channel:
      return run_combine<T, Combine::channel, kForward>(p);
    case Combine::spatial:
      return run_combine<T, Combine::spatial, kForward>(p);
  }
}
