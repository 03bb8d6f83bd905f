"""The host's time for a call at a tiny map, where a GPU waits for the host.

Microseconds per call, forward and forward + backward, for the eager operators and for each backend
that can be used; and the same with BatchNorm and ReLU before the block, as one operator, beside
torch's two followed by the block of this package (unfused).

On a GPU: how long the host takes to queue the call, while the GPU has nothing else to do. Without
one: the processor time of a single thread on tensors of the host. Eager and cpu compute there as
well, which at such a map is little. Triton's kernels are compiled, and nothing is launched.

All in turn, round by round, and a clone of a fixed map with them, which shows how noisy the machine
was.
Written: host.csv.
"""

import argparse
import contextlib
import csv
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from scse_kernels import backends

from . import ops, options, providers, report, timing
from .cases import LAYOUTS, Case
from .timing import Timing

#: Calls to a sample: short against a disturbance, and fewer kernels than a launch queue holds.
_CALLS = 20
DIRECTIONS = ("forward", "forward + backward")
#: Stands for block and provider where the fixed clone is timed.
_NOISE = ("", timing.FIXED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench host`."""
    parser.add_argument("--shape", type=options.shape, default=(2, 64, 8, 8), help="2x64x8x8")
    parser.add_argument("--dtype", choices=ops.DTYPES, default="float32", help="%(default)s")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="%(default)s")
    parser.add_argument("--reduction", type=options.positive, default=16, help="%(default)s")
    parser.add_argument("--rounds", type=options.positive, default=50, help="%(default)s")


def run(args: argparse.Namespace) -> int:
    """Print and write the table."""
    device = args.device
    dtype = getattr(torch, args.dtype)
    cases = {
        block: Case(args.shape, dtype, args.layout, args.reduction, "add", device, block)
        for block in providers.BLOCKS
    }
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        environment = report.environment(device)
        report.print_header(environment, providers.missing(device))
        names = {
            block: [
                *[c for c in providers.competitors(block) if c not in providers.COMPILED],
                *providers.usable(device, block),
            ]
            for block in cases
        }
        if device.type == "cpu" and "triton" not in names["scse"]:  # it is there where interpreted
            try:
                stack.enter_context(without_launches())
                for own in names.values():
                    own.append("triton")
                report.console.print("triton: its launches are replaced by nothing")
            except ImportError as error:
                report.console.print(f"[yellow]no Triton: {error}")
        rows = [(block, name) for block, own in names.items() for name in own]
        found = {
            (*row, direction): taken
            for direction in DIRECTIONS
            for row, taken in _measure(cases, rows, direction, args.rounds).items()
        }
    noise = {direction: found.pop((*_NOISE, direction)).spread for direction in DIRECTIONS}
    for block, own in names.items():
        table = report.table(f"{cases[block]}, microseconds per call")
        table.add_column("")
        for direction in DIRECTIONS:
            table.add_column(direction, justify="right")
            table.add_column("x eager", justify="right")
        for name in own:
            cells = []
            for direction in DIRECTIONS:
                taken, eager = found[block, name, direction], found[block, "eager", direction]
                ratio = report.ratio(eager, taken) if name != "eager" else ""
                cells += [f"{taken.median * 1e6:.1f}", ratio]
            table.add_row(name, *cells)
        report.console.print(table)
    report.print_noise(noise)
    path = args.output / "host.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["provider", "direction", "seconds", "noise", "case", *environment])
        for (block, name, direction), taken in found.items():
            row = [name, direction, taken.median, noise[direction], cases[block]]
            writer.writerow([*row, *environment.values()])
    report.console.print(f"Written: {path}")
    return 0


def _measure(
    cases: dict[str, Case], rows: list[tuple[str, str]], direction: str, rounds: int
) -> dict[tuple[str, str], Timing]:
    """What a call of each block and provider takes, and what the fixed clone does."""
    inputs = {block: case.inputs() for block, case in cases.items()}
    device = next(iter(cases.values())).device
    calls = {_NOISE: timing.fixed_clone(device)}
    for block, name in rows:
        module, own = ops.module_of(name, cases[block], inputs[block]), inputs[block]
        both = direction != "forward"
        calls[block, name] = ops.both(module, own) if both else _infer(module, own)
    for call in calls.values():
        for _ in range(3):  # compiles, and sets up what is set up once
            call()
    samples = {row: [] for row in calls}
    order = list(calls)
    for i in range(rounds):
        shift = i % len(order)
        for row in order[shift:] + order[:shift]:
            samples[row].append(_sample(calls[row], device))
    return {row: Timing(tuple(values), _CALLS) for row, values in samples.items()}


def _infer(module: nn.Module, inputs) -> Callable[[], object]:
    """The forward as in training, with all that the backward will need."""
    return lambda: module(inputs.x)


def _sample(call: Callable[[], object], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    # On a GPU the backward is queued by a thread of autograd's own.
    clock = time.perf_counter if on_gpu else time.thread_time
    if on_gpu:
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(_CALLS):
        call()
    return (clock() - start) / _CALLS


class _Launcher:
    """Takes what Triton's launchers take, and launches nothing."""

    def __call__(self, *arguments: object) -> None:
        pass


class _Driver:
    """What Triton asks of a driver on the way to a launch: one H100, and the default stream."""

    launcher_cls = _Launcher

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 1 << 20  # not one that Triton keeps real kernels for

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton's backend takes tensors of the host for those of a GPU. It compiles, and launches
    nothing.

    Results are memory as it was.
    """
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from scse_kernels._triton import plan

    def load(kernel) -> None:
        kernel.function, kernel._run = 0, _Launcher()  # no module: nothing to unload

    before = driver._active, CompiledKernel._init_handles, plan.takes_addresses, backends.why_not
    driver.set_active(_Driver())
    CompiledKernel._init_handles, plan.takes_addresses = load, lambda device: True
    backends.why_not = lambda backend, *more: (
        None if backend == "triton" else before[3](backend, *more)
    )
    try:
        yield
    finally:
        driver._active, CompiledKernel._init_handles, plan.takes_addresses, backends.why_not = (
            before
        )
