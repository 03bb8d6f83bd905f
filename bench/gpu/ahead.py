"""Compiles what later steps need, in as many processes as there are cores. The steps themselves
would compile one kernel after the other. Results wait in the caches of Triton and of Inductor.

    python -m bench.gpu.ahead --jobs 14
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import sys
from collections.abc import Iterator

import torch

from scse_kernels import selfcheck

from .. import options
from ..cases import LAYOUTS, Case
from . import kernels
from .plan import DEEP, LARGE, LEVELS

#: A call of one of the functions below.
_Task = tuple[str, tuple]


def tasks() -> Iterator[_Task]:
    """Those of the first steps first."""
    for dtype in selfcheck.DTYPES:
        for case in selfcheck.cases(dtype, torch.device("cuda"), "triton"):
            for launches in ("3", "1"):
                yield "check", (case, launches)
    levels = [options.shape(shape) for shape in LEVELS]
    large = options.shape(LARGE)
    for layout, combine in itertools.product(LAYOUTS, ("add", "max")):
        for shape, overlap in itertools.product((*levels, large), "10"):
            yield "timed", (shape, 16, layout, combine, overlap)
    for shape, layout, overlap in itertools.product(DEEP, LAYOUTS, "10"):
        yield "timed", (options.shape(shape), 2, layout, "add", overlap)
    for layout, combine in itertools.product(LAYOUTS, ("add", "max")):
        for shape in (*levels, large):
            yield "provider", ("triton", shape, 16, torch.bfloat16, layout, combine)
    for name, layout, combine in itertools.product(
        ("compile", "rewritten"), LAYOUTS, ("add", "max")
    ):
        for shape in levels:
            yield "provider", (name, shape, 16, torch.float16, layout, combine)


def check(case: selfcheck.Case, launches: str) -> None:
    """A case of the self-check, through Triton in one launch or in three."""
    with selfcheck.environment({"SCSE_TRITON_LAUNCHES": launches}):
        selfcheck.computed(case, "triton", torch.device("cuda"))


def timed(shape: tuple[int, ...], reduction: int, layout: str, combine: str, overlap: str) -> None:
    """What `bench.gpu.kernels` times through Triton, with launches that overlap or without."""
    with selfcheck.environment({"SCSE_TRITON_OVERLAP": overlap}):
        provider("triton", shape, reduction, torch.float16, layout, combine)


def provider(
    name: str,
    shape: tuple[int, ...],
    reduction: int,
    dtype: torch.dtype,
    layout: str,
    combine: str,
) -> None:
    """A provider's forward and backward on one case of `bench ops`."""
    torch._dynamo.reset()
    kernels.calls(Case(shape, dtype, layout, reduction, combine, torch.device("cuda")), name)


def run(task: _Task) -> str | None:
    """Runs a task, in a process that does one after the other; returns what went wrong."""
    function, arguments = task
    try:
        globals()[function](*arguments)
    except Exception as error:  # the step that needs it will say so, too
        return f"{function}{arguments}: {type(error).__name__}: {str(error)[:500]}"
    return None


def main() -> int:
    """Runs all tasks; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ahead", description=__doc__)
    parser.add_argument("--jobs", type=options.positive, default=1, help="processes (%(default)s)")
    args = parser.parse_args()
    todo, failed = list(tasks()), 0
    spawn = multiprocessing.get_context("spawn")  # CUDA can't be used in a fork
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn) as pool:
        for problem in pool.map(run, todo):
            if problem:
                failed += 1
                print(f"FAILED: {problem}", flush=True)
    print(f"{len(todo) - failed} of {len(todo)} calls compiled")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
