// Tensors as the operators of every backend meet them: their layouts. LibTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace scse {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// What the operators return: see their schemas in scse_kernels/ops.py.
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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

inline MemoryFormat format_of(bool channels_last, int64_t dim) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return dim == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
}

// `t` itself where the kernels can read it in the given layout, else a copy.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  const bool fits = channels_last ? dense(t, axes_channels_last(t)) : has_dense_planes(t);
  return fits ? t : torch::stable::contiguous(t, format_of(channels_last, t.dim()));
}

}  // namespace scse
