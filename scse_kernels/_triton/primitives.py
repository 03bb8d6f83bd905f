"""What the kernels share: finding a tile, sums over rows, small dense layers.

A feature map [N, C, S] is walked in tiles [BLOCK_C, BLOCK_S]. Of its two inner axes one has stride
1 (S in contiguous maps, C in channels_last ones) and the other one stride `pitch`. ALIGN divides
pitch, the sample's stride and the size of the axis of stride 1.
"""

import triton
import triton.language as tl

# No policy of eviction. (Triton 3.6 takes no plain string for the default of an argument.)
NORMAL = tl.constexpr("")

# Where an excitation's weights are many: terms that a part of a sum adds one after the other. So
# many weights of four bytes are one load.
IN_TURN = tl.constexpr(4)

# Integers that differ from map to map. No kernel is compiled for some values of these (1, multiples
# of 16), or images of many sizes would wait for the compiler again and again. What wide accesses
# need to know of them ALIGN says.
SIZES = (
    *("N", "S", "strips", "rows", "tiles", "blocks_s", "blocks", "tasks", "lag", "plane"),
    *("stride_xn", "pitch_x", "stride_yn", "pitch_y", "half_y"),
    *("stride_dyn", "pitch_dy", "half_dy", "stride_dxn", "pitch_dx"),
    *("stride_un", "pitch_u", "stride_dun", "pitch_du"),
)


@triton.constexpr_function
def accumulator(dtype):
    """The dtype in which sums are formed."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.constexpr_function
def halvings(size):
    """How often a power of two can be halved."""
    return size.bit_length() - 1


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Once all programs have called this, or ended, those of the next launch may start where there
    is room, if it waits as below. (NVIDIA's programmatic dependent launch; OVERLAP: it is there.)
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Returns when the launch before has ended. Before that a program reads nothing that the launch
    writes, and writes nothing. All programs call this, so that a launch never ends before an
    earlier one."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def shown(size, ALIGN: tl.constexpr):
    """`size`, written so that the compiler sees that ALIGN divides it. So accesses are wide."""
    return size // ALIGN * ALIGN


@triton.jit
def shown_positions(S, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """S, where positions are the axis of stride 1 as `shown`."""
    return S if CHANNELS_LAST else shown(S, ALIGN)


@triton.jit
def index(i, WIDE: tl.constexpr):
    """An index, in 64 bits where a map's elements need them."""
    return i.to(tl.int64) if WIDE else i


@triton.jit
def place(tile, C, blocks_s, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Where one of all samples' tiles lies: its sample, first channel and positions [BLOCK_S]."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = index(tile // (blocks_s * blocks_c), WIDE)
    s = (tile // blocks_c % blocks_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    return n, (tile % blocks_c) * BLOCK_C, s


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
def load(ptr, mask, ACC: tl.constexpr, POLICY: tl.constexpr = NORMAL):
    """Elements in the accumulator's dtype, 0 outside of the mask. POLICY: of eviction."""
    return tl.load(ptr, mask=mask, other=0.0, eviction_policy=POLICY).to(ACC)


@triton.jit
def store(ptr, elements, mask, POLICY: tl.constexpr):
    """Elements in the tensor's own dtype."""
    tl.store(ptr, elements.to(ptr.dtype.element_ty), mask=mask, eviction_policy=POLICY)


@triton.jit
def sum_in_pairs(x, axis: tl.constexpr, NEAR: tl.constexpr):
    """The sum of x [rows, columns] over one axis, always two elements at a time.

    As a + b is b + a, the result is the same to the last bit however the compiler spreads x over
    threads, and for any number of warps. (In `tl.sum` the order of the terms follows the layout.)
    Pairs lie half of the axis apart, and are neighbours once NEAR elements or fewer are left. A
    thread should first add what it has itself, and last what other warps have. It has neighbours on
    the axis that is dense in memory. On the other one its elements are far apart, and neighbours
    are in its warp where the dense axis is short. Triton's sum of these takes one at a time through
    shared memory; to split pairs, all go at once.
    """
    for _ in tl.static_range(halvings(x.shape[axis])):
        if axis == 0 and x.shape[0] <= NEAR:
            pairs = tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1]))
            left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
            x = left + right
        elif axis == 0:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), 0)
        elif x.shape[1] <= NEAR:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
        else:
            x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), 1)
    return tl.reshape(x, (x.shape[1 - axis],))


@triton.jit
def add_in_turn(total, x, y):
    """total + x[0] * y[0] + x[1] * y[1] and so on, one after the other, of a power of two of
    tensors that have total's three axes. (What is not asked to be an fma, the compiler may make one
    here and not there.)"""
    HALF: tl.constexpr = x.shape[0] // 2
    if HALF == 0:
        return tl.fma(tl.reshape(x, x.shape[1:]), tl.reshape(y, y.shape[1:]), total)
    else:
        x, next_x = halves(x)
        y, next_y = halves(y)
        return add_in_turn(add_in_turn(total, x, y), next_x, next_y)


@triton.jit
def halves(x):
    """The first half of x along the first of its four axes, and the second."""
    x = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1], x.shape[2], x.shape[3]))
    return tl.split(tl.permute(x, (1, 2, 3, 4, 0)))


@triton.jit
def sum_rows(ptr, rows, size, i, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """sum_r ptr[r, i] of ptr [rows, size], for the columns i [BLOCK]."""
    return sum_rows_at(ptr, i, i < size, rows, size, ACC, BLOCK_ROWS)


@triton.jit
def sum_rows_at(ptr, at, inside, rows, size, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """sum_r ptr[at + r * size], r < rows, for the offsets at [BLOCK] that are `inside`, else 0.

    In tiles [BLOCK, BLOCK_ROWS], the other way round than `vecmat`: Triton may give tiles of one
    shape one layout, and the layout for elements of two bytes is a bad one for four.
    """
    total = tl.zeros([at.shape[0], BLOCK_ROWS], ACC)
    for begin in range(0, rows, BLOCK_ROWS):
        r = begin + tl.arange(0, BLOCK_ROWS)
        mask = (r[None, :] < rows) & inside[:, None]
        total += load(ptr + (r[None, :] * size + at[:, None]), mask, ACC)
    return sum_in_pairs(total, 1, 1)


@triton.jit
def matvec(
    matrix_ptr,
    vector_ptr,
    i,
    rows,
    columns,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    TURNS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """sum_k matrix[i, k] * vector[k] of matrix [rows, columns], for the rows i [BLOCK_ROWS].

    A sum has TERMS parts. Of TURNS * TERMS columns the first part adds the first TURNS, one after
    the other, the second part the next ones. SEGMENT: columns whose sum is formed apart, or 0."""
    total = matvec_part(
        matrix_ptr, vector_ptr, i, 0, SEGMENT if SEGMENT else columns, rows, columns, ACC,
        BLOCK_ROWS, TERMS, TURNS,
    )  # fmt: skip
    if SEGMENT:
        for begin in range(SEGMENT, columns, SEGMENT):
            total += matvec_part(
                matrix_ptr, vector_ptr, i, begin, begin + SEGMENT, rows, columns, ACC,
                BLOCK_ROWS, TERMS, TURNS,
            )  # fmt: skip
    return total


@triton.jit
def matvec_part(
    matrix_ptr, vector_ptr, i, first, end, rows, columns, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, TERMS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_ROWS, TERMS], ACC)
    for begin in range(first, end, TURNS * TERMS):
        for turn in tl.static_range(TURNS):
            k = begin + tl.arange(0, TERMS) * TURNS + turn
            at = i[:, None] * columns + k[None, :]
            mask = (i[:, None] < rows) & (k[None, :] < columns)
            v = load(vector_ptr + k, k < columns, ACC)
            weights = load(matrix_ptr + at, mask, ACC)
            total = tl.fma(weights, tl.broadcast_to(v[None, :], total.shape), total)
    return sum_in_pairs(total, 1, TERMS)


@triton.jit
def vecmat(
    vector_ptr,
    matrix_ptr,
    i,
    rows,
    columns,
    ACC: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """sum_k vector[k] * matrix[k, i] of matrix [rows, columns], for the columns i
    [BLOCK_COLUMNS]. The others: see `matvec`."""
    total = vecmat_part(
        vector_ptr, matrix_ptr, i, 0, SEGMENT if SEGMENT else rows, rows, columns, ACC,
        TERMS, BLOCK_COLUMNS, TURNS,
    )  # fmt: skip
    if SEGMENT:
        for begin in range(SEGMENT, rows, SEGMENT):
            total += vecmat_part(
                vector_ptr, matrix_ptr, i, begin, begin + SEGMENT, rows, columns, ACC,
                TERMS, BLOCK_COLUMNS, TURNS,
            )  # fmt: skip
    return total


@triton.jit
def vecmat_part(
    vector_ptr, matrix_ptr, i, first, end, rows, columns, ACC: tl.constexpr,
    TERMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([TERMS, BLOCK_COLUMNS], ACC)
    for begin in range(first, end, TURNS * TERMS):
        for turn in tl.static_range(TURNS):
            k = begin + tl.arange(0, TERMS) * TURNS + turn
            at = k[:, None] * columns + i[None, :]
            mask = (k[:, None] < rows) & (i[None, :] < columns)
            v = load(vector_ptr + k, k < rows, ACC)
            weights = load(matrix_ptr + at, mask, ACC)
            total = tl.fma(weights, tl.broadcast_to(v[:, None], total.shape), total)
    return sum_in_pairs(total, 0, TERMS if TURNS > 1 else 1)
