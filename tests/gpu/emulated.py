"""The package's functions with the Triton backend on the emulator (tests/gpulab): CPU tensors stand
for those of a GPU, and the kernels run as the PTX that Triton makes of them."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import budget
import gpulab
import pytest
from budget import Case, call, output_and_gradients, same_bits
from gpu.proof import record

from scse_kernels import backends
from scse_kernels._triton import heuristics

FORWARD = ("squeeze_kernel", "excite_kernel", "apply_kernel")
BACKWARD = ("reduce_kernel", "excite_backward_kernel", "apply_backward_kernel")
#: In the place of the excitation, where its weights are many.
BY_ROWS = {
    "excite_kernel": ("excite_hidden_kernel", "excite_gates_kernel"),
    "excite_backward_kernel": ("excite_backward_hidden_kernel", "excite_backward_mean_kernel"),
}
ONE_LAUNCH = ("forward_kernel", "backward_kernel")


@contextmanager
def emulator(target=90, launches=3, processors=None, **options):
    """What gpulab.intercept yields, for an H100 (an A100 below 90) or options["device"]. A launch
    that may start while the one before ends must wait before it touches what that does.

    launches: kernels each way, 3 or 1. processors: tiles are chosen for so many; few of them give
    small maps the tiles of large ones.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "why_not", lambda backend, *_: None)
        patch.setenv("SCSE_TRITON_LAUNCHES", str(launches))
        if processors:
            patch.setattr(heuristics, "multiprocessors", lambda device: processors)
        options = {"seed": None, "overlap": True, **options}
        with gpulab.intercept(target, cuda_available=True, **options) as lab:
            yield lab


def results(case: Case, **options):
    """y and all gradients, and what ran."""
    with emulator(**options) as lab:
        return output_and_gradients(partial(call, backend="triton"), case), lab


def kernels(variant: str, launches: int, by_rows: bool = False) -> tuple[str, ...]:
    """Those of one forward and backward, in order."""
    if launches == 1:
        return ONE_LAUNCH
    names = (*(k for k in FORWARD if variant != "sse" or k != "excite_kernel"), *BACKWARD)
    if by_rows:
        return tuple(one for name in names for one in BY_ROWS.get(name, (name,)))
    return names


def check(case: Case, orders=((3, None),), target=90, by_rows=False, **options) -> dict:
    """Asserts that all results are within budget, and the same bits in all `orders`: of launches
    each way and seeds of the order of execution (None: programs in their order)."""
    first = None
    ran = Counter()
    for launches, seed in orders:
        got, lab = results(case, target=target, launches=launches, seed=seed, **options)
        names = [report.kernel for report in lab.reports]
        assert tuple(names) == kernels(case.variant, launches, by_rows)
        ran.update(names)
        if first is None:
            first, found = got, budget.errors(case, got)
            for name, error in found.items():
                assert error <= 1, f"{name}: error is {error:.3g} times what is allowed"
        for name, right in first.items():
            assert same_bits(got[name], right), f"{name}: {launches} launches, seed {seed}"
    forward = found.pop("y")
    for name, count in ran.items():
        is_forward = name in (*FORWARD, *BY_ROWS["excite_kernel"], ONE_LAUNCH[0])
        record("triton", name, target, count, forward if is_forward else max(found.values()))
    return first
