// The operators scse_kernels::cpu_forward and cpu_backward (schemas: scse_kernels/ops.py): checks,
// layout, memory, and the choice of the kernels. LibTorch's stable ABI only.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "batch_norm/problem.h"
#include "cache.h"
#include "problem.h"

namespace scse {

#define SCSE_DECLARE_KERNELS(isa)                           \
  namespace isa {                                           \
  extern const Kernels<float> float_kernels;                \
  extern const Kernels<double> double_kernels;              \
  extern const Kernels<half> half_kernels;                  \
  extern const Kernels<bfloat16> bfloat16_kernels;          \
  extern const NormKernels<float> float_norm_kernels;       \
  extern const NormKernels<double> double_norm_kernels;     \
  extern const NormKernels<half> half_norm_kernels;         \
  extern const NormKernels<bfloat16> bfloat16_norm_kernels; \
  }
SCSE_DECLARE_KERNELS(baseline)
SCSE_DECLARE_KERNELS(avx2)
SCSE_DECLARE_KERNELS(avx512)

namespace {

// --- instruction sets ---

enum class Isa { baseline, avx2, avx512 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

// The widest instruction set of this machine, or a narrower one by SCSE_CPU_CAPABILITY (for tests).
Isa choose_isa() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  if (const char* wanted = std::getenv("SCSE_CPU_CAPABILITY")) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::string(wanted) == kIsaNames[static_cast<int>(isa)]) return std::min(isa, best);
    }
    STD_TORCH_CHECK(false, "SCSE_CPU_CAPABILITY must be baseline, avx2 or avx512, got ", wanted);
  }
  return best;
}

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

template <typename K>
const K& select(const K& baseline, const K& avx2, const K& avx512) {
  return isa() == Isa::avx512 ? avx512 : isa() == Isa::avx2 ? avx2 : baseline;
}

template <typename T>
const Kernels<T>& kernels();
template <typename T>
const NormKernels<T>& norm_kernels();
#if defined(__x86_64__)
#define SCSE_SELECT_FOR(T, table) select(baseline::T##table, avx2::T##table, avx512::T##table)
#else
#define SCSE_SELECT_FOR(T, table) baseline::T##table
#endif
#define SCSE_SELECT(T)                        \
  template <>                                 \
  const Kernels<T>& kernels<T>() {            \
    return SCSE_SELECT_FOR(T, _kernels);      \
  }                                           \
  template <>                                 \
  const NormKernels<T>& norm_kernels<T>() {   \
    return SCSE_SELECT_FOR(T, _norm_kernels); \
  }
SCSE_SELECT(float)
SCSE_SELECT(double)
SCSE_SELECT(half)
SCSE_SELECT(bfloat16)

// --- the problem ---

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
             bool channels_last = false) {
  return empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype, channels_last);
}
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty({sizes.begin(), sizes.size()}, dtype);
}

// A result as large as a map. From 32 MiB on malloc gives fresh memory for each, which Linux fills
// with zeros at its first touch, 4 KiB at a time: three quarters of the call's time. Asked for, it
// gives 2 MiB at a time. It may refuse, and nothing is lost.
Tensor empty_map(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                 bool channels_last) {
  const Tensor map = empty(sizes, dtype, channels_last);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t bytes = map.numel() * map.element_size();
  if (bytes >= uintptr_t{32} << 20) {
    const auto begin = reinterpret_cast<uintptr_t>(map.mutable_data_ptr());
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return map;
}

template <typename T>
constexpr ScalarType kAccumulator =
    std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// A parameter as the kernels take it. Holds the converted copy, if one was needed, while they run.
template <typename A>
class Parameter {
 public:
  Parameter(const char* name, const Optional& parameter, int64_t count) {
    if (!parameter) return;
    check_count(name, *parameter, count);
    constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    tensor_ = parameter;
    if (tensor_->scalar_type() != dtype) tensor_ = torch::stable::to(*tensor_, dtype);
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
    data_ = static_cast<const A*>(tensor_->const_data_ptr());
  }
  const A* data() const { return data_; }

 private:
  Optional tensor_;
  const A* data_ = nullptr;
};

// A parameter's gradient: written in the accumulator's dtype, handed out in the parameter's, with
// its strides.
template <typename A>
class Gradient {
 public:
  Gradient(const Optional& parameter, bool needed, ScalarType dtype)
      : dtype_(parameter ? parameter->scalar_type() : dtype),
        tensor_(parameter && needed
                    ? gradient_on(aoti_torch_device_type_cpu(), 0, *parameter, dtype)
                    : empty({0}, dtype_)),
        data_(parameter && needed ? static_cast<A*>(tensor_.mutable_data_ptr()) : nullptr) {}
  A* data() const { return data_; }
  Tensor result() const {
    return tensor_.scalar_type() == dtype_ ? tensor_ : torch::stable::to(tensor_, dtype_);
  }

 private:
  ScalarType dtype_;
  Tensor tensor_;
  A* data_;
};

// Scratch memory of the kernels: one allocation, cut into pieces that begin on cache lines.
template <typename A>
class Scratch {
 public:
  int64_t reserve(int64_t count) {
    const int64_t begin = size_;
    size_ += (count + 15) / 16 * 16;
    return begin;
  }
  void allocate(ScalarType dtype) {
    tensor_ = empty({size_}, dtype);
    data_ = static_cast<A*>(tensor_->mutable_data_ptr());
  }
  A* at(int64_t begin) const { return data_ + begin; }

 private:
  int64_t size_ = 0;
  Optional tensor_;
  A* data_ = nullptr;
};

template <typename T>
Problem<T> describe(const Tensor& x, const Map& map, const Optional& w1, const Optional& w2,
                    const Optional& ws, int64_t combine, int64_t gate, bool residual,
                    bool channels_last) {
  check_arguments(x, w1, w2, ws, combine, residual);
  check_code("gate", gate, 1);
  Problem<T> p{};
  p.samples = x.size(0);
  p.channels = x.size(1);
  p.hidden_channels = w1 ? w1->size(0) : 0;
  p.positions = positions_of(x);
  p.combine = !w1 ? Combine::spatial : !ws ? Combine::channel : static_cast<Combine>(combine);
  p.gate = static_cast<Gate>(gate);
  p.residual = residual;
  p.channels_last = channels_last;
  p.out_channels = p.combine == Combine::concat ? 2 * p.channels : p.channels;
  p.x = static_cast<const T*>(map.tensor.const_data_ptr());
  p.x_sample = map.sample, p.x_pitch = map.pitch;
  p.width = strip_width(p.samples, p.positions, channels_last);
  p.strips = (p.positions + p.width - 1) / p.width;
  p.threads = torch::stable::get_num_threads();
  p.parallel_for = [](int64_t begin, int64_t end, int64_t grain,
                      void (*body)(int64_t, int64_t, void*), void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return p;
}

// Parks per-position values in `map` [N, channels, *S], or in a buffer if its samples are too thin.
template <typename T>
Optional set_parking(Problem<T>& p, T* map, int64_t channels, int slots, ScalarType dtype) {
  const int64_t needed = slots * static_cast<int64_t>(sizeof(Accumulator<T>) / sizeof(T));
  Optional buffer;
  if (channels < needed) {
    channels = needed;
    buffer = empty({p.samples * p.positions * needed}, dtype);
    map = static_cast<T*>(buffer->mutable_data_ptr());
  }
  p.parking = map;
  p.parking_sample = channels * p.positions;
  p.parking_channels = channels;
  return buffer;
}

// A call that reads and writes more bytes than this stores its result past the caches. A line that
// is stored into them is read from memory first and evicted to it later; stored past them it is
// only written. Small results are better off in the cache, where whoever comes next finds them. A
// quarter of the last-level cache, since x, y and their gradients are four maps together: with
// 32 MB of it, forwards of 4 and 8 MB mostly took a fifth longer when they streamed; of 16 MB and
// more 30 % less to 4 % longer, and with their backwards 13 to 29 % less. SCSE_CPU_STREAM names
// another number of bytes.
int64_t choose_stream_threshold() {
  if (const char* wanted = std::getenv("SCSE_CPU_STREAM")) {
    char* end;
    const int64_t bytes = std::strtoll(wanted, &end, 10);
    STD_TORCH_CHECK(end != wanted && *end == '\0' && bytes >= 0,
                    "SCSE_CPU_STREAM must be a number of bytes, got ", wanted);
    return bytes;
  }
  const int64_t cache = last_level_cache();
  return cache ? cache / 4 : std::numeric_limits<int64_t>::max();
}

// Whether the second pass stores its map past the caches, given how many bytes the call reads and
// writes in all.
template <typename T>
bool streams(const Problem<T>& p, const T* map, int64_t bytes) {
  static const int64_t threshold = choose_stream_threshold();
  const int64_t row = (p.channels_last ? p.channels : p.positions) * sizeof(T);
  return bytes > threshold && (reinterpret_cast<uintptr_t>(map) | row) % 64 == 0;
}

// --- forward and backward ---

template <typename T>
ForwardResult forward(const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2,
                      const Optional& b2, const Optional& ws, const Optional& bs, int64_t combine,
                      int64_t activation, double slope, int64_t gate, bool residual) {
  using A = Accumulator<T>;
  constexpr ScalarType acc = kAccumulator<T>;
  const bool channels_last = is_channels_last(x);
  const Map x_map = map_of(x, channels_last);
  Problem<T> p = describe<T>(x, x_map, w1, w2, ws, combine, gate, residual, channels_last);
  check_code("activation", activation, 6);
  p.activation = static_cast<Activation>(activation);
  p.activation_parameter = static_cast<A>(slope);

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = p.out_channels;
  const Tensor y = empty_map({sizes.data(), sizes.size()}, x.scalar_type(), channels_last);
  const int64_t channels = w1 ? p.channels : 0;
  const Tensor pooled = empty({p.samples, channels}, acc);
  const Tensor hidden = empty({2, p.samples, p.hidden_channels}, acc);  // value and slope
  const Tensor channel_gate = empty({p.samples, channels}, acc);
  p.y = static_cast<T*>(y.mutable_data_ptr());
  p.pooled = static_cast<A*>(pooled.mutable_data_ptr());
  p.hidden = static_cast<A*>(hidden.mutable_data_ptr());
  p.hidden_slope = p.hidden + p.samples * p.hidden_channels;
  p.channel_gate = static_cast<A*>(channel_gate.mutable_data_ptr());

  const int64_t C = p.channels, Cr = p.hidden_channels;
  const Parameter<A> w1_("w1", w1, Cr * C), b1_("b1", b1, Cr), w2_("w2", w2, C * Cr),
      b2_("b2", b2, C), ws_("ws", ws, C), bs_("bs", bs, 1);
  p.w1 = w1_.data(), p.b1 = b1_.data(), p.w2 = w2_.data(), p.b2 = b2_.data(), p.ws = ws_.data();
  p.bs = bs_.data() ? *bs_.data() : A(0);

  p.stream = streams(p, p.y, (x.numel() + y.numel()) * sizeof(T));

  Optional parking;
  if (ws) parking = set_parking(p, p.y, p.out_channels, 1, x.scalar_type());
  Scratch<A> scratch;
  scratch.reserve(w1 ? p.samples * p.strips * p.channels : 0);
  scratch.allocate(acc);
  p.partial = scratch.at(0);

  kernels<T>().forward(p);
  return {y, pooled, hidden, channel_gate};
}

template <typename T>
BackwardResult backward(const Tensor& dy, const Tensor& x, const Optional& w1, const Optional& b1,
                        const Optional& w2, const Optional& b2, const Optional& ws,
                        const Optional& bs, const Tensor& pooled, const Tensor& hidden,
                        const Tensor& channel_gate, int64_t combine, bool need_dx,
                        bool need_channel, bool need_spatial, int64_t gate, bool residual) {
  using A = Accumulator<T>;
  constexpr ScalarType acc = kAccumulator<T>;
  const bool channels_last = is_channels_last(x);
  const Map x_map = map_of(x, channels_last);
  Problem<T> p = describe<T>(x, x_map, w1, w2, ws, combine, gate, residual, channels_last);
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.dim() == x.dim() &&
                      dy.numel() == p.samples * p.out_channels * p.positions,
                  "scse_kernels: dy must have y's shape and dtype");
  const Map dy_map = map_of(dy, channels_last);
  p.dy = static_cast<const T*>(dy_map.tensor.const_data_ptr());
  p.dy_sample = dy_map.sample, p.dy_pitch = dy_map.pitch;
  p.need_dx = need_dx;
  p.need_channel = need_channel && w1;
  p.need_spatial = need_spatial && ws;

  const int64_t C = p.channels, Cr = p.hidden_channels;
  const Parameter<A> w1_("w1", w1, Cr * C), w2_("w2", w2, C * Cr), ws_("ws", ws, C),
      bs_("bs", bs, 1);
  if (b1) check_count("b1", *b1, Cr);
  if (b2) check_count("b2", *b2, C);
  p.pooled = saved<A>("pooled", pooled, w1 ? p.samples * C : 0);
  p.hidden = saved<A>("hidden", hidden, 2 * p.samples * Cr);
  p.hidden_slope = p.hidden + p.samples * Cr;
  p.channel_gate = saved<A>("channel_gate", channel_gate, w1 ? p.samples * C : 0);
  p.w1 = w1_.data(), p.w2 = w2_.data(), p.ws = ws_.data();
  p.bs = bs_.data() ? *bs_.data() : A(0);
  const Gradient<A> dw1(w1, need_channel, acc), db1(b1, need_channel, acc),
      dw2(w2, need_channel, acc), db2(b2, need_channel, acc), dws(ws, need_spatial, acc),
      dbs(bs, need_spatial, acc);
  p.dw1 = dw1.data(), p.db1 = db1.data(), p.dw2 = dw2.data(), p.db2 = db2.data();
  p.dws = dws.data(), p.dbs = dbs.data();

  Tensor dx = empty({0}, x.scalar_type());
  Optional parking;
  if (need_dx) {
    dx = empty_map(x.sizes(), x.scalar_type(), channels_last);
    p.dx = static_cast<T*>(dx.mutable_data_ptr());
    p.stream = streams(p, p.dx, (x.numel() + dy.numel() + dx.numel()) * sizeof(T));
    if (ws) parking = set_parking(p, p.dx, p.channels, 2, x.scalar_type());
  }

  Scratch<A> scratch;
  const int64_t maps = p.samples * p.strips * p.channels, vectors = p.samples * p.channels;
  const int64_t partial = scratch.reserve(w1 ? maps : 0);
  const int64_t partial_ws = scratch.reserve(ws ? maps : 0);
  const int64_t partial_bs = scratch.reserve(p.samples * p.strips);
  const int64_t d_excited = scratch.reserve(vectors), d_mean = scratch.reserve(vectors);
  const int64_t d_hidden = scratch.reserve(p.samples * p.hidden_channels);
  scratch.allocate(acc);
  p.partial = scratch.at(partial), p.partial_ws = scratch.at(partial_ws);
  p.partial_bs = scratch.at(partial_bs), p.d_excited = scratch.at(d_excited);
  p.d_mean = scratch.at(d_mean), p.d_hidden = scratch.at(d_hidden);

  kernels<T>().backward(p);
  return {dx, dw1.result(), db1.result(), dw2.result(), db2.result(), dws.result(), dbs.result()};
}

// Calls function<T>(arguments...) for the element type of x.
#define SCSE_DISPATCH(x, function, ...)                                                        \
  switch ((x).scalar_type()) {                                                                 \
    case ScalarType::Float:                                                                    \
      return function<float>(__VA_ARGS__);                                                     \
    case ScalarType::Double:                                                                   \
      return function<double>(__VA_ARGS__);                                                    \
    case ScalarType::Half:                                                                     \
      return function<half>(__VA_ARGS__);                                                      \
    case ScalarType::BFloat16:                                                                 \
      return function<bfloat16>(__VA_ARGS__);                                                  \
    default:                                                                                   \
      STD_TORCH_CHECK(false, "scse_kernels: x must be float32, float64, float16 or bfloat16"); \
  }

ForwardResult cpu_forward(const Tensor& x, const Optional& w1, const Optional& b1,
                          const Optional& w2, const Optional& b2, const Optional& ws,
                          const Optional& bs, int64_t combine, int64_t activation, double slope,
                          int64_t gate, bool residual) {
  SCSE_DISPATCH(x, forward, x, w1, b1, w2, b2, ws, bs, combine, activation, slope, gate, residual);
}

BackwardResult cpu_backward(const Tensor& dy, const Tensor& x, const Optional& w1,
                            const Optional& b1, const Optional& w2, const Optional& b2,
                            const Optional& ws, const Optional& bs, const Tensor& pooled,
                            const Tensor& hidden, const Tensor& channel_gate, int64_t combine,
                            bool need_dx, bool need_channel, bool need_spatial, int64_t gate,
                            bool residual) {
  SCSE_DISPATCH(x, backward, dy, x, w1, b1, w2, b2, ws, bs, pooled, hidden, channel_gate, combine,
                need_dx, need_channel, need_spatial, gate, residual);
}

#include "batch_norm/ops.inc"

std::string cpu_capability() { return kIsaNames[static_cast<int>(isa())]; }

}  // namespace
}  // namespace scse

STABLE_TORCH_LIBRARY_IMPL(scse_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&scse::cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&scse::cpu_backward));
  m.impl("cpu_bn_forward", TORCH_BOX(&scse::cpu_bn_forward));
  m.impl("cpu_bn_backward", TORCH_BOX(&scse::cpu_bn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(scse_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&scse::cpu_capability));
}

// An empty Python module: importing it registers the operators above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
