"""The host side of BatchNorm + ReLU + scSE: fills the results of `triton_bn_forward` and
`triton_bn_backward`. As launch.py, whose helpers it shares; no step waits for the device.

Launches in training: forward five (statistics, their merge, squeeze, excite, apply), backward four
(reduce, excite, sums over all strips, apply); with running statistics three each way, and one more
backward where BatchNorm's weight or bias has a gradient.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from . import heuristics
from .activation import RELU, SIGMOID
from .excite import excite_backward_kernel, excite_kernel
from .launch import (
    Map,
    _all_registers,
    _contiguous,
    _dense,
    _describe,
    _in_format,
    gradient_tasks,
)
from .norm_backward import norm_apply_backward_kernel, norm_reduce_kernel, norm_sums_kernel
from .norm_forward import norm_apply_kernel, norm_squeeze_kernel
from .norm_statistics import norm_merge_kernel, norm_statistics_kernel

_EXCITATION = {"ACTIVATION": RELU.value, "SLOPE": 0.0, "GATE": SIGMOID.value}
# Channels to a program where all strips' rows are added up (a sector), and rows at a time.
_COLUMNS, _ROWS = 8, 128


def _columns(p) -> dict:
    """The compile-time arguments of the kernels that add up all strips' rows."""
    rows = min(_ROWS, heuristics.power_of_two(p.samples * p.strips))
    return {"BLOCK": _COLUMNS, "BLOCK_ROWS": rows, "num_warps": 4, "num_stages": 1}


def _tiles(p, u: Tensor) -> tuple[heuristics.Tile, heuristics.Tile]:
    """Of the passes forward and backward."""
    return heuristics.norm_tiles(
        p.tile, p.samples, p.positions, u.element_size(), 64 if torch.version.hip else 32,
        p.channels_last, heuristics.multiprocessors(u.device),
    )  # fmt: skip


def _statistics(p, in_u: Map, mean: Tensor, var: Tensor) -> None:
    """Fills mean and var: two launches."""
    u = in_u.tensor
    processors = heuristics.multiprocessors(u.device)
    n, c, s = p.samples, p.channels, p.positions
    tile = heuristics.statistics_tile(n, c, s, u.element_size(), p.channels_last, processors)
    q = replace(p, tile=tile)
    own = mean.new_empty((2, n, q.strips, c))
    constants = {k: v for k, v in q.constants(in_u).items() if k != "COMBINE"}
    norm_statistics_kernel[(n * q.strips * triton.cdiv(c, tile.block_c),)](
        u, own[0], own[1], c, s, q.strips, in_u.sample, in_u.pitch, **constants,
    )  # fmt: skip
    norm_merge_kernel[(triton.cdiv(c, _COLUMNS),)](
        own[0], own[1], mean, var, c, s, n * q.strips, q.strips,
        STRIP=tile.block_s, **_columns(q),
    )  # fmt: skip


def forward(
    memory_format: torch.memory_format,
    results: tuple[Tensor, ...],
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    eps: float,
    combine: int,
) -> None:
    """Fills y, mean, var, pooled, hidden, channel_gate."""
    p = _describe(memory_format, u, w1, ws, combine)
    y, mean, var, pooled, hidden, channel_gate = results
    if running_mean is not None:
        mean.copy_(running_mean), var.copy_(running_var)
    elif p.samples == 0:
        mean.zero_(), var.zero_()
    if p.samples == 0:
        return
    p = replace(p, tile=_tiles(p, u)[0])
    in_u, out_y = _in_format(u, memory_format), _dense(y, p.channels_last)
    u = in_u.tensor
    bn_weight, bn_bias = _contiguous(bn_weight, bn_bias)
    w1, b1, w2, b2, ws, bs = _contiguous(w1, b1, w2, b2, ws, bs)

    n, c, s = p.samples, p.channels, p.positions
    partial = pooled.new_empty((n, p.strips, c)) if p.has_channel else None
    spatial_gate = pooled.new_empty((n, s)) if p.has_spatial else None
    with torch.cuda.device_of(u):
        if running_mean is None:
            _statistics(p, in_u, mean, var)
        norm_squeeze_kernel[(n * p.strips,)](
            u, mean, var, bn_weight, bn_bias, ws, bs, partial, spatial_gate,
            c, s, p.strips, in_u.sample, in_u.pitch,
            EPS=eps, HOLD=p.tile.hold, TILES=p.tile.tiles, **p.constants(in_u),
        )  # fmt: skip
        if p.has_channel:
            excite_kernel[(n,)](
                partial, w1, b1, w2, b2, pooled, hidden, channel_gate,
                c, p.hidden, s, p.strips,
                **_EXCITATION, **p.excitation(pooled.dtype),
            )  # fmt: skip
        strips = triton.cdiv(s, p.tile.block_s)
        norm_apply_kernel[(n * strips * triton.cdiv(c, p.tile.block_c),)](
            u, mean, var, bn_weight, bn_bias, channel_gate, spatial_gate, y,
            c, s, strips, in_u.sample, in_u.pitch, out_y.sample, out_y.pitch, p.half(out_y),
            EPS=eps, **p.constants(in_u, out_y),
        )  # fmt: skip


def backward(
    memory_format: torch.memory_format,
    results: tuple[Tensor, ...],
    dy: Tensor,
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    mean: Tensor,
    var: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    channel_gate: Tensor,
    eps: float,
    of_batch: bool,
    combine: int,
    need_du: bool,
    need_affine: bool,
    need_channel: bool,
    need_spatial: bool,
) -> None:
    """Fills du and the gradients of the eight parameters, except those not needed."""
    du = results[0]
    needed = (need_affine,) * 2 + (need_channel,) * 4 + (need_spatial,) * 2
    given = (bn_weight, bn_bias, w1, b1, w2, b2, ws, bs)
    d_bn_weight, d_bn_bias, dw1, db1, dw2, db2, dws, dbs = (
        None if parameter is None or not wanted else gradient
        for parameter, wanted, gradient in zip(given, needed, results[1:], strict=True)
    )
    p = _describe(memory_format, u, w1, ws, combine)
    need_affine = d_bn_weight is not None or d_bn_bias is not None
    need_channel, need_spatial = dw1 is not None, dws is not None
    need_sums = need_affine or (need_du and of_batch)
    sum_channel = p.has_channel and (need_du or need_affine or need_channel)
    sum_spatial = p.has_spatial and (need_du or need_affine or need_spatial)
    if not (sum_channel or sum_spatial):
        return

    in_u, in_dy = _in_format(u, memory_format), _in_format(dy, memory_format)
    out_du = _dense(du, p.channels_last) if need_du else Map(du, 0, 0)
    u, dy = in_u.tensor, in_dy.tensor
    bn_weight, bn_bias, w1, w2, ws, bs = _contiguous(bn_weight, bn_bias, w1, w2, ws, bs)
    n, c, s = p.samples, p.channels, p.positions
    tile = _tiles(p, u)[1]
    r = replace(p, tile=tile)
    strips = r.strips

    def scratch(needed: bool, *shape: int) -> Tensor | None:
        return mean.new_empty(shape) if needed else None

    partial = scratch(sum_channel, n, strips, c)
    partial_ws = scratch(need_spatial, n, strips, c)
    partial_bs = scratch(need_spatial, n, strips)
    sums = scratch(need_sums, 4 if p.has_channel else 2, n, strips, c)
    through = scratch(need_du and of_batch, 2, c)
    store_gates = p.has_spatial and need_du
    spatial_gate, dq = scratch(store_gates, n, s), scratch(store_gates, n, s)
    d_excited, d_hidden = scratch(sum_channel, n, c), scratch(sum_channel, n, p.hidden)
    d_mean = scratch(sum_channel and (need_du or need_affine), n, c)
    sample_ws, sample_bs = scratch(need_spatial, n, c), scratch(need_spatial, n)

    block = heuristics.gradient_block(tile.warps)
    tasks = gradient_tasks(c, p.hidden, block, need_channel, need_spatial)
    maps = [in_u, in_dy, *([out_du] if need_du else [])]
    norm = mean, var, bn_weight, bn_bias
    with torch.cuda.device_of(u):
        if n:
            norm_reduce_kernel[(n * strips,)](
                dy, u, *norm, ws, bs, channel_gate, partial, partial_ws, partial_bs, sums,
                spatial_gate, dq,
                c, s, strips, n * strips * c,
                in_dy.sample, in_dy.pitch, p.half(in_dy), in_u.sample, in_u.pitch,
                EPS=eps, SUM_CHANNEL=sum_channel, SUM_SPATIAL=sum_spatial, WEIGH=need_spatial,
                SUM_NORM=need_sums, STORE_GATES=store_gates, HOLD=r.tile.hold, TILES=r.tile.tiles,
                **r.constants(in_u, in_dy), **_all_registers(),
            )  # fmt: skip
            if sum_channel or need_spatial:
                excite_backward_kernel[(n, sum_channel + need_spatial)](
                    partial, partial_ws, partial_bs, w1, w2, hidden, channel_gate,
                    d_excited, d_hidden, d_mean, sample_ws, sample_bs,
                    c, p.hidden, s, strips,
                    GATE=_EXCITATION["GATE"], **r.excitation(pooled.dtype),
                )  # fmt: skip
        if need_sums:
            norm_sums_kernel[(triton.cdiv(c, _COLUMNS),)](
                sums, d_mean, var, bn_weight, d_bn_weight, d_bn_bias, through,
                c, s, n * strips, strips, n * strips * c,
                EPS=eps, **_columns(r),
            )  # fmt: skip
        row_strips = triton.cdiv(s, tile.block_s)
        tiles = n * row_strips * triton.cdiv(c, tile.block_c) if need_du else 0
        if tiles + tasks:
            norm_apply_backward_kernel[(tiles + tasks,)](
                dy, u, *norm, through, channel_gate, spatial_gate, dq, d_mean, ws,
                du if need_du else None,
                d_excited, d_hidden, pooled, hidden, sample_ws, sample_bs,
                dw1, db1, dw2, db2, dws, dbs,
                n, c, p.hidden, s, row_strips, tiles,
                in_dy.sample, in_dy.pitch, p.half(in_dy), in_u.sample, in_u.pitch,
                out_du.sample, out_du.pitch,
                EPS=eps, NEED_DU=need_du, NEED_PARAMETERS=tasks > 0, BLOCK=block,
                **r.constants(*maps),
            )  # fmt: skip
