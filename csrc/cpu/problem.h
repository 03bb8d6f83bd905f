// What one call works on. Plain data, shared by the operators (ops.cpp) and by the kernels, which
// are compiled once per instruction set and know nothing of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <thread>
#include <tuple>

#include "../activations.h"
#include "../combine.h"

namespace scse {

// Storage of the half types; arithmetic happens in float, see vec.inc.
struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// The type in which sums are formed and small tensors are kept.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// torch's thread pool: splits [begin, end) into one range per thread.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*body)(int64_t, int64_t, void*), void* context);

// A map is processed in strips of at most this many positions; per-position sums of a strip live
// on the stack.
constexpr int64_t kMaxStrip = 1024;
constexpr int64_t kStripBuffer = kMaxStrip + 64;  // room for whole vectors

// Positions to a strip. In contiguous maps a strip is up to a page of floats wide. Narrower ones
// waste the prefetcher and the TLB; the channels of wider ones do not stay in L2 for their second
// use. Where samples are few, strips are narrower, so that every thread gets some. In channels_last
// maps a strip is one run of memory. It is short, since each of its sums is one chain of additions.
// The number of threads is not asked: results must not depend on it.
inline int64_t strip_width(int64_t samples, int64_t positions, bool channels_last) {
  if (channels_last) return 256;
  return std::clamp<int64_t>(samples * positions / 8, 256, kMaxStrip) / 64 * 64;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// body(begin, end) for ranges of `grain` of `count` items.
template <typename Body>
struct Stage {
  int64_t count, grain;
  Body body;

  void run(int64_t begin, int64_t end) const {
    if (begin < end) body(begin, end);
  }
};
template <typename Body>
Stage(int64_t, int64_t, Body) -> Stage<Body>;

// Who does which items of a stage, and how many are not done yet.
struct Tickets {
  int64_t next, left;

  template <typename Body>
  void serve(const Stage<Body>& stage) {
    for (;;) {
      const int64_t begin = __atomic_fetch_add(&next, stage.grain, __ATOMIC_RELAXED);
      if (begin >= stage.count) return;
      const int64_t end = std::min(begin + stage.grain, stage.count);
      stage.run(begin, end);
      __atomic_sub_fetch(&left, end - begin, __ATOMIC_RELEASE);
    }
  }

  // Returns when every item is done. The thread stays awake: the others are nearly done, and waking
  // up would take longer.
  void wait() const {
    for (int i = 0; __atomic_load_n(&left, __ATOMIC_ACQUIRE); ++i) {
      i < 6000 ? relax() : std::this_thread::yield();
    }
  }
};

template <typename T>
struct Problem {
  using A = Accumulator<T>;

  int64_t samples, channels, hidden_channels, positions;
  Combine combine;
  Activation activation;
  A activation_parameter;
  Gate gate;
  bool residual;  // y has x added, and so dx has dy
  bool channels_last;
  int64_t width, strips;  // positions per strip, strips per sample
  bool stream;            // the second pass stores past the caches; rows begin on cache lines

  // Feature maps: [N, C, S] or [N, S, C]; y and dy hold 2 * C channels for concat. Rows are dense;
  // those of the inputs, and their samples, may be any distance apart.
  const T* x;
  const T* dy;
  T* y;
  T* dx;
  int64_t x_sample, dy_sample;  // elements from one sample to the next
  int64_t x_pitch, dy_pitch;    // and from one row to the next
  int64_t out_channels;         // channels of y and dy

  // Parameters, as Accumulator<T>; null where absent.
  const A *w1, *b1, *w2, *b2, *ws;
  A bs;

  // [N, C], [N, Cr], [N, C]; outputs of the forward, inputs of the backward. hidden_slope: the
  // activation's derivative where hidden is its value.
  A *pooled, *hidden, *hidden_slope, *channel_gate;

  // Per-position values (forward: the spatial gate; backward: the gate and dq) wait between the
  // two passes over a sample inside the map that the second pass is about to write, so they cost
  // no memory. Where a sample is too thin for them they wait in a buffer of their own.
  T* parking;
  int64_t parking_sample;    // elements from one sample to the next
  int64_t parking_channels;  // row pitch of [S, channels] maps

  A* partial;     // [N, strips, C]: sums of x, or of the channel gate's gradient
  A* partial_ws;  // [N, strips, C]: sums of dq * x
  A* partial_bs;  // [N, strips]: sums of dq
  A* d_excited;   // [N, C]: gradient before the channel gate
  A* d_hidden;    // [N, Cr]: gradient before the activation
  A* d_mean;      // [N, C]: gradient of the pooled value, divided by S
  A *dw1, *db1, *dw2, *db2, *dws, *dbs;
  bool need_dx, need_d_mean, need_channel, need_spatial;

  int64_t threads;
  ParallelFor parallel_for;

  // Runs one stage after the other. An item goes to the first thread that comes for it: to wake a
  // thread can take longer than a small map does, and nobody waits for it. Threads are woken once
  // for all stages. A thread waits only for items that other threads are running already.
  template <typename... Bodies>
  void in_turn(const Stage<Bodies>&... stages) const {
    if (threads == 1 || ((stages.count <= stages.grain) && ...)) {
      (stages.run(0, stages.count), ...);
      return;
    }
    struct Team {
      std::tuple<const Stage<Bodies>&...> stages;
      Tickets tickets[sizeof...(Bodies)];
    } team{{stages...}, {{0, stages.count}...}};
    const auto serve = [](int64_t thread, int64_t, void* context) {
      Team& team = *static_cast<Team*>(context);
      Tickets* tickets = team.tickets;
      const auto turn = [&](const auto& stage) {
        tickets->serve(stage);
        const bool last = tickets + 1 == std::end(team.tickets);
        if (!last || thread == 0) tickets->wait();
        ++tickets;
      };
      std::apply([&](const auto&... stage) { (turn(stage), ...); }, team.stages);
      for (int i = 0; thread == 0 && i < 20; ++i) relax();  // and let the others leave first
    };
    parallel_for(0, threads, 1, serve, &team);
  }

  bool has_channel() const { return combine != Combine::spatial; }
};

// The kernels for one instruction set and one element type.
template <typename T>
struct Kernels {
  void (*forward)(const Problem<T>&);
  void (*backward)(const Problem<T>&);
};

}  // namespace scse
