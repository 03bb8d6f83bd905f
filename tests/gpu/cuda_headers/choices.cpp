// The plain functions that decide how the CUDA kernels run, for tests/gpu/test_cuda_choices.py.
#include <iterator>

#include "count.h"
#include "general/flat.h"
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

void flat(int64_t rows, int64_t row, int width, int64_t* out) {
  const Flat f = flat_of(rows, row, width);
  const int64_t values[] = {f.row, f.size, f.run, f.inner_tiles, f.outer_tiles};
  std::copy(std::begin(values), std::end(values), out);
}

// x and dy alike: `begin` is where they begin; `pitch` and `sample` are their distances.
bool flat_map(int dtype, int64_t channels, int64_t positions, int combine, bool channels_last,
              int64_t begin, int64_t pitch, int64_t sample, bool of_dy) {
  Problem p{};
  p.dtype = static_cast<Dtype>(dtype), p.combine = static_cast<scse::Combine>(combine);
  p.channels = channels, p.positions = positions, p.channels_last = channels_last;
  p.x_pitch = p.dy_pitch = p.row(), p.x_sample = p.dy_sample = channels * positions;
  p.x = p.dy = p.y = p.dx = reinterpret_cast<void*>(256);
  (of_dy ? p.dy : p.x) = reinterpret_cast<const void*>(256 + begin * itemsize(p.dtype));
  (of_dy ? p.dy_pitch : p.x_pitch) += pitch;
  (of_dy ? p.dy_sample : p.x_sample) += sample;
  return flat_for(p).size > 0;
}

int divide(int64_t size, int number) { return Divisor(size).divide(number); }

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
