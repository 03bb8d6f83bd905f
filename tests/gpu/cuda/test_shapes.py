"""Shapes that take another way through a kernel than those of test_kernels.py."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from budget import make_case
from cases import ARRANGED, execute, in_layout
from gpulab import A100, H100

PLANES, LAST = "contiguous", "channels_last"
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16

SHAPES = {
    "strips of several tiles, wide": (PLANES, "add", FLOAT, (2, 128, 4, 140)),
    "strips of several tiles, narrow": (PLANES, "max", HALF, (2, 21, 1, 601)),
    "... channels in one step": (LAST, "mul", HALF, (1, 21, 1, 601)),
    "... channels in several steps": (LAST, "concat", FLOAT, (2, 37, 1, 531)),
    "... wide, channels in one step": (LAST, "max", BFLOAT, (1, 72, 1, 1090)),
    "channels in several steps, wide": (LAST, "max", HALF, (2, 264, 3, 7)),
    "x does not all stay in shared memory": (PLANES, "max", HALF, (1, 2056, 1, 16)),
    "... of narrow rows": (PLANES, "sse", FLOAT, (1, 4100, 1, 3)),
    "... channels last": (LAST, "max", FLOAT, (1, 648, 1, 29)),
    "... channels last, the sum": (LAST, "add", FLOAT, (1, 648, 1, 29)),
    "rows of 8 bytes": (PLANES, "max", HALF, (2, 67, 2, 10)),
    "rows of single elements, many channels": (PLANES, "add", HALF, (2, 521, 7, 7)),
    "the largest excitation": (PLANES, "cse", HALF, (3, 264, 1, 8)),
    "one element": (PLANES, "add", FLOAT, (1, 1, 1, 1)),
    "one channel": (LAST, "max", HALF, (2, 1, 3, 5)),
    "one position": (PLANES, "mul", BFLOAT, (2, 50, 1, 1)),
    "many samples": (LAST, "concat", BFLOAT, (9, 8, 2, 4)),
    "more samples than are on their way": (PLANES, "add", FLOAT, (70, 40, 1, 8)),
    "a sample alone, apart": (PLANES, "sse", HALF, (1, 16, 5, 8)),
    "strips of several tiles, channels in several steps, wide": (
        LAST,
        "max",
        HALF,
        (1, 264, 1, 530),
    ),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes(what):
    layout, variant, dtype, shape = SHAPES[what]
    gpu = (H100, A100)[list(SHAPES).index(what) % 2]
    way = ARRANGED["samples apart" if "apart" in what else "dense"]
    case = make_case(shape, variant, dtype).arranged(*[partial(way, layout)] * 2)
    execute(gpu, case)


@pytest.mark.parametrize("layout", (PLANES, LAST))
@pytest.mark.parametrize("which", ("x", "dy"))
def test_a_misaligned_map_of_aligned_size(layout, which):
    case = make_case((2, 24, 4, 8), "max", HALF).arranged(*[partial(in_layout, layout)] * 2)
    case = case.arranged(**{which: partial(ARRANGED["misaligned"], layout)})
    lab = execute(H100, case)
    widths = {kernel.split(", ")[1] for kernel in lab.launched if "excite" not in kernel}
    assert widths == ({"4"} if which == "x" else {"8", "4"})


@pytest.mark.parametrize("layout", (PLANES, LAST))
def test_equal_gates_share_the_gradient(layout):
    """All weights are zero, so both gates are 1/2 and all products tie."""
    case = make_case((2, 24, 4, 8), "max", HALF)
    tied = replace(case, parameters=tuple(torch.zeros_like(p) for p in case.parameters))
    execute(H100, tied.arranged(*[partial(in_layout, layout)] * 2))


def test_samples_that_begin_anywhere():
    """Rows are multiples of an access, and the distance between samples is not."""

    def arrange(t):
        size = t[0].numel() + 1
        around = torch.full((t.shape[0] * size,), torch.nan, dtype=t.dtype)
        return around.as_strided(t.shape, (size, *t.stride()[1:])).copy_(t)

    execute(H100, make_case((3, 8, 2, 10), "max", HALF).arranged(arrange, arrange))
