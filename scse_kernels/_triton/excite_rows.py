"""The excitation of many weights: see heuristics.Rows.

One program to a sample would have all weights come through one multiprocessor, and again for each
sample. Here each of the two layers is a launch. A program has BLOCK of the layer's outputs for
SAMPLES samples, so weights are read once for so many. Sums are those of excite.py, term by term: no
bit depends on how many programs there are, or on which samples share one.

What a program has of each sample is flat: [SAMPLES * BLOCK], sample by sample.
"""

import triton
import triton.language as tl

from .activation import activate, gate_gradient, gate_of
from .primitives import SIZES, accumulator, load, sum_in_pairs, sum_rows_at

# Channels of the spatial branch's sums to a program: 128 bytes of a row.
COLUMNS = tl.constexpr(32)


@triton.jit
def flat(SAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    """Which sample, and which of BLOCK, each one of [SAMPLES * BLOCK] is."""
    i = tl.arange(0, SAMPLES * BLOCK)
    return i // BLOCK, i % BLOCK


@triton.jit
def outputs(SAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    """Which sample, and which of the layer's outputs, each of this program's is."""
    n, i = flat(SAMPLES, BLOCK)
    return n, i + tl.program_id(1) * BLOCK


@triton.jit
def share(N, SAMPLES: tl.constexpr):
    """This program's first sample, and how many there are from it on."""
    first = tl.program_id(0) * SAMPLES
    return first.to(tl.int64), N - first


@triton.jit(do_not_specialize=SIZES)
def excite_hidden_kernel(
    partial_ptr,  # [N, strips, C]: sums of x
    w1_ptr,  # [Cr, C]
    b1_ptr,  # [Cr] or None
    pooled_ptr,  # [N, C]
    hidden_ptr,  # [2, N, Cr]: the activation's value and its derivative
    N,
    C,
    Cr,
    S,
    strips,
    TERMS_C: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """A program for SAMPLES samples and BLOCK hidden channels. Reads the samples' partial sums, and
    its own rows of w1, once; the first program of a sample writes pooled."""
    ACC: tl.constexpr = accumulator(pooled_ptr.dtype.element_ty)
    first, samples = share(N, SAMPLES)
    partial_ptr += first * strips * C
    pooled_ptr += first * C
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :, None]

    total = tl.zeros([SAMPLES, BLOCK, TERMS_C], ACC)
    n, k = flat(SAMPLES, TERMS_C)
    for begin in range(0, C, TERMS_C):
        c = begin + tl.arange(0, TERMS_C)[None, None, :]
        w1 = load(w1_ptr + j * C + c, (j < Cr) & (c < C), ACC)
        c = begin + k
        inside = (n < samples) & (c < C)
        at = n * strips * C + c
        pooled = sum_rows_at(partial_ptr, at, inside, strips, C, ACC, TERMS_STRIPS) / S
        if tl.program_id(1) == 0:
            tl.store(pooled_ptr + n * C + c, pooled, mask=inside)
        total += w1 * tl.reshape(pooled, (SAMPLES, TERMS_C))[:, None, :]
    h = sum_in_pairs(tl.reshape(total, (SAMPLES * BLOCK, TERMS_C)), 1, TERMS_C)

    n, j = outputs(SAMPLES, BLOCK)
    inside = (n < samples) & (j < Cr)
    if b1_ptr is not None:
        h += load(b1_ptr + j, j < Cr, ACC)
    value, slope = activate(h, ACTIVATION, SLOPE)
    at = (first + n) * Cr + j
    tl.store(hidden_ptr + at, value, mask=inside)
    tl.store(hidden_ptr + tl.cast(N, tl.int64) * Cr + at, slope, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def excite_gates_kernel(
    w2_ptr,  # [C, Cr]
    b2_ptr,  # [C] or None
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    N,
    C,
    Cr,
    TERMS_J: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
):
    """A program for SAMPLES samples and BLOCK channels. Reads its own rows of w2 once; writes
    gates."""
    ACC: tl.constexpr = accumulator(hidden_ptr.dtype.element_ty)
    first, samples = share(N, SAMPLES)
    hidden_ptr += first * Cr
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :, None]

    total = tl.zeros([SAMPLES, BLOCK, TERMS_J], ACC)
    n, k = flat(SAMPLES, TERMS_J)
    for begin in range(0, Cr, TERMS_J):
        j = begin + tl.arange(0, TERMS_J)[None, None, :]
        w2 = load(w2_ptr + c * Cr + j, (c < C) & (j < Cr), ACC)
        j = begin + k
        h = load(hidden_ptr + n * Cr + j, (n < samples) & (j < Cr), ACC)
        total += w2 * tl.reshape(h, (SAMPLES, TERMS_J))[:, None, :]
    excited = sum_in_pairs(tl.reshape(total, (SAMPLES * BLOCK, TERMS_J)), 1, TERMS_J)

    n, c = outputs(SAMPLES, BLOCK)
    if b2_ptr is not None:
        excited += load(b2_ptr + c, c < C, ACC)
    gate = gate_of(excited, GATE)
    tl.store(channel_gate_ptr + (first + n) * C + c, gate, mask=(n < samples) & (c < C))


@triton.jit(do_not_specialize=SIZES)
def excite_backward_hidden_kernel(
    partial_ptr,  # [N, strips, C]: sums for the channel gate's gradient
    w2_ptr,  # [C, Cr]
    hidden_ptr,  # [2, N, Cr]
    channel_gate_ptr,  # [N, C]
    d_excited_ptr,  # [N, C]: gradient before the channel gate
    d_hidden_ptr,  # [N, Cr]: gradient before the activation
    N,
    C,
    Cr,
    strips,
    TERMS_C: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    NEAR: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    GATE: tl.constexpr,
):
    """A program for SAMPLES samples and BLOCK hidden channels. Reads the samples' partial sums, and
    its own columns of w2, once; the first program of a sample writes d_excited."""
    ACC: tl.constexpr = accumulator(hidden_ptr.dtype.element_ty)
    first, samples = share(N, SAMPLES)
    partial_ptr += first * strips * C
    channel_gate_ptr += first * C
    d_excited_ptr += first * C
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    n, j = outputs(SAMPLES, BLOCK)
    of_hidden = (n < samples) & (j < Cr)
    at_hidden = (first + n) * Cr + j
    slope = load(hidden_ptr + tl.cast(N, tl.int64) * Cr + at_hidden, of_hidden, ACC)

    total = tl.zeros([TERMS_C, SAMPLES, BLOCK], ACC)
    n, k = flat(SAMPLES, TERMS_C)
    for begin in range(0, C, TERMS_C):
        c = begin + tl.arange(0, TERMS_C)[:, None, None]
        w2 = load(w2_ptr + c * Cr + column, (c < C) & (column < Cr), ACC)
        c = begin + k
        inside = (n < samples) & (c < C)
        gate = load(channel_gate_ptr + n * C + c, inside, ACC)
        at = n * strips * C + c
        d = sum_rows_at(partial_ptr, at, inside, strips, C, ACC, TERMS_STRIPS)
        d = gate_gradient(d, gate, GATE)
        if tl.program_id(1) == 0:
            tl.store(d_excited_ptr + n * C + c, d, mask=inside)
        d = tl.reshape(tl.where(inside, d, 0.0), (SAMPLES, TERMS_C))
        total += w2 * tl.trans(d)[:, :, None]
    d = sum_in_pairs(tl.reshape(total, (TERMS_C, SAMPLES * BLOCK)), 0, NEAR)
    # A slope of zero stops an infinite gradient.
    d = tl.where(slope == 0, 0.0, slope * d)
    tl.store(d_hidden_ptr + at_hidden, d, mask=of_hidden)


@triton.jit(do_not_specialize=SIZES)
def excite_backward_mean_kernel(
    partial_ws_ptr,  # [N, strips, C]: sums of dq * x, or None
    partial_bs_ptr,  # [N, strips]: sums of dq, or None
    w1_ptr,  # [Cr, C]
    d_hidden_ptr,  # [N, Cr]
    d_mean_ptr,  # [N, C]: gradient of the pooled value, divided by S
    sample_ws_ptr,  # [N, C]: the sample's part of dws
    sample_bs_ptr,  # [N]: the sample's part of dbs
    N,
    C,
    Cr,
    S,
    strips,
    blocks,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    NEAR: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for SAMPLES samples and BLOCK channels, `blocks` of them (0: d_mean is not needed),
    and one more for COLUMNS channels of the spatial branch's sums, if they are there. Reads its own
    columns of w1, or those sums, once."""
    ACC: tl.constexpr = accumulator(d_hidden_ptr.dtype.element_ty)
    first, samples = share(N, SAMPLES)
    if partial_ws_ptr is not None:  # noqa: SIM102 (one is known when compiling)
        if tl.program_id(1) >= blocks:
            n, c = flat(SAMPLES, COLUMNS)
            c += (tl.program_id(1) - blocks) * COLUMNS
            inside = (n < samples) & (c < C)
            partial_ws_ptr += first * strips * C
            at = n * strips * C + c
            ws = sum_rows_at(partial_ws_ptr, at, inside, strips, C, ACC, TERMS_STRIPS)
            tl.store(sample_ws_ptr + (first + n) * C + c, ws, mask=inside)
            if tl.program_id(1) == blocks:
                one = tl.arange(0, SAMPLES)
                here = one < samples
                bs_ptr = partial_bs_ptr + first * strips
                bs = sum_rows_at(bs_ptr, one * strips, here, strips, 1, ACC, TERMS_STRIPS)
                tl.store(sample_bs_ptr + first + one, bs, mask=here)
            return
    d_hidden_ptr += first * Cr
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, None, :]

    total = tl.zeros([TERMS_J, SAMPLES, BLOCK], ACC)
    n, k = flat(SAMPLES, TERMS_J)
    for begin in range(0, Cr, TERMS_J):
        j = begin + tl.arange(0, TERMS_J)[:, None, None]
        w1 = load(w1_ptr + j * C + column, (j < Cr) & (column < C), ACC)
        j = begin + k
        d = load(d_hidden_ptr + n * Cr + j, (n < samples) & (j < Cr), ACC)
        total += w1 * tl.trans(tl.reshape(d, (SAMPLES, TERMS_J)))[:, :, None]
    d = sum_in_pairs(tl.reshape(total, (TERMS_J, SAMPLES * BLOCK)), 0, NEAR)

    n, c = outputs(SAMPLES, BLOCK)
    tl.store(d_mean_ptr + (first + n) * C + c, d / S, mask=(n < samples) & (c < C))
