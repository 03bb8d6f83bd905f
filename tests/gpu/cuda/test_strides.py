"""Maps whose rows or samples are not neighbours, read as they are."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from budget import call, check, make_case
from targets import Target

sys.path.insert(0, str(Path(__file__).parent))  # the fake runtime is a folder beside this file

from fakecuda.build import NoCompiler
from fakecuda.driver import connect, running_on
from gpulab import A100, H100

ON_CPU = Target("cuda", "cpu")


@pytest.fixture(autouse=True)
def runtime():
    try:
        connect()
    except NoCompiler as why:
        pytest.skip(str(why))


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def part(t, arranged, before, after, step=1):
    """t as channels of a larger map, all else of which is NaN."""
    size = [t.shape[0], before + step * t.shape[1] + after, *t.shape[2:]]
    larger = arranged(torch.full(size, torch.nan, dtype=t.dtype))
    view = larger[:, before : before + step * t.shape[1] : step]
    view.copy_(t)
    return view


STRIDES = {
    # the pitch keeps rows aligned, or doesn't
    "channels_last slice, wide": lambda t: part(t, channels_last, 0, 8),
    "channels_last slice, odd": lambda t: part(t, channels_last, 1, 2),
    "every second channel": lambda t: part(t, torch.Tensor.contiguous, 1, 0, 2),
    "one sample": lambda t: t[:1].expand(t.shape),
    "one channel": lambda t: t[:, :1].expand(t.shape),
    "one position": lambda t: channels_last(t)[..., :1, :1].expand(t.shape),
    "one element": lambda t: t.flatten()[0].expand(t.shape),
}


@pytest.mark.parametrize("gpu", (A100, H100), ids=("8.0", "9.0"))
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, gpu):
    arrange, number = STRIDES[strides], list(STRIDES).index(strides)
    variants = [("add", "max", "concat", "mul", "cse", "sse")[(number + i) % 6] for i in (0, 1)]
    dtypes = torch.float16, torch.float32
    x = channels_last if "last" in strides or "position" in strides else None
    for variant, shape, dtype in zip(variants, ((2, 16, 4, 8), (2, 11, 3, 5)), dtypes, strict=True):
        case = make_case(shape, variant, dtype)
        with running_on(gpu):
            check(case.arranged(arrange, arrange), ON_CPU)
            check(case.arranged(x, arrange), ON_CPU)


@pytest.mark.parametrize("gpu", (A100, H100), ids=("8.0", "9.0"))
def test_wide_accesses_where_the_pitch_allows(gpu):
    """Of a slice as of a dense map; where slices begin or end oddly, of an element."""
    case = make_case((2, 64, 8, 8), "add", torch.float16)

    def accesses(arrange):
        x = arrange(case.x)
        with running_on(gpu) as lab:
            y = call("add", x, *case.parameters, backend="cuda")
        assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
        return sum((report.load_widths for report in lab.reports), Counter())

    dense = accesses(channels_last)
    assert accesses(lambda t: part(t, channels_last, 8, 8)) == dense
    odd = accesses(lambda t: part(t, channels_last, 1, 2))
    assert odd[2] >= dense[2] + case.x.numel() and odd[16] < dense[16]
