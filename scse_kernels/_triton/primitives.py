"""What the kernels share: how a program finds its tile, sums over rows, small dense layers.

A feature map [N, C, S] is walked in tiles [BLOCK_C, BLOCK_S]. Of its two inner axes one has stride
1 (S in contiguous maps, C in channels_last ones) and the other one stride `pitch`. ALIGN divides
pitch, the sample's stride and the size of the axis of stride 1.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def accumulator(dtype):
    """The dtype in which sums are formed."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def shown(size, ALIGN: tl.constexpr):
    """`size`, in a form from which the compiler sees that ALIGN divides it, for wide accesses."""
    return size // ALIGN * ALIGN


@triton.jit
def index(i, WIDE: tl.constexpr):
    """An index, in 64 bits where a map's elements need them."""
    return i.to(tl.int64) if WIDE else i


@triton.jit
def offsets(c, s, pitch, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_S] of channels c at positions s in their sample."""
    if CHANNELS_LAST:
        return c[:, None] + s[None, :] * shown(pitch, ALIGN)
    else:
        return c[:, None] * shown(pitch, ALIGN) + s[None, :]


@triton.jit
def inside(c, s, C, S, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """The mask [BLOCK_C, BLOCK_S] of what lies in the map."""
    if CHANNELS_LAST:
        return (c[:, None] < shown(C, ALIGN)) & (s[None, :] < S)
    else:
        return (c[:, None] < C) & (s[None, :] < shown(S, ALIGN))


@triton.jit
def load(ptr, mask, ACC: tl.constexpr):
    """Elements in the accumulator's dtype, 0 outside of the mask."""
    return tl.load(ptr, mask=mask, other=0.0).to(ACC)


@triton.jit
def sum_rows(ptr, rows, size, i, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sum_r ptr[r, i] of ptr [rows, size], for the columns i [BLOCK]."""
    total = tl.zeros([BLOCK_ROWS, BLOCK], ACC)
    for begin in range(0, rows, BLOCK_ROWS):
        r = begin + tl.arange(0, BLOCK_ROWS)
        at = r[:, None] * size + i[None, :]
        total += load(ptr + at, (r[:, None] < rows) & (i[None, :] < size), ACC)
    return tl.sum(total, 0)


@triton.jit
def matvec(
    matrix_ptr,
    vector_ptr,
    i,
    rows,
    columns,
    stride_row,
    stride_column,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """sum_k matrix[i, k] * vector[k] for the rows i [BLOCK_ROWS]."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], ACC)
    for begin in range(0, columns, BLOCK_COLUMNS):
        k = begin + tl.arange(0, BLOCK_COLUMNS)
        at = i[:, None] * stride_row + k[None, :] * stride_column
        mask = (i[:, None] < rows) & (k[None, :] < columns)
        v = load(vector_ptr + k, k < columns, ACC)
        total += load(matrix_ptr + at, mask, ACC) * v[None, :]
    return tl.sum(total, 1)
