#if defined(__x86_64__)
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
#define SCSE_HALF_512
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
