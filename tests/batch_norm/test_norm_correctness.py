"""Every backend's output and gradients against float64, in training and with running statistics."""

import pytest
import torch
from budget import VARIANTS, channels_last, check, with_layouts
from norm_budget import WITH_KERNELS, make_case  # noqa: F401

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))

SMALL = [  # shape, reduction
    ((2, 5, 33), 2),
    ((2, 3, 7, 9), 1),
    ((4, 32, 3, 1), 16),
    ((2, 17, 13, 11), 16),
    ((2, 6, 3, 5, 7), 2),
]
LARGE = [  # several strips to a sample, tails in each of them
    ((1, 4, 20000), 2),
    ((3, 8, 67, 71), 2),
    ((1, 19, 11, 17, 18), 16),
    ((1, 150, 40, 41), 2),
]


def skip_torchs_sums(target, layout):
    if target.backend == "eager" and layout == "channels_last":
        pytest.skip("torch's own sums over large channels_last maps are less exact than the budget")


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, reduction, layout", with_layouts(SMALL))
def test_small_maps(target, shape, reduction, layout, dtype, variant, training):
    case = make_case(shape, variant, dtype, reduction, training)
    check(case.in_layout(layout), target)


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape, reduction, layout", with_layouts(LARGE))
def test_maps_of_several_strips(target, shape, reduction, layout, variant, training):
    skip_torchs_sums(target, layout)
    case = make_case(shape, variant, torch.float32, reduction, training)
    check(case.in_layout(layout), target)


@pytest.mark.parametrize("variant", ("add", "max"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape, reduction, layout", with_layouts(LARGE[1:2]))
def test_maps_of_several_strips_in_other_dtypes(target, shape, reduction, layout, dtype, variant):
    check(make_case(shape, variant, dtype, reduction).in_layout(layout), target)


@pytest.mark.parametrize("positions", (*range(2, 20), 31, 33, 63, 65, 127, 129))
def test_every_tail_of_a_vector(target, positions):
    check(make_case((2, 5, positions), "add"), target)
    check(make_case((2, 5, positions), "max", torch.float16), target)


@pytest.mark.parametrize("channels", (*range(2, 20), 31, 33, 63, 65))
def test_every_tail_of_a_channels_last_vector(target, channels):
    for variant, dtype in (("add", torch.float32), ("max", torch.float16)):
        check(make_case((2, channels, 5, 3), variant, dtype).in_channels_last(), target)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("mean", (1000.0, -1000.0))
def test_a_mean_of_a_thousand_standard_deviations(target, mean, layout):
    skip_torchs_sums(target, layout)
    for variant, shape in (("add", (3, 8, 67, 71)), ("max", (2, 17, 13, 11))):
        check(make_case(shape, variant, mean=mean).in_layout(layout), target)


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_without_affine_parameters_and_biases(target, layout, variant, training):
    case = make_case((3, 12, 9, 7), variant, training=training, affine=False, biases=False)
    check(case.in_layout(layout), target)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_float32_parameters_beside_half_maps(target, dtype):
    check(make_case((3, 12, 9, 7), "add", dtype, parameter_dtype=torch.float32), target)


def _channel_sliced(t):
    return torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, : t.shape[1]]


def _channel_sliced_in_channels_last(t):
    return channels_last(torch.cat([t, torch.full_like(t, torch.nan)], 1))[:, : t.shape[1]]


def _position_sliced(t):
    return torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, : t.shape[2]]


def _transposed(t):
    return t.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize(
    "arrange",
    (_channel_sliced, _channel_sliced_in_channels_last, _position_sliced, _transposed),
)
def test_other_strides(target, arrange):
    case = make_case((3, 12, 19, 17), "max")  # two strips to a sample
    check(case.arranged(x=arrange), target)
    check(case.arranged(dy=arrange), target)


@pytest.mark.parametrize("variant", ("add", "max", "concat"))
def test_parameters_of_convolutions(target, variant):
    check(make_case((2, 6, 5, 3), variant, trailing=2), target)
