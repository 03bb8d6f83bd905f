// What every machine of the architecture has: 16-byte vectors.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "problem.h"

#define SCSE_ISA baseline
#define SCSE_VECTOR_BYTES 16
#include "kernels.h"
