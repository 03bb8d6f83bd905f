#include "kernels.cuh"

template struct scse::cuda::on_chip::Kernels<__half>;
