// Elements of a map as memory has them, up to 16 bytes to an access, and as floats for arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace scse::cuda {

#define SCSE_DEVICE __device__ __forceinline__

template <int bytes>
struct BitsOf;
template <>
struct BitsOf<16> {
  using type = uint4;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};

// W elements of type T as memory has them, 16 bytes or 8: wide<T> elements where addresses allow
// accesses of that width, else half as many.
template <typename T, int W>
using Bits = typename BitsOf<W * sizeof(T)>::type;
template <typename T>
constexpr int wide = 16 / sizeof(T);

template <int W>
struct Floats {
  float of[W];
  SCSE_DEVICE float& operator[](int i) { return of[i]; }
  SCSE_DEVICE float operator[](int i) const { return of[i]; }
};

// p is aligned to the access.
template <int W, typename T>
SCSE_DEVICE Bits<T, W> load(const T* p) {
  return *reinterpret_cast<const Bits<T, W>*>(p);
}
template <int W, typename T>
SCSE_DEVICE void store(T* p, const Bits<T, W>& bits) {
  *reinterpret_cast<Bits<T, W>*>(p) = bits;
}

// The same for the first `inside` elements only, one by one. They can be at any address that their
// type allows. The others are 0.
template <int W, typename T>
SCSE_DEVICE Bits<T, W> load_singly(const T* p, int inside) {
  constexpr int n = 4 / sizeof(T);
  using Element = std::conditional_t<n == 2, uint16_t, uint32_t>;
  const Element* elements = reinterpret_cast<const Element*>(p);
  uint32_t words[W / n] = {};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const uint32_t element = i < inside ? elements[i] : 0;
    words[i / n] |= element << i % n * 16;
  }
  static_assert(W == 2 * n, "two words");
  return {words[0], words[1]};
}
template <int W, typename T>
SCSE_DEVICE void store_singly(T* p, const Bits<T, W>& bits, int inside) {
  constexpr int n = 4 / sizeof(T);
  using Element = std::conditional_t<n == 2, uint16_t, uint32_t>;
  static_assert(W == 2 * n, "two words");
  const uint32_t words[2] = {bits.x, bits.y};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const uint32_t element = words[i / n] >> i % n * 16;
    if (i < inside) reinterpret_cast<Element*>(p)[i] = static_cast<Element>(element);
  }
}

// --- between elements and floats, a 32-bit word (one float or two half-type elements) at a time
// ---

SCSE_DEVICE void widen_word(const float*, uint32_t word, float* f) { *f = __uint_as_float(word); }
SCSE_DEVICE void widen_word(const __half*, uint32_t word, float* f) {
  const float2 two = __half22float2(reinterpret_cast<const __half2&>(word));
  f[0] = two.x, f[1] = two.y;
}
SCSE_DEVICE void widen_word(const __nv_bfloat16*, uint32_t word, float* f) {
  f[0] = __uint_as_float(word << 16), f[1] = __uint_as_float(word & 0xffff0000u);
}
SCSE_DEVICE uint32_t narrow_word(const float*, const float* f) { return __float_as_uint(*f); }
SCSE_DEVICE uint32_t narrow_word(const __half*, const float* f) {
  const __half2 two = __floats2half2_rn(f[0], f[1]);
  return reinterpret_cast<const uint32_t&>(two);
}
SCSE_DEVICE uint32_t narrow_word(const __nv_bfloat16*, const float* f) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(f[0], f[1]);
  return reinterpret_cast<const uint32_t&>(two);
}

template <typename T, int W>
SCSE_DEVICE Floats<W> widen(const Bits<T, W>& bits) {
  constexpr T* type = nullptr;
  constexpr int n = 4 / sizeof(T);
  Floats<W> f;
  widen_word(type, bits.x, f.of), widen_word(type, bits.y, f.of + n);
  if constexpr (sizeof bits == 16) {
    widen_word(type, bits.z, f.of + 2 * n), widen_word(type, bits.w, f.of + 3 * n);
  }
  return f;
}

// Rounds to nearest, ties to even.
template <typename T, int W>
SCSE_DEVICE Bits<T, W> narrow(const Floats<W>& f) {
  constexpr T* type = nullptr;
  constexpr int n = 4 / sizeof(T);
  if constexpr (W * sizeof(T) == 16) {
    return {narrow_word(type, f.of), narrow_word(type, f.of + n), narrow_word(type, f.of + 2 * n),
            narrow_word(type, f.of + 3 * n)};
  } else {
    return {narrow_word(type, f.of), narrow_word(type, f.of + n)};
  }
}

// --- single elements (torch's headers and flags switch the conversion operators off) ---

SCSE_DEVICE float to_float(float v) { return v; }
SCSE_DEVICE float to_float(double v) { return static_cast<float>(v); }
SCSE_DEVICE float to_float(__half v) { return __half2float(v); }
SCSE_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
SCSE_DEVICE void from_float(float& to, float v) { to = v; }
SCSE_DEVICE void from_float(double& to, float v) { to = v; }
SCSE_DEVICE void from_float(__half& to, float v) { to = __float2half_rn(v); }
SCSE_DEVICE void from_float(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

// --- some neighbours, of which the first `inside` exist ---

// In the fewest accesses that p's alignment allows; 0 for what doesn't exist.
template <int count, typename T>
SCSE_DEVICE void load_some(const T* p, int inside, float (&v)[count]) {
  constexpr int bytes = count * sizeof(T) < 16 ? count * sizeof(T) : 16;
  struct alignas(bytes) Pack {
    T of[bytes / sizeof(T)];
  };
  constexpr int n = bytes / sizeof(T);
  if (inside >= count && reinterpret_cast<uintptr_t>(p) % bytes == 0) {
#pragma unroll
    for (int k = 0; k < count / n; ++k) {
      const Pack pack = reinterpret_cast<const Pack*>(p)[k];
#pragma unroll
      for (int i = 0; i < n; ++i) v[k * n + i] = to_float(pack.of[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] = i < inside ? to_float(p[i]) : 0.f;
  }
}

// In one access if p's alignment allows.
template <int count>
SCSE_DEVICE void store_some(float* p, int inside, const float (&v)[count]) {
  struct alignas(sizeof v) Pack {
    float of[count];
  };
  if (inside >= count && reinterpret_cast<uintptr_t>(p) % sizeof v == 0) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < count; ++i) pack.of[i] = v[i];
    *reinterpret_cast<Pack*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i < inside) p[i] = v[i];
    }
  }
}

}  // namespace scse::cuda
