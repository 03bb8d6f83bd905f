// The channel excitation (two small dense layers), its backward, and the parameters' gradients.
// Sums over strips and samples run in a fixed order, in double.
// Included once per instruction set.

// out[i] = scale * sum_r rows[r, i]
template <typename A>
inline void sum_rows(const A* rows, int64_t count, int64_t size, A scale, A* out) {
  constexpr int64_t kColumns = 64;  // at a time, so that rows are read in runs
  for (int64_t begin = 0; begin < size; begin += kColumns) {
    const int64_t columns = size - begin < kColumns ? size - begin : kColumns;
    double sum[kColumns] = {};
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < columns; ++i) sum[i] += rows[r * size + begin + i];
    }
    for (int64_t i = 0; i < columns; ++i) out[begin + i] = static_cast<A>(sum[i] * scale);
  }
}

// out[r] = matrix[r, :] . v + bias[r], four rows at a time.
template <typename A>
inline void matvec(const A* matrix, const A* v, const A* bias, int64_t rows, int64_t columns,
                   A* out) {
  in_groups<4>(0, rows, [&](int64_t r, auto group) {
    constexpr int R = decltype(group)::value;
    Vec<A> sum[R] = {};
    sweep<A>(columns, [&](int64_t i, auto extent) {
      const Vec<A> vi = load(v + i, extent);
      for (int k = 0; k < R; ++k) sum[k] += vi * load(matrix + (r + k) * columns + i, extent);
    });
    for (int k = 0; k < R; ++k) out[r + k] = sum_lanes<A>(sum[k]) + (bias ? bias[r + k] : A(0));
  });
}

// out[i] = scale * sum_r v[r] * matrix[r, i], four rows at a time.
template <typename A>
inline void matvec_transposed(const A* matrix, const A* v, int64_t rows, int64_t columns, A scale,
                              A* out) {
  sweep<A>(columns, [&](int64_t i, auto extent) {
    Vec<A> sum[4] = {};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      for (int k = 0; k < 4; ++k) sum[k] += v[r + k] * load(matrix + (r + k) * columns + i, extent);
    }
    for (; r < rows; ++r) sum[0] += v[r] * load(matrix + r * columns + i, extent);
    store(out + i, scale * ((sum[0] + sum[1]) + (sum[2] + sum[3])), extent);
  });
}

// pooled, hidden, its slope and channel_gate of sample n, from the strips' channel sums.
template <typename T>
inline void excite(const Problem<T>& p, int64_t n) {
  using A = Accumulator<T>;
  const int64_t C = p.channels, Cr = p.hidden_channels;
  A *pooled = p.pooled + n * C, *gate = p.channel_gate + n * C;
  A *hidden = p.hidden + n * Cr, *slope = p.hidden_slope + n * Cr;
  sum_rows<A>(p.partial + n * p.strips * C, p.strips, C, A(1) / p.positions, pooled);
  matvec<A>(p.w1, pooled, p.b1, Cr, C, hidden);
  for (int64_t j = 0; j < Cr; ++j) {
    const Activated<A> h = activate(p.activation, p.activation_parameter, hidden[j]);
    hidden[j] = h.value, slope[j] = h.slope;
  }
  matvec<A>(p.w2, hidden, p.b2, C, Cr, gate);
  sweep<A>(C, [&](int64_t c, auto extent) {
    store(gate + c, gate_of<A>(p.gate, load(gate + c, extent)), extent);
  });
}

// d_excited, d_hidden and d_mean of sample n, from the strips' sums for the channel gate.
template <typename T>
inline void excite_backward(const Problem<T>& p, int64_t n) {
  using A = Accumulator<T>;
  const int64_t C = p.channels, Cr = p.hidden_channels;
  const A *slope = p.hidden_slope + n * Cr, *gate = p.channel_gate + n * C;
  A *d_excited = p.d_excited + n * C, *d_hidden = p.d_hidden + n * Cr;
  sum_rows<A>(p.partial + n * p.strips * C, p.strips, C, A(1), d_excited);
  sweep<A>(C, [&](int64_t c, auto extent) {
    const Vec<A> d = load(d_excited + c, extent);
    store(d_excited + c, gate_gradient<A>(p.gate, d, load(gate + c, extent)), extent);
  });
  matvec_transposed<A>(p.w2, d_excited, C, Cr, A(1), d_hidden);
  for (int64_t j = 0; j < Cr; ++j) d_hidden[j] = through(slope[j], d_hidden[j]);
  if (p.need_dx) matvec_transposed<A>(p.w1, d_hidden, Cr, C, A(1) / p.positions, p.d_mean + n * C);
}

// matrix[r, i] = sum_n left[n, r] * right[n, i]: a dense layer's weight gradient, row by row.
template <typename T, typename A>
inline auto matrix_gradient(const Problem<T>& p, const A* left, int64_t rows, const A* right,
                            int64_t columns, A* matrix) {
  const int64_t worth = 1 << 18;  // products for which another thread pays
  const int64_t grain = std::max<int64_t>(1, worth / (p.samples * columns + 1));
  const auto body = [=, samples = p.samples](int64_t begin, int64_t end) {
    in_groups<4>(begin, end, [&](int64_t r, auto group) {
      constexpr int R = decltype(group)::value;
      sweep<A>(columns, [&](int64_t i, auto extent) {
        Vec<A> sum[R] = {};
        for (int64_t n = 0; n < samples; ++n) {
          const Vec<A> v = load(right + n * columns + i, extent);
          for (int k = 0; k < R; ++k) sum[k] += left[n * rows + r + k] * v;
        }
        for (int k = 0; k < R; ++k) store(matrix + (r + k) * columns + i, sum[k], extent);
      });
    });
  };
  return Stage{p.need_channel ? rows : 0, grain, body};
}

// The gradients of b1, b2, ws and bs, once every sample is reduced.
template <typename T>
inline void vector_gradients(const Problem<T>& p) {
  using A = Accumulator<T>;
  const int64_t N = p.samples, C = p.channels, Cr = p.hidden_channels;
  if (p.need_spatial) {
    sum_rows<A>(p.partial_ws, N * p.strips, C, A(1), p.dws);
    if (p.dbs) sum_rows<A>(p.partial_bs, N * p.strips, 1, A(1), p.dbs);
  }
  if (p.need_channel) {
    if (p.db1) sum_rows<A>(p.d_hidden, N, Cr, A(1), p.db1);
    if (p.db2) sum_rows<A>(p.d_excited, N, C, A(1), p.db2);
  }
}
