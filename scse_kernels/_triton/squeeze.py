"""The forward's first pass: both squeezes of x."""

import triton
import triton.language as tl

from .activation import gate_of
from .combine import CHANNEL, SPATIAL
from .primitives import (
    SIZES,
    accumulator,
    index,
    inside,
    let_next_start,
    load,
    offsets,
    shown,
    shown_positions,
)


@triton.jit(do_not_specialize=SIZES)
def squeeze_kernel(
    x_ptr,  # [N, C, S]
    ws_ptr,  # [C]
    bs_ptr,  # [1] or None
    partial_ptr,  # [N, strips, C]: sums of x over a strip's positions
    spatial_gate_ptr,  # [N, S]
    C,
    S,
    strips,
    stride_xn,
    pitch_x,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HOLD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each sample and strip (TILES tiles). Reads x once; writes channel sums and
    spatial gates."""
    let_next_start(OVERLAP)
    squeeze_strip(
        tl.program_id(0), x_ptr, ws_ptr, bs_ptr, partial_ptr, spatial_gate_ptr,
        C, S, strips, stride_xn, pitch_x,
        COMBINE, CHANNELS_LAST, ALIGN, WIDE, HOLD, TILES, BLOCK_C, BLOCK_S, GATE,
    )  # fmt: skip


@triton.jit
def squeeze_strip(
    item, x_ptr, ws_ptr, bs_ptr, partial_ptr, spatial_gate_ptr, C, S, strips, stride_xn, pitch_x,
    COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    HOLD: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """The strip `item` of all samples' strips. HOLD: BLOCK_C covers all channels; TILES is 1
    without."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    HAS_CHANNEL: tl.constexpr = COMBINE != SPATIAL
    HAS_SPATIAL: tl.constexpr = COMBINE != CHANNEL
    # With HOLD no loop is left over the channels: from a loop the compiler may take products, in
    # one kernel and not in another, that it else contracts with the sums.
    END = BLOCK_C if HOLD else C
    n = index(item // strips, WIDE)
    strip = item % strips
    x_ptr += n * shown(stride_xn, ALIGN)
    if HAS_CHANNEL:
        partial_ptr += index(item, WIDE) * C

    # Zeros that the compiler does not recognise. Triton (3.6 to 3.8) rewrites `constant +=
    # sum(load)` in a loop, with registers in a wrong order: channels of float32 channels_last maps
    # were mixed up.
    channel_sum = tl.zeros([BLOCK_C], ACC) + (item < 0).to(ACC)
    for tile in range(TILES):
        s = (strip * TILES + tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        squeezed = tl.zeros([BLOCK_S], ACC)
        for begin in range(0, END, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            at = offsets(index(c, WIDE), index(s, WIDE), pitch_x, CHANNELS_LAST, ALIGN)
            x = load(x_ptr + at, inside(c, s, C, S, CHANNELS_LAST, ALIGN), ACC)
            if HAS_CHANNEL:
                if HOLD:
                    channel_sum += tl.sum(x, 1)
                else:
                    tl.store(partial_ptr + c, tl.sum(x, 1), mask=c < C)
            if HAS_SPATIAL:
                ws = load(ws_ptr + c, c < C, ACC)
                squeezed += tl.sum(x * ws[:, None], 0)
        if HAS_SPATIAL:
            if bs_ptr is not None:
                squeezed += tl.load(bs_ptr).to(ACC)
            tl.store(spatial_gate_ptr + n * S + s, gate_of(squeezed, GATE), mask=s < S)
    if HAS_CHANNEL and HOLD:
        c = tl.arange(0, BLOCK_C)
        tl.store(partial_ptr + c, channel_sum, mask=c < C)
