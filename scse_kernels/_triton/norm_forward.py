"""The forward's passes over u once its statistics are known. They are those of squeeze.py and
apply.py, behind BatchNorm and ReLU."""

import triton
import triton.language as tl

from .activation import SIGMOID, gate_of
from .apply import load_gates
from .combine import CHANNEL, CONCAT, SPATIAL, value
from .norm import active, load_norm, normalised
from .primitives import (
    SIZES,
    accumulator,
    index,
    inside,
    let_next_start,
    load,
    offsets,
    place,
    shown,
    shown_positions,
    wait_for_previous,
)


@triton.jit(do_not_specialize=SIZES)
def norm_squeeze_kernel(
    u_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    ws_ptr,  # [C]
    bs_ptr,  # [1] or None
    partial_ptr,  # [N, strips, C]: sums of z over a strip's positions
    spatial_gate_ptr,  # [N, S]
    kept_mean_ptr,  # [C]: mean and var as they are now, for what runs after this. None: not wanted
    kept_var_ptr,  # [C]
    C,
    S,
    strips,
    stride_un,
    pitch_u,
    EPS: tl.constexpr,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    HOLD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each sample and strip (TILES tiles). Reads u once; writes channel sums and
    spatial gates. HOLD: BLOCK_C covers all channels; TILES is 1 without."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    ACC: tl.constexpr = accumulator(u_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    HAS_CHANNEL: tl.constexpr = COMBINE != SPATIAL
    HAS_SPATIAL: tl.constexpr = COMBINE != CHANNEL
    item = tl.program_id(0)
    n = index(item // strips, WIDE)
    strip = item % strips
    u_ptr += n * shown(stride_un, ALIGN)
    if HAS_CHANNEL:
        partial_ptr += index(item, WIDE) * C
    if kept_mean_ptr is not None:  # noqa: SIM102 (one is known when compiling)
        if item == 0:
            for begin in range(0, C, BLOCK_C):
                c = begin + tl.arange(0, BLOCK_C)
                tl.store(kept_mean_ptr + c, load(mean_ptr + c, c < C, ACC), mask=c < C)
                tl.store(kept_var_ptr + c, load(var_ptr + c, c < C, ACC), mask=c < C)

    channel_sum = tl.zeros([BLOCK_C], ACC)
    for tile in range(TILES):
        s = (strip * TILES + tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        squeezed = tl.zeros([BLOCK_S], ACC)
        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            at = offsets(index(c, WIDE), index(s, WIDE), pitch_u, CHANNELS_LAST, ALIGN)
            mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
            u = load(u_ptr + at, mask, ACC)
            mean, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC)
            v = normalised(u - mean, scale, shift, mask)
            z = active(v, v)
            if HAS_CHANNEL:
                if HOLD:
                    channel_sum += tl.sum(z, 1)
                else:
                    tl.store(partial_ptr + c, tl.sum(z, 1), mask=c < C)
            if HAS_SPATIAL:
                ws = load(ws_ptr + c, c < C, ACC)
                squeezed += tl.sum(z * ws[:, None], 0)
        if HAS_SPATIAL:
            if bs_ptr is not None:
                squeezed += tl.load(bs_ptr).to(ACC)
            tl.store(spatial_gate_ptr + n * S + s, gate_of(squeezed, SIGMOID), mask=s < S)
    if HAS_CHANNEL and HOLD:
        c = tl.arange(0, BLOCK_C)
        tl.store(partial_ptr + c, channel_sum, mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def norm_apply_kernel(
    u_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    channel_gate_ptr,  # [N, C]
    spatial_gate_ptr,  # [N, S]
    y_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    C,
    S,
    blocks_s,  # tiles side by side along S
    stride_un,
    pitch_u,
    stride_yn,
    pitch_y,
    half_y,  # CONCAT: elements from the first to the second half of a sample
    EPS: tl.constexpr,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each tile. Reads u and the small tensors once, writes y. Goes from the last
    tile to the first: the end of u is what the squeeze left in L2."""
    ACC: tl.constexpr = accumulator(u_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    n, begin, s = place(tile, C, blocks_s, WIDE, BLOCK_C, BLOCK_S)
    c = begin + tl.arange(0, BLOCK_C)
    mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_u, CHANNELS_LAST, ALIGN)
    u = load(u_ptr + n * shown(stride_un, ALIGN) + at, mask, ACC)
    wait_for_previous(OVERLAP)
    mean, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC)
    v = normalised(u - mean, scale, shift, mask)
    z = active(v, v)
    channel_gate, spatial_gate = load_gates(
        channel_gate_ptr, spatial_gate_ptr, n, c, s, C, S, COMBINE, ACC
    )

    y_ptr += n * shown(stride_yn, ALIGN)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_y, CHANNELS_LAST, ALIGN)
    if COMBINE == CONCAT:
        tl.store(y_ptr + at, (z * channel_gate).to(y_ptr.dtype.element_ty), mask=mask)
        y_ptr += shown(half_y, ALIGN)
        tl.store(y_ptr + at, (z * spatial_gate).to(y_ptr.dtype.element_ty), mask=mask)
    else:
        y = value(z, channel_gate, spatial_gate, COMBINE)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
