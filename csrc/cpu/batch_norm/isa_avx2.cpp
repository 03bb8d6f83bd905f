// BatchNorm + ReLU + scSE for the instruction set of the file below.
#define SCSE_KERNELS "batch_norm/kernels.h"
#include "../isa_avx2.cpp"
