"""What does not change the result: the order of execution, and gradients that nobody wants. And a
batch without samples."""

from functools import partial

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case, same_bits
from cases import LAYOUTS, in_layout, results
from fakecuda import A100, H100, NO_CLUSTERS, SMALL_BLOCKS, running_on

SCHEDULES = (
    {"seed": 1, "resident": 1},
    {"seed": 2, "resident": 3},
    {"seed": 3},
    {"seed": 4, "resident": 16},
)


@pytest.mark.parametrize(
    "gpu, variant, layout, dtype",
    [
        (NO_CLUSTERS, "max", "contiguous", torch.float16),
        (NO_CLUSTERS, "concat", "channels_last", torch.float32),
        (A100, "add", "channels_last", torch.bfloat16),
        (SMALL_BLOCKS, "add", "contiguous", torch.float32),
        (SMALL_BLOCKS, "max", "channels_last", torch.float16),
    ],
    ids=str,
)
def test_any_order_of_execution_gives_the_same_bits(gpu, variant, layout, dtype):
    case = make_case((2, 37, 6, 40), variant, dtype).arranged(*[partial(in_layout, layout)] * 2)
    in_order, lab = results(gpu, case, seed=None)
    assert max(report.ctas for report in lab.reports) > 2
    for schedule in SCHEDULES:
        again, _ = results(gpu, case, **schedule)
        for name, t in in_order.items():
            assert same_bits(t, again[name]), f"{name} with {schedule}"


#: What wants a gradient -> arguments; the operators are told x, channel branch, spatial branch.
WANTED = {
    "x": ("x",),
    "parameters": NAMES[1:],
    "x and channel": ("x", "w1", "b1", "w2", "b2"),
    "x and spatial": ("x", "ws", "bs"),
    "channel": ("w2",),
    "spatial": ("bs",),
}


@pytest.mark.parametrize("gpu", (NO_CLUSTERS, SMALL_BLOCKS), ids=("general", "on chip"))
@pytest.mark.parametrize("variant", ("add", "max", "concat", "cse", "sse"))
def test_gradients_only_where_they_are_wanted(gpu, variant):
    for number, wanted in enumerate(WANTED.values()):
        layout, dtype = LAYOUTS[number % 2], (torch.float16, torch.float32)[number // 2 % 2]
        case = make_case((2, 16, 5, 8), variant, dtype)
        case = case.arranged(*[partial(in_layout, layout)] * 2)
        everything, _ = results(gpu, case)
        given = dict(zip(NAMES, (case.x, *case.parameters), strict=True))
        given = {
            name: t if t is None else t.detach().requires_grad_(name in wanted)
            for name, t in given.items()
        }
        wanted = [name for name in wanted if given[name] is not None]
        if not wanted:
            continue
        with running_on(gpu):
            y = call(variant, **given, backend="cuda")
            gradients = torch.autograd.grad(y, [given[name] for name in wanted], case.dy)
        for name, gradient in zip(wanted, gradients, strict=True):
            assert same_bits(gradient, everything[f"d{name}"]), (name, wanted)


@pytest.mark.parametrize("gpu", (A100, NO_CLUSTERS, H100), ids=("sm_80", "sm_90", "on chip"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_samples(gpu, variant):
    case = make_case((1, 40, 5, 7), variant, torch.float16, parameter_dtype=torch.float64)
    given = [case.x[:0], *case.parameters]
    given = [t if t is None else t.detach().requires_grad_() for t in given]
    with running_on(gpu) as lab:
        y = call(variant, *given, backend="cuda")
        present = [t for t in given if t is not None]
        dx, *gradients = torch.autograd.grad(y, present, torch.ones_like(y))
    assert not lab.refused
    assert y.shape == (0, *case.dy.shape[1:]) and dx.shape == (0, 40, 5, 7)
    for gradient, parameter in zip(gradients, present[1:], strict=True):
        assert same_bits(gradient, torch.zeros_like(parameter))
