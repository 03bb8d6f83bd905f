"""BatchNorm's statistics: each strip's own mean and sum of squared deviations, then merged.

The variance is not formed as the mean of squares minus the square of the mean. So a mean of a
thousand standard deviations does no harm.
"""

import triton
import triton.language as tl

from .primitives import (
    SIZES,
    accumulator,
    index,
    inside,
    let_next_start,
    load,
    offsets,
    shown,
    sum_in_pairs,
    wait_for_previous,
)


@triton.jit(do_not_specialize=SIZES)
def norm_statistics_kernel(
    u_ptr,  # [N, C, S]
    strip_mean_ptr,  # [N, strips, C]: the means of a strip
    strip_squares_ptr,  # [N, strips, C]: sums of squares of what deviates from them
    C,
    S,
    strips,
    stride_un,
    pitch_u,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each tile [BLOCK_C, BLOCK_S]: a strip of some of the channels. Reads u once,
    writes two numbers to a channel."""
    let_next_start(OVERLAP)
    ACC: tl.constexpr = accumulator(u_ptr.dtype.element_ty)
    blocks = tl.cdiv(C, BLOCK_C)
    item = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = index(item // strips, WIDE)
    s = (item % strips) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
    at = offsets(index(c, WIDE), index(s, WIDE), pitch_u, CHANNELS_LAST, ALIGN)
    u = load(u_ptr + n * shown(stride_un, ALIGN) + at, mask, ACC)

    count = tl.minimum(BLOCK_S, S - (item % strips) * BLOCK_S)
    near = tl.sum(u, 1) / count  # the mean, but for the roundings of that sum
    d = tl.where(mask, u - near[:, None], 0.0)
    off = tl.sum(d, 1) / count
    squares = tl.sum(d * d, 1) - count * off * off
    row = index(item, WIDE) * C
    tl.store(strip_mean_ptr + row + c, near + off, mask=c < C)
    tl.store(strip_squares_ptr + row + c, tl.maximum(squares, 0.0), mask=c < C)


@triton.jit
def move(ptr, towards, momentum, mask, ACC: tl.constexpr):
    """Does what torch.Tensor.lerp_ does: exact for a momentum of 0 and of 1."""
    here = load(ptr, mask, ACC)
    step = towards - here
    there = tl.where(momentum < 0.5, here + momentum * step, towards - step * (1 - momentum))
    tl.store(ptr, there.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def norm_merge_kernel(
    strip_mean_ptr,  # [N, strips, C]
    strip_squares_ptr,  # [N, strips, C]
    mean_ptr,  # [C]
    var_ptr,  # [C]: biased
    running_mean_ptr,  # [C] or None: not kept
    running_var_ptr,  # [C] or None
    momentum,
    unbiased,  # M / (M - 1) for M values to a channel
    C,
    S,
    rows,  # N * strips
    strips,
    STRIP: tl.constexpr,  # positions of a strip
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each BLOCK channels. Reads the strips' means twice and their squares once, in a
    fixed order; writes the channels' mean and variance, and moves the running ones."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    ACC: tl.constexpr = accumulator(mean_ptr.dtype.element_ty)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.full((), rows // strips, ACC) * S  # of one row and strip: a number, no tensor
    first = load(strip_mean_ptr + c, c < C, ACC)[None, :]  # differences are as small as u's own
    total = tl.zeros([BLOCK_ROWS, BLOCK], ACC)
    for begin in range(0, rows, BLOCK_ROWS):
        r = (begin + tl.arange(0, BLOCK_ROWS))[:, None]
        mask = (r < rows) & (c[None, :] < C)
        count = tl.minimum(STRIP, S - r % strips * STRIP)
        mean = load(strip_mean_ptr + r.to(tl.int64) * C + c[None, :], mask, ACC)
        total += tl.where(mask, count * (mean - first), 0.0)
    mean_of_all = first + (sum_in_pairs(total, 0, 1) / values)[None, :]

    total = tl.zeros([BLOCK_ROWS, BLOCK], ACC)
    for begin in range(0, rows, BLOCK_ROWS):
        r = (begin + tl.arange(0, BLOCK_ROWS))[:, None]
        mask = (r < rows) & (c[None, :] < C)
        count = tl.minimum(STRIP, S - r % strips * STRIP)
        at = r.to(tl.int64) * C + c[None, :]
        apart = load(strip_mean_ptr + at, mask, ACC) - mean_of_all
        squares = load(strip_squares_ptr + at, mask, ACC)
        total += tl.where(mask, squares + count * (apart * apart), 0.0)
    mean = tl.reshape(mean_of_all, (BLOCK,))
    var = sum_in_pairs(total, 0, 1) / values
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)
    if running_mean_ptr is not None:
        move(running_mean_ptr + c, mean, momentum, c < C, ACC)
        move(running_var_ptr + c, var * unbiased, momentum, c < C, ACC)
