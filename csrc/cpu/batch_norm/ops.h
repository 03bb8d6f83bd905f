// The operators scse_kernels::cpu_bn_forward and cpu_bn_backward (schemas:
// scse_kernels/batch_norm/ops.py). Part of ops.cpp, which includes it.

using NormForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using NormBackwardResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
NormProblem<T> describe_norm(const Tensor& u, const Optional& w1, const Optional& w2,
                             const Optional& ws, double eps, int64_t combine, bool channels_last) {
  NormProblem<T> p{};
  static_cast<Problem<T>&>(p) =
      describe<T>(u, map_of(u, channels_last), w1, w2, ws, combine,
                  static_cast<int64_t>(Gate::sigmoid), false, channels_last);
  p.activation = Activation::relu;
  p.eps = eps;
  if (!channels_last) {  // the backward uses a strip of u and of dy twice: both should stay in L2
    const int64_t both = (512 << 10) / (2 * sizeof(T) * p.channels);
    p.width = std::min(p.width, std::max<int64_t>(both / 64 * 64, 256));
    p.strips = (p.positions + p.width - 1) / p.width;
  }
  return p;
}

template <typename T>
NormForwardResult norm_forward(const Tensor& given_u, const Optional& weight, const Optional& bias,
                               const Optional& given_mean, const Optional& given_var,
                               const Optional& w1, const Optional& b1, const Optional& w2,
                               const Optional& b2, const Optional& ws, const Optional& bs,
                               double eps, int64_t combine) {
  using A = Accumulator<T>;
  constexpr ScalarType acc = kAccumulator<T>;
  const bool channels_last = is_channels_last(given_u);
  const Tensor u = in_layout(given_u, channels_last);
  NormProblem<T> p = describe_norm<T>(u, w1, w2, ws, eps, combine, channels_last);
  STD_TORCH_CHECK(!given_mean == !given_var,
                  "scse_kernels: mean and var must both be given or both be missing");
  p.of_batch = !given_mean;

  std::vector<int64_t> sizes(u.sizes().begin(), u.sizes().end());
  sizes[1] = p.out_channels;
  const Tensor y = empty_map({sizes.data(), sizes.size()}, u.scalar_type(), channels_last);
  const int64_t C = p.channels, Cr = p.hidden_channels, channels = w1 ? C : 0;
  const Tensor mean = empty({C}, acc), var = empty({C}, acc);
  const Tensor pooled = empty({p.samples, channels}, acc);
  const Tensor hidden = empty({2, p.samples, Cr}, acc);  // value and slope
  const Tensor channel_gate = empty({p.samples, channels}, acc);
  p.y = static_cast<T*>(y.mutable_data_ptr());
  p.mean = static_cast<A*>(mean.mutable_data_ptr());
  p.var = static_cast<A*>(var.mutable_data_ptr());
  p.pooled = static_cast<A*>(pooled.mutable_data_ptr());
  p.hidden = static_cast<A*>(hidden.mutable_data_ptr());
  p.hidden_slope = p.hidden + p.samples * Cr;
  p.channel_gate = static_cast<A*>(channel_gate.mutable_data_ptr());

  const Parameter<A> w1_("w1", w1, Cr * C), b1_("b1", b1, Cr), w2_("w2", w2, C * Cr),
      b2_("b2", b2, C), ws_("ws", ws, C), bs_("bs", bs, 1), weight_("bn_weight", weight, C),
      bias_("bn_bias", bias, C), mean_("mean", given_mean, C), var_("var", given_var, C);
  p.w1 = w1_.data(), p.b1 = b1_.data(), p.w2 = w2_.data(), p.b2 = b2_.data(), p.ws = ws_.data();
  p.bs = bs_.data() ? *bs_.data() : A(0);
  p.weight = weight_.data(), p.bias = bias_.data();
  if (!p.of_batch) {
    std::copy_n(mean_.data(), C, p.mean);
    std::copy_n(var_.data(), C, p.var);
  }
  p.stream = streams(p, p.y, (u.numel() + y.numel()) * sizeof(T));

  Optional parking;
  if (ws) parking = set_parking(p, p.y, p.out_channels, 1, u.scalar_type());
  Scratch<A> scratch;
  const int64_t maps = p.samples * p.strips * C;
  const int64_t partial = scratch.reserve(w1 ? maps : 0);
  const int64_t strip_mean = scratch.reserve(p.of_batch ? maps : 0);
  const int64_t strip_squares = scratch.reserve(p.of_batch ? maps : 0);
  const int64_t scale = scratch.reserve(C), shift = scratch.reserve(C), rstd = scratch.reserve(C);
  scratch.allocate(acc);
  p.partial = scratch.at(partial);
  p.strip_mean = scratch.at(strip_mean), p.strip_squares = scratch.at(strip_squares);
  p.scale = scratch.at(scale), p.shift = scratch.at(shift), p.rstd = scratch.at(rstd);

  norm_kernels<T>().forward(p);
  return {y, mean, var, pooled, hidden, channel_gate};
}

template <typename T>
NormBackwardResult norm_backward(const Tensor& given_dy, const Tensor& given_u,
                                 const Optional& weight, const Optional& bias, const Optional& w1,
                                 const Optional& b1, const Optional& w2, const Optional& b2,
                                 const Optional& ws, const Optional& bs, const Tensor& mean,
                                 const Tensor& var, const Tensor& pooled, const Tensor& hidden,
                                 const Tensor& channel_gate, double eps, bool of_batch,
                                 int64_t combine, bool need_du, bool need_affine, bool need_channel,
                                 bool need_spatial) {
  using A = Accumulator<T>;
  constexpr ScalarType acc = kAccumulator<T>;
  const bool channels_last = is_channels_last(given_u);
  const Tensor u = in_layout(given_u, channels_last), dy = in_layout(given_dy, channels_last);
  NormProblem<T> p = describe_norm<T>(u, w1, w2, ws, eps, combine, channels_last);
  STD_TORCH_CHECK(dy.scalar_type() == u.scalar_type() && dy.dim() == u.dim() &&
                      dy.numel() == p.samples * p.out_channels * p.positions,
                  "scse_kernels: dy must have y's shape and dtype");
  p.dy = static_cast<const T*>(dy.const_data_ptr());
  p.dy_sample = p.samples > 1 ? dy.stride(0) : p.out_channels * p.positions;
  p.of_batch = of_batch;
  p.need_du = need_du;
  p.need_affine = need_affine;
  p.need_dx = need_du || need_affine;  // d_mean is wanted for both
  p.need_channel = need_channel && w1;
  p.need_spatial = need_spatial && ws;

  const int64_t C = p.channels, Cr = p.hidden_channels;
  const Parameter<A> w1_("w1", w1, Cr * C), w2_("w2", w2, C * Cr), ws_("ws", ws, C),
      bs_("bs", bs, 1), weight_("bn_weight", weight, C), bias_("bn_bias", bias, C);
  if (b1) check_count("b1", *b1, Cr);
  if (b2) check_count("b2", *b2, C);
  p.mean = saved<A>("mean", mean, C);
  p.var = saved<A>("var", var, C);
  p.pooled = saved<A>("pooled", pooled, w1 ? p.samples * C : 0);
  p.hidden = saved<A>("hidden", hidden, 2 * p.samples * Cr);
  p.hidden_slope = p.hidden + p.samples * Cr;
  p.channel_gate = saved<A>("channel_gate", channel_gate, w1 ? p.samples * C : 0);
  p.w1 = w1_.data(), p.w2 = w2_.data(), p.ws = ws_.data();
  p.bs = bs_.data() ? *bs_.data() : A(0);
  p.weight = weight_.data(), p.bias = bias_.data();
  const Gradient<A> dweight(weight, need_affine, acc), dbias(bias, need_affine, acc),
      dw1(w1, need_channel, acc), db1(b1, need_channel, acc), dw2(w2, need_channel, acc),
      db2(b2, need_channel, acc), dws(ws, need_spatial, acc), dbs(bs, need_spatial, acc);
  p.dweight = dweight.data(), p.dbias = dbias.data();
  p.dw1 = dw1.data(), p.db1 = db1.data(), p.dw2 = dw2.data(), p.db2 = db2.data();
  p.dws = dws.data(), p.dbs = dbs.data();

  Tensor du = empty({0}, u.scalar_type());
  Optional parking;
  if (need_du) {
    du = empty_map(u.sizes(), u.scalar_type(), channels_last);
    p.dx = static_cast<T*>(du.mutable_data_ptr());
    p.stream = streams(p, p.dx, (u.numel() + dy.numel() + du.numel()) * sizeof(T));
    if (ws) parking = set_parking(p, p.dx, C, 2, u.scalar_type());
  }

  Scratch<A> scratch;
  const int64_t maps = p.samples * p.strips * C, vectors = p.samples * C;
  struct Piece {
    A** place;
    int64_t count, begin = 0;
  } pieces[] = {
      {&p.partial, w1 ? maps : 0},
      {&p.partial_ws, ws ? maps : 0},
      {&p.sum_g, maps},
      {&p.sum_gu, maps},
      {&p.sum_one, w1 ? maps : 0},
      {&p.sum_u, w1 ? maps : 0},
      {&p.partial_bs, p.samples * p.strips},
      {&p.d_excited, vectors},
      {&p.d_mean, vectors},
      {&p.d_hidden, p.samples * Cr},
      {&p.scale, C},
      {&p.shift, C},
      {&p.rstd, C},
      {&p.du_one, C},
      {&p.du_u, C},
  };
  for (Piece& piece : pieces) piece.begin = scratch.reserve(piece.count);
  scratch.allocate(acc);
  for (Piece& piece : pieces) *piece.place = piece.count ? scratch.at(piece.begin) : nullptr;

  norm_kernels<T>().backward(p);
  return {du,           dweight.result(), dbias.result(), dw1.result(), db1.result(),
          dw2.result(), db2.result(),     dws.result(),   dbs.result()};
}

NormForwardResult cpu_bn_forward(const Tensor& u, const Optional& weight, const Optional& bias,
                                 const Optional& mean, const Optional& var, const Optional& w1,
                                 const Optional& b1, const Optional& w2, const Optional& b2,
                                 const Optional& ws, const Optional& bs, double eps,
                                 int64_t combine) {
  SCSE_DISPATCH(u, norm_forward, u, weight, bias, mean, var, w1, b1, w2, b2, ws, bs, eps, combine);
}

NormBackwardResult cpu_bn_backward(const Tensor& dy, const Tensor& u, const Optional& weight,
                                   const Optional& bias, const Optional& w1, const Optional& b1,
                                   const Optional& w2, const Optional& b2, const Optional& ws,
                                   const Optional& bs, const Tensor& mean, const Tensor& var,
                                   const Tensor& pooled, const Tensor& hidden,
                                   const Tensor& channel_gate, double eps, bool of_batch,
                                   int64_t combine, bool need_du, bool need_affine,
                                   bool need_channel, bool need_spatial) {
  SCSE_DISPATCH(u, norm_backward, dy, u, weight, bias, w1, b1, w2, b2, ws, bs, mean, var, pooled,
                hidden, channel_gate, eps, of_batch, combine, need_du, need_affine, need_channel,
                need_spatial);
}
