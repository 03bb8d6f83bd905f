"""The host side: fills the results of the operators `triton_forward` and `triton_backward`.

The arguments are the memory format of y and dx, the results' tensors, and then those of the
operators' schemas in ops.py. No step here waits for the device. Scratch comes from torch's
allocator.

`forward` and `backward` make tensors readable for the kernels. The rest is a plan for calls of this
kind (plan.py): `_plan_forward` and `_plan_backward` write it down at the first one.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference import accumulation_dtype
from . import heuristics, tuning
from .apply import apply_backward_kernel, apply_kernel
from .combine import CHANNEL, SPATIAL, by_gates
from .excite import excite_backward_kernel, excite_kernel
from .excite_rows import (
    COLUMNS,
    excite_backward_hidden_kernel,
    excite_backward_mean_kernel,
    excite_gates_kernel,
    excite_hidden_kernel,
)
from .one_launch import backward_kernel, forward_kernel
from .plan import Plan, run_plan
from .reduce import reduce_kernel
from .squeeze import squeeze_kernel

_WIDE = 2**31  # maps of so many elements need 64-bit offsets


class Map(NamedTuple):
    """A map as kernels access it. Its rows are dense: rows of positions, in channels_last of
    channels."""

    tensor: Tensor
    sample: int  # elements from one sample to the next
    pitch: int  # and from one row to the next

    def strides(self, name: str) -> dict[str, int]:
        """A kernel's arguments for the strides of the map that it calls `name`."""
        return {f"stride_{name}n": self.sample, f"pitch_{name}": self.pitch}


@dataclass(frozen=True)
class Problem:
    """Sizes and choices of one call."""

    samples: int
    channels: int
    hidden: int
    positions: int
    combine: int
    channels_last: bool
    tile: heuristics.Tile
    launches: int

    @property
    def strips(self) -> int:
        """Strips of a sample, each with a row of partial sums."""
        return triton.cdiv(self.positions, self.tile.block_s * self.tile.tiles)

    @property
    def blocks_s(self) -> int:
        """Tiles of a sample side by side along its positions."""
        return triton.cdiv(self.positions, self.tile.block_s)

    @property
    def tiles(self) -> int:
        """Tiles of a sample."""
        return self.blocks_s * triton.cdiv(self.channels, self.tile.block_c)

    @property
    def has_channel(self) -> bool:
        return self.combine != SPATIAL.value

    @property
    def has_spatial(self) -> bool:
        return self.combine != CHANNEL.value

    def constants(self, *maps: Map) -> dict:
        """The compile-time arguments that kernels over these maps share."""
        inner = self.channels if self.channels_last else self.positions
        strides = [stride for m in maps for stride in (m.sample, m.pitch)]
        align = 16 // maps[0].tensor.element_size()
        while any(size % align for size in (inner, *strides)):
            align //= 2
        return {
            "COMBINE": self.combine,
            "CHANNELS_LAST": self.channels_last,
            "ALIGN": align,
            "WIDE": any(self.reach(m) >= _WIDE for m in maps),
            "BLOCK_C": self.tile.block_c,
            "BLOCK_S": self.tile.block_s,
            "num_warps": self.tile.warps,
            "num_stages": 1,
        }

    def tiles_of_excitation(self, x: Tensor) -> heuristics.Excitation:
        return heuristics.excitation(
            self.channels, self.hidden, self.strips, accumulation_dtype(x.dtype).itemsize
        )

    def rows(self, x: Tensor, e: heuristics.Excitation) -> heuristics.Rows:
        """How programs share an excitation."""
        itemsize = accumulation_dtype(x.dtype).itemsize
        processors = heuristics.multiprocessors(x.device)
        return heuristics.rows(e, self.samples, self.channels, self.hidden, itemsize, processors)

    def excitation(self, x: Tensor) -> dict:
        """The compile-time arguments of the excitation and of its backward."""
        e = self.tiles_of_excitation(x)
        return {
            "BLOCK_C": e.block_c,
            "BLOCK_J": e.block_j,
            "TERMS_C": e.terms_c,
            "TERMS_J": e.terms_j,
            "TERMS_STRIPS": e.terms_strips,
            "TILE": e.tile,
            "SEGMENT": e.segment,
            "num_warps": e.warps,
            "num_stages": 1,
        }

    def excitation_within(self, x: Tensor) -> dict:
        """The same, for a kernel with the tile's warps. Sums are the same, but fewer are formed at
        once."""
        e = self.tiles_of_excitation(x)
        itemsize = accumulation_dtype(x.dtype).itemsize
        return {
            "EXCITE_C": e.block_c,
            "EXCITE_J": e.block_j,
            "TERMS_C": e.terms_c,
            "TERMS_J": e.terms_j,
            "TERMS_STRIPS": e.terms_strips,
            "EXCITE_TILE": heuristics.excitation_tile(self.tile.warps, itemsize),
            "SEGMENT": e.segment,
        }

    def queue(self, x: Tensor, resident: int, *kept: Tensor) -> heuristics.Queue:
        """The queue of one launch in which the maps `kept` are read twice."""
        processors, l2 = 1, 0  # the interpreter runs one program after the other
        if x.is_cuda:
            device = torch.cuda.get_device_properties(x.device)
            processors, l2 = device.multi_processor_count, device.L2_cache_size
        strip = self.tile.block_s * self.tile.tiles * x.element_size()
        return heuristics.queue(
            self.samples * self.strips,
            strip * sum(map.shape[1] for map in kept),
            self.tile.warps,
            resident,
            processors,
            l2,
        )

    def reach(self, map: Map) -> int:
        """A bound of the offsets of all elements; also of a dense map of this shape."""
        samples, channels = map.tensor.shape[:2]
        rows = self.positions if self.channels_last else channels
        return samples * max(map.sample, channels * self.positions, rows * map.pitch)

    def half(self, map: Map) -> int:
        """Elements from the first to the second half of a sample of y or dy (for concat)."""
        return self.channels * (1 if self.channels_last else map.pitch)


def _dense(map: Tensor, channels_last: bool) -> Map:
    """A map that is dense in its format."""
    channels, positions = map.shape[1], prod(map.shape[2:])
    return Map(map, channels * positions, channels if channels_last else positions)


def _apart(map: Tensor) -> int:
    """The distance between neighbouring positions. -1 where it is not the same for all, 1 where
    there is one position only."""
    apart, following = -1, 0
    for size, stride in zip(reversed(map.shape[2:]), reversed(map.stride()[2:]), strict=True):
        if size == 1:
            continue
        if apart < 0:
            apart = stride
        elif stride != following:
            return -1
        following = size * stride
    return 1 if apart < 0 else apart


def _in_format(map: Tensor, memory_format: torch.memory_format) -> Map:
    """The map in a format that kernels can read: rows are dense, and rows and samples may be any
    distance apart, zero too. It is copied where it must be; of an expanded map one sample, or one
    row, is copied."""
    channels_last = memory_format != torch.contiguous_format
    if map.is_contiguous(memory_format=memory_format):
        return _dense(map, channels_last)
    channels, positions = map.shape[1], prod(map.shape[2:])
    apart, between = _apart(map), 1 if channels == 1 else map.stride(1)
    row, rows = (channels, positions) if channels_last else (positions, channels)
    along, pitch = (between, apart) if channels_last else (apart, between)
    pitch = row if rows == 1 else pitch
    sample = map.stride(0) if map.shape[0] > 1 else row * rows
    if along == 1 and pitch >= 0:
        return Map(map, sample, pitch)
    least = map[:1] if sample == 0 else map
    if pitch == 0:
        least = least[(..., *(slice(1),) * (map.dim() - 2))] if channels_last else least[:, :1]
        rows = 1
    copy = least.contiguous(memory_format=memory_format)
    return Map(copy.expand(map.shape), sample and row * rows, pitch and row)


def _describe(
    memory_format: torch.memory_format,
    x: Tensor,
    w1: Tensor | None,
    ws: Tensor | None,
    combine: int,
) -> Problem:
    samples, channels = x.shape[:2]
    positions = prod(x.shape[2:])
    hidden = 0 if w1 is None else w1.shape[0]
    if ws is None:
        combine = CHANNEL.value
    elif w1 is None:
        combine = SPATIAL.value
    channels_last = memory_format != torch.contiguous_format
    choice = tuning.choice(x.device, samples, channels, positions, x.dtype, channels_last, combine)
    return Problem(
        samples,
        channels,
        hidden,
        positions,
        combine,
        channels_last,
        choice.tile(channels),
        heuristics.launches(choice.launches),
    )


def _all_registers(most: int = 255) -> dict:
    """An option that lets NVIDIA's assembler use `most` registers. Without it a few may be spilled,
    so that more programs run at once."""
    return {} if torch.version.hip else {"maxnreg": most}


def _contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    return [p if p is None or p.is_contiguous() else p.contiguous() for p in parameters]


def gradient_tasks(
    channels: int, hidden: int, block: int, need_channel: bool, need_spatial: bool
) -> int:
    """Programs that form the parameters' gradients, see `parameter_gradients`."""
    blocks = triton.cdiv(channels, block)
    return 2 * blocks * triton.cdiv(hidden, block) * need_channel + blocks * need_spatial


def readable(map: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The map, or a copy of it, in a format that `_in_format` takes as it is."""
    if map.is_contiguous(memory_format=memory_format):
        return map
    return _in_format(map, memory_format).tensor


def forward(
    memory_format: torch.memory_format,
    results: tuple[Tensor, ...],
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    combine: int,
    activation: int = 0,
    slope: float = 0.0,
    gate: int = 0,
    residual: bool = False,
) -> None:
    """Fills y, pooled, hidden, channel_gate: three launches (two without the channel branch, four
    with many weights), or one."""
    if x.shape[0] == 0:
        return
    x = readable(x, memory_format)
    parameters = _contiguous(w1, b1, w2, b2, ws, bs)
    hidden = w1 is not None and w1.shape[0]
    choices = memory_format, hidden, combine, activation, slope, gate, residual
    run_plan(_plan_forward, choices, (x,), parameters, results)


def _plan_forward(plan: Plan, choices: tuple, x: Tensor, *others: Tensor | None) -> None:
    memory_format, _, combine, activation, slope, gate, residual = choices
    w1, ws, y = others[0], others[4], others[6]
    p = _describe(memory_format, x, w1, ws, combine)
    in_x, out_y = _in_format(x, memory_format), _dense(y, p.channels_last)
    x, w1, b1, w2, b2, ws, bs, y, pooled, hidden, channel_gate = plan.given

    n, c, s = p.samples, p.channels, p.positions
    excitation = {"ACTIVATION": activation, "SLOPE": slope, "GATE": gate}
    partial = plan.scratch(n, p.strips, c) if p.has_channel else None
    spatial_gate = plan.scratch(n, s) if p.has_spatial else None
    if p.launches == 1:
        queue = p.queue(in_x.tensor, 16, in_x.tensor)  # sixteen warps of 128 registers
        lag = p.strips + queue.lead
        plan.launch(
            forward_kernel, (queue.programs,),
            x_ptr=x, w1_ptr=w1, b1_ptr=b1, w2_ptr=w2, b2_ptr=b2, ws_ptr=ws, bs_ptr=bs,
            partial_ptr=partial, spatial_gate_ptr=spatial_gate, pooled_ptr=pooled,
            hidden_ptr=hidden, channel_gate_ptr=channel_gate, y_ptr=y,
            counters_ptr=plan.zeros(1 + n),
            N=n, C=c, Cr=p.hidden, S=s, strips=p.strips, lag=lag,
            half_y=p.half(out_y), **in_x.strides("x"), **out_y.strides("y"),
            RESIDUAL=residual, HOLD=p.tile.hold, TILES=p.tile.tiles, **excitation,
            **p.constants(in_x, out_y), **p.excitation_within(in_x.tensor),
            **_all_registers(255 if in_x.tensor.dtype == torch.float64 else 128),
        )  # fmt: skip
        return
    plan.launch(
        squeeze_kernel, (n * p.strips,),
        x_ptr=x, ws_ptr=ws, bs_ptr=bs, partial_ptr=partial, spatial_gate_ptr=spatial_gate,
        C=c, S=s, strips=p.strips, **in_x.strides("x"),
        HOLD=p.tile.hold, TILES=p.tile.tiles, GATE=gate, **p.constants(in_x),
    )  # fmt: skip
    if p.has_channel:
        plan_excitation(
            plan, p, in_x.tensor, partial=partial, w1=w1, b1=b1, w2=w2, b2=b2,
            pooled=pooled, hidden=hidden, channel_gate=channel_gate, **excitation,
        )  # fmt: skip
    plan.launch(
        apply_kernel, (n * p.tiles,),
        x_ptr=x, channel_gate_ptr=channel_gate, spatial_gate_ptr=spatial_gate, y_ptr=y,
        C=c, S=s, blocks_s=p.blocks_s,
        half_y=p.half(out_y), **in_x.strides("x"), **out_y.strides("y"),
        RESIDUAL=residual, **p.constants(in_x, out_y),
    )  # fmt: skip


def plan_excitation(
    plan: Plan, p: Problem, x: Tensor, *, partial, w1, b1, w2, b2, pooled, hidden, channel_gate,
    ACTIVATION: int, SLOPE: float, GATE: int,
) -> None:  # fmt: skip
    """Fills pooled, hidden and channel_gate: one launch, or two."""
    n, c, j, s = p.samples, p.channels, p.hidden, p.positions
    e = p.tiles_of_excitation(x)
    activation = {"ACTIVATION": ACTIVATION, "SLOPE": SLOPE}
    if not e.segment:
        plan.launch(
            excite_kernel, (n,),
            partial_ptr=partial, w1_ptr=w1, b1_ptr=b1, w2_ptr=w2, b2_ptr=b2,
            pooled_ptr=pooled, hidden_ptr=hidden, channel_gate_ptr=channel_gate,
            C=c, Cr=j, S=s, strips=p.strips,
            GATE=GATE, **activation, **p.excitation(x),
        )  # fmt: skip
        return
    rows = p.rows(x, e)
    segments = triton.cdiv(c, e.segment)
    sums = plan.scratch(n, segments, j)
    more = {"num_stages": 1, **_all_registers()}
    plan.launch(
        excite_hidden_kernel, (*rows.hidden.grid(n, j), segments),
        partial, w1, pooled, sums,
        n, c, j, s, p.strips,
        SEGMENT=e.segment, TERMS_C=e.terms_c, TERMS_STRIPS=e.terms_strips,
        **rows.hidden.constants(), **more,
    )  # fmt: skip
    plan.launch(
        excite_gates_kernel, rows.gates.grid(n, c),
        sums, b1, w2, b2, hidden, channel_gate,
        n, c, j,
        SEGMENTS=segments, TERMS_J=e.terms_j, GATE=GATE, **activation,
        **rows.gates.constants(), **more,
    )  # fmt: skip


def plan_excitation_backward(
    plan: Plan, p: Problem, x: Tensor, *, partial, partial_ws, partial_bs, w1, w2, hidden,
    channel_gate, d_excited, d_hidden, d_mean, sample_ws, sample_bs, GATE: int,
) -> None:  # fmt: skip
    """Fills what of d_excited to sample_bs is not None: one launch, or two."""
    n, c, j, s = p.samples, p.channels, p.hidden, p.positions
    branches = (partial is not None) + (partial_ws is not None)
    e = p.tiles_of_excitation(x)
    if not e.segment or partial is None:
        plan.launch(
            excite_backward_kernel, (n, branches),
            partial_ptr=partial, partial_ws_ptr=partial_ws, partial_bs_ptr=partial_bs,
            w1_ptr=w1, w2_ptr=w2, hidden_ptr=hidden, channel_gate_ptr=channel_gate,
            d_excited_ptr=d_excited, d_hidden_ptr=d_hidden, d_mean_ptr=d_mean,
            sample_ws_ptr=sample_ws, sample_bs_ptr=sample_bs,
            C=c, Cr=j, S=s, strips=p.strips,
            GATE=GATE, **p.excitation(x),
        )  # fmt: skip
        return
    rows = p.rows(x, e)
    segments = triton.cdiv(c, e.segment)
    sums = plan.scratch(n, segments, j)
    more = {"TERMS_STRIPS": e.terms_strips, "num_stages": 1, **_all_registers()}
    plan.launch(
        excite_backward_hidden_kernel, (*rows.d_hidden.grid(n, j), segments),
        partial, w2, channel_gate, d_excited, sums,
        n, c, j, p.strips,
        SEGMENT=e.segment, TERMS_C=e.terms_c, GATE=GATE, **rows.d_hidden.constants(), **more,
    )  # fmt: skip
    groups, blocks = rows.d_mean.grid(n, c)
    if d_mean is None:
        blocks = 1  # for d_hidden
    spatial = triton.cdiv(c, COLUMNS.value) if partial_ws is not None else 0
    plan.launch(
        excite_backward_mean_kernel, (groups, blocks + spatial),
        partial_ws, partial_bs, sums, w1, hidden, d_hidden, d_mean, sample_ws, sample_bs,
        n, c, j, s, p.strips, blocks,
        SEGMENTS=segments, TERMS_J=e.terms_j, **rows.d_mean.constants(), **more,
    )  # fmt: skip


def backward(
    memory_format: torch.memory_format,
    results: tuple[Tensor | None, ...],
    dy: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    pooled: Tensor,
    hidden: Tensor,
    channel_gate: Tensor,
    combine: int,
    need_dx: bool,
    need_channel: bool,
    need_spatial: bool,
    gate: int = 0,
    residual: bool = False,
) -> None:
    """Fills dx and the gradients of the six parameters, except those not needed: three launches,
    or one."""
    x, dy = readable(x, memory_format), readable(dy, memory_format)
    parameters = _contiguous(w1, b1, w2, b2, ws, bs)
    dx, *gradients = results
    results = (
        dx if need_dx else None,
        *(
            None if parameter is None or not needed else gradient
            for parameter, needed, gradient in zip(
                parameters, (need_channel,) * 4 + (need_spatial,) * 2, gradients, strict=True
            )
        ),
    )
    choices = memory_format, w1 is not None and w1.shape[0], combine, gate, residual
    run_plan(_plan_backward, choices, (x, dy), parameters, (pooled, hidden, channel_gate, *results))


#: What kernels call the parameters' gradients, in the operators' order.
GRADIENTS = ("dw1_ptr", "db1_ptr", "dw2_ptr", "db2_ptr", "dws_ptr", "dbs_ptr")


def _plan_backward(
    plan: Plan, choices: tuple, x: Tensor, dy: Tensor, *others: Tensor | None
) -> None:
    memory_format, _, combine, gate, residual = choices
    w1, ws, dx, dw1, dws = others[0], others[4], others[9], others[10], others[14]
    p = _describe(memory_format, x, w1, ws, combine)
    need_dx, need_channel, need_spatial = dx is not None, dw1 is not None, dws is not None
    sum_channel = p.has_channel and (need_dx or need_channel)
    sum_spatial = p.has_spatial and (need_dx or need_spatial)
    if not (sum_channel or sum_spatial):
        return

    in_x, in_dy = _in_format(x, memory_format), _in_format(dy, memory_format)
    out_dx = _dense(dx, p.channels_last) if need_dx else Map(dx, 0, 0)
    x, dy, w1, _, w2, _, ws, bs, pooled, hidden, channel_gate, *results = plan.given
    dx, *gradients = results
    gradients = dict(zip(GRADIENTS, gradients, strict=True))
    read_strides = in_dy.strides("dy") | in_x.strides("x") | {"half_dy": p.half(in_dy)}
    strides = read_strides | out_dx.strides("dx")
    n, c, s, strips = p.samples, p.channels, p.positions, p.strips
    scratch = plan.scratch_if
    partial = scratch(sum_channel, n, strips, c)
    partial_ws = scratch(need_spatial, n, strips, c)
    partial_bs = scratch(need_spatial, n, strips)
    store_gates = p.has_spatial and need_dx
    spatial_gate, dq = scratch(store_gates, n, s), scratch(store_gates, n, s)
    d_excited, d_hidden = scratch(sum_channel, n, c), scratch(sum_channel, n, p.hidden)
    d_mean = scratch(sum_channel and need_dx, n, c)
    sample_ws, sample_bs = scratch(need_spatial, n, c), scratch(need_spatial, n)

    block = heuristics.gradient_block(p.tile.warps)
    tasks = gradient_tasks(c, p.hidden, block, need_channel, need_spatial)
    maps = [in_x, in_dy, *([out_dx] if need_dx else [])]
    if n and p.launches == 1:
        read = [in_dy.tensor, *([in_x.tensor] if by_gates(p.combine) else [])]
        queue = p.queue(in_x.tensor, 8, *read)
        lag = strips + queue.lead
        plan.launch(
            backward_kernel, (queue.programs,),
            dy_ptr=dy, x_ptr=x, w1_ptr=w1, w2_ptr=w2, ws_ptr=ws, bs_ptr=bs, pooled_ptr=pooled,
            hidden_ptr=hidden, channel_gate_ptr=channel_gate, partial_ptr=partial,
            partial_ws_ptr=partial_ws, partial_bs_ptr=partial_bs, spatial_gate_ptr=spatial_gate,
            dq_ptr=dq, d_excited_ptr=d_excited, d_hidden_ptr=d_hidden, d_mean_ptr=d_mean,
            sample_ws_ptr=sample_ws, sample_bs_ptr=sample_bs, dx_ptr=dx, **gradients,
            counters_ptr=plan.zeros(2 + n),
            N=n, C=c, Cr=p.hidden, S=s, strips=strips, lag=lag, tasks=tasks, **strides,
            SUM_CHANNEL=sum_channel, SUM_SPATIAL=sum_spatial, WEIGH=need_spatial,
            STORE_GATES=store_gates, NEED_DX=need_dx, HOLD=p.tile.hold, TILES=p.tile.tiles,
            BLOCK=block, GATE=gate, RESIDUAL=residual, **p.constants(*maps),
            **p.excitation_within(in_x.tensor), **_all_registers(),
        )  # fmt: skip
        return
    if n:
        plan.launch(
            reduce_kernel, (n * strips,),
            dy_ptr=dy, x_ptr=x, ws_ptr=ws, bs_ptr=bs, channel_gate_ptr=channel_gate,
            partial_ptr=partial, partial_ws_ptr=partial_ws, partial_bs_ptr=partial_bs,
            spatial_gate_ptr=spatial_gate, dq_ptr=dq,
            C=c, S=s, strips=strips, **read_strides,
            SUM_CHANNEL=sum_channel, SUM_SPATIAL=sum_spatial, WEIGH=need_spatial,
            STORE_GATES=store_gates, HOLD=p.tile.hold, TILES=p.tile.tiles, GATE=gate,
            **p.constants(in_x, in_dy),
        )  # fmt: skip
        if sum_channel or need_spatial:
            plan_excitation_backward(
                plan, p, in_x.tensor, partial=partial, partial_ws=partial_ws,
                partial_bs=partial_bs, w1=w1, w2=w2, hidden=hidden, channel_gate=channel_gate,
                d_excited=d_excited, d_hidden=d_hidden, d_mean=d_mean,
                sample_ws=sample_ws, sample_bs=sample_bs, GATE=gate,
            )  # fmt: skip
    tiles = n * p.tiles if need_dx else 0
    if tiles + tasks:
        # max and mul have x in registers, too.
        registers = _all_registers() if by_gates(p.combine) else {}
        plan.launch(
            apply_backward_kernel, (tiles + tasks,),
            dy_ptr=dy, x_ptr=x, channel_gate_ptr=channel_gate, spatial_gate_ptr=spatial_gate,
            dq_ptr=dq, d_mean_ptr=d_mean, ws_ptr=ws, dx_ptr=dx, d_excited_ptr=d_excited,
            d_hidden_ptr=d_hidden, pooled_ptr=pooled, hidden_ptr=hidden, sample_ws_ptr=sample_ws,
            sample_bs_ptr=sample_bs, **gradients,
            N=n, C=c, Cr=p.hidden, S=s, blocks_s=p.blocks_s, tiles=tiles, **strides,
            RESIDUAL=residual, NEED_DX=need_dx, NEED_PARAMETERS=tasks > 0, BLOCK=block,
            **p.constants(*maps), **registers,
        )  # fmt: skip
