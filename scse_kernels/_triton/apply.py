"""The second pass over the map, forward (y) and backward (dx, with the parameters' gradients)."""

import triton
import triton.language as tl

from .combine import CHANNEL, CONCAT, SPATIAL, by_gates, direct, value
from .parameters import parameter_gradients
from .primitives import (
    NORMAL,
    SIZES,
    accumulator,
    index,
    inside,
    load,
    offsets,
    place,
    shown,
    shown_positions,
    store,
    wait_for_previous,
)


@triton.jit
def load_gates(
    channel_gate_ptr, spatial_gate_ptr, n, c, s, C, S, COMBINE: tl.constexpr, ACC: tl.constexpr
):
    """The gates of sample n, [BLOCK_C, 1] of channels c and [1, BLOCK_S] of positions s; 0 for a
    branch that is missing."""
    channel_gate = 0.0
    spatial_gate = 0.0
    if COMBINE != SPATIAL:
        channel_gate = load(channel_gate_ptr + n * C + c, c < C, ACC)[:, None]
    if COMBINE != CHANNEL:
        spatial_gate = load(spatial_gate_ptr + n * S + s, s < S, ACC)[None, :]
    return channel_gate, spatial_gate


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    x_ptr,  # [N, C, S]
    channel_gate_ptr,  # [N, C]
    spatial_gate_ptr,  # [N, S]
    y_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    C,
    S,
    blocks_s,  # tiles side by side along S
    stride_xn,
    pitch_x,
    stride_yn,
    pitch_y,
    half_y,  # CONCAT: elements from the first to the second half of a sample
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each tile. Reads x and the gates once, writes y. Goes from the last tile to the
    first: the end of x is what the squeeze left in L2."""
    apply_tile(
        tl.num_programs(0) - 1 - tl.program_id(0), x_ptr, channel_gate_ptr, spatial_gate_ptr, y_ptr,
        C, S, blocks_s, stride_xn, pitch_x, stride_yn, pitch_y, half_y,
        COMBINE, RESIDUAL, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C, BLOCK_S, NORMAL, OVERLAP,
    )  # fmt: skip


@triton.jit
def apply_tile(
    tile, x_ptr, channel_gate_ptr, spatial_gate_ptr, y_ptr, C, S, blocks_s, stride_xn, pitch_x,
    stride_yn, pitch_y, half_y, COMBINE: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, POLICY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One of all samples' tiles. RESIDUAL: y has x added. POLICY: the caches' for x and y. OVERLAP:
    the gates are the previous launch's; x is on its way before that ends."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    n, begin, s = place(tile, C, blocks_s, WIDE, BLOCK_C, BLOCK_S)
    c = begin + tl.arange(0, BLOCK_C)
    mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_x, CHANNELS_LAST, ALIGN)
    x = load(x_ptr + n * shown(stride_xn, ALIGN) + at, mask, ACC, POLICY)
    wait_for_previous(OVERLAP)
    channel_gate, spatial_gate = load_gates(
        channel_gate_ptr, spatial_gate_ptr, n, c, s, C, S, COMBINE, ACC
    )

    y_ptr += n * shown(stride_yn, ALIGN)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_y, CHANNELS_LAST, ALIGN)
    if COMBINE == CONCAT:
        store(y_ptr + at, x * channel_gate, mask, POLICY)
        store(y_ptr + shown(half_y, ALIGN) + at, x * spatial_gate, mask, POLICY)
    else:
        y = value(x, channel_gate, spatial_gate, COMBINE)
        if RESIDUAL:
            y += x
        store(y_ptr + at, y, mask, POLICY)


@triton.jit(do_not_specialize=SIZES)
def apply_backward_kernel(
    dy_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    x_ptr,  # [N, C, S]
    channel_gate_ptr,  # [N, C]
    spatial_gate_ptr,  # [N, S]
    dq_ptr,  # [N, S]: gradient before the spatial gate
    d_mean_ptr,  # [N, C]
    ws_ptr,  # [C]
    dx_ptr,  # [N, C, S]
    d_excited_ptr,  # from here to dbs_ptr: see `parameter_gradients`
    d_hidden_ptr,
    pooled_ptr,
    hidden_ptr,
    sample_ws_ptr,
    sample_bs_ptr,
    dw1_ptr,
    db1_ptr,
    dw2_ptr,
    db2_ptr,
    dws_ptr,
    dbs_ptr,
    N,
    C,
    Cr,
    S,
    blocks_s,
    tiles,  # programs for dx; those before them sum the parameters' gradients over the batch
    stride_dyn,
    pitch_dy,
    half_dy,
    stride_xn,
    pitch_x,
    stride_dxn,
    pitch_dx,
    COMBINE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each tile of dx. Reads dy and the small tensors once, and x where the formula
    needs it; writes dx. Programs of their own form the parameters' gradients meanwhile."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in `apply_kernel`
    if NEED_PARAMETERS:  # noqa: SIM102 (one is known when compiling, the other when running)
        if tile >= tiles:
            wait_for_previous(OVERLAP)
            parameter_gradients(
                tile - tiles, d_excited_ptr, d_hidden_ptr, pooled_ptr, hidden_ptr,
                sample_ws_ptr, sample_bs_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, dws_ptr, dbs_ptr,
                N, C, Cr, BLOCK,
            )  # fmt: skip
            return
    if NEED_DX:
        apply_backward_tile(
            tile, dy_ptr, x_ptr, channel_gate_ptr, spatial_gate_ptr, dq_ptr, d_mean_ptr, ws_ptr,
            dx_ptr, C, S, blocks_s, stride_dyn, pitch_dy, half_dy, stride_xn, pitch_x, stride_dxn,
            pitch_dx, COMBINE, RESIDUAL, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C, BLOCK_S, NORMAL,
            OVERLAP,
        )  # fmt: skip


@triton.jit
def apply_backward_tile(
    tile, dy_ptr, x_ptr, channel_gate_ptr, spatial_gate_ptr, dq_ptr, d_mean_ptr, ws_ptr, dx_ptr,
    C, S, blocks_s, stride_dyn, pitch_dy, half_dy, stride_xn, pitch_x, stride_dxn, pitch_dx,
    COMBINE: tl.constexpr, RESIDUAL: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    POLICY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One of all samples' tiles of dx. RESIDUAL: dx has dy added. POLICY: the caches' for the
    maps. OVERLAP: as in `apply_tile`."""
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    n, begin, s = place(tile, C, blocks_s, WIDE, BLOCK_C, BLOCK_S)
    c = begin + tl.arange(0, BLOCK_C)
    mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
    dy_ptr += n * shown(stride_dyn, ALIGN)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_dy, CHANNELS_LAST, ALIGN)
    dy = load(dy_ptr + at, mask, ACC, POLICY)
    dy2 = 0.0
    if COMBINE == CONCAT:
        dy2 = load(dy_ptr + shown(half_dy, ALIGN) + at, mask, ACC, POLICY)
    x = 0.0
    if by_gates(COMBINE):
        at = offsets(index(c, WIDE), index(s, WIDE), pitch_x, CHANNELS_LAST, ALIGN)
        x = load(x_ptr + n * shown(stride_xn, ALIGN) + at, mask, ACC, POLICY)
    wait_for_previous(OVERLAP)
    channel_gate, spatial_gate = load_gates(
        channel_gate_ptr, spatial_gate_ptr, n, c, s, C, S, COMBINE, ACC
    )
    dx = direct(x, dy, dy2, channel_gate, spatial_gate, COMBINE)
    if RESIDUAL:
        dx += dy
    if COMBINE != SPATIAL:
        dx += load(d_mean_ptr + n * C + c, c < C, ACC)[:, None]
    if COMBINE != CHANNEL:
        ws = load(ws_ptr + c, c < C, ACC)
        dx += ws[:, None] * load(dq_ptr + n * S + s, s < S, ACC)[None, :]
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_dx, CHANNELS_LAST, ALIGN)
    dx_ptr += n * shown(stride_dxn, ALIGN)
    store(dx_ptr + at, dx, mask, POLICY)
