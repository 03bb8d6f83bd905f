// The kernels' host side: three launches forward, three backward (four where the excitation has
// many weights), for any map and sm_80 or later. Plain arithmetic on sizes, and pointers into the
// scratch memory.
#pragma once

#include "../problem.h"
#include "flat.h"
#include "tile.h"

namespace scse::cuda {

// Memory for sums and per-position values, and how the maps are walked. Pointers are null where
// nobody asks for what they would hold.
struct Forward {
  Tile tile;
  Flat flat;            // where the gates are applied
  int64_t floats;       // of scratch memory
  float* partial;       // [N, strips, C]: sums of x
  float* spatial_gate;  // [N, S]
  float* slices;        // see Layers; null where the excitation is one launch
};
struct Backward : PerSample {
  Tile tile;
  Flat flat;  // where the gates are applied
  int64_t floats;
  float* partial;       // [N, strips, C]: sums for the channel gate's gradient
  float* partial_ws;    // [N, strips, C]: sums of dq * x
  float* partial_bs;    // [N, strips]: sums of dq
  float* spatial_gate;  // [N, S]
  float* dq;            // [N, S]: gradient before the spatial gate
  float* d_mean;        // [N, C]: gradient of the pooled value, divided by S
  float* slices;        // as above
  int64_t tasks;        // blocks that form the parameters' gradients
};

Forward plan_forward(const Problem& p, float* scratch);
Backward plan_backward(const Problem& p, float* scratch);

// The channel excitation and its backward, between the two passes over the map.
void excite(const Problem& p, const Forward& f);
void excite_backward(const Problem& p, const Backward& b);

// The passes over the map, for one element type.
template <typename T>
struct Passes {
  static void squeeze(const Problem& p, const Forward& f);
  static void apply(const Problem& p, const Forward& f);
  static void reduce(const Problem& p, const Backward& b);
  static void apply_backward(const Problem& p, const Backward& b);
};

// What the operators call: all launches of a direction, with so many floats of scratch memory,
// aligned to 256 bytes.
int64_t forward_scratch(const Problem& p);
void forward(const Problem& p, float* scratch);
int64_t backward_scratch(const Problem& p);
void backward(const Problem& p, float* scratch);

// What this build's kernels are compiled for on `device`, the current one: 80 for 8.0, 0 where
// there is no code that it can run. Less than the device's own where it compiles PTX for an older
// one, which does not know how to wait for the kernel before.
int architecture_of(int device);

}  // namespace scse::cuda
