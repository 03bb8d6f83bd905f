"""The backward's first pass: every sum over positions or channels.

With shares gc, gs of dy in the gradients of the two gates (see `combine`), for each sample

    d channel_gate[c] = sum_s gc[c, s]
    dq[s]             = gate'[s] * sum_c gs[c, s], gate' being the spatial gate's derivative
    dws[c]            = sum_s dq[s] * x[c, s],  dbs = sum_s dq[s]
"""

import triton
import triton.language as tl

from .activation import gate_gradient, gate_of
from .combine import CONCAT, by_gates, shares
from .primitives import (
    NORMAL,
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


@triton.jit
def load_tile(
    ptr, begin, s, C, S, pitch, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, POLICY: tl.constexpr = NORMAL,
):  # fmt: skip
    """The tile [BLOCK_C, BLOCK_S] of one sample, in its own dtype."""
    c = begin + tl.arange(0, BLOCK_C)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch, CHANNELS_LAST, ALIGN)
    mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
    return tl.load(ptr + at, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def gate_inside(q, s, S, GATE: tl.constexpr):
    """The spatial gate; 0 outside of the map. (An infinite weight makes q NaN there.)"""
    return tl.where(s < S, gate_of(q, GATE), 0.0)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    dy_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    x_ptr,  # [N, C, S]
    ws_ptr,  # [C]
    bs_ptr,  # [1] or None
    channel_gate_ptr,  # [N, C]
    partial_ptr,  # [N, strips, C]: sums of gc over a strip's positions
    partial_ws_ptr,  # [N, strips, C]: sums of dq * x
    partial_bs_ptr,  # [N, strips]: sums of dq
    spatial_gate_ptr,  # [N, S], written
    dq_ptr,  # [N, S]
    C,
    S,
    strips,
    stride_dyn,
    pitch_dy,
    half_dy,
    stride_xn,
    pitch_x,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    SUM_CHANNEL: tl.constexpr,
    SUM_SPATIAL: tl.constexpr,
    WEIGH: tl.constexpr,
    STORE_GATES: tl.constexpr,
    HOLD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each sample and strip (TILES tiles). Reads x and dy once from memory; writes
    what is asked for: the sums for the channel gate (SUM_CHANNEL), those for ws and bs (WEIGH), the
    spatial gate and dq (STORE_GATES)."""
    let_next_start(OVERLAP)
    reduce_strip(
        tl.program_id(0), dy_ptr, x_ptr, ws_ptr, bs_ptr, channel_gate_ptr,
        partial_ptr, partial_ws_ptr, partial_bs_ptr, spatial_gate_ptr, dq_ptr,
        C, S, strips, stride_dyn, pitch_dy, half_dy, stride_xn, pitch_x,
        COMBINE, CHANNELS_LAST, ALIGN, WIDE, SUM_CHANNEL, SUM_SPATIAL, WEIGH, STORE_GATES,
        HOLD, TILES, BLOCK_C, BLOCK_S, GATE, NORMAL,
    )  # fmt: skip


@triton.jit
def reduce_strip(
    item, dy_ptr, x_ptr, ws_ptr, bs_ptr, channel_gate_ptr, partial_ptr, partial_ws_ptr,
    partial_bs_ptr, spatial_gate_ptr, dq_ptr, C, S, strips, stride_dyn, pitch_dy, half_dy,
    stride_xn, pitch_x, COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, SUM_CHANNEL: tl.constexpr, SUM_SPATIAL: tl.constexpr, WEIGH: tl.constexpr,
    STORE_GATES: tl.constexpr, HOLD: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr, GATE: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The strip `item` of all samples' strips.

    HOLD: BLOCK_C covers all channels, and x waits in registers for its later uses. Without, TILES
    is 1 and x is read again for each, from a cache, as a strip is narrow. POLICY: the caches' for
    the last read of x.
    """
    ACC: tl.constexpr = accumulator(x_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    GATE_FIRST: tl.constexpr = by_gates(COMBINE)
    # With HOLD no loop is left over the channels: from a loop the compiler may take products, in
    # one kernel and not in another, that it else contracts with the sums.
    END = BLOCK_C if HOLD else C
    n = index(item // strips, WIDE)
    strip = item % strips
    x_ptr += n * shown(stride_xn, ALIGN)
    dy_ptr += n * shown(stride_dyn, ALIGN)
    row = index(item, WIDE) * C
    bs = 0.0
    if bs_ptr is not None:
        bs = tl.load(bs_ptr).to(ACC)

    channel_sum = tl.zeros([BLOCK_C], ACC)
    ws_sum = tl.zeros([BLOCK_C], ACC)
    bs_sum = tl.zeros([BLOCK_S], ACC)
    for tile in range(TILES):
        s = (strip * TILES + tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        if HOLD:
            x = load_tile(x_ptr, 0, s, C, S, pitch_x, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C, POLICY)
        q = tl.zeros([BLOCK_S], ACC) + bs
        gate = tl.zeros([BLOCK_S], ACC)
        d_gate = tl.zeros([BLOCK_S], ACC)

        if GATE_FIRST:
            for begin in range(0, END, BLOCK_C):
                if not HOLD:
                    x = load_tile(
                        x_ptr, begin, s, C, S, pitch_x, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C
                    )
                c = begin + tl.arange(0, BLOCK_C)
                q += tl.sum(x.to(ACC) * load(ws_ptr + c, c < C, ACC)[:, None], 0)
            gate = gate_inside(q, s, S, GATE)

        for begin in range(0, END, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            if not HOLD:
                x = load_tile(x_ptr, begin, s, C, S, pitch_x, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
            dy = load_tile(
                dy_ptr, begin, s, C, S, pitch_dy, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C
            ).to(ACC)
            dy2 = 0.0
            if COMBINE == CONCAT:
                dy2 = load_tile(
                    dy_ptr + shown(half_dy, ALIGN), begin, s, C, S, pitch_dy, CHANNELS_LAST,
                    ALIGN, WIDE, BLOCK_C,
                ).to(ACC)  # fmt: skip
            channel_gate = 0.0
            if GATE_FIRST:
                channel_gate = load(channel_gate_ptr + n * C + c, c < C, ACC)[:, None]
            gc, gs = shares(x.to(ACC), dy, dy2, channel_gate, gate[None, :], COMBINE)
            if SUM_CHANNEL:
                if HOLD:
                    channel_sum += tl.sum(gc, 1)
                else:
                    tl.store(partial_ptr + row + c, tl.sum(gc, 1), mask=c < C)
            if SUM_SPATIAL:
                d_gate += tl.sum(gs, 0)
                if not GATE_FIRST:
                    q += tl.sum(x.to(ACC) * load(ws_ptr + c, c < C, ACC)[:, None], 0)

        if SUM_SPATIAL:
            if not GATE_FIRST:
                gate = gate_inside(q, s, S, GATE)
            dq = gate_gradient(d_gate, gate, GATE)
            if STORE_GATES:
                tl.store(spatial_gate_ptr + n * S + s, gate, mask=s < S)
                tl.store(dq_ptr + n * S + s, dq, mask=s < S)
            if WEIGH:
                bs_sum += dq
                for begin in range(0, END, BLOCK_C):
                    if HOLD:
                        ws_sum += tl.sum(x.to(ACC) * dq[None, :], 1)
                    else:
                        x = load_tile(
                            x_ptr, begin, s, C, S, pitch_x, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C,
                            POLICY,
                        )  # fmt: skip
                        c = begin + tl.arange(0, BLOCK_C)
                        sums = tl.sum(x.to(ACC) * dq[None, :], 1)
                        tl.store(partial_ws_ptr + row + c, sums, mask=c < C)

    c = tl.arange(0, BLOCK_C)
    if SUM_CHANNEL and HOLD:
        tl.store(partial_ptr + row + c, channel_sum, mask=c < C)
    if WEIGH:
        if HOLD:
            tl.store(partial_ws_ptr + row + c, ws_sum, mask=c < C)
        tl.store(partial_bs_ptr + item, tl.sum(bs_sum, 0))
