"""Self-check: what is built and usable here, and whether it computes what the reference defines.

    python -m scse_kernels

Every backend that can run on a device of this machine is compared with the reference in float64:
output and all gradients of scse (each way to combine), cse and sse, for each dtype and memory
format. Takes a few seconds. Exits with 1 if one disagrees.
"""

import argparse
import math
import platform
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import scse_kernels

from . import backends, functional, ops, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Odd sizes leave a remainder in every vector and strip; one, two and three spatial axes.
SHAPES = ((3, 19, 201), (2, 67, 33, 31), (2, 24, 7, 9, 11))
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
OPERATIONS = ("cse", "sse", *ops.COMBINE)
ARGUMENTS = ("x", "w1", "b1", "w2", "b2", "ws", "bs")


class Case(NamedTuple):
    """One comparison: an operation ("cse", "sse" or how scse combines) on one kind of input."""

    operation: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.operation} {list(self.shape)}{layout}"


class Worst(NamedTuple):
    """The largest error found, in units of its tolerance (so more than one is too much)."""

    error: float
    where: str


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        for channels_last in (False, True)[: 1 + (len(shape) in CHANNELS_LAST)]:
            for operation in OPERATIONS:
                yield Case(operation, dtype, shape, channels_last)


def inputs(case: Case) -> tuple[dict[str, Tensor | None], Tensor]:
    """The arguments of scse() by name, None for an absent branch, and dy, all on the CPU.

    x has zeros, as after a ReLU: there the two products of "max" tie.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, c, *spatial = case.shape
    hidden = c // 2
    x = normal(*case.shape)
    x = torch.where(x.abs() < 0.2, 0.0, x)
    # Layers' usual scale, 1 / sqrt(fan in), keeps the gates away from 0 and 1.
    channel = (normal(hidden, c) * c**-0.5, normal(hidden), normal(c, hidden) * hidden**-0.5)
    tensors = (x, *channel, normal(c), normal(c) * c**-0.5, normal(1))
    absent = {"cse": ("ws", "bs"), "sse": ("w1", "b1", "w2", "b2")}.get(case.operation, ())
    named = {
        name: None if name in absent else tensor.to(case.dtype)
        for name, tensor in zip(ARGUMENTS, tensors, strict=True)
    }
    dy = normal(n, 2 * c if case.operation == "concat" else c, *spatial).to(case.dtype)
    if case.channels_last:
        memory_format = CHANNELS_LAST[x.dim()]
        named["x"] = named["x"].contiguous(memory_format=memory_format)
        dy = dy.contiguous(memory_format=memory_format)
    return named, dy


def with_gradients(function, named: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """y = function(**named) under "y", and under "d<name>" the gradient of each argument there."""
    leaves = {k: t.detach().requires_grad_() for k, t in named.items() if t is not None}
    y = function(**{**named, **leaves})
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}}


def expected(case: Case) -> dict[str, Tensor]:
    """What the reference computes in float64 from the same, already rounded, inputs."""
    named, dy = inputs(case)
    named = {name: None if t is None else t.double() for name, t in named.items()}
    combine = case.operation if case.operation in ops.COMBINE else "add"
    return with_gradients(lambda **a: reference.scse(**a, combine=combine), named, dy.double())


def computed(case: Case, backend: str, device: torch.device) -> dict[str, Tensor]:
    """What the backend computes, by way of the public functions."""

    def function(**named):
        if case.operation in ops.COMBINE:
            return functional.scse(**named, combine=case.operation, backend=backend)
        branch = {name: t for name, t in named.items() if t is not None or name == "x"}
        return getattr(functional, case.operation)(**branch, backend=backend)

    named, dy = inputs(case)
    named = {name: None if t is None else t.to(device) for name, t in named.items()}
    return with_gradients(function, named, dy.to(device))


def tolerance(want: Tensor, case: Case) -> float:
    """How far a result may be from `want`.

    Backends form sums in float32 (float64 for float64) and round the result once to case.dtype:
    a few roundings of that dtype, of the largest magnitude. A gradient that is a sum of n terms of
    either sign is about sqrt(n) times smaller than its terms are together, so the roundings of the
    sum weigh that much more.
    """
    rounding = torch.finfo(case.dtype).eps
    rounding_of_sums = torch.finfo(reference.accumulation_dtype(case.dtype)).eps
    few = 4 * rounding + 4 * math.sqrt(math.prod(case.shape)) * rounding_of_sums
    return few * want.abs().max().item()


def error(got: Tensor, want: Tensor, case: Case) -> float:
    """The largest error of `got` in tolerances; infinite where it isn't even comparable."""
    if got.shape != want.shape or got.dtype != case.dtype:
        return math.inf
    largest = (got.cpu().double() - want).abs().max().item()
    return math.inf if math.isnan(largest) else largest / tolerance(want, case)


def worst(results: dict[Case, dict[str, Tensor]], backend: str, device: torch.device) -> Worst:
    """Compares a backend with the expected results of some cases."""
    found = Worst(0.0, "")
    for case, want in results.items():
        try:
            got = computed(case, backend, device)
        except Exception as raised:  # a broken backend may fail in any way; it is to be reported
            return Worst(math.inf, f"{case}: {type(raised).__name__}: {raised}")
        for name, tensor in want.items():
            here = Worst(error(got[name], tensor, case), f"{name} of {case}")
            found = max(found, here, key=lambda w: w.error)
    return found


def devices() -> list[torch.device]:
    return [
        torch.device("cpu"),
        *(torch.device("cuda", i) for i in range(torch.cuda.device_count())),
    ]


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def triton_version() -> str:
    """Triton's version, and whether it is newer than what the kernels were tried with."""
    from . import _triton

    try:
        import triton
    except ImportError:
        return "not installed"
    if _triton.version(triton.__version__) > _triton.NEWEST:
        return "{} (not tried: {}.{} is the newest that was)".format(
            triton.__version__, *_triton.NEWEST
        )
    return triton.__version__


def status(backend: str, device: torch.device) -> str:
    """ "usable", with the instruction set of the CPU kernels, or why not."""
    if reason := backends.why_not(backend, device):
        return f"not usable: {reason}"
    if backend == "cpu":
        return f"usable, with kernels for {torch.ops.scse_kernels.cpu_capability()}"
    return "usable"


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())
    print()


def check(backends: list[tuple[str, torch.device]]) -> int:
    """Prints how each backend compares with the reference; returns how many rows disagree."""
    rows, wrong = [], 0
    for dtype in DTYPES:
        results = {case: expected(case) for case in cases(dtype)}
        for backend, device in backends:
            if backends.why_not(backend, device, dtype):
                continue
            found = worst(results, backend, device)
            agrees = found.error <= 1
            wrong += not agrees
            name, verdict = str(dtype).removeprefix("torch."), "ok" if agrees else "WRONG"
            rows.append((backend, str(device), name, verdict, f"{found.error:.2g}", found.where))
    header = ("backend", "device", "dtype", "", "error / tolerance", "largest in")
    print_table(header, sorted(rows, key=lambda row: row[:2]))
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit status, 1 if a usable backend is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m scse_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)

    versions = (
        ("scse_kernels", scse_kernels.__version__),
        ("torch", torch.__version__),
        ("triton", triton_version()),
        ("python", platform.python_version()),
    )
    print_table(("package", "version"), list(versions))
    print_table(("device", ""), [(str(device), describe(device)) for device in devices()])

    pairs = [(backend, device) for backend in ("eager", *ops.BACKENDS) for device in devices()]
    rows = [(backend, str(device), status(backend, device)) for backend, device in pairs]
    print_table(("backend", "device", ""), rows)

    usable = [pair for pair in pairs if backends.why_not(*pair) is None]
    wrong = check(usable)
    print(f"{wrong} of the above are WRONG" if wrong else "all agree with the float64 reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
