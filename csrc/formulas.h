// The combinations of the two branches, element by element: the one place with their formulas.
// Included inside a namespace that has defined Vec<A>, some A's that are worked on at once (on a
// GPU one, as each thread has its own), and SCSE_INLINE.
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
