// The excitation's activations and gates, and the combinations of the two branches, element by
// element: the one place with their formulas. Included inside a namespace that has defined Vec<A>,
// some A's that are worked on at once (on a GPU one, as each thread has its own), sigmoid<A> of
// them, and SCSE_INLINE.

// --- the hidden layer's activations, one element at a time, as there are few ---

template <typename A>
struct Activated {
  A value, slope;  // slope: the derivative, which the backward then only multiplies by
};

// parameter: leaky_relu's negative slope, elu's alpha.
template <typename A>
SCSE_INLINE Activated<A> activate(Activation k, A parameter, A v) {
  switch (k) {
    case Activation::relu:
      return {v < 0 ? A(0) : v, v <= 0 ? A(0) : A(1)};  // NaN stays
    case Activation::leaky_relu:
      return v > 0 ? Activated<A>{v, A(1)} : Activated<A>{parameter * v, parameter};
    case Activation::silu: {
      const A s = A(1) / (A(1) + std::exp(-v));
      return {v * s, s * (A(1) + v * (A(1) - s))};
    }
    case Activation::gelu: {
      const A below = A(0.5) * std::erfc(v * A(-0.70710678118654752));  // normal distribution
      const A density = A(0.39894228040143268) * std::exp(A(-0.5) * v * v);
      return {v * below, below + v * density};
    }
    case Activation::gelu_tanh: {
      // (1 + tanh(u)) / 2 is sigmoid(2 * u); the factor is sqrt(8 / pi).
      constexpr A factor = A(1.5957691216057308), cubic = A(0.044715);
      const A s = A(1) / (A(1) + std::exp(-factor * (v + cubic * v * v * v)));
      return {v * s, s + v * s * (A(1) - s) * factor * (A(1) + A(3) * cubic * v * v)};
    }
    case Activation::elu:
      return v > 0 ? Activated<A>{v, A(1)}
                   : Activated<A>{parameter * std::expm1(v), parameter * std::exp(v)};
    case Activation::none:
      break;
  }
  return {v, A(1)};
}

// The gradient before the activation. A slope of zero stops an infinite one, as torch's does.
template <typename A>
SCSE_INLINE A through(A slope, A d) {
  return slope == 0 ? A(0) : slope * d;
}

// --- the gates ---

template <typename A>
SCSE_INLINE Vec<A> gate_of(Gate k, Vec<A> v) {
  if (k == Gate::sigmoid) return sigmoid<A>(v);
  const Vec<A> zero{}, six = zero + A(6), shifted = v + A(3);
  const Vec<A> positive = shifted < zero ? zero : shifted;  // NaN stays
  return (positive > six ? six : positive) / A(6);
}

// The gradient before the gate, from that of the gate and its value.
template <typename A>
SCSE_INLINE Vec<A> gate_gradient(Gate k, Vec<A> d, Vec<A> gate) {
  if (k == Gate::sigmoid) return d * gate * (A(1) - gate);
  const Vec<A> zero{}, one = zero + A(1);
  return ((gate > zero) & (gate < one)) ? d * (A(1) / A(6)) : zero;
}

// --- the combinations ---
//
// value:      y from x, the channel gate c and the spatial gate s.
// gradient:   shares of dy in dL/dc (summed over positions) and in dL/ds (summed over channels).
// direct:     dL/dx with both gates held fixed.
// by_gates:   whether `gradient` needs the gates, so the spatial gate must be known first.
// For concat, dy is the gradient of the first half of y and dy2 that of the second.

template <typename A>
struct Shares {
  Vec<A> c, s;
};

template <typename A, Combine K>
struct Formula;

template <typename A>
struct Formula<A, Combine::add> {
  using V = Vec<A>;
  static constexpr bool by_gates = false;
  static SCSE_INLINE V value(V x, V c, V s) { return x * c + x * s; }
  static SCSE_INLINE Shares<A> gradient(V x, V dy, V, V, V) { return {dy * x, dy * x}; }
  static SCSE_INLINE V direct(V, V dy, V, V c, V s) { return dy * c + dy * s; }
};

template <typename A>
struct Formula<A, Combine::max> {
  using V = Vec<A>;
  static constexpr bool by_gates = true;
  // Both products, since a NaN in either must win.
  static SCSE_INLINE V value(V x, V c, V s) {
    const V a = x * c, b = x * s;
    return ((a > b) | (a != a)) ? a : b;
  }
  // Of what goes to the winner and of what to the loser: the channel branch's. Ties get the mean.
  static SCSE_INLINE V choose(V x, V c, V s, V won, V lost) {
    const V lead = x * (c - s), zero{};
    const V tied = A(0.5) * (won + lost);
    return lead > zero ? won : (lead < zero ? lost : tied);
  }
  static SCSE_INLINE Shares<A> gradient(V x, V dy, V, V c, V s) {
    const V share = choose(x, c, s, dy, V{});
    return {share * x, (dy - share) * x};
  }
  static SCSE_INLINE V direct(V x, V dy, V, V c, V s) { return dy * choose(x, c, s, c, s); }
};

template <typename A>
struct Formula<A, Combine::mul> {
  using V = Vec<A>;
  static constexpr bool by_gates = true;
  static SCSE_INLINE V value(V x, V c, V s) { return (x * c) * (x * s); }
  static SCSE_INLINE Shares<A> gradient(V x, V dy, V, V c, V s) {
    const V whole = dy * x;
    return {whole * (x * s), whole * (x * c)};
  }
  static SCSE_INLINE V direct(V x, V dy, V, V c, V s) { return dy * (A(2) * (x * c) * s); }
};

template <typename A>
struct Formula<A, Combine::concat> {  // value is that of one half at a time
  using V = Vec<A>;
  static constexpr bool by_gates = false;
  static SCSE_INLINE Shares<A> gradient(V x, V dy, V dy2, V, V) { return {dy * x, dy2 * x}; }
  static SCSE_INLINE V direct(V, V dy, V dy2, V c, V s) { return dy * c + dy2 * s; }
};

template <typename A>
struct Formula<A, Combine::channel> {
  using V = Vec<A>;
  static constexpr bool by_gates = false;
  static SCSE_INLINE V value(V x, V c, V) { return x * c; }
  static SCSE_INLINE Shares<A> gradient(V x, V dy, V, V, V) { return {dy * x, V{}}; }
  static SCSE_INLINE V direct(V, V dy, V, V c, V) { return dy * c; }
};

template <typename A>
struct Formula<A, Combine::spatial> {
  using V = Vec<A>;
  static constexpr bool by_gates = false;
  static SCSE_INLINE V value(V x, V, V s) { return x * s; }
  static SCSE_INLINE Shares<A> gradient(V x, V dy, V, V, V) { return {V{}, dy * x}; }
  static SCSE_INLINE V direct(V, V dy, V, V, V s) { return dy * s; }
};
