#include "passes.cuh"

template struct scse::cuda::Passes<__nv_bfloat16>;
