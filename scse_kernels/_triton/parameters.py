"""Sums over the batch: the parameters' gradients, once every sample has its own part of them."""

import triton
import triton.language as tl

from .primitives import accumulator, load, sum_in_pairs, sum_rows

# The rows of so many samples are loaded before any is used: so there is one wait for memory to all
# of them.
SAMPLES = tl.constexpr(16)


@triton.jit
def dense_gradient(
    left_ptr,  # [N, rows]: gradient of the layer's output
    right_ptr,  # [N, columns]: the layer's input
    weight_ptr,  # [rows, columns]: written
    bias_ptr,  # [rows] or None: written
    block,
    N,
    rows,
    columns,
    BLOCK: tl.constexpr,
):
    """weight = left.T @ right and bias = left.sum(0), the block-th tile [BLOCK, BLOCK] of it.

    One thread sums an element of weight, sample after sample (matrix units, in float64, take four
    at a time). So neither BLOCK nor the number of warps changes a bit.
    """
    ACC: tl.constexpr = accumulator(left_ptr.dtype.element_ty)
    blocks = tl.cdiv(columns, BLOCK)
    r = (block // blocks) * BLOCK + tl.arange(0, BLOCK)
    k = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.zeros([BLOCK, BLOCK], ACC)
    bias = tl.zeros([SAMPLES, BLOCK], ACC)
    for begin in range(0, N, SAMPLES):
        n = (begin + tl.arange(0, SAMPLES))[:, None]
        left = load(left_ptr + n * rows + r[None, :], (n < N) & (r[None, :] < rows), ACC)
        right = load(right_ptr + n * columns + k[None, :], (n < N) & (k[None, :] < columns), ACC)
        weight = tl.dot(tl.trans(left), right, weight, input_precision="ieee", out_dtype=ACC)
        bias += left
    at = r[:, None] * columns + k[None, :]
    tl.store(weight_ptr + at, weight, mask=(r[:, None] < rows) & (k[None, :] < columns))
    if bias_ptr is not None and block % blocks == 0:
        tl.store(bias_ptr + r, sum_in_pairs(bias, 0, 1), mask=r < rows)


@triton.jit
def parameter_gradients(
    task,
    d_excited_ptr,  # [N, C]
    d_hidden_ptr,  # [N, Cr]
    pooled_ptr,  # [N, C]
    hidden_ptr,  # [N, Cr]
    sample_ws_ptr,  # [N, C]
    sample_bs_ptr,  # [N]
    dw1_ptr,  # [Cr, C] or None: not needed
    db1_ptr,  # [Cr] or None
    dw2_ptr,  # [C, Cr]
    db2_ptr,  # [C] or None
    dws_ptr,  # [C] or None: not needed
    dbs_ptr,  # [1] or None
    N,
    C,
    Cr,
    BLOCK: tl.constexpr,
):
    """The task-th piece of work. Tiles of dw2, tiles of dw1, blocks of dws."""
    tiles = 0
    if dw1_ptr is not None:
        tiles = tl.cdiv(C, BLOCK) * tl.cdiv(Cr, BLOCK)
        if task < tiles:
            dense_gradient(d_excited_ptr, hidden_ptr, dw2_ptr, db2_ptr, task, N, C, Cr, BLOCK)
        elif task < 2 * tiles:
            dense_gradient(
                d_hidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, task - tiles, N, Cr, C, BLOCK
            )
    if dws_ptr is not None:  # noqa: SIM102 (one is known when compiling)
        if task >= 2 * tiles:
            ACC: tl.constexpr = accumulator(sample_ws_ptr.dtype.element_ty)
            block = task - 2 * tiles
            c = block * BLOCK + tl.arange(0, BLOCK)
            total = sum_rows(sample_ws_ptr, N, C, c, ACC, 2 * SAMPLES)
            tl.store(dws_ptr + c, total, mask=c < C)
            if dbs_ptr is not None and block == 0:
                one = tl.arange(0, 1)
                tl.store(dbs_ptr + one, sum_rows(sample_bs_ptr, N, 1, one, ACC, 2 * SAMPLES))
