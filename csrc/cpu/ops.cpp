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

// A result as large as a map. From 32 MiB on, malloc takes fresh memory for each. Linux fills that
// with zeros at the first touch, 4 KiB at a time: three quarters of the call's time. This asks
// Linux for 2 MiB at a time. It may refuse; nothing is lost then.
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

// A parameter's gradient. The kernels write it in the accumulator's dtype; the operator returns it
// in the parameter's dtype, with the parameter's strides.
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

// A part of the kernels' scratch memory.
template <typename A>
struct Piece {
  A** place;  // gets its address; null if it has no elements
  int64_t count;
};

// Scratch memory: one allocation, cut into pieces that begin on cache lines.
template <typename A>
Tensor scratch(std::initializer_list<Piece<A>> pieces, ScalarType dtype) {
  const auto padded = [](int64_t count) { return (count + 15) / 16 * 16; };
  int64_t size = 0;
  for (const Piece<A>& piece : pieces) size += padded(piece.count);
  const Tensor memory = empty({size}, dtype);
  A* next = static_cast<A*>(memory.mutable_data_ptr());
  for (const Piece<A>& piece : pieces) {
    *piece.place = piece.count > 0 ? next : nullptr;
    next += padded(piece.count);
  }
  return memory;
}

template <typename T>
Problem<T> describe(const Tensor& x, const Map& map, const Optional& w1, const Optional& w2,
                    const Optional& ws, int64_t combine, int64_t gate, bool residual,
                    bool channels_last) {
  Problem<T> p{};
  describe_call(p, x, map, w1, w2, ws, combine, gate, residual, channels_last);
  p.out_channels = p.combine == Combine::concat ? 2 * p.channels : p.channels;
  p.x = static_cast<const T*>(map.tensor.const_data_ptr());
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

// A call that reads and writes more bytes than this stores its result past the caches. A store into
// the caches first reads the line from memory, and the line is written back later. A store past
// them only writes. Small results are better in the cache, where the next layer finds them. The
// limit is a quarter of the last-level cache, since x, y and their gradients are four maps. With 32
// MB of cache, forwards of 4 and 8 MB mostly took a fifth longer when they streamed. Forwards of 16
// MB and more took between 30 % less and 4 % more, and forward and backward together 13 to 29 %
// less. SCSE_CPU_STREAM names another number of bytes.
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

// y or dx, and where values of positions wait if its samples are too thin.
struct ResultMap {
  Tensor tensor;
  Optional parking;
};

// Memory for y or dx: x's map with `channels` channels. `slots`: the values of a position that wait
// in it for the second pass. `read`: the elements that the call reads.
template <typename T>
ResultMap new_map(Problem<T>& p, T*& place, const Tensor& x, int64_t channels, int slots,
                  int64_t read) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = channels;
  const Tensor map = empty_map({sizes.data(), sizes.size()}, x.scalar_type(), p.channels_last);
  place = static_cast<T*>(map.mutable_data_ptr());
  p.stream = streams(p, place, (read + map.numel()) * sizeof(T));
  if (p.combine == Combine::channel) return {map, {}};
  return {map, set_parking(p, place, channels, slots, x.scalar_type())};
}

// scSE's parameters. The backward needs no b1 and no b2.
template <typename T>
class Parameters {
  using A = Accumulator<T>;

 public:
  Parameters(Problem<T>& p, const Optional& w1, const Optional& b1, const Optional& w2,
             const Optional& b2, const Optional& ws, const Optional& bs)
      : w1_("w1", w1, p.hidden_channels * p.channels),
        b1_("b1", b1, p.hidden_channels),
        w2_("w2", w2, p.channels * p.hidden_channels),
        b2_("b2", b2, p.channels),
        ws_("ws", ws, p.channels),
        bs_("bs", bs, 1) {
    p.w1 = w1_.data(), p.b1 = b1_.data(), p.w2 = w2_.data(), p.b2 = b2_.data();
    p.ws = ws_.data();
    p.bs = bs_.data() ? *bs_.data() : A(0);
  }

 private:
  Parameter<A> w1_, b1_, w2_, b2_, ws_, bs_;
};

// The gradients of all parameters.
template <typename T>
struct Gradients {
  using A = Accumulator<T>;
  Gradient<A> dw1, db1, dw2, db2, dws, dbs;

  Gradients(Problem<T>& p, const Optional& w1, const Optional& b1, const Optional& w2,
            const Optional& b2, const Optional& ws, const Optional& bs, bool need_channel,
            bool need_spatial)
      : dw1(w1, need_channel, kAccumulator<T>),
        db1(b1, need_channel, kAccumulator<T>),
        dw2(w2, need_channel, kAccumulator<T>),
        db2(b2, need_channel, kAccumulator<T>),
        dws(ws, need_spatial, kAccumulator<T>),
        dbs(bs, need_spatial, kAccumulator<T>) {
    if (b1) check_count("b1", *b1, p.hidden_channels);
    if (b2) check_count("b2", *b2, p.channels);
    p.need_channel = need_channel && w1;
    p.need_spatial = need_spatial && ws;
    p.dw1 = dw1.data(), p.db1 = db1.data(), p.dw2 = dw2.data(), p.db2 = db2.data();
    p.dws = dws.data(), p.dbs = dbs.data();
  }
};

// What the forward returns besides y, for the backward. hidden: the value and the slope.
struct SavedTensors {
  Tensor pooled, hidden, channel_gate;
};

template <typename T>
void set_saved(Problem<T>& p, Accumulator<T>* pooled, Accumulator<T>* hidden,
               Accumulator<T>* channel_gate) {
  p.pooled = pooled, p.channel_gate = channel_gate;
  p.hidden = hidden, p.hidden_slope = hidden + p.samples * p.hidden_channels;
}

template <typename T>
SavedTensors new_saved(Problem<T>& p) {
  using A = Accumulator<T>;
  constexpr ScalarType acc = kAccumulator<T>;
  const int64_t channels = p.has_channel() ? p.channels : 0;
  const SavedTensors to_save{empty({p.samples, channels}, acc),
                             empty({2, p.samples, p.hidden_channels}, acc),
                             empty({p.samples, channels}, acc)};
  set_saved(p, static_cast<A*>(to_save.pooled.mutable_data_ptr()),
            static_cast<A*>(to_save.hidden.mutable_data_ptr()),
            static_cast<A*>(to_save.channel_gate.mutable_data_ptr()));
  return to_save;
}

template <typename T>
void take_saved(Problem<T>& p, const Tensor& pooled, const Tensor& hidden,
                const Tensor& channel_gate) {
  using A = Accumulator<T>;
  const int64_t channels = p.has_channel() ? p.channels : 0;
  set_saved(p, saved<A>("pooled", pooled, p.samples * channels),
            saved<A>("hidden", hidden, 2 * p.samples * p.hidden_channels),
            saved<A>("channel_gate", channel_gate, p.samples * channels));
}

template <typename T>
ForwardResult forward(const Tensor& x, const Optional& w1, const Optional& b1, const Optional& w2,
                      const Optional& b2, const Optional& ws, const Optional& bs, int64_t combine,
                      int64_t activation, double slope, int64_t gate, bool residual) {
  using A = Accumulator<T>;
  const bool channels_last = is_channels_last(x);
  const Map x_map = map_of(x, channels_last);
  Problem<T> p = describe<T>(x, x_map, w1, w2, ws, combine, gate, residual, channels_last);
  check_code("activation", activation, 6);
  p.activation = static_cast<Activation>(activation);
  p.activation_parameter = static_cast<A>(slope);

  const ResultMap y = new_map(p, p.y, x, p.out_channels, 1, x.numel());
  const SavedTensors to_save = new_saved(p);
  const Parameters<T> parameters(p, w1, b1, w2, b2, ws, bs);
  const Tensor memory =
      scratch<A>({{&p.partial, w1 ? p.samples * p.strips * p.channels : 0}}, kAccumulator<T>);

  kernels<T>().forward(p);
  return {y.tensor, to_save.pooled, to_save.hidden, to_save.channel_gate};
}

template <typename T>
BackwardResult backward(const Tensor& dy, const Tensor& x, const Optional& w1, const Optional& b1,
                        const Optional& w2, const Optional& b2, const Optional& ws,
                        const Optional& bs, const Tensor& pooled, const Tensor& hidden,
                        const Tensor& channel_gate, int64_t combine, bool need_dx,
                        bool need_channel, bool need_spatial, int64_t gate, bool residual) {
  using A = Accumulator<T>;
  const bool channels_last = is_channels_last(x);
  const Map x_map = map_of(x, channels_last);
  Problem<T> p = describe<T>(x, x_map, w1, w2, ws, combine, gate, residual, channels_last);
  check_dy(dy, x, p.out_channels);
  const Map dy_map = map_of(dy, channels_last);
  p.dy = static_cast<const T*>(dy_map.tensor.const_data_ptr());
  p.dy_sample = dy_map.sample, p.dy_pitch = dy_map.pitch;
  p.need_dx = p.need_d_mean = need_dx;
  const Parameters<T> parameters(p, w1, {}, w2, {}, ws, bs);
  const Gradients<T> gradients(p, w1, b1, w2, b2, ws, bs, need_channel, need_spatial);
  take_saved(p, pooled, hidden, channel_gate);  // after the parameters, whose sizes they have

  const ResultMap dx = need_dx ? new_map(p, p.dx, x, p.channels, 2, x.numel() + dy.numel())
                               : ResultMap{empty({0}, x.scalar_type()), {}};
  const int64_t all_strips = p.samples * p.strips, vector = p.samples * p.channels;
  const Tensor memory = scratch<A>({{&p.partial, w1 ? all_strips * p.channels : 0},
                                    {&p.partial_ws, ws ? all_strips * p.channels : 0},
                                    {&p.partial_bs, all_strips},
                                    {&p.d_excited, vector},
                                    {&p.d_mean, vector},
                                    {&p.d_hidden, p.samples * p.hidden_channels}},
                                   kAccumulator<T>);

  kernels<T>().backward(p);
  return {dx.tensor,
          gradients.dw1.result(),
          gradients.db1.result(),
          gradients.dw2.result(),
          gradients.db2.result(),
          gradients.dws.result(),
          gradients.dbs.result()};
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
