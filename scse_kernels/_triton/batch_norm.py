"""The host side of BatchNorm + ReLU + scSE: fills the results of `triton_bn_forward` and
`triton_bn_backward`. As launch.py, whose helpers it shares; no step waits for the device.

Launches in training: five forward (statistics, their merge, squeeze, excite, apply), four backward
(reduce, excite, sums over all strips, apply). With running statistics there are three each way, and
one more backward where BatchNorm's weight or bias has a gradient. In training the merge moves the
running statistics. In evaluation the squeeze keeps a copy of them for the backward.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from . import heuristics
from .activation import RELU, SIGMOID
from .launch import (
    GRADIENTS,
    Map,
    _all_registers,
    _contiguous,
    _dense,
    _describe,
    _in_format,
    gradient_tasks,
    plan_excitation,
    plan_excitation_backward,
    readable,
)
from .norm_backward import norm_apply_backward_kernel, norm_reduce_kernel, norm_sums_kernel
from .norm_forward import norm_apply_kernel, norm_squeeze_kernel
from .norm_statistics import norm_merge_kernel, norm_statistics_kernel
from .plan import Plan, Pointer, run_plan

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
    moving: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Fills y, mean, var, pooled, hidden, channel_gate.

    moving: running statistics, contiguous, and the momentum with which they move towards those of
    u. u is not float64 then: Triton takes numbers in float32.
    """
    of_batch = running_mean is None
    if u.shape[0] == 0:
        _, mean, var, *_ = results
        if of_batch:
            mean.zero_(), var.zero_()
        else:
            mean.copy_(running_mean), var.copy_(running_var)
        return
    u = readable(u, memory_format)
    numbers = ()
    if moving is not None:
        running_mean, running_var, momentum = moving
        numbers = (float(momentum),)
    parameters = _contiguous(bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, ws, bs)
    choices = memory_format, w1 is not None and w1.shape[0], combine, eps, of_batch
    run_plan(_plan_forward, choices, (u,), parameters, results, numbers)


def _plan_forward(plan: Plan, choices: tuple, u: Tensor, *others: Tensor | None) -> None:
    memory_format, _, combine, eps, of_batch = choices
    w1, ws, y = others[4], others[8], others[10]
    p = _describe(memory_format, u, w1, ws, combine)
    p = replace(p, tile=_tiles(p, u)[0])
    in_u, out_y = _in_format(u, memory_format), _dense(y, p.channels_last)
    (
        u, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, ws, bs,
        y, mean, var, pooled, hidden, channel_gate,
    ) = plan.given  # fmt: skip

    n, c, s = p.samples, p.channels, p.positions
    partial = plan.scratch(n, p.strips, c) if p.has_channel else None
    spatial_gate = plan.scratch(n, s) if p.has_spatial else None
    used, kept = (running_mean, running_var), (mean, var)
    if of_batch:
        _plan_statistics(plan, p, in_u, running_mean, running_var, mean, var)
        used, kept = (mean, var), (None, None)
    plan.launch(
        norm_squeeze_kernel, (n * p.strips,),
        u_ptr=u, mean_ptr=used[0], var_ptr=used[1], weight_ptr=bn_weight, bias_ptr=bn_bias,
        ws_ptr=ws, bs_ptr=bs, partial_ptr=partial, spatial_gate_ptr=spatial_gate,
        kept_mean_ptr=kept[0], kept_var_ptr=kept[1],
        C=c, S=s, strips=p.strips, **in_u.strides("u"),
        EPS=eps, HOLD=p.tile.hold, TILES=p.tile.tiles, **p.constants(in_u),
    )  # fmt: skip
    if p.has_channel:
        plan_excitation(
            plan, p, in_u.tensor, partial=partial, w1=w1, b1=b1, w2=w2, b2=b2,
            pooled=pooled, hidden=hidden, channel_gate=channel_gate, **_EXCITATION,
        )  # fmt: skip
    plan.launch(
        norm_apply_kernel, (n * p.tiles,),
        u_ptr=u, mean_ptr=mean, var_ptr=var, weight_ptr=bn_weight, bias_ptr=bn_bias,
        channel_gate_ptr=channel_gate, spatial_gate_ptr=spatial_gate, y_ptr=y,
        C=c, S=s, blocks_s=p.blocks_s,
        half_y=p.half(out_y), **in_u.strides("u"), **out_y.strides("y"),
        EPS=eps, **p.constants(in_u, out_y),
    )  # fmt: skip


def _plan_statistics(
    plan: Plan,
    p,
    in_u: Map,
    running_mean: Pointer | None,
    running_var: Pointer | None,
    mean: Pointer,
    var: Pointer,
) -> None:
    """Fills mean and var, and moves the running ones: two launches."""
    u = in_u.tensor
    processors = heuristics.multiprocessors(u.device)
    n, c, s = p.samples, p.channels, p.positions
    tile = heuristics.statistics_tile(n, c, s, u.element_size(), p.channels_last, processors)
    q = replace(p, tile=tile)
    means, squares = plan.scratch(n, q.strips, c), plan.scratch(n, q.strips, c)
    constants = {k: v for k, v in q.constants(in_u).items() if k != "COMBINE"}
    plan.launch(
        norm_statistics_kernel, (n * q.tiles,),
        u_ptr=plan.given[0], strip_mean_ptr=means, strip_squares_ptr=squares,
        C=c, S=s, strips=q.strips, **in_u.strides("u"), **constants,
    )  # fmt: skip
    momentum = plan.numbers[0] if plan.numbers else 0.0
    plan.launch(
        norm_merge_kernel, (triton.cdiv(c, _COLUMNS),),
        strip_mean_ptr=means, strip_squares_ptr=squares, mean_ptr=mean, var_ptr=var,
        running_mean_ptr=running_mean, running_var_ptr=running_var,
        momentum=momentum, unbiased=n * s / max(n * s - 1, 1),
        C=c, S=s, rows=n * q.strips, strips=q.strips,
        STRIP=tile.block_s, **_columns(q),
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
    u, dy = readable(u, memory_format), readable(dy, memory_format)
    parameters = _contiguous(bn_weight, bn_bias, w1, b1, w2, b2, ws, bs)
    du, *gradients = results
    needed = (need_affine,) * 2 + (need_channel,) * 4 + (need_spatial,) * 2
    results = (
        du if need_du else None,
        *(
            None if parameter is None or not wanted else gradient
            for parameter, wanted, gradient in zip(parameters, needed, gradients, strict=True)
        ),
    )
    choices = memory_format, w1 is not None and w1.shape[0], combine, eps, of_batch
    saved = mean, var, pooled, hidden, channel_gate
    run_plan(_plan_backward, choices, (u, dy), parameters, (*saved, *results))


def _plan_backward(
    plan: Plan, choices: tuple, u: Tensor, dy: Tensor, *others: Tensor | None
) -> None:
    memory_format, _, combine, eps, of_batch = choices
    w1, ws, du = others[2], others[6], others[13]
    p = _describe(memory_format, u, w1, ws, combine)
    r = replace(p, tile=_tiles(p, u)[1])
    in_u, in_dy = _in_format(u, memory_format), _in_format(dy, memory_format)
    need_du = du is not None
    out_du = _dense(du, p.channels_last) if need_du else Map(u, 0, 0)
    (
        u, dy, bn_weight, bn_bias, w1, _, w2, _, ws, bs,
        mean, var, pooled, hidden, channel_gate,
        du, d_bn_weight, d_bn_bias, *gradients,
    ) = plan.given  # fmt: skip
    gradients = dict(zip(GRADIENTS, gradients, strict=True))
    need_affine = d_bn_weight is not None or d_bn_bias is not None
    need_channel = gradients["dw1_ptr"] is not None
    need_spatial = gradients["dws_ptr"] is not None
    need_sums = need_affine or (need_du and of_batch)
    sum_channel = p.has_channel and (need_du or need_affine or need_channel)
    sum_spatial = p.has_spatial and (need_du or need_affine or need_spatial)
    if not (sum_channel or sum_spatial):
        return

    n, c, s, strips = p.samples, p.channels, p.positions, r.strips
    scratch = plan.scratch_if
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

    block = heuristics.gradient_block(r.tile.warps)
    tasks = gradient_tasks(c, p.hidden, block, need_channel, need_spatial)
    maps = [in_u, in_dy, *([out_du] if need_du else [])]
    norm = {"mean_ptr": mean, "var_ptr": var, "weight_ptr": bn_weight, "bias_ptr": bn_bias}
    read_strides = in_dy.strides("dy") | in_u.strides("u") | {"half_dy": p.half(in_dy)}
    if n:
        plan.launch(
            norm_reduce_kernel, (n * strips,),
            dy_ptr=dy, u_ptr=u, **norm, ws_ptr=ws, bs_ptr=bs, channel_gate_ptr=channel_gate,
            partial_ptr=partial, partial_ws_ptr=partial_ws, partial_bs_ptr=partial_bs,
            sums_ptr=sums, spatial_gate_ptr=spatial_gate, dq_ptr=dq,
            C=c, S=s, strips=strips, plane=n * strips * c, **read_strides,
            EPS=eps, SUM_CHANNEL=sum_channel, SUM_SPATIAL=sum_spatial, WEIGH=need_spatial,
            SUM_NORM=need_sums, STORE_GATES=store_gates, HOLD=r.tile.hold, TILES=r.tile.tiles,
            **r.constants(in_u, in_dy), **_all_registers(),
        )  # fmt: skip
        if sum_channel or need_spatial:
            plan_excitation_backward(
                plan, r, in_u.tensor, partial=partial, partial_ws=partial_ws,
                partial_bs=partial_bs, w1=w1, w2=w2, hidden=hidden, channel_gate=channel_gate,
                d_excited=d_excited, d_hidden=d_hidden, d_mean=d_mean,
                sample_ws=sample_ws, sample_bs=sample_bs, GATE=_EXCITATION["GATE"],
            )  # fmt: skip
    if need_sums:
        plan.launch(
            norm_sums_kernel, (triton.cdiv(c, _COLUMNS),),
            sums_ptr=sums, d_mean_ptr=d_mean, var_ptr=var, weight_ptr=bn_weight,
            dweight_ptr=d_bn_weight, dbias_ptr=d_bn_bias, through_ptr=through,
            C=c, S=s, rows=n * strips, strips=strips, plane=n * strips * c,
            EPS=eps, **_columns(r),
        )  # fmt: skip
    tiles = n * r.tiles if need_du else 0
    if tiles + tasks:
        plan.launch(
            norm_apply_backward_kernel, (tiles + tasks,),
            dy_ptr=dy, u_ptr=u, **norm, through_ptr=through, channel_gate_ptr=channel_gate,
            spatial_gate_ptr=spatial_gate, dq_ptr=dq, d_mean_ptr=d_mean, ws_ptr=ws, du_ptr=du,
            d_excited_ptr=d_excited, d_hidden_ptr=d_hidden, pooled_ptr=pooled, hidden_ptr=hidden,
            sample_ws_ptr=sample_ws, sample_bs_ptr=sample_bs, **gradients,
            N=n, C=c, Cr=p.hidden, S=s, blocks_s=r.blocks_s, tiles=tiles,
            **read_strides, **out_du.strides("du"),
            EPS=eps, NEED_DU=need_du, NEED_PARAMETERS=tasks > 0, BLOCK=block,
            **r.constants(*maps),
        )  # fmt: skip
