"""Tile sizes and warps from shape, dtype and layout: the one place where they are chosen.

Never from the device or the number of samples, so that a sum has the same order everywhere.
"""

from dataclasses import dataclass

# Bytes of the map that a thread holds of one tile. With 128 and two maps (x and dy) a thread has 16
# loads of 16 bytes on their way, and needs some 150 registers for their floats: three programs of
# four warps to an SM, 96 KiB in flight; 32 KiB would do to keep the memory busy.
_BYTES = 128
# The longest strip's share of a row of partial sums: [strips, C] floats per sample are written and
# read again. More strips than this and each takes several tiles.
_STRIPS = 512


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
    """Weights are read in tiles [block_j, block_c] (hidden channels, channels), partial sums in
    tiles [block_strips, block_c]."""

    block_c: int
    block_j: int
    block_strips: int
    warps: int


def power_of_two(size: int) -> int:
    """The smallest power of two that isn't less than `size`."""
    return 1 << max(size - 1, 0).bit_length()


def tile(channels: int, positions: int, itemsize: int, lanes: int) -> Tile:
    """The tile of every pass over the map. `lanes`: threads to a warp.

    A row of the tile is 64 bytes or more along either axis, so that whole sectors are used, and
    a tile has all channels where they fit: then positions' sums are finished in it.
    """
    per_thread = _BYTES // itemsize
    block_c = min(power_of_two(channels), 1024)
    # Wide maps of many channels take more warps, so that a row doesn't get shorter than 64 bytes.
    row = 64 // itemsize
    warps = 4
    while warps < 16 and block_c * row > warps * lanes * per_thread:
        warps *= 2
    block_s = max(row, warps * lanes * per_thread // block_c)
    block_s = min(block_s, max(16, power_of_two(positions)))
    while warps > 1 and block_c * block_s < warps * lanes * per_thread // 2:
        warps //= 2  # a small map
    hold = channels <= block_c
    tiles = 1
    while hold and positions > tiles * block_s * _STRIPS:
        tiles *= 2
    return Tile(block_c, block_s, warps, tiles, hold)


def excitation(channels: int, hidden: int, strips: int) -> Excitation:
    """The excitation's blocks. One program has all of a sample's weights to read, so each thread
    has 16 loads of 16 bytes on their way. Few warps, as sums across warps cost more than they
    save: one up to 64 channels, at most eight."""
    block_c = min(256, power_of_two(channels))
    block_j = min(64 if channels > 256 else 32, power_of_two(hidden))
    return Excitation(
        block_c,
        block_j,
        min(32, power_of_two(strips)),
        max(1, block_c * block_j // 2048),
    )
