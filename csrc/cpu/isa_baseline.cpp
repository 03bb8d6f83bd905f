// What every machine of the architecture has: 16-byte vectors.
#ifndef SCSE_KERNELS
#define SCSE_KERNELS "kernels.h"  // batch_norm/ compiles others
#endif
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "problem.h"

#define SCSE_ISA baseline
#define SCSE_VECTOR_BYTES 16
#include SCSE_KERNELS
