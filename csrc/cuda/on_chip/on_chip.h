// Kernels that keep a sample on chip: one launch reads each map once and writes the result once.
// For sm_90 and later, where a cluster of blocks can share its blocks' memory.
#pragma once

#include <string>

#include "../problem.h"

namespace scse::cuda {

// Whether a sample's maps (forward: x; backward: x and dy) fit the shared memory of a cluster on
// p.device. Looks at no pointer.
bool on_chip_forward_fits(const Problem& p);
bool on_chip_backward_fits(const Problem& p);

// Why they don't: a part of a sentence.
std::string on_chip_why_not(const Problem& p);

// How many blocks the forward takes; each is a slice of a sample. 0 where it doesn't fit.
int64_t on_chip_blocks(const Problem& p);

// Only for problems that fit.
extern const Launcher on_chip_kernels;

}  // namespace scse::cuda
