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
#include <vector>

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

// Whether axes `order` (outermost first) lie densely one inside the other.
template <typename Order>
bool dense(const Tensor& t, const Order& order) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
    if (sizes[*axis] != 1 && strides[*axis] != expected) return false;
    expected *= sizes[*axis];
  }
  return true;
}

inline std::vector<int64_t> axes_channels_last(const Tensor& t) {
  std::vector<int64_t> order{0};
  for (int64_t axis = 2; axis < t.dim(); ++axis) order.push_back(axis);
  order.push_back(1);
  return order;
}

inline bool is_channels_last(const Tensor& t) {
  return t.dim() >= 4 && !t.is_contiguous() && dense(t, axes_channels_last(t));
}

// Every sample is dense; samples may lie further apart, as in a slice of a concatenation.
inline bool has_dense_planes(const Tensor& t) {
  std::vector<int64_t> inner;
  for (int64_t axis = 1; axis < t.dim(); ++axis) inner.push_back(axis);
  return dense(t, inner);
}

// `t` itself where the kernels can read it in the given layout, else a copy.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  const bool fits = channels_last ? dense(t, axes_channels_last(t)) : has_dense_planes(t);
  if (fits) return t;
  return torch::stable::contiguous(t, !channels_last ? MemoryFormat::Contiguous
                                      : t.dim() == 4 ? MemoryFormat::ChannelsLast
                                                     : MemoryFormat::ChannelsLast3d);
}

// Memory for a tensor, not through the dispatcher: a call makes up to ten of them.
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

// Memory for the gradient of a parameter, to be written row by row. It gets the parameter's
// strides, which torch's DistributedDataParallel expects, where they mean the same order of
// elements: those of [C, Cr, 1, 1] in channels_last are other numbers than the contiguous ones.
inline Tensor gradient_on(int32_t device_type, int32_t device, const Tensor& parameter,
                          ScalarType dtype) {
  const auto sizes = parameter.sizes();
  if (!parameter.is_contiguous()) return empty_on(device_type, device, sizes, dtype, false);
  return empty_strided_on(device_type, device, sizes, parameter.strides().data(), dtype);
}

// Callers of the Python functions never see this; who calls an operator is kept from other memory.
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
                            const Optional& ws, int64_t combine) {
  STD_TORCH_CHECK(w1 || ws, "scse_kernels: w1 and ws are both missing, expected at least one");
  STD_TORCH_CHECK(!w1 == !w2, "scse_kernels: w1 and w2 must both be given or both be missing");
  check_code("combine", combine, 3);
  STD_TORCH_CHECK(x.size(1) > 0 && positions_of(x) > 0,
                  "scse_kernels: x must have channels and positions, got ", x.size(1), " and ",
                  positions_of(x));
}

// Elements of a small tensor that the forward returned and the backward got.
template <typename A>
A* saved(const char* name, const Tensor& t, int64_t count) {
  check_count(name, t, count);
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous(), "scse_kernels: ", name,
                  " must be what the forward returned");
  return static_cast<A*>(t.data_ptr());
}

}  // namespace scse
