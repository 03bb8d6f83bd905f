#include "passes.cuh"

template struct scse::cuda::Passes<float>;
