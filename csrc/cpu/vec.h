// Vectors of accumulators, loaded from and stored to any element type. Written with the compiler's
// vector extensions, so one text serves every instruction set: SCSE_VECTOR_BYTES is its register's
// size. Included once per instruction set, inside a namespace of that set.

template <typename A>
constexpr int lanes = SCSE_VECTOR_BYTES / sizeof(A);

template <typename E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <typename E, int N>
using Vector = typename VectorOf<E, N>::type;
template <typename A>
using Vec = Vector<A, lanes<A>>;

#define SCSE_INLINE inline __attribute__((always_inline))

template <typename V, typename E>
SCSE_INLINE V load_raw(const E* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename V, typename E>
SCSE_INLINE void store_raw(E* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <typename To, typename From>
SCSE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes the type, not the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename A>
SCSE_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

using F32 = Vec<float>;
using U32 = Vector<uint32_t, lanes<float>>;
using U16 = Vector<uint16_t, lanes<float>>;

// --- conversion of the half types ---

SCSE_INLINE F32 widen(bfloat16, U16 h) {
  return bit_cast<F32>(__builtin_convertvector(h, U32) << 16);
}

SCSE_INLINE U16 narrow(bfloat16, F32 f) {
  const U32 bits = bit_cast<U32>(f);
  const U32 rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const U32 quiet = bits | 0x400000;                       // a NaN keeps its sign
  return __builtin_convertvector((f == f ? rounded : quiet) >> 16, U16);
}

#if defined(SCSE_HALF_512)
SCSE_INLINE F32 widen(half, U16 h) { return (F32)_mm512_maskz_cvtph_ps(-1, (__m256i)h); }
SCSE_INLINE U16 narrow(half, F32 f) {
  return (U16)_mm512_maskz_cvtps_ph(-1, (__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(SCSE_HALF_256)
SCSE_INLINE F32 widen(half, U16 h) { return (F32)_mm256_cvtph_ps((__m128i)h); }
SCSE_INLINE U16 narrow(half, F32 f) {
  return (U16)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
}
#else
SCSE_INLINE F32 widen(half, U16 h) {
  const U32 bits = __builtin_convertvector(h, U32);
  const U32 magnitude = bits & 0x7fff;
  // Place exponent and mantissa into a float and multiply by 2^112, the difference of the biases:
  // exact, and right for subnormals too. Infinity and NaN get float's largest exponent.
  const F32 finite = bit_cast<F32>(magnitude << 13) * 0x1p112f;
  const U32 value = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : bit_cast<U32>(finite);
  return bit_cast<F32>(value | ((bits & 0x8000) << 16));
}
SCSE_INLINE U16 narrow(half, F32 f) {
  const U32 bits = bit_cast<U32>(f);
  const U32 magnitude = bits & 0x7fffffff;
  // Normal results: move the exponent's bias, round the thirteen bits away to nearest even.
  const U32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal ones: adding 0.5 leaves float's last bit worth 2^-24, half's smallest step.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000;
  U32 value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x477ff000 ? U32{} + 0x7c00 : value;  // 65520 and up: infinity
  value = magnitude > 0x7f800000 ? U32{} + 0x7e00 : value;   // NaN
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000), U16);
}
#endif

// --- loads and stores ---

// How many elements an access covers: all lanes (known when compiled), or the first few.
template <typename A>
struct Full {
  static constexpr int count = lanes<A>;
};
struct Tail {
  int count;
};

// Stores past the caches ("non-temporal"), where there are such instructions: whole vectors, at
// multiples of their size. Other threads may see them only after `end_streams`.
#if defined(__x86_64__) && SCSE_VECTOR_BYTES > 16
template <typename V>
SCSE_INLINE void stream_raw(void* p, V v) {
  if constexpr (sizeof v == 64) _mm512_stream_si512((__m512i*)p, (__m512i)v);
  if constexpr (sizeof v == 32) _mm256_stream_si256((__m256i*)p, (__m256i)v);
  if constexpr (sizeof v == 16) _mm_stream_si128((__m128i*)p, (__m128i)v);
}
SCSE_INLINE void end_streams() { _mm_sfence(); }
#else
template <typename V>
SCSE_INLINE void stream_raw(void* p, V v) {
  store_raw(p, v);
}
SCSE_INLINE void end_streams() {}
#endif

template <typename T>
struct Access {  // float and double
  static SCSE_INLINE Vec<T> load(const T* p) { return load_raw<Vec<T>>(p); }
  static SCSE_INLINE void store(T* p, Vec<T> v) { store_raw(p, v); }
  static SCSE_INLINE void stream(T* p, Vec<T> v) { stream_raw(p, v); }
};
template <typename H>
struct HalfAccess {
  static SCSE_INLINE F32 load(const H* p) { return widen(H{}, load_raw<U16>(p)); }
  static SCSE_INLINE void store(H* p, F32 v) { store_raw(p, narrow(H{}, v)); }
  static SCSE_INLINE void stream(H* p, F32 v) { stream_raw(p, narrow(H{}, v)); }
};
template <>
struct Access<half> : HalfAccess<half> {};
template <>
struct Access<bfloat16> : HalfAccess<bfloat16> {};

template <typename T, typename A = Accumulator<T>>
SCSE_INLINE Vec<A> load(const T* p, Full<A>) {
  return Access<T>::load(p);
}
template <typename T, typename A = Accumulator<T>>
SCSE_INLINE Vec<A> load(const T* p, Tail tail) {  // zeros beyond the tail
  T lane[lanes<A>] = {};
  __builtin_memcpy(lane, p, tail.count * sizeof(T));
  return Access<T>::load(lane);
}
template <typename T, typename A = Accumulator<T>>
SCSE_INLINE void store(T* p, Vec<A> v, Full<A>) {
  Access<T>::store(p, v);
}
template <typename T, typename A = Accumulator<T>>
SCSE_INLINE void store(T* p, Vec<A> v, Tail tail) {
  T lane[lanes<A>];
  Access<T>::store(lane, v);
  __builtin_memcpy(p, lane, tail.count * sizeof(T));
}

// A vector of a map that a pass writes whole: into the caches, or past them.
template <bool kStream, typename T, typename Extent, typename A = Accumulator<T>>
SCSE_INLINE void put(T* p, Vec<A> v, Extent extent) {
  if constexpr (kStream && std::is_same_v<Extent, Full<A>>) {
    Access<T>::stream(p, v);
  } else {
    store(p, v, extent);
  }
}

// A line about to be written is first read from memory; asked for early, that costs no waiting. It
// took a fifth to a third off the second passes over maps that outgrow L2. Past the end it is a
// no-op.
template <typename T>
SCSE_INLINE void prefetch_for_writing(const T* p) {
  __builtin_prefetch(p, 1, 3);
}

// Calls body(i, extent) over [0, n) in steps of a vector.
template <typename A, typename F>
SCSE_INLINE void sweep(int64_t n, const F& body) {
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) body(i, Full<A>{});
  if (i < n) body(i, Tail{static_cast<int>(n - i)});
}

// Calls body(i, group) over [begin, end) in groups of G, then one by one: decltype(group)::value
// says how many.
template <int G, typename F>
SCSE_INLINE void in_groups(int64_t begin, int64_t end, const F& body) {
  int64_t i = begin;
  for (; i + G <= end; i += G) body(i, std::integral_constant<int, G>{});
  for (; i < end; ++i) body(i, std::integral_constant<int, 1>{});
}

// --- sums and functions ---

// Halves of a vector added up until four lanes are left.
template <typename E>
SCSE_INLINE Vector<E, 4> fold(Vector<E, 4> v) {
  return v;
}
template <typename E>
SCSE_INLINE Vector<E, 4> fold(Vector<E, 8> v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
template <typename E>
SCSE_INLINE Vector<E, 4> fold(Vector<E, 16> v) {
  return fold<E>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}

template <typename A>
SCSE_INLINE A sum_lanes(Vec<A> v) {
  if constexpr (lanes<A> == 2) {
    return v[0] + v[1];
  } else {
    const Vector<A, 4> w = fold<A>(v);
    return (w[0] + w[2]) + (w[1] + w[3]);
  }
}

// out[k] = first + sum_lanes(v[k]), to the last bit, for half the shuffles where P is four.
template <typename A, int P>
SCSE_INLINE void sum_lanes_of(const Vec<A> (&v)[P], A first, A* out) {
  if constexpr (P == 4 && lanes<A> >= 4) {
    const Vector<A, 4> a = fold<A>(v[0]), b = fold<A>(v[1]), c = fold<A>(v[2]), d = fold<A>(v[3]);
    const Vector<A, 4> ab =
        __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vector<A, 4> cd =
        __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store_raw(out, first + (__builtin_shufflevector(ab, cd, 0, 1, 4, 5) +
                            __builtin_shufflevector(ab, cd, 2, 3, 6, 7)));
  } else {
    for (int k = 0; k < P; ++k) out[k] = first + sum_lanes<A>(v[k]);
  }
}

template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
  static constexpr float smallest = -87.f, largest = 88.f, shift = 0x1.8p23f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};
template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
  static constexpr double smallest = -708., largest = 709., shift = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fefa3800p-1, ln2_low = 0x1.ef35793c76730p-45;
};

// exp(v); infinity where it would overflow, at least the smallest normal number; NaN stays NaN. v =
// n ln 2 + r, and the Taylor series of exp(r), |r| <= ln(2) / 2, is cut where its next term is
// below half an ulp.
template <typename A>
SCSE_INLINE Vec<A> exp(Vec<A> v) {
  using K = ExpConstants<A>;
  using Bits = Vector<typename K::Bits, lanes<A>>;
  const auto overflows = v > K::largest;
  v = v < K::smallest ? broadcast<A>(K::smallest) : v;
  // Adding the shift leaves round(v / ln 2) in the low bits of the mantissa.
  const Vec<A> shifted = v * A(1.4426950408889634) + K::shift;
  const Vec<A> n = shifted - K::shift;
  const Vec<A> r = (v - n * K::ln2_high) - n * K::ln2_low;
  Vec<A> series = broadcast<A>(1);
  for (int k = K::degree; k > 0; --k) series = series * r * (A(1) / k) + A(1);
  const Bits exponent = bit_cast<Bits>(shifted) << K::mantissa;
  const Vec<A> result = v == v ? bit_cast<Vec<A>>(bit_cast<Bits>(series) + exponent) : v;
  return overflows ? broadcast<A>(INFINITY) : result;
}

template <typename A>
SCSE_INLINE Vec<A> sigmoid(Vec<A> v) {
  return A(1) / (A(1) + exp<A>(-v));
}
