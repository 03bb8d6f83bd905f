"""What does not change the result: the order of execution, and gradients that nobody wants. And a
batch without samples."""

from functools import partial
from itertools import product

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case, same_bits
from cases import LAYOUTS, in_layout, results
from fakecuda import running_on
from gpulab import A100, H100

from scse_kernels.ops import BACKWARD, COMBINE, FORWARD

#: For excitations of many weights, a launch for each layer.
LAYERS = H100.scaled(name="many weights")
SCHEDULES = (
    {"seed": 1, "resident": 1},
    {"seed": 2, "resident": 3},
    {"seed": 3},
)


@pytest.mark.parametrize(
    "gpu, variant, layout, dtype",
    [
        (H100, "max", "contiguous", torch.float16),
        (H100, "concat", "channels_last", torch.float32),
        (A100, "add", "channels_last", torch.bfloat16),
        (LAYERS, "add", "channels_last", torch.float16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_any_order_of_execution_gives_the_same_bits(gpu, variant, layout, dtype):
    shape, reduction = ((3, 132, 2, 5), 1) if gpu is LAYERS else ((2, 37, 6, 30), 2)
    case = make_case(shape, variant, dtype, reduction)
    case = case.arranged(*[partial(in_layout, layout)] * 2)
    in_order, lab = results(gpu, case, seed=None)
    assert max(report.ctas for report in lab.reports) > 2
    for schedule in SCHEDULES:
        again, _ = results(gpu, case, **schedule)
        for name, t in in_order.items():
            assert same_bits(t, again[name]), f"{name} with {schedule}"


#: What the backward operator may be told of: dx, the channel branch's gradients, the spatial one's.
NEEDS = [needs for needs in product((True, False), repeat=3) if any(needs)]


@pytest.mark.parametrize(
    "gpu, variant",
    [
        *product((H100,), ("add", "max", "concat", "cse", "sse")),
        *product((LAYERS,), ("add", "cse")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_gradients_only_where_they_are_wanted(gpu, variant):
    number = VARIANTS.index(variant)
    layout, dtype = LAYOUTS[number % 2], (torch.float16, torch.float32)[number // 2 % 2]
    # For the sum strips of several tiles.
    shape = (1, 21, 1, 601) if variant == "add" else (2, 16, 5, 8)
    shape, reduction = ((2, 132, 1, 9), 1) if gpu is LAYERS else (shape, 2)
    case = make_case(shape, variant, dtype, reduction)
    case = case.arranged(*[partial(in_layout, layout)] * 2)
    code = COMBINE.get(variant, 0)
    with running_on(gpu):
        _, *small = FORWARD["cuda"](case.x, *case.parameters, code)

    def gradients(*needs):
        with running_on(gpu):
            return BACKWARD["cuda"](case.dy, case.x, *case.parameters, *small, code, *needs)

    everything = gradients(True, True, True)
    # A branch that is absent can't be asked for.
    for dx, channel, spatial in NEEDS:
        if (channel and variant == "sse") or (spatial and variant == "cse"):
            continue
        wanted = (dx, *(channel,) * 4, *(spatial,) * 2)
        some = gradients(dx, channel, spatial)
        for name, needed, t, whole in zip(NAMES, wanted, some, everything, strict=True):
            if needed:
                assert same_bits(t, whole), f"d{name} of {(dx, channel, spatial)}"
            else:
                assert t.numel() == 0, f"d{name} was not asked for"


@pytest.mark.parametrize("gpu", (A100, H100), ids=("sm_80", "sm_90"))
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
