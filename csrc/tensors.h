// Tensors as the operators of every backend meet them: their layouts and memory. LibTorch's stable
// ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <type_traits>

#include "activations.h"
#include "combine.h"

namespace scse {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// What the operators return: see their schemas in scse_kernels/ops.py.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Elements of one channel of one sample.
inline int64_t positions_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t axis = 2; axis < x.dim(); ++axis) positions *= x.size(axis);
  return positions;
}

// The distance between neighbouring positions, if it is the same for all; else -1. If there is only
// one position: 1.
inline int64_t stride_of_positions(const Tensor& t) {
  int64_t stride = -1, next = 0;
  for (int64_t axis = t.dim(); axis-- > 2;) {
    if (t.size(axis) == 1) continue;
    if (stride < 0) {
      stride = t.stride(axis);
    } else if (t.stride(axis) != next) {
      return -1;
    }
    next = t.stride(axis) * t.size(axis);
  }
  return stride < 0 ? 1 : stride;
}

// Whether y and dx are channels_last: the same rule as memory_format's in scse_kernels/ops.py.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.stride(1) != 1 || x.is_contiguous()) return false;
  const int64_t pixel = std::max<int64_t>(x.size(1), 2);
  int64_t least = pixel;
  for (int64_t axis = x.dim(); axis-- > 2;) {
    if (x.size(axis) == 1) continue;
    if (x.stride(axis) < least) return false;
    least = x.stride(axis) * x.size(axis);
  }
  return least > pixel;
}

inline MemoryFormat format_of(const Tensor& t, bool channels_last) {
  return !channels_last ? MemoryFormat::Contiguous
         : t.dim() == 4 ? MemoryFormat::ChannelsLast
                        : MemoryFormat::ChannelsLast3d;
}

// A map as the kernels read it: rows of channels (channels_last) or of positions, each dense. Rows
// and samples may be any distance apart, as in a slice of a concatenation. In an expanded map the
// distance is 0.
struct Map {
  Tensor tensor;          // its memory
  int64_t sample, pitch;  // elements from one sample to the next, and from one row to the next
};

// `t` itself if its rows are dense, else a copy. Of an expanded map one sample or one row is
// copied.
inline Map map_of(const Tensor& t, bool channels_last) {
  const int64_t channels = t.size(1), positions = positions_of(t);
  const int64_t apart = stride_of_positions(t);
  const int64_t row = channels_last ? channels : positions,
                rows = channels_last ? positions : channels;
  const int64_t along = channels_last ? (channels == 1 ? 1 : t.stride(1)) : apart;
  const int64_t pitch = rows == 1 ? row : channels_last ? apart : t.stride(1);
  const int64_t sample = t.size(0) > 1 ? t.stride(0) : channels * positions;
  if (along == 1 && pitch >= 0) return {t, sample, pitch};

  const bool one_sample = t.size(0) > 1 && sample == 0, one_row = rows > 1 && pitch == 0;
  Tensor least = t;
  if (one_sample) least = torch::stable::narrow(least, 0, 0, 1);
  for (int64_t axis = 1; one_row && axis < t.dim(); ++axis) {
    if (channels_last == (axis > 1)) least = torch::stable::narrow(least, axis, 0, 1);
  }
  const Tensor copy = torch::stable::contiguous(least, format_of(t, channels_last));
  return {copy, one_sample ? 0 : one_row ? row : row * rows, one_row ? 0 : row};
}

// Memory for a tensor. A call asks for up to ten, so this does not go through the dispatcher, which
// takes longer.
inline Tensor empty_strided_on(int32_t device_type, int32_t device,
                               torch::headeronly::IntHeaderOnlyArrayRef sizes,
                               const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device,
      &handle));
  return Tensor(handle);
}

// The same with dense strides.
inline Tensor empty_on(int32_t device_type, int32_t device,
                       torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                       bool channels_last) {
  std::array<int64_t, 8> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "scse_kernels: expected at most ", strides.size(),
                  " axes, got ", sizes.size());
  int64_t stride = 1;
  const auto take = [&](size_t axis) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  };
  if (channels_last) take(1);
  for (size_t axis = sizes.size(); axis-- > 0;) {
    if (!channels_last || axis != 1) take(axis);
  }
  return empty_strided_on(device_type, device, sizes, strides.data(), dtype);
}

// Memory for the gradient of a parameter, which is written row by row. The gradient of a contiguous
// parameter gets the parameter's strides: torch's DistributedDataParallel expects them. They may be
// other numbers than usual, as those of [C, Cr, 1, 1] in channels_last are, but they mean the same
// order of elements.
inline Tensor gradient_on(int32_t device_type, int32_t device, const Tensor& parameter,
                          ScalarType dtype) {
  const auto sizes = parameter.sizes();
  if (!parameter.is_contiguous()) return empty_on(device_type, device, sizes, dtype, false);
  return empty_strided_on(device_type, device, sizes, parameter.strides().data(), dtype);
}

// The Python functions have checked this before. Whoever calls an operator directly is kept from
// other memory.
inline void check_count(const char* name, const Tensor& t, int64_t count) {
  STD_TORCH_CHECK(t.numel() == count, "scse_kernels: ", name, " must have ", count,
                  " elements, got ", t.numel());
}

// A code that chooses one of several formulas.
inline void check_code(const char* name, int64_t code, int64_t last) {
  STD_TORCH_CHECK(0 <= code && code <= last, "scse_kernels: ", name, " must be 0 to ", last,
                  ", got ", code);
}

// What every operator asks of its arguments before it looks at their elements.
inline void check_arguments(const Tensor& x, const Optional& w1, const Optional& w2,
                            const Optional& ws, int64_t combine, bool residual) {
  STD_TORCH_CHECK(w1 || ws, "scse_kernels: w1 and ws are both missing, expected at least one");
  STD_TORCH_CHECK(!w1 == !w2, "scse_kernels: w1 and w2 must both be given or both be missing");
  check_code("combine", combine, 3);
  STD_TORCH_CHECK(!(residual && w1 && ws && combine == static_cast<int64_t>(Combine::concat)),
                  "scse_kernels: residual can't be added to concat, which has twice x's channels");
  STD_TORCH_CHECK(x.size(1) > 0 && positions_of(x) > 0,
                  "scse_kernels: x must have channels and positions, got ", x.size(1), " and ",
                  positions_of(x));
}

// Fills in what the problems of both backends have alike: sizes, options, and the distances in
// `map`, which is x's.
template <typename Problem>
void describe_call(Problem& p, const Tensor& x, const Map& map, const Optional& w1,
                   const Optional& w2, const Optional& ws, int64_t combine, int64_t gate,
                   bool residual, bool channels_last) {
  check_arguments(x, w1, w2, ws, combine, residual);
  check_code("gate", gate, 1);
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.hidden_channels = w1 ? w1->size(0) : 0;
  p.positions = positions_of(x);
  p.combine = !w1 ? Combine::spatial : !ws ? Combine::channel : static_cast<Combine>(combine);
  p.gate = static_cast<Gate>(gate);
  p.residual = residual;
  p.channels_last = channels_last;
  p.x_sample = map.sample, p.x_pitch = map.pitch;
}

inline void check_dy(const Tensor& dy, const Tensor& x, int64_t out_channels) {
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.dim() == x.dim() &&
                      dy.numel() == x.size(0) * out_channels * positions_of(x),
                  "scse_kernels: dy must have y's shape and dtype");
}

// The elements of a small tensor that the forward has returned and the backward is given.
template <typename A>
A* saved(const char* name, const Tensor& t, int64_t count) {
  check_count(name, t, count);
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), "scse_kernels: ", name,
                  " must be what the forward returned");
  return static_cast<A*>(t.data_ptr());
}

}  // namespace scse
