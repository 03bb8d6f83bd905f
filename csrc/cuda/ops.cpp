// The operators scse_kernels::cuda_forward and cuda_backward (schemas: scse_kernels/ops.py):
// checks, layout and memory. LibTorch's stable ABI only.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "general/general.h"
#include "options.h"

namespace scse::cuda {
namespace {

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like,
             bool channels_last = false) {
  return empty_on(aoti_torch_device_type_cuda(), like.get_device(), sizes, dtype, channels_last);
}
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return empty({sizes.begin(), sizes.size()}, dtype, like);
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "scse_kernels: expected float32, float64, float16 or bfloat16");
  }
}

// The parameters as the kernels take them. Holds copies of those that aren't dense.
class Parameters {
 public:
  const void* add(Problem& p, Parameter which, const char* name, const Optional& parameter,
                  int64_t count) {
    if (!parameter) return nullptr;
    check_count(name, *parameter, count);
    const Tensor dense =
        parameter->is_contiguous() ? *parameter : torch::stable::contiguous(*parameter);
    held_.push_back(dense);
    p.dtypes |= packed(which, dtype_of(dense));
    return dense.const_data_ptr();
  }

 private:
  std::vector<Tensor> held_;
};

Tensor gradient(const Optional& parameter, bool needed, const Tensor& x, void*& data) {
  if (!parameter || !needed) return empty({0}, x.scalar_type(), x);
  Tensor t = gradient_on(aoti_torch_device_type_cuda(), x.get_device(), *parameter,
                         parameter->scalar_type());
  data = t.mutable_data_ptr();
  return t;
}

// What forward and backward have in common, without the parameters.
Problem describe(const Tensor& x, const Map& map, const Optional& w1, const Optional& w2,
                 const Optional& ws, int64_t combine, int64_t gate, bool residual,
                 bool channels_last) {
  Problem p{};
  describe_call(p, x, map, w1, w2, ws, combine, gate, residual, channels_last);
  p.dtype = dtype_of(x);
  STD_TORCH_CHECK(p.dtype != Dtype::float64,
                  "scse_kernels: backend 'cuda' has no kernels for float64, got x in float64;"
                  " 'triton' and 'eager' take it");
  for (int64_t size : {p.samples, p.channels, p.hidden_channels}) {
    STD_TORCH_CHECK(size <= 1 << 30,
                    "scse_kernels: backend 'cuda' takes up to 2**30 samples,"
                    " channels and hidden channels, got ",
                    size);
  }
  p.x = map.tensor.const_data_ptr();
  p.device = x.get_device();
  p.architecture = architecture_of(p.device);
  STD_TORCH_CHECK(p.architecture > 0, "scse_kernels: this build of backend 'cuda' has no code for",
                  " device ", p.device);
  p.overlap = wanted_overlap();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(p.device, &stream));
  p.stream = static_cast<cudaStream_t>(stream);
  return p;
}

Tensor scratch(int64_t floats, const Tensor& x) { return empty({floats}, ScalarType::Float, x); }

ForwardResult cuda_forward(const Tensor& x, const Optional& w1, const Optional& b1,
                           const Optional& w2, const Optional& b2, const Optional& ws,
                           const Optional& bs, int64_t combine, int64_t activation, double slope,
                           int64_t gate, bool residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const bool channels_last = is_channels_last(x);
  const Map x_map = map_of(x, channels_last);
  Problem p = describe(x, x_map, w1, w2, ws, combine, gate, residual, channels_last);
  check_code("activation", activation, 6);
  p.activation = static_cast<Activation>(activation);
  p.activation_parameter = static_cast<float>(slope);

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = p.out_channels();
  const Tensor y = empty({sizes.data(), sizes.size()}, x.scalar_type(), x, channels_last);
  const int64_t channels = w1 ? p.channels : 0;
  const Tensor pooled = empty({p.samples, channels}, ScalarType::Float, x);
  const Tensor hidden =  // value and slope
      empty({2, p.samples, p.hidden_channels}, ScalarType::Float, x);
  const Tensor channel_gate = empty({p.samples, channels}, ScalarType::Float, x);
  p.y = y.mutable_data_ptr();
  p.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  p.hidden = static_cast<float*>(hidden.mutable_data_ptr());
  p.hidden_slope = p.hidden + p.samples * p.hidden_channels;
  p.channel_gate = static_cast<float*>(channel_gate.mutable_data_ptr());

  Parameters parameters;
  const int64_t C = p.channels, Cr = p.hidden_channels;
  p.w1 = parameters.add(p, Parameter::w1, "w1", w1, Cr * C);
  p.b1 = parameters.add(p, Parameter::b1, "b1", b1, Cr);
  p.w2 = parameters.add(p, Parameter::w2, "w2", w2, C * Cr);
  p.b2 = parameters.add(p, Parameter::b2, "b2", b2, C);
  p.ws = parameters.add(p, Parameter::ws, "ws", ws, C);
  p.bs = parameters.add(p, Parameter::bs, "bs", bs, 1);

  const Tensor memory = scratch(forward_scratch(p), x);
  forward(p, static_cast<float*>(memory.mutable_data_ptr()));
  return {y, pooled, hidden, channel_gate};
}

BackwardResult cuda_backward(const Tensor& dy, const Tensor& x, const Optional& w1,
                             const Optional& b1, const Optional& w2, const Optional& b2,
                             const Optional& ws, const Optional& bs, const Tensor& pooled,
                             const Tensor& hidden, const Tensor& channel_gate, int64_t combine,
                             bool need_dx, bool need_channel, bool need_spatial, int64_t gate,
                             bool residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const bool channels_last = is_channels_last(x);
  const Map x_map = map_of(x, channels_last);
  Problem p = describe(x, x_map, w1, w2, ws, combine, gate, residual, channels_last);
  check_dy(dy, x, p.out_channels());
  const Map dy_map = map_of(dy, channels_last);
  p.dy = dy_map.tensor.const_data_ptr();
  p.dy_sample = dy_map.sample, p.dy_pitch = dy_map.pitch;
  p.pooled = saved<float>("pooled", pooled, w1 ? p.samples * p.channels : 0);
  p.hidden = saved<float>("hidden", hidden, 2 * p.samples * p.hidden_channels);
  p.hidden_slope = p.hidden + p.samples * p.hidden_channels;
  p.channel_gate = saved<float>("channel_gate", channel_gate, w1 ? p.samples * p.channels : 0);

  Parameters parameters;
  const int64_t C = p.channels, Cr = p.hidden_channels;
  p.w1 = parameters.add(p, Parameter::w1, "w1", w1, Cr * C);
  parameters.add(p, Parameter::b1, "b1", b1, Cr);
  p.w2 = parameters.add(p, Parameter::w2, "w2", w2, C * Cr);
  parameters.add(p, Parameter::b2, "b2", b2, C);
  p.ws = parameters.add(p, Parameter::ws, "ws", ws, C);
  p.bs = parameters.add(p, Parameter::bs, "bs", bs, 1);
  const Tensor dw1 = gradient(w1, need_channel, x, p.dw1),
               db1 = gradient(b1, need_channel, x, p.db1),
               dw2 = gradient(w2, need_channel, x, p.dw2),
               db2 = gradient(b2, need_channel, x, p.db2),
               dws = gradient(ws, need_spatial, x, p.dws),
               dbs = gradient(bs, need_spatial, x, p.dbs);
  Tensor dx = empty({0}, x.scalar_type(), x);
  if (need_dx) {
    dx = empty(x.sizes(), x.scalar_type(), x, channels_last);
    p.dx = dx.mutable_data_ptr();
  }

  const Tensor memory = scratch(backward_scratch(p), x);
  backward(p, static_cast<float*>(memory.mutable_data_ptr()));
  return {dx, dw1, db1, dw2, db2, dws, dbs};
}

// What the build's kernels are compiled for on a device: 90 for 9.0; 0: there is no code for it.
int64_t cuda_architecture(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return architecture_of(static_cast<int>(device));
}

}  // namespace
}  // namespace scse::cuda

STABLE_TORCH_LIBRARY_IMPL(scse_kernels, CUDA, m) {
  m.impl("cuda_forward", TORCH_BOX(&scse::cuda::cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&scse::cuda::cuda_backward));
}

STABLE_TORCH_LIBRARY_IMPL(scse_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_architecture", TORCH_BOX(&scse::cuda::cuda_architecture));
}

// An empty Python module: importing it registers the operators above.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
