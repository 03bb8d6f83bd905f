"""The channel excitation, two small dense layers per sample, and its backward."""

import triton
import triton.language as tl

from .activation import activate, gate_gradient, gate_of
from .primitives import (
    IN_TURN,
    SIZES,
    accumulator,
    let_next_start,
    load,
    matvec,
    sum_rows,
    vecmat,
    wait_for_previous,
)


@triton.constexpr_function
def at_once(block, terms, tile):
    """How many of `block` sums are formed at once, with `terms` terms of each side by side: a tile
    of them at most.

    The sums' own order depends on `terms` alone, not on this.
    """
    return max(1, min(block, tile // terms))


@triton.jit(do_not_specialize=SIZES)
def excite_kernel(
    partial_ptr,  # [N, strips, C]: sums of x
    w1_ptr,  # [Cr, C]
    b1_ptr,  # [Cr] or None
    w2_ptr,  # [C, Cr]
    b2_ptr,  # [C] or None
    pooled_ptr,  # [N, C]
    hidden_ptr,  # [2, N, Cr]: the activation's value and its derivative
    channel_gate_ptr,  # [N, C]
    C,
    Cr,
    S,
    strips,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TERMS_C: tl.constexpr,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each sample. Reads its partial sums and the parameters once; writes pooled,
    hidden and the gate, and reads the first two again (all threads need all of them)."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    excite_sample(
        tl.program_id(0), tl.num_programs(0), partial_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
        pooled_ptr, hidden_ptr, channel_gate_ptr, C, Cr, S, strips,
        BLOCK_C, BLOCK_J, TERMS_C, TERMS_J, TERMS_STRIPS, TILE,
        SEGMENT, ACTIVATION, SLOPE, GATE,
    )  # fmt: skip


@triton.jit
def excite_sample(
    n, N, partial_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, pooled_ptr, hidden_ptr, channel_gate_ptr,
    C, Cr, S, strips, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr, TERMS_C: tl.constexpr,
    TERMS_J: tl.constexpr, TERMS_STRIPS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Sample n of N. TILE: elements of what is added at once, at most. SEGMENT: where weights are
    many, channels whose terms are added apart, else 0."""
    TURNS: tl.constexpr = IN_TURN if SEGMENT else 1
    ACC: tl.constexpr = accumulator(pooled_ptr.dtype.element_ty)
    SUMS: tl.constexpr = at_once(BLOCK_C, TERMS_STRIPS, TILE)
    HIDDEN: tl.constexpr = at_once(BLOCK_J, TURNS * TERMS_C, TILE)
    GATES: tl.constexpr = at_once(BLOCK_C, TURNS * TERMS_J, TILE)
    n = n.to(tl.int64)
    partial_ptr += n * strips * C
    pooled_ptr += n * C
    slope_ptr = hidden_ptr + (N + n) * Cr
    hidden_ptr += n * Cr
    channel_gate_ptr += n * C

    for begin in range(0, C, SUMS):
        c = begin + tl.arange(0, SUMS)
        total = sum_rows(partial_ptr, strips, C, c, ACC, TERMS_STRIPS)
        tl.store(pooled_ptr + c, total / S, mask=c < C)
    tl.debug_barrier()
    for begin in range(0, Cr, HIDDEN):
        j = begin + tl.arange(0, HIDDEN)
        h = matvec(w1_ptr, pooled_ptr, j, Cr, C, ACC, HIDDEN, TERMS_C, TURNS, SEGMENT)
        if b1_ptr is not None:
            h += load(b1_ptr + j, j < Cr, ACC)
        value, slope = activate(h, ACTIVATION, SLOPE)
        tl.store(hidden_ptr + j, value, mask=j < Cr)
        tl.store(slope_ptr + j, slope, mask=j < Cr)
    tl.debug_barrier()
    for begin in range(0, C, GATES):
        c = begin + tl.arange(0, GATES)
        excited = matvec(w2_ptr, hidden_ptr, c, C, Cr, ACC, GATES, TERMS_J, TURNS, 0)
        if b2_ptr is not None:
            excited += load(b2_ptr + c, c < C, ACC)
        tl.store(channel_gate_ptr + c, gate_of(excited, GATE), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def excite_backward_kernel(
    partial_ptr,  # [N, strips, C]: sums for the channel gate's gradient, or None
    partial_ws_ptr,  # [N, strips, C]: sums of dq * x, or None
    partial_bs_ptr,  # [N, strips]: sums of dq, or None
    w1_ptr,  # [Cr, C]
    w2_ptr,  # [C, Cr]
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    d_excited_ptr,  # [N, C]: gradient before the channel gate
    d_hidden_ptr,  # [N, Cr]: gradient before the activation
    d_mean_ptr,  # [N, C]: gradient of the pooled value, divided by S; or None
    sample_ws_ptr,  # [N, C]: the sample's part of dws
    sample_bs_ptr,  # [N]: the sample's part of dbs
    C,
    Cr,
    S,
    strips,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TERMS_C: tl.constexpr,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each sample and branch. Reads its partial sums once, and the weights."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    excite_backward_sample(
        tl.program_id(0), tl.num_programs(0),
        tl.program_id(1) == 0, tl.program_id(1) == tl.num_programs(1) - 1,
        partial_ptr, partial_ws_ptr, partial_bs_ptr, w1_ptr, w2_ptr, hidden_ptr, channel_gate_ptr,
        d_excited_ptr, d_hidden_ptr, d_mean_ptr, sample_ws_ptr, sample_bs_ptr, C, Cr, S, strips,
        BLOCK_C, BLOCK_J, TERMS_C, TERMS_J, TERMS_STRIPS, TILE, SEGMENT, GATE,
    )  # fmt: skip


@triton.jit
def excite_backward_sample(
    n, N, do_spatial, do_channel, partial_ptr, partial_ws_ptr, partial_bs_ptr, w1_ptr, w2_ptr,
    hidden_ptr, channel_gate_ptr, d_excited_ptr, d_hidden_ptr, d_mean_ptr, sample_ws_ptr,
    sample_bs_ptr, C, Cr, S, strips, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
    TERMS_C: tl.constexpr, TERMS_J: tl.constexpr, TERMS_STRIPS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One branch, or both, of sample n of N."""
    TURNS: tl.constexpr = IN_TURN if SEGMENT else 1
    SUMS: tl.constexpr = at_once(BLOCK_C, TERMS_STRIPS, TILE)
    HIDDEN: tl.constexpr = at_once(BLOCK_J, TURNS * TERMS_C, TILE)
    MEANS: tl.constexpr = at_once(BLOCK_C, TURNS * TERMS_J, TILE)
    n = n.to(tl.int64)
    row = n * strips
    ACC: tl.constexpr = accumulator(hidden_ptr.dtype.element_ty)

    if partial_ws_ptr is not None and do_spatial:
        for begin in range(0, C, SUMS):
            c = begin + tl.arange(0, SUMS)
            total = sum_rows(partial_ws_ptr + row * C, strips, C, c, ACC, TERMS_STRIPS)
            tl.store(sample_ws_ptr + n * C + c, total, mask=c < C)
        one = tl.arange(0, 1)
        total = sum_rows(partial_bs_ptr + row, strips, 1, one, ACC, TERMS_STRIPS)
        tl.store(sample_bs_ptr + n + one, total)

    if partial_ptr is not None and do_channel:
        d_excited_ptr += n * C
        d_hidden_ptr += n * Cr
        slope_ptr = hidden_ptr + (N + n) * Cr
        for begin in range(0, C, SUMS):
            c = begin + tl.arange(0, SUMS)
            d = sum_rows(partial_ptr + row * C, strips, C, c, ACC, TERMS_STRIPS)
            gate = load(channel_gate_ptr + n * C + c, c < C, ACC)
            tl.store(d_excited_ptr + c, gate_gradient(d, gate, GATE), mask=c < C)
        tl.debug_barrier()
        for begin in range(0, Cr, HIDDEN):
            j = begin + tl.arange(0, HIDDEN)
            d = vecmat(d_excited_ptr, w2_ptr, j, C, Cr, ACC, TERMS_C, HIDDEN, TURNS, SEGMENT)
            slope = load(slope_ptr + j, j < Cr, ACC)
            # A slope of zero stops an infinite gradient.
            tl.store(d_hidden_ptr + j, tl.where(slope == 0, 0.0, slope * d), mask=j < Cr)
        if d_mean_ptr is not None:
            tl.debug_barrier()
            for begin in range(0, C, MEANS):
                c = begin + tl.arange(0, MEANS)
                d = vecmat(d_hidden_ptr, w1_ptr, c, Cr, C, ACC, TERMS_J, MEANS, TURNS, 0)
                tl.store(d_mean_ptr + n * C + c, d / S, mask=c < C)
