"""The least time that each Triton kernel over a map could take on an H100, for the tiles that
`heuristics.py` chooses, and beside it the best of other tiles: prints the table of docs/gpu.md.

    PYTHONPATH=tests python -m gpu.triton_bounds [--search] [--reduction R] [N,C,H,W ...]

A bound is the emulator's (tests/gpulab): the largest of the times of DRAM, L2, instructions, shared
memory and the longest chain of accesses that wait for each other. Of a large map only a share of
the programs runs, on a device with the same share of multiprocessors, bandwidth and L2.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import gpulab
import pytest
import torch
import triton
from budget import make_parameters
from gpu.emulated import emulator

from scse_kernels import ops
from scse_kernels._triton import heuristics, launch, tuning
from scse_kernels._triton.plan import Plan, Pointer
from scse_kernels._triton.tuning import Choice

SHAPES = ((8, 256, 16, 16), (8, 512, 14, 14), (2, 1024, 7, 7), (1, 128, 64, 64))
#: Elements of a map that are executed, about.
MOST = 1 << 18
#: Shares of an H100 (of 132 multiprocessors).
SHARES = (1, 2, 3, 4, 6, 12, 22, 33, 66, 132)
MAPS = ("squeeze_kernel", "apply_kernel", "reduce_kernel", "apply_backward_kernel")


@dataclass(frozen=True)
class Bound:
    """Microseconds, and what takes them."""

    us: float
    binds: str


def launches(shape, memory_format, reduction) -> Iterator[list]:
    """Of the forward, then of the backward, in float16: kernel, grid, arguments, options."""
    samples, channels = shape[:2]
    hidden = max(1, channels // reduction)
    x = torch.zeros(shape, dtype=torch.float16).contiguous(memory_format=memory_format)
    parameters = make_parameters(channels, reduction, dtype=torch.float32)
    pooled, gate = torch.zeros(samples, channels), torch.zeros(samples, channels)
    saved = pooled, torch.zeros(2, samples, hidden), gate
    add, relu, sigmoid = ops.COMBINE["add"], ops.ACTIVATION["relu"], ops.GATE["sigmoid"]
    both = (
        (
            launch._plan_forward,
            (memory_format, hidden, add, relu, 0.0, sigmoid, False),
            (x, *parameters, torch.zeros_like(x), *saved),
        ),
        (
            launch._plan_backward,
            (memory_format, hidden, add, sigmoid, False),
            (x, torch.zeros_like(x), *parameters, *saved, torch.zeros_like(x), *parameters),
        ),
    )
    for make, choices, tensors in both:
        plan = Plan(tensors, torch.float32)
        make(plan, choices, *tensors)
        values = {"given": tensors, "scratch": [torch.zeros(size) for size in plan._sizes]}

        def filled(arguments, values=values):
            return [values[a.kind][a.place] if isinstance(a, Pointer) else a for a in arguments]

        yield [one._replace(arguments=filled(one.arguments)) for one in plan.launches]


def bounds(shape, memory_format, reduction=16, choice: Choice | None = None) -> dict[str, Bound]:
    """Of each kernel, by its name."""
    wanted = prod(shape) / MOST
    share = next((s for s in SHARES if s >= wanted), SHARES[-1])
    device = gpulab.H100
    part = device.scaled(
        sms=device.sms // share, dram_gbps=device.dram_gbps / share,
        l2_gbps=device.l2_gbps / share, l2_bytes=device.l2_bytes // share,
    )  # fmt: skip
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        if choice is not None:
            patch.setattr(tuning, "choice", lambda *_: choice)
        for direction in launches(shape, memory_format, reduction):
            options = {"checks": False, "latency": True, "poison": False}
            with emulator(device=part, **options) as lab:
                for kernel, grid, arguments, more in direction:
                    of_map = kernel.__name__ in MAPS
                    lab.device = part if of_map else device
                    programs = (-(-grid[0] // share),) if of_map else grid
                    kernel[programs](*arguments, **more)
                    line = lab.reports[-1].roofline()
                    found[kernel.__name__] = Bound(line["bound_us"], line["binds"])
    return found


def total(found: dict[str, Bound]) -> float:
    """Of a step."""
    return sum(bound.us for bound in found.values())


def chosen(shape, memory_format) -> Choice:
    """What the heuristics choose."""
    samples, channels, *axes = shape
    last = memory_format != torch.contiguous_format
    tile = heuristics.tile(samples, channels, prod(axes), 2, 32, last, 132)
    return Choice(tile.block_c, tile.block_s, tile.warps, tile.tiles, 3)


#: What to try: factors of block_s, warps and tiles.
STEPS = ((2, 1, 1), (0.5, 1, 1), (1, 2, 1), (1, 0.5, 1), (2, 2, 1), (0.5, 0.5, 1), (1, 1, 2))


def near(choice: Choice, channels: int, positions: int) -> Iterator[Choice]:
    """Choices a step away."""
    for s, w, t in STEPS:
        block_s, warps, tiles = choice.block_s * s, choice.warps * w, choice.tiles * t
        to_a_thread = 2 * choice.block_c * block_s // (32 * max(warps, 1))
        if (
            min(block_s, warps, tiles) >= 1
            and 16 <= to_a_thread <= 256
            and warps <= 16
            and block_s * tiles < 2 * max(16, positions)
            and (tiles == 1 or choice.block_c >= channels)
        ):
            yield Choice(choice.block_c, int(block_s), int(warps), int(tiles), 3)


def search(shape, memory_format, reduction):
    """The best choice that steps from the heuristics' one lead to, and its bounds."""
    seen = {}

    def cost(choice):
        if choice not in seen:
            try:
                seen[choice] = bounds(shape, memory_format, reduction, choice)
            except triton.OutOfResources:
                seen[choice] = {"": Bound(math.inf, "")}
        return total(seen[choice])

    best = chosen(shape, memory_format)
    cost(best)
    while True:
        other = min(near(best, shape[1], prod(shape[2:])), key=cost)
        if cost(other) > 0.97 * cost(best):
            return best, seen[best]
        best = other


def shown(choice: Choice) -> str:
    return f"{choice.block_c} x {choice.block_s}, {choice.warps}, {choice.tiles}"


def row(shape, layout: str, choice: Choice, found: dict[str, Bound]) -> str:
    """A row of the table. The excitation may have two kernels each way."""
    squeeze, apply, reduce, apply_backward = MAPS
    small = [name for name in found if name not in MAPS]
    excite = [name for name in small if "backward" not in name]
    excite_backward = [name for name in small if "backward" in name]
    names = [[squeeze], excite, [apply], [reduce], excite_backward, [apply_backward]]
    cells = [sum(found[name].us for name in some) for some in names]
    figures = (f"{cell:.2f}" for cell in (*cells, total(found)))
    return "| " + " | ".join([f"{list(shape)}, {layout}", shown(choice), *figures]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help="such as 8,64,64,64 (default: those of the page)")
    parser.add_argument(
        "--search", action="store_true", help="look for a better tile, minutes each"
    )
    parser.add_argument(
        "--reduction", type=int, help="channels to a hidden one (default: 2 from 256 on, else 16)"
    )
    options = parser.parse_args()
    for shape in [tuple(map(int, s.split(","))) for s in options.shapes] or SHAPES:
        reduction = options.reduction or (2 if shape[1] >= 256 else 16)
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        for layout, format_ in (("contiguous", torch.contiguous_format), ("channels_last", last)):
            choice = chosen(shape, format_)
            print(row(shape, layout, choice, bounds(shape, format_, reduction, choice)), flush=True)
            if options.search:
                best, found = search(shape, format_, reduction)
                print("best:", row(shape, layout, best, found), flush=True)


if __name__ == "__main__":
    main()
