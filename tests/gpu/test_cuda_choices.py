"""How the CUDA kernels are run: what is decided by plain functions, which need no GPU."""

import ctypes
import itertools
import random
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not SOURCES.exists(), reason="no C++ compiler, or no sources"
)

FLOAT32, FLOAT16 = 0, 2  # of scse::cuda::Dtype
ADD, CONCAT = 0, 3  # of scse::Combine
# The kernels' launch bounds and their grid's limit.
MOST_THREADS, MOST_BLOCKS = 256, 2**31 - 1


class Tile(NamedTuple):
    width: int
    each: int
    lanes: int
    rows: int
    apply_rows: int
    inner: int
    outer: int
    steps: int
    tiles: int
    positions: int
    strips: int
    inner_tiles: int
    outer_tiles: int


class Flat(NamedTuple):
    row: int
    size: int
    run: int
    inner_tiles: int
    outer_tiles: int


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("choices") / "choices.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    folders = [f"-I{HERE / 'cuda_headers'}", f"-I{SOURCES}"]
    subprocess.run(
        [COMPILER, *flags, *folders, HERE / "cuda_headers" / "choices.cpp", "-o", file], check=True
    )
    loaded = ctypes.CDLL(str(file))
    for function in (loaded.fits, loaded.layers, loaded.flat_map):
        function.restype = ctypes.c_bool
    loaded.tasks.restype = ctypes.c_int64
    return loaded


def _long(*values):
    return [ctypes.c_int64(value) for value in values]


@pytest.fixture
def tile(library):
    def tile_of(channels, positions, itemsize, width, channels_last) -> Tile:
        out = (ctypes.c_int64 * len(Tile._fields))()
        sizes = _long(channels, positions)
        library.tile(*sizes, itemsize, width, ctypes.c_bool(channels_last), out)
        return Tile(*out)

    return tile_of


@pytest.fixture
def flat(library):
    def flat_of(rows, row, width) -> Flat:
        out = (ctypes.c_int64 * len(Flat._fields))()
        library.flat(*_long(rows, row), width, out)
        return Flat(*out)

    return flat_of


def _sizes():
    """Channels and positions: all small ones, those of U-Nets, and any."""
    yield from itertools.product(range(1, 12), range(1, 12))
    yield from itertools.product((16, 64, 96, 512, 1024, 4096), (49, 196, 1024, 4096, 65536, 2**21))
    rng = random.Random(0)
    for _ in range(300):
        yield int(2 ** rng.uniform(0, 12)), int(2 ** rng.uniform(0, 22))


def _power_of_two(number):
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("itemsize, width", [(4, 4), (4, 1), (2, 8), (2, 1)])
def test_tiles_cover_the_map(tile, itemsize, width, channels_last):
    for channels, positions in _sizes():
        t = tile(channels, positions, itemsize, width, channels_last)
        inner, outer = (channels, positions) if channels_last else (positions, channels)
        where = f"{channels} channels, {positions} positions: {t}"
        # A row of threads is part of one warp, and a block has whole warps.
        assert _power_of_two(t.lanes) and t.lanes <= 32 and _power_of_two(t.rows), where
        # Wide accesses have blocks of fewer threads where positions are the outer axis.
        assert t.each == (8 if width * itemsize == 16 else 4), where
        most = MOST_THREADS // 2 if channels_last and t.each == 8 else MOST_THREADS
        assert 32 <= t.lanes * t.rows <= most, where
        assert 32 <= t.lanes * t.apply_rows <= MOST_THREADS, where
        assert t.inner == t.lanes * width and t.outer == t.each * t.rows, where
        step = t.inner if channels_last else t.outer
        for size, each, count in (
            (channels, step, t.steps),
            (inner, t.inner, t.inner_tiles),
            (outer, 4 * t.apply_rows, t.outer_tiles),
        ):
            assert (count - 1) * each < size <= count * each, where
        assert t.positions == (t.outer if channels_last else t.inner), where
        strip = t.positions * t.tiles
        assert (t.strips - 1) * strip < positions <= t.strips * strip, where
        # One block adds up the strips' sums.
        assert t.strips <= 512, where
        assert 16 * t.inner_tiles * t.outer_tiles < MOST_BLOCKS, where


def test_tiles_of_large_maps_read_whole_lines(tile):
    for channels, itemsize in itertools.product((16, 64, 256), (2, 4)):
        width = 16 // itemsize
        assert tile(channels, 64 * 64, itemsize, width, False).inner * itemsize >= 128
        # A position's channels lie side by side, as many as a warp reads at once.
        t = tile(channels, 64 * 64, itemsize, width, True)
        assert t.inner == min(channels, 32 * width)


@pytest.mark.parametrize("width", (4, 8))
def test_runs_cover_a_flat_sample(flat, width):
    """A run is whole rows and whole accesses, and the blocks of a sample reach its end."""
    for rows, row in _sizes():
        if rows * row % width:
            continue
        f = flat(rows, row, width)
        where = f"{rows} rows of {row}: {f}"
        assert (f.row, f.size) == (row, rows * row), where
        assert 0 < f.run <= f.size and f.run % row == 0 and f.run % width == 0, where
        block = MOST_THREADS * width
        assert (f.inner_tiles - 1) * block < f.run <= f.inner_tiles * block, where
        assert (f.outer_tiles - 1) * 4 * f.run < f.size <= f.outer_tiles * 4 * f.run, where


def test_flat_maps_of_networks_fill_their_blocks(flat):
    for channels, side, least in (
        (1024, 7, 0.85), (512, 14, 0.85), (512, 13, 0.85), (512, 15, 0.85), (256, 21, 0.95),
        (256, 27, 0.9), (2048, 3, 0.75), (256, 33, 0.85), (64, 65, 0.95)
    ):  # fmt: skip
        f = flat(channels, side * side, 8)
        threads = f.inner_tiles * f.outer_tiles * MOST_THREADS * 4 * 8
        assert f.size / threads >= least, (channels, side, f, f.size / threads)


def test_which_maps_are_flat(library):
    def flat_map(dtype, channels, positions, last=False, combine=ADD, begin=0, pitch=0, sample=0):
        sizes, strides = _long(channels, positions), _long(begin, pitch, sample)
        ways = [
            library.flat_map(dtype, *sizes, combine, ctypes.c_bool(last), *strides, of_dy)
            for of_dy in (ctypes.c_bool(False), ctypes.c_bool(True))
        ]
        assert ways[0] == ways[1], "x and dy are judged alike"
        return ways[0]

    assert flat_map(FLOAT16, 1024, 49) and flat_map(FLOAT16, 512, 196)
    assert flat_map(FLOAT32, 4, 49) and flat_map(FLOAT32, 2, 50)
    assert flat_map(FLOAT16, 37, 64, last=True) and flat_map(FLOAT16, 12, 14, last=True)
    assert not flat_map(FLOAT16, 1024, 64)  # its rows are whole accesses
    assert not flat_map(FLOAT32, 512, 196) and not flat_map(FLOAT16, 64, 49, last=True)
    assert not flat_map(FLOAT16, 1020, 49)  # its samples are not
    assert flat_map(FLOAT16, 8, 9) and not flat_map(FLOAT16, 8, 7)  # three rows to an access
    assert flat_map(FLOAT16, 8, 49, begin=8) and not flat_map(FLOAT16, 8, 49, begin=4)
    assert flat_map(FLOAT16, 8, 49, sample=8) and not flat_map(FLOAT16, 8, 49, sample=4)
    assert not flat_map(FLOAT16, 8, 49, pitch=8)
    assert flat_map(FLOAT16, 8, 49, combine=CONCAT)
    assert not flat_map(FLOAT16, 49, 8, last=True, combine=CONCAT)
    assert flat_map(FLOAT16, 8, 2**26 - 1) and not flat_map(FLOAT16, 8, 2**26 + 1)


def test_division_by_a_product(library):
    rng = random.Random(1)
    sizes = [*range(1, 300), 2**31 - 1, *(2**k + d for k in range(9, 31) for d in (-1, 0, 1))]
    for size in sizes:
        numbers = {0, 1, size - 1, size, 2**31 - 1, 2**31 - 1 - 2**31 % size}
        numbers |= {
            max(0, min(rng.randrange(2**31) // size * size + d, 2**31 - 1)) for d in (-1, 0)
        }
        for number in numbers:
            assert library.divide(*_long(size), number) == number // size, (number, size)


def test_excitations_of_many_weights_have_a_launch_for_each_layer(library):
    expected = {(64, 4): 0, (256, 16): 0, (512, 16): 0, (512, 32): 1, (256, 128): 1, (512, 256): 1}
    assert {e: library.layers(*_long(*e)) for e in expected} == expected
    assert library.layers(*_long(9000, 1))  # its vectors fill the shared memory


def test_gradients_are_shared_out(library):
    def tasks(channels, hidden, channel=True, spatial=True):
        flags = ctypes.c_bool(channel), ctypes.c_bool(spatial)
        return library.tasks(*_long(channels, hidden), *flags)

    # Pieces of 32 x 64 of both matrices, of 32 of b2, b1 and ws, and bs.
    assert tasks(64, 32) == (2 + 1) + (2 + 1) + (2 + 1)
    assert tasks(65, 33) == (3 + 2 * 2) + (3 + 2) + (3 + 1)
    assert tasks(64, 32, channel=False) == 2 + 1
    assert tasks(64, 32, spatial=False) == (2 + 1) + (2 + 1)
    assert tasks(64, 32, channel=False, spatial=False) == 0


def test_sizes_that_are_no_int_are_refused(library):
    """Kernels take sizes as 32 bits: none is cut short on its way there."""
    assert all(library.fits(*_long(size)) for size in (0, 1, 2**31 - 1))
    assert not any(library.fits(*_long(size)) for size in (2**31, 2**32, 2**32 + 1, 2**62))


def test_threads_of_the_excitation(library):
    for channels, hidden, strips in itertools.product((1, 16, 64, 512, 4096), repeat=3):
        threads = library.excitation(*_long(channels, hidden, strips))
        assert _power_of_two(threads) and 64 <= threads <= 512
    assert library.excitation(*_long(64, 4, 64)) == 256
    assert library.excitation(*_long(512, 256, 4)) == 512
