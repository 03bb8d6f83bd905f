"""The excitation of many weights: see heuristics.Rows.

One program to a sample would have all weights come through one multiprocessor, and again for each
sample. Here each of the two layers is a launch. A program has BLOCK of the layer's outputs for
SAMPLES samples, and in the first layer, whose sums are over all channels, a segment of these. So a
weight is read once for so many samples, and an input once for so many outputs. The second layer
adds up what the segments gave.

A step of a program is STEP terms of each of its sums. What it needs is loaded a step ahead. Lanes
have weights that are neighbours in memory, four to a thread, and a thread multiplies them with all
samples, and each input with all its outputs, in registers. Threads exchange inputs at each step,
sums after the last one. The first weights are on their way before the previous launch ends.

Each sum has TERMS parts. Of 4 * TERMS terms in a row the first part adds the first four, one after
the other, the second part the next four. This is the order of excite.py, and it does not depend on
STEP: no bit depends on how many programs there are, or on which samples share one.

What a program has of each sample is flat: [SAMPLES * BLOCK], sample by sample.
"""

import triton
import triton.language as tl

from .activation import activate, gate_gradient, gate_of
from .primitives import (
    IN_TURN,
    SIZES,
    accumulator,
    add_in_turn,
    let_next_start,
    load,
    sum_in_pairs,
    sum_rows_at,
    wait_for_previous,
)

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


# Sums along a matrix' rows, of inputs [SAMPLES, STEP]: totals [SAMPLES, BLOCK, TERMS].


@triton.jit
def rows_of(
    matrix_ptr, begin, rows, columns, ACC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """This program's rows of matrix [rows, columns], STEP columns of them from `begin` on, in runs
    that give each part four: [runs, 1, BLOCK, 4 * TERMS]."""
    RUN: tl.constexpr = IN_TURN * TERMS
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, None, :, None]
    run = tl.arange(0, STEP // RUN)[:, None, None, None]
    k = begin + run * RUN + tl.arange(0, RUN)[None, None, None, :]
    k = tl.max_contiguous(k, (1, 1, 1, IN_TURN))  # to a thread, even where 16 bytes have more
    return load(matrix_ptr + i * columns + k, (i < rows) & (k < columns), ACC)


@triton.jit
def add_rows(total, weights, inputs):
    """total, and a step's products."""
    SAMPLES: tl.constexpr = total.shape[0]
    TERMS: tl.constexpr = total.shape[2]
    RUNS: tl.constexpr = weights.shape[0]
    inputs = tl.permute(tl.reshape(inputs, (SAMPLES, RUNS, IN_TURN * TERMS)), (1, 0, 2))
    weights, inputs = tl.broadcast(weights, inputs[:, :, None, :])
    return add_in_turn(total, runs_in_turn(weights), runs_in_turn(inputs))


@triton.jit
def runs_in_turn(x):
    """[runs, SAMPLES, BLOCK, 4 * TERMS] in the parts' order: [4 * runs, SAMPLES, BLOCK, TERMS]."""
    RUNS: tl.constexpr = x.shape[0]
    TERMS: tl.constexpr = x.shape[3] // IN_TURN
    x = tl.reshape(x, (RUNS, x.shape[1], x.shape[2], TERMS, IN_TURN))
    x = tl.permute(x, (0, 4, 1, 2, 3))
    return tl.reshape(x, (RUNS * IN_TURN, x.shape[2], x.shape[3], TERMS))


@triton.jit
def sum_of_rows(total):
    """The sums, flat."""
    TERMS: tl.constexpr = total.shape[2]
    return sum_in_pairs(tl.reshape(total, (total.shape[0] * total.shape[1], TERMS)), 1, TERMS)


# Sums along a matrix' columns. A thread has four of them side by side, which are an axis of their
# own here: totals [4 * SAMPLES, TERMS, BLOCK / 4].


@triton.jit
def columns_of(
    matrix_ptr, begin, rows, columns, ACC: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """This program's columns of matrix [rows, columns], STEP rows of them from `begin` on, in the
    parts' order: [STEP / TERMS, 1, TERMS, BLOCK]."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, None, None, :]
    i = tl.max_contiguous(i, (1, 1, 1, 4))
    turn = tl.arange(0, STEP // TERMS)[:, None, None, None]
    part = tl.arange(0, TERMS)[None, None, :, None]
    k = begin + turn // IN_TURN * (IN_TURN * TERMS) + part * IN_TURN + turn % IN_TURN
    return load(matrix_ptr + k * columns + i, (k < rows) & (i < columns), ACC)


@triton.jit
def add_columns(total, weights, inputs):
    """total, and a step's products."""
    SAMPLES: tl.constexpr = total.shape[0] // 4
    TERMS: tl.constexpr = total.shape[1]
    TURNS: tl.constexpr = weights.shape[0]
    inputs = tl.reshape(inputs, (SAMPLES, TURNS // IN_TURN, TERMS, IN_TURN))
    inputs = tl.reshape(tl.permute(inputs, (1, 3, 0, 2)), (TURNS, SAMPLES, TERMS))
    weights, inputs = tl.broadcast(weights, inputs[:, :, :, None])
    return add_in_turn(total, columns_apart(weights), columns_apart(inputs))


@triton.jit
def columns_apart(x):
    """[turns, SAMPLES, TERMS, BLOCK] as [turns, 4 * SAMPLES, TERMS, BLOCK / 4]."""
    LANES: tl.constexpr = x.shape[3] // 4
    x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], LANES, 4))
    x = tl.permute(x, (0, 4, 1, 2, 3))
    return tl.reshape(x, (x.shape[0], 4 * x.shape[2], x.shape[3], LANES))


@triton.jit
def sum_of_columns(total):
    """The sums, flat."""
    SAMPLES: tl.constexpr = total.shape[0] // 4
    TERMS: tl.constexpr = total.shape[1]
    LANES: tl.constexpr = total.shape[2]
    total = tl.reshape(tl.permute(total, (1, 0, 2)), (TERMS, 4 * SAMPLES * LANES))
    sums = tl.reshape(sum_in_pairs(total, 0, TERMS), (4, SAMPLES, LANES))
    return tl.reshape(tl.permute(sums, (1, 2, 0)), (4 * SAMPLES * LANES,))


# What the layers read, [SAMPLES, STEP] from `begin` on. All programs of a sample form it, the first
# one writes it.


@triton.jit
def pooled_of(
    partial_ptr, pooled_ptr, samples, begin, C, S, strips, ACC: tl.constexpr,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, TERMS_STRIPS: tl.constexpr,
):  # fmt: skip
    n, c = flat(SAMPLES, STEP)
    c += begin
    inside = (n < samples) & (c < C)
    at = n * strips * C + c
    pooled = sum_rows_at(partial_ptr, at, inside, strips, C, ACC, TERMS_STRIPS) / S
    if tl.program_id(1) == 0:
        tl.store(pooled_ptr + n * C + c, pooled, mask=inside)
    return tl.reshape(pooled, (SAMPLES, STEP))


@triton.jit
def hidden_of(
    sums_ptr, b1_ptr, hidden_ptr, slope_ptr, samples, begin, Cr, ACC: tl.constexpr,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, SEGMENTS: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    n, j = flat(SAMPLES, STEP)
    j += begin
    inside = (n < samples) & (j < Cr)
    h = sum_segments(sums_ptr + n * SEGMENTS * Cr + j, inside, Cr, ACC, SEGMENTS)
    if b1_ptr is not None:
        h += load(b1_ptr + j, j < Cr, ACC)
    value, slope = activate(h, ACTIVATION, SLOPE)
    if tl.program_id(1) == 0:
        tl.store(hidden_ptr + n * Cr + j, value, mask=inside)
        tl.store(slope_ptr + n * Cr + j, slope, mask=inside)
    return tl.reshape(tl.where(inside, value, 0.0), (SAMPLES, STEP))


@triton.jit
def d_excited_of(
    partial_ptr, channel_gate_ptr, d_excited_ptr, samples, begin, C, strips, ACC: tl.constexpr,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, TERMS_STRIPS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    n, c = flat(SAMPLES, STEP)
    c += begin
    inside = (n < samples) & (c < C)
    gate = load(channel_gate_ptr + n * C + c, inside, ACC)
    at = n * strips * C + c
    d = sum_rows_at(partial_ptr, at, inside, strips, C, ACC, TERMS_STRIPS)
    d = gate_gradient(d, gate, GATE)
    if tl.program_id(1) == 0:
        tl.store(d_excited_ptr + n * C + c, d, mask=inside)
    return tl.reshape(tl.where(inside, d, 0.0), (SAMPLES, STEP))


@triton.jit
def d_hidden_of(
    sums_ptr, slope_ptr, d_hidden_ptr, samples, begin, Cr, ACC: tl.constexpr,
    SAMPLES: tl.constexpr, STEP: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    n, j = flat(SAMPLES, STEP)
    j += begin
    inside = (n < samples) & (j < Cr)
    d = sum_segments(sums_ptr + n * SEGMENTS * Cr + j, inside, Cr, ACC, SEGMENTS)
    slope = load(slope_ptr + n * Cr + j, inside, ACC)
    # A slope of zero stops an infinite gradient.
    d = tl.where(slope == 0, 0.0, slope * d)
    if tl.program_id(1) == 0:
        tl.store(d_hidden_ptr + n * Cr + j, d, mask=inside)
    return tl.reshape(d, (SAMPLES, STEP))


@triton.jit
def sum_segments(ptr, inside, Cr, ACC: tl.constexpr, SEGMENTS: tl.constexpr):
    """The segments' sums, one after the other."""
    total = load(ptr, inside, ACC)
    for segment in tl.static_range(1, SEGMENTS):
        total += load(ptr + segment * Cr, inside, ACC)
    return total


@triton.jit
def at_segment(first, n, j, Cr):
    """Where this program's segment has its sum for sample first + n."""
    return ((first + n) * tl.num_programs(2) + tl.program_id(2)) * Cr + j


@triton.jit(do_not_specialize=SIZES)
def excite_hidden_kernel(
    partial_ptr,  # [N, strips, C]: sums of x
    w1_ptr,  # [Cr, C]
    pooled_ptr,  # [N, C]
    sums_ptr,  # [N, segments, Cr]: each segment's part of the first layer
    N,
    C,
    Cr,
    S,
    strips,
    SEGMENT: tl.constexpr,
    TERMS_C: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for SAMPLES samples, BLOCK hidden channels and SEGMENT channels. Reads the samples'
    partial sums, and its own part of w1, once."""
    ACC: tl.constexpr = accumulator(pooled_ptr.dtype.element_ty)
    let_next_start(OVERLAP)
    first, samples = share(N, SAMPLES)
    partial_ptr += first * strips * C
    pooled_ptr += first * C
    begin = tl.program_id(2) * SEGMENT

    total = tl.zeros([SAMPLES, BLOCK, TERMS_C], ACC)
    w1 = rows_of(w1_ptr, begin, Cr, C, ACC, BLOCK, STEP, TERMS_C)
    wait_for_previous(OVERLAP)
    pooled = pooled_of(
        partial_ptr, pooled_ptr, samples, begin, C, S, strips, ACC, SAMPLES, STEP, TERMS_STRIPS
    )
    for c in range(begin + STEP, tl.minimum(begin + SEGMENT, C), STEP):
        next_w1 = rows_of(w1_ptr, c, Cr, C, ACC, BLOCK, STEP, TERMS_C)
        next_pooled = pooled_of(
            partial_ptr, pooled_ptr, samples, c, C, S, strips, ACC, SAMPLES, STEP, TERMS_STRIPS
        )
        total = add_rows(total, w1, pooled)
        w1, pooled = next_w1, next_pooled
    h = sum_of_rows(add_rows(total, w1, pooled))

    n, j = outputs(SAMPLES, BLOCK)
    tl.store(sums_ptr + at_segment(first, n, j, Cr), h, mask=(n < samples) & (j < Cr))


@triton.jit(do_not_specialize=SIZES)
def excite_gates_kernel(
    sums_ptr,  # [N, SEGMENTS, Cr]
    b1_ptr,  # [Cr] or None
    w2_ptr,  # [C, Cr]
    b2_ptr,  # [C] or None
    hidden_ptr,  # [2, N, Cr]: the activation's value and its derivative
    channel_gate_ptr,  # [N, C]
    N,
    C,
    Cr,
    SEGMENTS: tl.constexpr,
    TERMS_J: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for SAMPLES samples and BLOCK channels. Reads the samples' sums, and its own rows
    of w2, once."""
    ACC: tl.constexpr = accumulator(hidden_ptr.dtype.element_ty)
    let_next_start(OVERLAP)
    first, samples = share(N, SAMPLES)
    sums_ptr += first * SEGMENTS * Cr
    hidden_ptr += first * Cr
    slope_ptr = hidden_ptr + tl.cast(N, tl.int64) * Cr

    total = tl.zeros([SAMPLES, BLOCK, TERMS_J], ACC)
    w2 = rows_of(w2_ptr, 0, C, Cr, ACC, BLOCK, STEP, TERMS_J)
    wait_for_previous(OVERLAP)
    h = hidden_of(
        sums_ptr, b1_ptr, hidden_ptr, slope_ptr, samples, 0, Cr, ACC,
        SAMPLES, STEP, SEGMENTS, ACTIVATION, SLOPE,
    )  # fmt: skip
    for j in range(STEP, Cr, STEP):
        next_w2 = rows_of(w2_ptr, j, C, Cr, ACC, BLOCK, STEP, TERMS_J)
        next_h = hidden_of(
            sums_ptr, b1_ptr, hidden_ptr, slope_ptr, samples, j, Cr, ACC,
            SAMPLES, STEP, SEGMENTS, ACTIVATION, SLOPE,
        )  # fmt: skip
        total = add_rows(total, w2, h)
        w2, h = next_w2, next_h
    excited = sum_of_rows(add_rows(total, w2, h))

    n, c = outputs(SAMPLES, BLOCK)
    if b2_ptr is not None:
        excited += load(b2_ptr + c, c < C, ACC)
    gate = gate_of(excited, GATE)
    tl.store(channel_gate_ptr + (first + n) * C + c, gate, mask=(n < samples) & (c < C))


@triton.jit(do_not_specialize=SIZES)
def excite_backward_hidden_kernel(
    partial_ptr,  # [N, strips, C]: sums for the channel gate's gradient
    w2_ptr,  # [C, Cr]
    channel_gate_ptr,  # [N, C]
    d_excited_ptr,  # [N, C]: gradient before the channel gate
    sums_ptr,  # [N, segments, Cr]: each segment's part of the gradient of hidden
    N,
    C,
    Cr,
    strips,
    SEGMENT: tl.constexpr,
    TERMS_C: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for SAMPLES samples, BLOCK hidden channels and SEGMENT channels. Reads the samples'
    partial sums, and its own part of w2, once."""
    ACC: tl.constexpr = accumulator(d_excited_ptr.dtype.element_ty)
    let_next_start(OVERLAP)
    first, samples = share(N, SAMPLES)
    partial_ptr += first * strips * C
    channel_gate_ptr += first * C
    d_excited_ptr += first * C
    begin = tl.program_id(2) * SEGMENT

    total = tl.zeros([4 * SAMPLES, TERMS_C, BLOCK // 4], ACC)
    w2 = columns_of(w2_ptr, begin, C, Cr, ACC, BLOCK, STEP, TERMS_C)
    wait_for_previous(OVERLAP)
    d = d_excited_of(
        partial_ptr, channel_gate_ptr, d_excited_ptr, samples, begin, C, strips, ACC,
        SAMPLES, STEP, TERMS_STRIPS, GATE,
    )  # fmt: skip
    for c in range(begin + STEP, tl.minimum(begin + SEGMENT, C), STEP):
        next_w2 = columns_of(w2_ptr, c, C, Cr, ACC, BLOCK, STEP, TERMS_C)
        next_d = d_excited_of(
            partial_ptr, channel_gate_ptr, d_excited_ptr, samples, c, C, strips, ACC,
            SAMPLES, STEP, TERMS_STRIPS, GATE,
        )  # fmt: skip
        total = add_columns(total, w2, d)
        w2, d = next_w2, next_d
    d = sum_of_columns(add_columns(total, w2, d))

    n, j = outputs(SAMPLES, BLOCK)
    tl.store(sums_ptr + at_segment(first, n, j, Cr), d, mask=(n < samples) & (j < Cr))


@triton.jit(do_not_specialize=SIZES)
def excite_backward_mean_kernel(
    partial_ws_ptr,  # [N, strips, C]: sums of dq * x, or None
    partial_bs_ptr,  # [N, strips]: sums of dq, or None
    sums_ptr,  # [N, SEGMENTS, Cr]
    w1_ptr,  # [Cr, C]
    hidden_ptr,  # [2, N, Cr]
    d_hidden_ptr,  # [N, Cr]: gradient before the activation
    d_mean_ptr,  # [N, C]: gradient of the pooled value, divided by S; or None
    sample_ws_ptr,  # [N, C]: the sample's part of dws
    sample_bs_ptr,  # [N]: the sample's part of dbs
    N,
    C,
    Cr,
    S,
    strips,
    blocks,
    SEGMENTS: tl.constexpr,
    TERMS_J: tl.constexpr,
    TERMS_STRIPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for SAMPLES samples and BLOCK channels, `blocks` of them (1 without d_mean), and
    one more for COLUMNS channels of the spatial branch's sums, if they are there. Reads the
    samples' sums and its own columns of w1, or those sums, once."""
    ACC: tl.constexpr = accumulator(d_hidden_ptr.dtype.element_ty)
    let_next_start(OVERLAP)
    first, samples = share(N, SAMPLES)
    if partial_ws_ptr is not None:  # noqa: SIM102 (one is known when compiling)
        if tl.program_id(1) >= blocks:
            wait_for_previous(OVERLAP)
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
    sums_ptr += first * SEGMENTS * Cr
    slope_ptr = hidden_ptr + (tl.cast(N, tl.int64) + first) * Cr
    d_hidden_ptr += first * Cr

    if d_mean_ptr is not None:
        w1 = columns_of(w1_ptr, 0, Cr, C, ACC, BLOCK, STEP, TERMS_J)
    wait_for_previous(OVERLAP)
    d = d_hidden_of(sums_ptr, slope_ptr, d_hidden_ptr, samples, 0, Cr, ACC, SAMPLES, STEP, SEGMENTS)
    if d_mean_ptr is None:
        for j in range(STEP, Cr, STEP):
            d_hidden_of(
                sums_ptr, slope_ptr, d_hidden_ptr, samples, j, Cr, ACC, SAMPLES, STEP, SEGMENTS
            )
    else:
        total = tl.zeros([4 * SAMPLES, TERMS_J, BLOCK // 4], ACC)
        for j in range(STEP, Cr, STEP):
            next_w1 = columns_of(w1_ptr, j, Cr, C, ACC, BLOCK, STEP, TERMS_J)
            next_d = d_hidden_of(
                sums_ptr, slope_ptr, d_hidden_ptr, samples, j, Cr, ACC, SAMPLES, STEP, SEGMENTS
            )
            total = add_columns(total, w1, d)
            w1, d = next_w1, next_d
        d = sum_of_columns(add_columns(total, w1, d))

        n, c = outputs(SAMPLES, BLOCK)
        tl.store(d_mean_ptr + (first + n) * C + c, d / S, mask=(n < samples) & (c < C))
