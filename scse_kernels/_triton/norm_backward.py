"""The backward's passes over u and dy, and the sums between them. The derivation is in
scse_kernels/batch_norm/reference.py. With the g from there, each strip of each sample sums up

    one = sum m,  u = sum m ud,  g = sum g,  gu = sum g ud         m = (v > 0), ud = u - mean

besides the sums that scSE needs anyway (see reduce.py; z stands in place of x).
"""

import triton
import triton.language as tl

from .activation import SIGMOID, gate_gradient
from .apply import load_gates
from .combine import CHANNEL, CONCAT, SPATIAL, by_gates, direct, shares
from .norm import active, load_norm, normalised, reciprocal_root
from .parameters import parameter_gradients
from .primitives import (
    SIZES,
    accumulator,
    index,
    inside,
    let_next_start,
    load,
    offsets,
    place,
    shown,
    shown_positions,
    sum_in_pairs,
    wait_for_previous,
)
from .reduce import gate_inside, load_tile


@triton.jit
def load_gradient(
    ptr, half, begin, s, C, S, pitch, COMBINE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tiles of dy and, for CONCAT, of its second half. The second is not used elsewhere."""
    dy = load_tile(ptr, begin, s, C, S, pitch, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    dy2 = dy
    if COMBINE == CONCAT:
        ptr += shown(half, ALIGN)
        dy2 = load_tile(ptr, begin, s, C, S, pitch, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    return dy, dy2


@triton.jit(do_not_specialize=SIZES)
def norm_reduce_kernel(
    dy_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    u_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    ws_ptr,  # [C]
    bs_ptr,  # [1] or None
    channel_gate_ptr,  # [N, C]
    partial_ptr,  # [N, strips, C]: sums for the channel gate over a strip's positions
    partial_ws_ptr,  # [N, strips, C]: sums of dq * z
    partial_bs_ptr,  # [N, strips]: sums of dq
    sums_ptr,  # [4, N, strips, C]: g, gu, one, u
    spatial_gate_ptr,  # [N, S], written
    dq_ptr,  # [N, S]
    C,
    S,
    strips,
    plane,  # elements from one of the four sums to the next
    stride_dyn,
    pitch_dy,
    half_dy,
    stride_un,
    pitch_u,
    EPS: tl.constexpr,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    SUM_CHANNEL: tl.constexpr,
    SUM_SPATIAL: tl.constexpr,
    WEIGH: tl.constexpr,
    SUM_NORM: tl.constexpr,
    STORE_GATES: tl.constexpr,
    HOLD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each sample and strip (TILES tiles). Reads u and dy once from memory; writes
    what is asked for: the sums for the channel gate (SUM_CHANNEL), those for ws and bs (WEIGH),
    BatchNorm's (SUM_NORM), the spatial gate and dq (STORE_GATES).

    HOLD: BLOCK_C covers all channels, and both tiles wait in registers until the positions'
    gradients are known. Without, TILES is 1 and both are read again, from a cache, as a strip is
    narrow.
    """
    let_next_start(OVERLAP)
    ACC: tl.constexpr = accumulator(u_ptr.dtype.element_ty)
    S = shown_positions(S, CHANNELS_LAST, ALIGN)
    GATE_FIRST: tl.constexpr = by_gates(COMBINE)
    HAS_CHANNEL: tl.constexpr = COMBINE != SPATIAL
    HAS_SPATIAL: tl.constexpr = COMBINE != CHANNEL
    item = tl.program_id(0)
    n = index(item // strips, WIDE)
    strip = item % strips
    u_ptr += n * shown(stride_un, ALIGN)
    dy_ptr += n * shown(stride_dyn, ALIGN)
    row = index(item, WIDE) * C
    bs = 0.0
    if bs_ptr is not None:
        bs = tl.load(bs_ptr).to(ACC)

    channel_sum = tl.zeros([BLOCK_C], ACC)
    ws_sum = tl.zeros([BLOCK_C], ACC)
    g_sum = tl.zeros([BLOCK_C], ACC)
    gu_sum = tl.zeros([BLOCK_C], ACC)
    one_sum = tl.zeros([BLOCK_C], ACC)
    u_sum = tl.zeros([BLOCK_C], ACC)
    bs_sum = tl.zeros([BLOCK_S], ACC)
    if HOLD:  # one block of channels: what belongs to it is loaded once
        c = tl.arange(0, BLOCK_C)
        mean, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC)
    for tile in range(TILES):
        s = (strip * TILES + tile) * BLOCK_S + tl.arange(0, BLOCK_S)
        q = tl.zeros([BLOCK_S], ACC) + bs
        gate = tl.zeros([BLOCK_S], ACC)
        d_gate = tl.zeros([BLOCK_S], ACC)

        if HOLD:
            u = load_tile(u_ptr, 0, s, C, S, pitch_u, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
            dy, dy2 = load_gradient(
                dy_ptr, half_dy, 0, s, C, S, pitch_dy, COMBINE, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C
            )
        if GATE_FIRST:
            for begin in range(0, C, BLOCK_C):
                c = begin + tl.arange(0, BLOCK_C)
                if not HOLD:
                    u = load_tile(
                        u_ptr, begin, s, C, S, pitch_u, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C
                    )
                    mean, scale, shift = load_norm(
                        mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC
                    )
                mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
                v = normalised(u.to(ACC) - mean, scale, shift, mask)
                q += tl.sum(active(v, v) * load(ws_ptr + c, c < C, ACC)[:, None], 0)
            gate = gate_inside(q, s, S, SIGMOID)

        for begin in range(0, C, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            if not HOLD:
                u = load_tile(u_ptr, begin, s, C, S, pitch_u, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
                dy, dy2 = load_gradient(
                    dy_ptr, half_dy, begin, s, C, S, pitch_dy, COMBINE, CHANNELS_LAST, ALIGN,
                    WIDE, BLOCK_C,
                )  # fmt: skip
            channel_gate = 0.0
            if GATE_FIRST:
                channel_gate = load(channel_gate_ptr + n * C + c, c < C, ACC)[:, None]
            if not HOLD:
                mean, scale, shift = load_norm(
                    mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC
                )
            mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
            v = normalised(u.to(ACC) - mean, scale, shift, mask)
            z = active(v, v)
            gc, gs = shares(z, dy.to(ACC), dy2.to(ACC), channel_gate, gate[None, :], COMBINE)
            if SUM_CHANNEL:
                if HOLD:
                    channel_sum += tl.sum(gc, 1)
                else:
                    tl.store(partial_ptr + row + c, tl.sum(gc, 1), mask=c < C)
            if SUM_SPATIAL:
                d_gate += tl.sum(gs, 0)
                if not GATE_FIRST:
                    q += tl.sum(z * load(ws_ptr + c, c < C, ACC)[:, None], 0)

        dq = tl.zeros([BLOCK_S], ACC)
        if SUM_SPATIAL:
            if not GATE_FIRST:
                gate = gate_inside(q, s, S, SIGMOID)
            dq = gate_gradient(d_gate, gate, SIGMOID)
            bs_sum += dq
            if STORE_GATES:
                tl.store(spatial_gate_ptr + n * S + s, gate, mask=s < S)
                tl.store(dq_ptr + n * S + s, dq, mask=s < S)

        if SUM_NORM or WEIGH:
            for begin in range(0, C, BLOCK_C):
                c = begin + tl.arange(0, BLOCK_C)
                if not HOLD:
                    u = load_tile(
                        u_ptr, begin, s, C, S, pitch_u, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C
                    )
                    mean, scale, shift = load_norm(
                        mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC
                    )
                ud = u.to(ACC) - mean
                mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
                v = normalised(ud, scale, shift, mask)
                z = active(v, v)
                if WEIGH:
                    if HOLD:
                        ws_sum += tl.sum(z * dq[None, :], 1)
                    else:
                        sums = tl.sum(z * dq[None, :], 1)
                        tl.store(partial_ws_ptr + row + c, sums, mask=c < C)
                if SUM_NORM:
                    if not HOLD:
                        dy, dy2 = load_gradient(
                            dy_ptr, half_dy, begin, s, C, S, pitch_dy, COMBINE, CHANNELS_LAST,
                            ALIGN, WIDE, BLOCK_C,
                        )  # fmt: skip
                    channel_gate = 0.0
                    if HAS_CHANNEL:
                        channel_gate = load(channel_gate_ptr + n * C + c, c < C, ACC)[:, None]
                    k = direct(z, dy.to(ACC), dy2.to(ACC), channel_gate, gate[None, :], COMBINE)
                    if HAS_SPATIAL:
                        k += load(ws_ptr + c, c < C, ACC)[:, None] * dq[None, :]
                    g = active(v, k)
                    if HOLD:
                        g_sum += tl.sum(g, 1)
                        gu_sum += tl.sum(g * ud, 1)
                        if HAS_CHANNEL:
                            one_sum += tl.sum(active(v, 1.0), 1)
                            u_sum += tl.sum(active(v, ud), 1)
                    else:
                        at = sums_ptr + row + c
                        tl.store(at, tl.sum(g, 1), mask=c < C)
                        tl.store(at + plane, tl.sum(g * ud, 1), mask=c < C)
                        if HAS_CHANNEL:
                            tl.store(at + 2 * plane, tl.sum(active(v, 1.0), 1), mask=c < C)
                            tl.store(at + 3 * plane, tl.sum(active(v, ud), 1), mask=c < C)

    c = tl.arange(0, BLOCK_C)
    if SUM_CHANNEL and HOLD:
        tl.store(partial_ptr + row + c, channel_sum, mask=c < C)
    if SUM_NORM and HOLD:
        at = sums_ptr + row + c
        tl.store(at, g_sum, mask=c < C)
        tl.store(at + plane, gu_sum, mask=c < C)
        if HAS_CHANNEL:
            tl.store(at + 2 * plane, one_sum, mask=c < C)
            tl.store(at + 3 * plane, u_sum, mask=c < C)
    if WEIGH:
        if HOLD:
            tl.store(partial_ws_ptr + row + c, ws_sum, mask=c < C)
        tl.store(partial_bs_ptr + item, tl.sum(bs_sum, 0))


@triton.jit(do_not_specialize=SIZES)
def norm_sums_kernel(
    sums_ptr,  # [4, N, strips, C]: g, gu, one, u
    d_mean_ptr,  # [N, C] or None: no channel branch
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    dweight_ptr,  # [C] or None: not needed
    dbias_ptr,  # [C] or None: not needed
    through_ptr,  # [2, C] or None: du_one and du_u, the parts of du that go through the statistics
    C,
    S,
    rows,  # N * strips
    strips,
    plane,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each BLOCK channels. Reads all strips' sums once, in a fixed order."""
    let_next_start(OVERLAP)
    wait_for_previous(OVERLAP)
    ACC: tl.constexpr = accumulator(var_ptr.dtype.element_ty)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dv = tl.zeros([BLOCK_ROWS, BLOCK], ACC)
    dvu = tl.zeros([BLOCK_ROWS, BLOCK], ACC)
    for begin in range(0, rows, BLOCK_ROWS):
        r = (begin + tl.arange(0, BLOCK_ROWS))[:, None]
        mask = (r < rows) & (c[None, :] < C)
        at = sums_ptr + r.to(tl.int64) * C + c[None, :]
        dv += load(at, mask, ACC)
        dvu += load(at + plane, mask, ACC)
        if d_mean_ptr is not None:
            d_mean = load(d_mean_ptr + (r // strips).to(tl.int64) * C + c[None, :], mask, ACC)
            dv += d_mean * load(at + 2 * plane, mask, ACC)
            dvu += d_mean * load(at + 3 * plane, mask, ACC)
    sum_dv = sum_in_pairs(dv, 0, 1)
    sum_dvu = sum_in_pairs(dvu, 0, 1)
    rstd = reciprocal_root(tl.load(var_ptr + c, mask=c < C, other=1.0).to(ACC) + EPS)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, sum_dvu * rstd, mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, sum_dv, mask=c < C)
    if through_ptr is not None:
        scale = -rstd / (tl.full((), rows // strips, ACC) * S)
        if weight_ptr is not None:
            scale *= load(weight_ptr + c, c < C, ACC)
        tl.store(through_ptr + c, scale * sum_dv, mask=c < C)
        tl.store(through_ptr + C + c, scale * rstd * rstd * sum_dvu, mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def norm_apply_backward_kernel(
    dy_ptr,  # [N, C, S]; CONCAT: [N, 2 * C, S]
    u_ptr,  # [N, C, S]
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    through_ptr,  # [2, C], or None: the statistics are constants
    channel_gate_ptr,  # [N, C]
    spatial_gate_ptr,  # [N, S]
    dq_ptr,  # [N, S]: gradient before the spatial gate's sigmoid
    d_mean_ptr,  # [N, C]
    ws_ptr,  # [C]
    du_ptr,  # [N, C, S]
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
    blocks_s,  # tiles side by side along S
    tiles,  # programs for du; those before them sum the parameters' gradients over the batch
    stride_dyn,
    pitch_dy,
    half_dy,
    stride_un,
    pitch_u,
    stride_dun,
    pitch_du,
    EPS: tl.constexpr,
    COMBINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    NEED_DU: tl.constexpr,
    NEED_PARAMETERS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A program for each tile of du. Reads u, dy and the small tensors once; writes du. Programs of
    their own form the parameters' gradients meanwhile."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, as in `norm_apply_kernel`
    if NEED_PARAMETERS:  # noqa: SIM102 (one is known when compiling, the other when running)
        if tile >= tiles:
            wait_for_previous(OVERLAP)
            parameter_gradients(
                tile - tiles, d_excited_ptr, d_hidden_ptr, pooled_ptr, hidden_ptr,
                sample_ws_ptr, sample_bs_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, dws_ptr, dbs_ptr,
                N, C, Cr, BLOCK,
            )  # fmt: skip
            return
    if NEED_DU:
        ACC: tl.constexpr = accumulator(u_ptr.dtype.element_ty)
        S = shown_positions(S, CHANNELS_LAST, ALIGN)
        n, begin, s = place(tile, C, blocks_s, WIDE, BLOCK_C, BLOCK_S)
        c = begin + tl.arange(0, BLOCK_C)
        dy_ptr += n * shown(stride_dyn, ALIGN)
        u_ptr += n * shown(stride_un, ALIGN)
        u = load_tile(u_ptr, begin, s, C, S, pitch_u, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
        dy, dy2 = load_gradient(
            dy_ptr, half_dy, begin, s, C, S, pitch_dy, COMBINE, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C
        )
        wait_for_previous(OVERLAP)
        mask = inside(c, s, C, S, CHANNELS_LAST, ALIGN)
        mean, scale, shift = load_norm(mean_ptr, var_ptr, weight_ptr, bias_ptr, c, C, EPS, ACC)
        ud = u.to(ACC) - mean
        v = normalised(ud, scale, shift, mask)
        channel_gate, spatial_gate = load_gates(
            channel_gate_ptr, spatial_gate_ptr, n, c, s, C, S, COMBINE, ACC
        )
        dv = direct(active(v, v), dy.to(ACC), dy2.to(ACC), channel_gate, spatial_gate, COMBINE)
        if COMBINE != SPATIAL:
            dv += load(d_mean_ptr + n * C + c, c < C, ACC)[:, None]
        if COMBINE != CHANNEL:
            ws = load(ws_ptr + c, c < C, ACC)
            dv += ws[:, None] * load(dq_ptr + n * S + s, s < S, ACC)[None, :]
        du = scale * active(v, dv)
        if through_ptr is not None:
            du_one = load(through_ptr + c, c < C, ACC)[:, None]
            du_u = load(through_ptr + C + c, c < C, ACC)[:, None]
            du += du_u * ud + du_one
        at = offsets(index(c, WIDE), index(s, WIDE), pitch_du, CHANNELS_LAST, ALIGN)
        du_ptr += n * shown(stride_dun, ALIGN)
        tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=mask)
