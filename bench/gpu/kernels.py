"""How long every kernel takes, against what its passes over the map would take at the speed of a
copy.

    python -m bench.gpu.kernels --shape 8x64x64x64 --output kernels.csv
    python -m bench.gpu.kernels --shape 8x64x64x64 --once

Each call, forward and backward, finds a cold L2 and starts when the host has queued all of it. The
kernels' times are those that CUPTI gives to torch's profiler; `span` is from the first kernel's
start to the last one's end. Written: a row for each kernel, for the span and for a copy of the map.
`--once`: one call of each case and no timing, between the marks that `ncu` starts and stops at.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .. import options, providers, timing
from ..cases import LAYOUTS, Case

#: Passes over the map that a kernel makes through DRAM when L2 is cold and everything that it reads
#: twice stays there: docs/gpu.md has the counts. For max the last backward kernel reads x as well.
#: By the kernel's name, without what follows `_kernel`, `_planes`, `_channels_last` or `_flat`.
PASSES = {
    "squeeze": {"add": 1, "max": 1},
    "excite": {"add": 0, "max": 0},
    "excite_hidden": {"add": 0, "max": 0},
    "excite_gates": {"add": 0, "max": 0},
    "apply": {"add": 2, "max": 2},
    "reduce": {"add": 2, "max": 2},
    "excite_backward": {"add": 0, "max": 0},
    "excite_backward_hidden": {"add": 0, "max": 0},
    "excite_backward_mean": {"add": 0, "max": 0},
    "apply_backward": {"add": 2, "max": 3},
    "forward": {"add": 2, "max": 2},
    "backward": {"add": 3, "max": 3},
}
COPY, SPAN = "copy", "span"


class Family(NamedTuple):
    """Kernels that a backend can be held to, by its environment."""

    backend: str
    environment: dict[str, str]


OVERLAP, ALONE = "overlap", "no overlap"
THREE, THREE_ALONE, ONE = "three launches", "three launches, no overlap", "one launch"
#: Whose kernels start while the one before ends: the time of one has its waiting in it.
OVERLAPPING = (OVERLAP, THREE)
#: What must not cost the others their time if it hangs comes last.
FAMILIES = {
    OVERLAP: Family("cuda", {"SCSE_CUDA_OVERLAP": "1"}),
    ALONE: Family("cuda", {"SCSE_CUDA_OVERLAP": "0"}),
    THREE: Family("triton", {"SCSE_TRITON_LAUNCHES": "3", "SCSE_TRITON_OVERLAP": "1"}),
    THREE_ALONE: Family("triton", {"SCSE_TRITON_LAUNCHES": "3", "SCSE_TRITON_OVERLAP": "0"}),
    ONE: Family("triton", {"SCSE_TRITON_LAUNCHES": "1"}),
}
_FORWARD, _BACKWARD = "forward", "backward"
_ROUNDS = 9
#: Cycles that the GPU spins before each call, for the host to queue it: a millisecond or two.
_LEAD = 3_000_000
_MARK = "spin_kernel"  # what torch.cuda._sleep launches


class Event(NamedTuple):
    """Something that the GPU did. Microseconds."""

    name: str
    start: float
    duration: float
    blocks: int = 0
    registers: int = 0

    @property
    def end(self) -> float:
        return self.start + self.duration


def short(name: str) -> str:
    """A kernel's name without its return type, this package's namespace, template arguments and
    parameters: `void scse::cuda::apply<__half, ...>(...)` is `apply`."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.match(r"[\w:]*", name)[0].removeprefix("scse::cuda::") or name


def passes(kernel: str, combine: str) -> int | None:
    """How often the kernel of that short name reads or writes the map; None if not known."""
    base = re.sub(r"_(kernel|planes|channels_last|flat)$", "", kernel)
    return PASSES.get(base, {}).get(combine)


def events(trace: dict) -> list[Event]:
    """The kernels and copies of a Chrome trace, in the order of their start."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            given = event.get("args", {})
            blocks = 1
            for size in given.get("grid", ()):
                blocks *= size
            registers = given.get("registers per thread", 0)
            name = COPY if event["cat"] == "gpu_memcpy" else event["name"]
            found.append(Event(name, float(event["ts"]), float(event["dur"]), blocks, registers))
    return sorted(found, key=lambda event: event.start)


def between_marks(found: list[Event]) -> list[list[Event]]:
    """What the GPU did between each odd mark and the next one."""
    groups: list[list[Event]] = []
    inside = False
    for event in found:
        if _MARK in event.name:
            inside = not inside
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(event)
    return groups


def profiled(todo: list[Callable[[], object]], device: torch.device) -> list[list[list[Event]]]:
    """For each call of `todo`, what the GPU did in each of several rounds."""
    flush = timing.Flush(device)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_ROUNDS):
            for call in todo:
                flush()
                torch.cuda._sleep(_LEAD)
                call()
                torch.cuda._sleep(1)
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        groups = between_marks(events(json.loads(file.read_text())))
    if len(groups) != _ROUNDS * len(todo) or not all(groups):
        raise RuntimeError("torch's profiler didn't see all kernels (it needs CUPTI)")
    return [groups[i :: len(todo)] for i in range(len(todo))]


def here() -> torch.device:
    """The current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def _inputs(case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x, a leaf, dy and the parameters: as Case has them, but made on the device."""
    small = Case((1, *case.shape[1:]), *(getattr(case, n) for n in _AFTER_SHAPE)).inputs()
    # Each sample with a magnitude of its own.
    scale = torch.linspace(0.5, 1.5, case.shape[0], device=case.device).to(case.dtype)
    scale = scale.view(-1, *[1] * (len(case.shape) - 1))
    x, dy = (case.place(t.detach() * scale) for t in (small.x, small.dy))
    return x.requires_grad_(), dy, small.parameters


_AFTER_SHAPE = ("dtype", "layout", "reduction", "combine", "device")


def calls(case: Case, provider: str) -> tuple[Callable[[], object], Callable[[], object], Tensor]:
    """The forward and the backward of one case, run once, and its x."""
    x, dy, parameters = _inputs(case)
    axes = len(case.shape) - 2
    module = providers.build(provider, case.shape[1], case.reduction, case.combine, axes)
    module = module.to(case.device, case.dtype)
    providers.load(module, parameters)
    leaves = [x, *module.parameters()]
    module = providers.compiled(provider, module)
    saved: list[Tensor] = []

    def forward() -> None:
        saved[:] = [module(x)]

    def backward() -> None:
        torch.autograd.grad(saved.pop(), leaves, dy)

    forward()
    backward()
    return forward, backward, x.detach()


def measure(case: Case, backend: str) -> list[dict[str, object]]:
    """The rows of one case."""
    forward, backward, x = calls(case, backend)
    rounds = profiled([x.clone, forward, backward], case.device)
    rows: list[dict[str, object]] = []
    microseconds = statistics.median(_span(group) for group in rounds[0])
    speed = 2 * case.x_bytes / microseconds
    rows.append({"direction": "", "kernel": COPY, "passes": 2, "us": microseconds, "speed": speed})
    for direction, groups in zip((_FORWARD, _BACKWARD), rounds[1:], strict=True):
        for i, event in enumerate(groups[0]):
            name = short(event.name)
            row = {
                "direction": direction,
                "kernel": name,
                "passes": passes(name, case.combine),
                "us": statistics.median(group[i].duration for group in groups),
                "blocks": event.blocks,
                "registers": event.registers,
            }
            if i + 1 < len(groups[0]):
                row["gap"] = statistics.median(g[i + 1].start - g[i].end for g in groups)
            rows.append(row)
        spans = statistics.median(_span(group) for group in groups)
        own = [row["passes"] for row in rows if row["direction"] == direction]
        total = None if None in own else sum(own)
        rows.append({"direction": direction, "kernel": SPAN, "passes": total, "us": spans})
    for row in rows:
        if row["passes"]:
            row["speed"] = row["passes"] * case.x_bytes / row["us"]
            row["of_copy"] = row["speed"] / speed
    return rows


def _span(group: list[Event]) -> float:
    return max(event.end for event in group) - group[0].start


def _once(case: Case, backend: str) -> list[dict[str, object]]:
    forward, backward, _ = calls(case, backend)
    torch.cuda.synchronize(case.device)
    torch.cuda.profiler.start()
    forward()
    backward()
    torch.cuda.synchronize(case.device)
    torch.cuda.profiler.stop()
    return []


#: The columns of the file. `speed`: bytes per microsecond; `gap`: microseconds to the next kernel.
_MEASURED = (
    "direction",
    "kernel",
    "passes",
    "us",
    "speed",
    "of_copy",
    "gap",
    "blocks",
    "registers",
)
_COLUMNS = ("family", "backend", "shape", "reduction", "layout", "combine", "x_bytes", *_MEASURED)


def main(arguments: list[str] | None = None) -> int:
    """Measures every case in every family; returns 1 if one could not be."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=options.shape, nargs="+", required=True)
    parser.add_argument("--reduction", type=options.positive, default=16, help="%(default)s")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--combine", nargs="+", choices=("add", "max"), default=("add", "max"))
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    if (args.output is None) != args.once:
        parser.error("either --once or --output FILE")
    device = here()
    missing, rows, failed = providers.missing(device), [], 0
    for backend in {FAMILIES[name].backend for name in args.family} & missing.keys():
        print(f"{backend} is left out: {missing[backend]}")
    for name, shape, layout, combine in itertools.product(
        args.family, args.shape, args.layout, args.combine
    ):
        family = FAMILIES[name]
        if family.backend in missing:
            failed += 1
            continue
        case = Case(shape, torch.float16, layout, args.reduction, combine, device)
        try:
            with mock.patch.dict(os.environ, family.environment):
                found = (_once if args.once else measure)(case, family.backend)
        except Exception as error:  # whatever it is, the other cases are worth having
            failed += 1
            print(f"FAILED: {name}, {case}: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{name}, {case}", flush=True)
        known = {"family": name, "backend": family.backend, "x_bytes": case.x_bytes}
        known |= {"shape": case.shape_name, "layout": layout, "combine": combine}
        known["reduction"] = args.reduction
        rows += [known | row for row in found]
        if args.output:
            _write(args.output, rows)
    return 1 if failed else 0


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    sys.exit(main())
