"""The excitation of many weights, by several programs for each sample: see heuristics.Rows.

One program would have a sample's weights come through one multiprocessor. Here each of the two
layers is a launch, and a program has some of the layer's outputs. Sums are those of excite.py, term
by term, so neither the number of programs nor who does the work changes a bit.
"""

import triton
import triton.language as tl

from .activation import activate, gate_gradient, gate_of
from .primitives import SIZES, accumulator, load, matvec, sum_in_pairs, sum_rows, vecmat


@triton.jit(do_not_specialize=SIZES)
def excite_hidden_kernel(
    partial_ptr,  # [N, strips, C]: sums of x
    w1_ptr,  # [Cr, C]
    b1_ptr,  # [Cr] or None
    pooled_ptr,  # [N, C]
    hidden_ptr,  # [2, N, Cr]: the activation's value and its derivative
    C,
    Cr,
    S,
    strips,
    TERMS_C: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """A program for each sample and BLOCK hidden channels. Reads the sample's partial sums, and its
    own rows of w1, once; the first program of a sample writes pooled."""
    ACC: tl.constexpr = accumulator(pooled_ptr.dtype.element_ty)
    n = tl.program_id(0).to(tl.int64)
    partial_ptr += n * strips * C
    slope_ptr = hidden_ptr + (tl.num_programs(0) + n) * Cr
    hidden_ptr += n * Cr
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)

    total = tl.zeros([BLOCK, TERMS_C], ACC)
    for begin in range(0, C, TERMS_C):
        c = begin + tl.arange(0, TERMS_C)
        mask = (j[:, None] < Cr) & (c[None, :] < C)
        w1 = load(w1_ptr + j[:, None] * C + c[None, :], mask, ACC)
        pooled = sum_rows(partial_ptr, strips, C, c, ACC, TERMS_STRIPS, TERMS_C) / S
        if tl.program_id(1) == 0:
            tl.store(pooled_ptr + n * C + c, pooled, mask=c < C)
        total += w1 * pooled[None, :]
    h = sum_in_pairs(total, 1, True)
    if b1_ptr is not None:
        h += load(b1_ptr + j, j < Cr, ACC)
    value, slope = activate(h, ACTIVATION, SLOPE)
    tl.store(hidden_ptr + j, value, mask=j < Cr)
    tl.store(slope_ptr + j, slope, mask=j < Cr)


@triton.jit(do_not_specialize=SIZES)
def excite_gates_kernel(
    w2_ptr,  # [C, Cr]
    b2_ptr,  # [C] or None
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    C,
    Cr,
    TERMS_J: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
):
    """A program for each sample and BLOCK channels. Reads its own rows of w2 once; writes gates."""
    ACC: tl.constexpr = accumulator(hidden_ptr.dtype.element_ty)
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    excited = matvec(w2_ptr, hidden_ptr + n * Cr, c, C, Cr, ACC, BLOCK, TERMS_J)
    if b2_ptr is not None:
        excited += load(b2_ptr + c, c < C, ACC)
    tl.store(channel_gate_ptr + n * C + c, gate_of(excited, GATE), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def excite_backward_hidden_kernel(
    partial_ptr,  # [N, strips, C]: sums for the channel gate's gradient
    w2_ptr,  # [C, Cr]
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    d_excited_ptr,  # [N, C]: gradient before the channel gate
    d_hidden_ptr,  # [N, Cr]: gradient before the activation
    C,
    Cr,
    strips,
    TERMS_C: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
):
    """A program for each sample and BLOCK hidden channels. Reads the sample's partial sums, and its
    own columns of w2, once; the first program of a sample writes d_excited."""
    ACC: tl.constexpr = accumulator(hidden_ptr.dtype.element_ty)
    n = tl.program_id(0).to(tl.int64)
    partial_ptr += n * strips * C
    slope_ptr = hidden_ptr + (tl.num_programs(0) + n) * Cr
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slope = load(slope_ptr + j, j < Cr, ACC)
    total = tl.zeros([TERMS_C, BLOCK], ACC)
    for begin in range(0, C, TERMS_C):
        c = begin + tl.arange(0, TERMS_C)
        mask = (c[:, None] < C) & (j[None, :] < Cr)
        w2 = load(w2_ptr + c[:, None] * Cr + j[None, :], mask, ACC)
        gate = load(channel_gate_ptr + n * C + c, c < C, ACC)
        d = sum_rows(partial_ptr, strips, C, c, ACC, TERMS_STRIPS, TERMS_C)
        d = gate_gradient(d, gate, GATE)
        if tl.program_id(1) == 0:
            tl.store(d_excited_ptr + n * C + c, d, mask=c < C)
        total += w2 * tl.where(c < C, d, 0.0)[:, None]
    d = sum_in_pairs(total, 0, False)
    # A slope of zero stops an infinite gradient.
    tl.store(d_hidden_ptr + n * Cr + j, tl.where(slope == 0, 0.0, slope * d), mask=j < Cr)


@triton.jit(do_not_specialize=SIZES)
def excite_backward_mean_kernel(
    partial_ws_ptr,  # [N, strips, C]: sums of dq * x, or None
    partial_bs_ptr,  # [N, strips]: sums of dq, or None
    w1_ptr,  # [Cr, C]
    d_hidden_ptr,  # [N, Cr]
    d_mean_ptr,  # [N, C]: gradient of the pooled value, divided by S
    sample_ws_ptr,  # [N, C]: the sample's part of dws
    sample_bs_ptr,  # [N]: the sample's part of dbs
    C,
    Cr,
    S,
    strips,
    blocks,
    TERMS_C: tl.constexpr,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each sample and BLOCK channels, `blocks` of them (0: d_mean is not needed), and
    one more for the sums of the spatial branch, if they are there. Reads its own columns of w1, or
    those sums, once."""
    ACC: tl.constexpr = accumulator(d_hidden_ptr.dtype.element_ty)
    n = tl.program_id(0).to(tl.int64)
    if partial_ws_ptr is not None:  # noqa: SIM102 (one is known when compiling)
        if tl.program_id(1) == blocks:
            partial_ws_ptr += n * strips * C
            for begin in range(0, C, TERMS_C):
                c = begin + tl.arange(0, TERMS_C)
                total = sum_rows(partial_ws_ptr, strips, C, c, ACC, TERMS_STRIPS, TERMS_C)
                tl.store(sample_ws_ptr + n * C + c, total, mask=c < C)
            one = tl.arange(0, 1)
            total = sum_rows(partial_bs_ptr + n * strips, strips, 1, one, ACC, TERMS_STRIPS, 1)
            tl.store(sample_bs_ptr + n + one, total)
            return
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = vecmat(d_hidden_ptr + n * Cr, w1_ptr, c, Cr, C, ACC, TERMS_J, BLOCK)
    tl.store(d_mean_ptr + n * C + c, d / S, mask=c < C)
