"""Tile sizes and warps from shape, dtype, layout and the device's multiprocessors: the one place
where they are chosen, unless a file of timings says better (`tuning.py`).

The order of a sum follows from them: it may change with the shape and the model of the device, but
not from run to run. Software pipelining (num_stages) is no choice here: Triton pipelines loops of
matrix products, and no other where it isn't asked to.
"""

import os
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

# Bytes of the map that a thread holds of one tile. With 128 and two maps (x and dy) a thread has 16
# loads of 16 bytes on their way and needs nearly all 255 registers for their floats. So eight warps
# fit an SM, with 64 KiB in flight; 32 KiB would do to keep the memory busy.
_BYTES = 128
# Rows of partial sums per sample, each channels floats that are written and read again by one
# program. With more strips than this each takes several tiles.
_STRIPS = 512
# Positions of a strip, at most, where a tile can be short: a row of partial sums for each.
_STRIP = 32
# The same for BatchNorm's backward; and a thread's elements of each map there, in contiguous maps
# and in channels_last ones. Of these 16 would be spread over warps in a way that takes four times
# as long for the sums, so 32 it is, with a few registers spilled.
_NORM_STRIP = 128
_NORM_ELEMENTS = 16, 32
# Bytes of x on their way to each multiprocessor, where strips of several tiles leave the choice; as
# many of dy join them. 3.35 TB/s and 0.7 us from memory make 18 KB for each of an H100's.
_IN_FLIGHT = 16384
# A tile's row in a contiguous map has so many bytes at least: what memory is read by, a sector.
# Half of that where the map's row is no more than a line of the cache.
_SECTOR = 32
_LINE = 128
# More channels than this are walked in several tiles: with rows of a sector it takes eight warps to
# hold so many, and more warps would only wait for each other.
_CHANNELS = 1024
# Weights of one layer of an excitation from which programs share it. And there: segments of the
# channels, at most; a program's samples and outputs of each, the more the fewer bytes come from L2;
# a thread's registers for its parts of sums, and at a step for weights and for partial sums.
_MANY_WEIGHTS = 1 << 15
_SEGMENTS = 4
_SHARES = ((16, 128), (16, 64), (8, 64), (8, 32), (4, 32), (2, 32))
_PARTS = 64
_STEP_WEIGHTS = 32
_STEP_PARTIALS = 64
# Strips whose sums are few enough for each program of a sample to add up all of them.
_FEW_STRIPS = 128
# Warps that an SM can issue from at once.
_SCHEDULERS = 4
# Multiprocessors where there is no device to ask (the interpreter, tests of compiled code): those
# of an H100.
_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """[block_c, block_s] elements to a step of a program of `warps` warps, `tiles` steps to a
    strip. `hold`: block_c covers all channels."""

    block_c: int
    block_s: int
    warps: int
    tiles: int
    hold: bool


@dataclass(frozen=True)
class Excitation:
    """block_c and block_j: powers of two that cover channels and hidden channels. A sum over
    channels has terms_c parts, one over hidden channels terms_j, one over strips terms_strips; so
    many sums are formed at once that a step reads `tile` elements. segment: where weights are many,
    channels whose terms are added apart, else 0."""

    block_c: int
    block_j: int
    terms_c: int
    terms_j: int
    terms_strips: int
    tile: int
    warps: int
    segment: int = 0


@dataclass(frozen=True)
class Share:
    """A program's share of a layer of an excitation: so many samples, so many outputs of each, in
    steps of so many terms."""

    samples: int
    outputs: int
    step: int
    warps: int

    def grid(self, samples: int, outputs: int) -> tuple[int, int]:
        """Programs for a layer, or for a segment's part of it."""
        return -(-samples // self.samples), -(-outputs // self.outputs)

    def constants(self) -> dict[str, int]:
        """What kernels call it."""
        return {
            "SAMPLES": self.samples,
            "BLOCK": self.outputs,
            "STEP": self.step,
            "num_warps": self.warps,
        }


@dataclass(frozen=True)
class Rows:
    """The shares of an excitation's four kernels, two forward and two backward."""

    hidden: Share
    gates: Share
    d_hidden: Share
    d_mean: Share


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; asked once, and the driver answers without waiting for kernels."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(size: int) -> int:
    """The smallest power of two that isn't less than `size`."""
    return 1 << max(size - 1, 0).bit_length()


def tile(
    samples: int,
    channels: int,
    positions: int,
    itemsize: int,
    lanes: int,
    channels_last: bool,
    processors: int,
) -> Tile:
    """The tile of every pass over the map. `lanes`: threads to a warp.

    A tile has all channels where they fit: then it finishes its positions' sums. It has as few
    warps as possible, since sums across warps go through shared memory. In contiguous maps its rows
    have 128 bytes, less where channels are many. In channels_last ones a single warp can sum alone
    if a position's channels fill it; then strips take several tiles, for fewer partial sums.

    Small maps get shorter strips, then smaller tiles, until half the `processors` have a program.
    """
    filled = 16 * lanes // itemsize  # elements with which a warp is full: 16 bytes to a thread
    size = _BYTES // 16 * filled  # a warp's part of a tile
    block_c = min(power_of_two(channels), _CHANNELS)
    hold = channels <= block_c
    alone = channels_last and block_c >= filled
    if alone and not hold:
        block_c = filled
    warps = max(1, block_c // size) if alone else 2
    while not alone and warps < 8 and block_c * (128 // itemsize) > warps * size:
        warps *= 2
    block_s = min(warps * size // block_c, max(16, power_of_two(positions)))
    while warps > 1 and block_c * block_s < warps * size:
        warps //= 2  # a small map
    tiles = max(1, _STRIP // block_s) if alone and hold else 1
    # Where channels are walked in any case and samples are many, rows are longer, so strips fewer.
    while not (hold or alone) and block_s < positions and block_s * itemsize < _LINE:
        if samples * -(-positions // (2 * block_s)) < processors * 3 // 4:
            break
        block_c, block_s = block_c // 2, 2 * block_s
    if not (hold or alone) and block_c < _CHANNELS and positions * itemsize % 16:
        block_c //= 2  # each element of these rows is a load of its own, with its address

    def programs() -> int:
        return samples * -(-positions // (block_s * tiles))

    def in_flight() -> int:
        return programs() * block_c * block_s * itemsize

    # Programs; of twice as many of half the size a multiprocessor would get two.
    enough = processors // 2
    # Of a small map half: each strip is a row of partial sums more for the excitation to add.
    wanted = min(processors * _IN_FLIGHT * 3 // 4, samples * block_c * positions * itemsize // 2)
    while tiles > 1 and (programs() < enough or in_flight() < wanted):
        tiles //= 2
    least = _SECTOR if positions * itemsize > _LINE else _SECTOR // 2
    while programs() < enough:
        if alone or block_s * itemsize <= least or block_c * block_s <= filled:
            break
        block_s //= 2
        if warps > _SCHEDULERS or block_c * block_s < warps * filled:
            warps //= 2  # else half the bytes to a thread, and all schedulers stay busy
    while hold and positions > tiles * block_s * _STRIPS:
        tiles *= 2
    return Tile(block_c, block_s, warps, tiles, hold)


def excitation(channels: int, hidden: int, strips: int, itemsize: int) -> Excitation:
    """The excitation's tiles. They do not depend on the number of samples: so the order of sums
    does not.

    One program has all of a sample's weights to read, so each thread has 16 loads of 16 bytes on
    their way, and up to 128 strips' sums come in one step if they fit. Few warps, as sums across
    warps cost more than they save: two up to 64 channels, at most eight. `itemsize`: of the sums.

    For the same reason a tile has few terms of each sum and rather more sums, all if they fit:
    threads add up what they hold of a sum only after its last step.

    Many weights are shared by programs (`rows`), unless there are so many strips that the map is
    large beside them.
    """
    block_c, block_j = power_of_two(channels), power_of_two(hidden)
    columns = min(256, block_c)
    share = itemsize // 4  # of the registers, for one sum
    rows = 128 if strips > 128 else max(32, min(128, 4096 // columns, 4 * columns))
    terms_strips = min(rows // share, power_of_two(strips))
    tile = columns * max(min((64 if channels > 256 else 32) // share, block_j), terms_strips)
    warps = min(8, max(1, tile * share // 2048))
    least = _SECTOR // 2  # weights of two bytes
    terms_c = min(columns, max(least, tile // block_j))
    terms_j = min(block_j, max(least, tile // block_c))
    alone = Excitation(block_c, block_j, terms_c, terms_j, terms_strips, tile, warps)
    if channels * hidden < _MANY_WEIGHTS or strips > _FEW_STRIPS:
        return alone
    return replace(
        alone,
        terms_c=max(4, min(8, block_c // 64)),
        terms_j=max(4, min(16, block_j // 32)),
        segment=max(least, block_c // _SEGMENTS),
    )


def rows(
    e: Excitation, samples: int, channels: int, hidden: int, itemsize: int, processors: int
) -> Rows:
    """How programs share an excitation of many weights.

    With a program to a sample, all of its weights would come through one multiprocessor, 64 bytes a
    cycle (4.7 us for 0.5 MB, where a launch more costs about 1), and all samples' through L2. Many
    programs with few outputs of few samples read weights and inputs often, from L2, 33 bytes a
    cycle for each of an H100's multiprocessors. So shares are as large as leave three quarters of
    the `processors` a program. No result depends on them.

    [256, 2048, 7, 7], 128 hidden channels: 16 samples and 64 outputs in each of four segments, 128
        programs, read 21 MB from L2; with 16 outputs and all channels it would be 33
    [8, 512, 16, 16], 256 hidden channels: 2 samples and 32 outputs, 128 programs
    """
    share = itemsize // 4
    aligned = channels % 16 == 0 and hidden % 16 == 0  # else each weight is a load of its own

    def shared(
        outputs: int, segments: int, inputs: int, terms: int, strips: int, columns: bool
    ) -> Share:
        for few, block in _SHARES if aligned else _SHARES[-2:]:
            programs = -(-samples // few) * -(-outputs // block) * segments
            warps = max(1, min(4, terms * block // 128)) if columns else 4
            threads = 32 * warps // share  # of registers of four bytes
            parts = few * block * terms // threads
            if few <= samples and parts <= _PARTS and programs >= processors * 3 // 4:
                break
        weights = _STEP_WEIGHTS if parts > 8 else 2 * _STEP_WEIGHTS
        step = min(weights * threads // block, _STEP_PARTIALS * threads // (few * strips), inputs)
        return Share(few, block, max(4 * terms, step), warps)

    first = hidden, -(-channels // e.segment), e.segment, e.terms_c, e.terms_strips
    second = channels, 1, e.block_j, e.terms_j, 1
    return Rows(
        hidden=shared(*first, columns=False),
        gates=shared(*second, columns=False),
        d_hidden=shared(*first, columns=True),
        d_mean=shared(*second, columns=True),
    )


def gradient_block(warps: int) -> int:
    """Rows and columns of a piece of the parameters' gradients in a kernel of so many warps: 16 to
    32 sums to a thread, no more registers than the pass over the map needs."""
    return 64 if warps >= 4 else 32


@dataclass(frozen=True)
class Queue:
    """For the kernels of one launch: `programs` of them take strips, and the second pass over a
    sample begins `lead` strips after the end of the first."""

    programs: int
    lead: int


def launches(chosen: int) -> int:
    """Kernel launches each way: 3, a kernel for each step, or 1, all steps in one.

    One launch makes programs wait for each other, and what it takes differs from map to map: so it
    is used only where a file of timings chose it, or where SCSE_TRITON_LAUNCHES, which goes before
    any choice, asks for it.
    """
    return int(_asked("SCSE_TRITON_LAUNCHES", str(chosen), ("1", "3")))


def overlap(x: Tensor) -> bool:
    """Whether a launch may start while the one before it ends: on NVIDIA's GPUs of compute
    capability 9.0 and later, unless SCSE_TRITON_OVERLAP is 0."""
    wanted = _asked("SCSE_TRITON_OVERLAP", "1", ("0", "1")) == "1"
    able = x.is_cuda and not torch.version.hip
    return wanted and able and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _asked(variable: str, default: str, values: tuple[str, str]) -> str:
    """What the environment variable says, one of two values."""
    asked = os.environ.get(variable, default)
    if asked not in values:
        raise ValueError(f"{variable} must be {' or '.join(values)}, got {asked!r}")
    return asked


def excitation_tile(warps: int, itemsize: int) -> int:
    """Elements of the excitation's tiles in a kernel of so many warps: 128 bytes of a thread's
    registers for sums of `itemsize` bytes, as the rest of the kernel needs some too."""
    return warps * 32 * 128 // itemsize


def queue(strips: int, kept: int, warps: int, resident: int, processors: int, l2: int) -> Queue:
    """The queue of `strips` strips in all, of which `kept` bytes each wait in L2 to be read again.

    Programs of `warps` warps fill the device's multiprocessors with `resident` warps each, if L2 is
    large enough for that: between the two readings of a strip pass the rest of its sample, `lead`
    strips and what the programs have in hand, twice their number. `lead` is a strip for every
    second program, so that there is work while a sample is excited. In all that may be half of L2;
    the other half is for the sample and what is written. On an H100 (132 multiprocessors, 50 MiB):

    [8, 64, 256, 256] float16: 512 strips of 16 KiB, 640 programs of two warps, ten warps to a
        multiprocessor; 512 + 2.5 * 640 strips pass, 33 MiB or four samples
    [8, 256, 64, 64] float16: 64 strips of 32 KiB, 264 programs of eight warps (sixteen warps);
        64 + 2.5 * 264 strips, 23 MiB, more than the map has
    the same in channels_last: 128 strips of 16 KiB, 640 programs of one warp, which is few
    """
    programs = processors * max(1, resident // warps)
    programs = max(1, min(programs, strips, l2 // (5 * kept)))
    return Queue(programs, programs // 2)


def statistics_tile(
    samples: int,
    channels: int,
    positions: int,
    itemsize: int,
    channels_last: bool,
    processors: int,
) -> Tile:
    """The tile of BatchNorm's statistics, which need no position's channels together.

    Two numbers to a channel and tile are written and read again, so a tile has few channels and
    many positions: in channels_last maps two sectors' channels, which is what memory is read by.
    Four warps with 128 bytes to a thread; smaller tiles until most `processors` have a program.
    """
    warps = 4
    size = warps * 32 * _BYTES // itemsize
    if channels_last:
        block_c = min(power_of_two(channels), 2 * _SECTOR // itemsize)
        block_s = min(size // block_c, max(16, power_of_two(positions)))
    else:
        block_s = min(size, max(16, power_of_two(positions)))
        block_c = min(power_of_two(channels), size // block_s)

    def programs() -> int:
        return samples * -(-channels // block_c) * -(-positions // block_s)

    while programs() < processors * 3 // 4 and block_c * block_s > size // 8:
        if not channels_last and block_c > 1:
            block_c //= 2
        elif block_s > 32:
            block_s //= 2
        else:
            break
    return Tile(block_c, block_s, warps, 1, False)


def norm_tiles(
    tile: Tile,
    samples: int,
    positions: int,
    itemsize: int,
    lanes: int,
    channels_last: bool,
    processors: int,
) -> tuple[Tile, Tile]:
    """The tiles of the passes with BatchNorm, forward and backward, given those without it.

    Backward all passes read u and dy, and a thread makes several floats of each element: so it has
    fewer of them. Six sums to a channel and strip are written and read again, where scSE alone has
    two: so strips are longer, as long as most processors have one.
    """
    block_c, block_s, warps, tiles = tile.block_c, tile.block_s, tile.warps, tile.tiles
    while block_c * block_s > _NORM_ELEMENTS[channels_last] * lanes * warps:
        if not tile.hold:
            block_c //= 2
        elif block_s > 1 and (channels_last or block_s * itemsize > _SECTOR):
            block_s //= 2
            tiles *= 2
        else:
            warps *= 2

    def with_strips(tile: Tile, least: int) -> Tile:
        tiles = tile.tiles
        while tile.hold and tile.block_s * tiles < least:
            if samples * -(-positions // (2 * tile.block_s * tiles)) < processors * 3 // 4:
                break
            tiles *= 2
        return replace(tile, tiles=tiles)

    backward = Tile(block_c, block_s, warps, tiles, tile.hold)
    return with_strips(tile, _STRIP), with_strips(backward, _NORM_STRIP)
