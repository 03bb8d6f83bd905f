// AVX-512 (F, BW, DQ, VL): 64-byte vectors. The standard headers come before the switch: their
// inline functions must stay code that every machine can run.
#if defined(__x86_64__)
#ifndef SCSE_KERNELS
#define SCSE_KERNELS "kernels.h"  // batch_norm/ compiles others
#endif
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "problem.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#include <immintrin.h>

#define SCSE_ISA avx512
#define SCSE_VECTOR_BYTES 64
#define SCSE_HALF_512  // the set converts float16 itself
#include SCSE_KERNELS
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
