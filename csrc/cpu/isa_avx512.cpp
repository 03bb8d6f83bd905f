// scSE for one instruction set.
#define SCSE_KERNELS "kernels.inc"
#include "isa_avx512.inc"
