// Launches the on-chip kernels: from what is known at run time to the kernel that was compiled for
// it.
#pragma once

#include "../launch.h"
#include "backward.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "../dispatch.h"

namespace scse::cuda::on_chip {

// How many bytes can be moved at once: 16, 4, or those of an element. All rows of the map begin and
// end at multiples of that.
inline int access_bytes(const Problem& p, const void* map, int64_t sample, int64_t pitch) {
  const int size = itemsize(p.dtype);
  const int64_t parts =
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(map)) | (p.row() | sample | pitch) * size;
  return parts % 16 == 0 ? 16 : parts % 4 == 0 ? 4 : size;
}

// Maps are written in whole vectors or element by element.
inline int store_bytes(const Problem& p, const void* map) {
  return access_bytes(p, map, 0, 0) == 16 ? 16 : itemsize(p.dtype);
}

// A cluster to a sample.
inline Grid grid_of(const Problem& p, const Plan& plan) {
  Grid grid{p.samples * plan.cluster, plan.threads};
  grid.shared = plan.shared;
  grid.most = plan.most;
  grid.cluster = plan.cluster;
  return grid;
}

// Calls body(std::integral_constant<Combine, k>, std::bool_constant<channels_last>).
template <typename Body>
void with_kernel(const Problem& p, const Body& body) {
  with_combine(p.combine, [&](auto combine) {
    with_bool(p.channels_last, [&](auto channels_last) { body(combine, channels_last); });
  });
}

template <typename T>
void Kernels<T>::forward(const Problem& p, const Plan& plan) {
  ForwardArguments<T> a{};
  a.x = static_cast<const T*>(p.x), a.y = static_cast<T*>(p.y);
  a.w1 = p.w1, a.b1 = p.b1, a.w2 = p.w2, a.b2 = p.b2, a.ws = p.ws, a.bs = p.bs;
  a.pooled = p.pooled, a.hidden = p.hidden, a.hidden_slope = p.hidden_slope;
  a.channel_gate = p.channel_gate;
  a.x_sample = p.x_sample, a.x_pitch = p.x_pitch;
  a.channels = p.channels, a.hidden_channels = p.hidden_channels, a.positions = p.positions;
  a.slice = plan.slice;
  a.x_bytes = access_bytes(p, p.x, p.x_sample, p.x_pitch), a.y_bytes = store_bytes(p, p.y);
  a.activation = p.activation, a.activation_parameter = p.activation_parameter, a.gate = p.gate;
  a.dtypes = p.dtypes, a.residual = p.residual;
  with_kernel(p, [&](auto combine, auto channels_last) {
    constexpr const char* name = "on_chip_forward";
    const auto kernel = forward_kernel<T, decltype(combine)::value, decltype(channels_last)::value>;
    launch(name, kernel, grid_of(p, plan), p, a);
  });
}

template <typename T>
void Kernels<T>::backward(const Problem& p, const Plan& plan, const PerSample& sums) {
  BackwardArguments<T> a{};
  a.dy = static_cast<const T*>(p.dy), a.x = static_cast<const T*>(p.x);
  a.w1 = p.w1, a.w2 = p.w2, a.ws = p.ws, a.bs = p.bs;
  a.hidden_slope = p.hidden_slope, a.channel_gate = p.channel_gate;
  a.dx = static_cast<T*>(p.dx), a.sums = sums;
  a.dy_sample = p.dy_sample, a.dy_pitch = p.dy_pitch;
  a.x_sample = p.x_sample, a.x_pitch = p.x_pitch;
  a.channels = p.channels, a.hidden_channels = p.hidden_channels, a.positions = p.positions;
  a.slice = plan.slice;
  a.dy_bytes = access_bytes(p, p.dy, p.dy_sample, p.dy_pitch);
  a.x_bytes = access_bytes(p, p.x, p.x_sample, p.x_pitch), a.dx_bytes = store_bytes(p, p.dx);
  a.dtypes = p.dtypes, a.gate = p.gate, a.residual = p.residual;
  with_kernel(p, [&](auto combine, auto channels_last) {
    constexpr const char* name = "on_chip_backward";
    const auto kernel =
        backward_kernel<T, decltype(combine)::value, decltype(channels_last)::value>;
    launch(name, kernel, grid_of(p, plan), p, a);
  });
}

template <typename T>
Limits Kernels<T>::limits(int device) {
  const auto kernel = forward_kernel<T, Combine::add, false>;
  int shared = 0;
  const bool asked =
      succeeded(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) &&
      succeeded(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) &&
      succeeded(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(kMostThreads);
  config.dynamicSmemBytes = shared;
  int cluster = 0;
  if (!asked || !succeeded(cudaOccupancyMaxPotentialClusterSize(&cluster, kernel, &config))) {
    return {0, 0};
  }
  return {shared, cluster < 16 ? cluster : 16};
}

}  // namespace scse::cuda::on_chip
