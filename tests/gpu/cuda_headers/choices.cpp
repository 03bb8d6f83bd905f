// The plain functions that decide how the CUDA kernels run, for tests/gpu/test_cuda_choices.py.
#include <iterator>

#include "count.h"
#include "general/tile.h"
#include "gradient_tasks.h"

using namespace scse::cuda;

extern "C" {

bool layers(int64_t channels, int64_t hidden) { return has_layers(channels, hidden); }

void tile(int64_t channels, int64_t positions, int itemsize, int width, bool channels_last,
          int64_t* out) {
  const Tile t = tile_of(channels, positions, itemsize, width, channels_last);
  const int64_t values[] = {t.width,  t.each,        t.lanes,      t.rows,  t.apply_rows,
                            t.inner,  t.outer,       t.steps,      t.tiles, t.positions,
                            t.strips, t.inner_tiles, t.outer_tiles};
  std::copy(std::begin(values), std::end(values), out);
}

int64_t tasks(int64_t channels, int64_t hidden, bool channel, bool spatial) {
  return gradient_tasks(channels, hidden, channel, spatial);
}

bool fits(int64_t size) {
  try {
    return Count(size) == static_cast<int>(size);
  } catch (const std::runtime_error&) {
    return false;
  }
}

int excitation(int64_t channels, int64_t hidden, int64_t strips) {
  return excite_threads(channels, hidden, strips);
}
}
