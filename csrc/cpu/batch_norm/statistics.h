// BatchNorm's statistics, and what every pass makes of them. Each strip has a mean and a sum of
// squared deviations from it of its own, for each channel; then all of a channel's are merged, in
// double and in a fixed order. Nowhere is a square of a mean taken from a mean of squares, so a
// mean of a thousand standard deviations does no harm.
// Included once per instruction set.

// `v`, 0 beyond the tail: there u was loaded as 0, which BatchNorm turns into something else.
template <typename A>
SCSE_INLINE Vec<A> within(Vec<A> v, Full<A>) {
  return v;
}
template <typename A>
SCSE_INLINE Vec<A> within(Vec<A> v, Tail tail) {
  A lane[lanes<A>] = {};
  __builtin_memcpy(lane, &v, tail.count * sizeof(A));
  return load_raw<Vec<A>>(lane);
}

// `t` where v > 0 (or is NaN, as torch has it), else 0: relu(v) is active(v, v).
template <typename A>
SCSE_INLINE Vec<A> active(Vec<A> v, Vec<A> t) {
  return v <= Vec<A>{} ? Vec<A>{} : t;
}

template <typename T>
struct Statistics {
  using A = Accumulator<T>;
  using V = Vec<A>;
  static constexpr int kRows = 4, kPositions = 8;

  // Reads u once from memory (planes: the strip's row again, from L1); writes the strip's own mean
  // and sum of squares.
  static __attribute__((noinline)) void of_strip(const NormProblem<T>& p, int64_t n,
                                                 int64_t index) {
    const Strip strip(p, n, index);
    A *mean = p.strip_mean + strip.sums, *squares = p.strip_squares + strip.sums;
    const T* u = p.x + n * p.x_sample;
    if (p.channels_last) {
      u += strip.begin * p.channels;
      std::fill(mean, mean + p.channels, A(0));
      std::fill(squares, squares + p.channels, A(0));
      in_groups<kPositions>(0, strip.len, [&](int64_t i, auto group) {
        add_positions<decltype(group)::value>(p, u, i, mean, squares);
      });
      sweep<A>(p.channels, [&](int64_t c, auto extent) {
        store(mean + c, load(mean + c, extent) + load(u + c, extent), extent);
      });
      return;
    }
    in_groups<kRows>(0, p.channels, [&](int64_t c, auto group) {
      of_rows<decltype(group)::value>(p, u + c * p.positions + strip.begin, strip.len, mean + c,
                                      squares + c);
    });
  }

  template <int R>
  static SCSE_INLINE void of_rows(const NormProblem<T>& p, const T* u, int64_t len, A* mean,
                                  A* squares) {
    V sum[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      for (int r = 0; r < R; ++r) sum[r] += load(u + r * p.positions + i, extent);
    });
    A near[R];  // the mean, but for the roundings of that sum
    for (int r = 0; r < R; ++r) near[r] = sum_lanes<A>(sum[r]) / len;
    V off[R] = {}, square[R] = {};
    sweep<A>(len, [&](int64_t i, auto extent) {
      for (int r = 0; r < R; ++r) {
        const V d = within<A>(load(u + r * p.positions + i, extent) - near[r], extent);
        off[r] += d;
        square[r] += d * d;
      }
    });
    for (int r = 0; r < R; ++r) {
      const A rest = sum_lanes<A>(off[r]) / len;
      mean[r] = near[r] + rest;
      squares[r] = std::max(A(0), sum_lanes<A>(square[r]) - len * rest * rest);
    }
  }

  // Adds positions i to i + P - 1 to a strip's mean and squares, which hold those of its first i.
  // `mean` is less u of the strip's first position, so that differences stay as small as u's own.
  template <int P>
  static SCSE_INLINE void add_positions(const NormProblem<T>& p, const T* u, int64_t i, A* mean,
                                        A* squares) {
    const A share = A(P) / (i + P), weight = i * share;
    sweep<A>(p.channels, [&](int64_t c, auto extent) {
      const V first = load(u + c, extent);
      V d[P], sum{}, square{};
      for (int k = 0; k < P; ++k) sum += d[k] = load(u + (i + k) * p.channels + c, extent) - first;
      const V own = sum * (A(1) / P);
      for (int k = 0; k < P; ++k) square += (d[k] - own) * (d[k] - own);
      const V before = load(mean + c, extent), apart = own - before;
      store(mean + c, before + apart * share, extent);
      store(squares + c, load(squares + c, extent) + square + apart * apart * weight, extent);
    });
  }
};

// mean and var of channels [begin, end) from the strips' own.
template <typename T>
inline void merge_statistics(const NormProblem<T>& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kColumns = 64;  // at a time, so that rows are read in runs
  const int64_t C = p.channels, rows = p.samples * p.strips;
  const double values = std::max<int64_t>(1, p.samples * p.positions);
  const auto length = [&](int64_t r) {
    return double(std::min(p.width, p.positions - r % p.strips * p.width));
  };
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t columns = std::min(kColumns, end - c);
    double mean[kColumns] = {}, squares[kColumns] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const double len = length(r);
      for (int64_t i = 0; i < columns; ++i) mean[i] += len * p.strip_mean[r * C + c + i];
    }
    for (int64_t i = 0; i < columns; ++i) mean[i] /= values;
    for (int64_t r = 0; r < rows; ++r) {
      const double len = length(r);
      for (int64_t i = 0; i < columns; ++i) {
        const double apart = p.strip_mean[r * C + c + i] - mean[i];
        squares[i] += p.strip_squares[r * C + c + i] + len * apart * apart;
      }
    }
    for (int64_t i = 0; i < columns; ++i) {
      p.mean[c + i] = static_cast<A>(mean[i]);
      p.var[c + i] = static_cast<A>(squares[i] / values);
    }
  }
}

// scale, shift and rstd of channels [begin, end); no part of du goes through the statistics yet.
template <typename T>
inline void prepare(const NormProblem<T>& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  for (int64_t c = begin; c < end; ++c) {
    const double rstd = 1 / std::sqrt(double(p.var[c]) + p.eps);
    p.rstd[c] = static_cast<A>(rstd);
    p.scale[c] = static_cast<A>(p.weight ? rstd * p.weight[c] : rstd);
    p.shift[c] = p.bias ? p.bias[c] : A(0);
    if (p.du_one) p.du_one[c] = p.du_u[c] = 0;
  }
}

// Of channels [begin, end), once every sample is reduced: d bias and d weight, and the two terms of
// du that go through the statistics.
template <typename T>
inline void close_sums(const NormProblem<T>& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  constexpr int64_t kColumns = 64;
  const int64_t C = p.channels;
  const double values = std::max<int64_t>(1, p.samples * p.positions);
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t columns = std::min(kColumns, end - c);
    double dv[kColumns] = {}, dvu[kColumns] = {};
    for (int64_t n = 0; n < p.samples; ++n) {
      double one[kColumns] = {}, u[kColumns] = {};
      for (int64_t r = n * p.strips; r < (n + 1) * p.strips; ++r) {
        for (int64_t i = 0; i < columns; ++i) {
          const int64_t at = r * C + c + i;
          dv[i] += p.sum_g[at];
          dvu[i] += p.sum_gu[at];
          if (p.has_channel()) one[i] += p.sum_one[at], u[i] += p.sum_u[at];
        }
      }
      for (int64_t i = 0; p.has_channel() && i < columns; ++i) {
        const double d_mean = p.d_mean[n * C + c + i];
        dv[i] += d_mean * one[i];
        dvu[i] += d_mean * u[i];
      }
    }
    for (int64_t i = 0; i < columns; ++i) {
      const double rstd = p.rstd[c + i], scale = p.of_batch ? -p.scale[c + i] / values : 0.0;
      if (p.dbias) p.dbias[c + i] = static_cast<A>(dv[i]);
      if (p.dweight) p.dweight[c + i] = static_cast<A>(dvu[i] * rstd);
      p.du_one[c + i] = static_cast<A>(scale * dv[i]);
      p.du_u[c + i] = static_cast<A>(scale * rstd * rstd * dvu[i]);
    }
  }
}
