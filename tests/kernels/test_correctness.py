"""Every backend's output and gradients against float64, over variants, dtypes, shapes, layouts."""

import pytest
import torch
from budget import VARIANTS, check, check_infinite_weight, make_case, with_layouts

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

SMALL = [  # shape, reduction
    ((2, 5, 33), 2),
    ((2, 3, 7, 9), 1),
    ((5, 1, 1, 1), 1),
    ((1, 1, 5, 5), 1),
    ((4, 32, 1, 1), 16),
    ((2, 17, 13, 11), 16),
    ((2, 64, 16, 16), 16),
    ((1, 513, 3, 5), 2),
    ((2, 6, 3, 5, 7), 2),
    ((1, 32, 4, 4, 4), 1),
]
LARGE = [  # several strips to a sample, tails in each of them
    ((1, 4, 40000), 2),
    ((3, 17, 4099), 2),
    ((3, 8, 97, 131), 2),
    ((1, 19, 16, 17, 18), 16),
    ((1, 150, 40, 41), 2),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, reduction, layout", with_layouts(SMALL))
def test_small_maps(target, shape, reduction, layout, dtype, variant):
    check(make_case(shape, variant, dtype, reduction).in_layout(layout), target)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape, reduction, layout", with_layouts(LARGE))
def test_maps_of_several_strips(target, shape, reduction, layout, variant):
    check(make_case(shape, variant, torch.float32, reduction).in_layout(layout), target)


@pytest.mark.parametrize("variant", ("add", "max"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape, reduction, layout", with_layouts(LARGE[2:4]))
def test_maps_of_several_strips_in_other_dtypes(target, shape, reduction, layout, dtype, variant):
    check(make_case(shape, variant, dtype, reduction).in_layout(layout), target)


@pytest.mark.parametrize("positions", (*range(2, 20), 31, 33, 63, 65, 127, 129, 255, 257))
def test_every_tail_of_a_vector(target, positions):
    check(make_case((2, 5, positions), "add"), target)
    check(make_case((2, 5, positions), "max", torch.float16), target)


@pytest.mark.parametrize("channels", (*range(2, 20), 31, 33, 63, 65, 127, 129))
def test_every_tail_of_a_channels_last_vector(target, channels):
    for variant, dtype in (("add", torch.float32), ("max", torch.float16)):
        case = make_case((2, channels, 5, 3), variant, dtype)
        check(case.in_channels_last(), target)


@pytest.mark.parametrize("channels", (256, 300, 384, 600, 768))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_many_channels(target, channels, layout, dtype):
    check(make_case((1, channels, 8, 8), "add", dtype, 16).in_layout(layout), target)


@pytest.mark.parametrize("variant", ("max", "mul"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_an_infinite_weight(target, layout, variant):
    case = make_case((2, 19, 5, 7), variant).in_layout(layout)
    check_infinite_weight(case, target)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_without_biases(target, variant, layout):
    check(make_case((3, 12, 9, 7), variant, biases=False).in_layout(layout), target)


@pytest.mark.parametrize("missing", range(3))
def test_without_one_bias(target, missing):
    case = make_case((3, 12, 9, 7))
    parameters = list(case.parameters)
    parameters[(1, 3, 5)[missing]] = None
    check(type(case)(case.variant, case.x, tuple(parameters), case.dy), target)


@pytest.mark.parametrize("variant", ("cse", "sse", "add"))
@pytest.mark.parametrize("shape", ((2, 6, 15), (2, 6, 5, 3), (2, 6, 5, 3, 2)))
def test_parameters_of_convolutions(target, variant, shape):
    check(make_case(shape, variant, trailing=len(shape) - 2), target)


def test_scalar_bias_and_row_of_spatial_weights(target):
    case = make_case((2, 6, 5, 3))
    *channel, ws, bs = case.parameters
    parameters = (*channel, ws.reshape(1, -1), bs.reshape(()))
    check(type(case)(case.variant, case.x, parameters, case.dy), target)


def test_parameters_with_strides(target):
    case = make_case((3, 12, 9, 7))
    parameters = tuple(
        p.t().contiguous().t() if p.dim() == 2 else torch.stack([p, -p], 1)[:, 0]
        for p in case.parameters
    )
    check(type(case)(case.variant, case.x, parameters, case.dy), target)


def test_fresh_memory_is_poisoned(target):
    assert torch.empty(1000, device=target.device).isnan().all()
    ones = torch.ones(10, dtype=torch.bfloat16, device=target.device)
    assert torch.empty_like(ones).isnan().all()
    assert ones.new_empty(5, dtype=torch.float64).isnan().all()
