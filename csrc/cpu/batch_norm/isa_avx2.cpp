// BatchNorm + ReLU + scSE for one instruction set.
#define SCSE_KERNELS "batch_norm/kernels.inc"
#include "../isa_avx2.inc"
