#include "passes.cuh"

template struct scse::cuda::Passes<__half>;
