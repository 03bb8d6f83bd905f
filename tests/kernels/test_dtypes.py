"""Accumulation, parameters of another dtype, autocast, and values at the ends of the range."""

import pytest
import torch
from budget import COMBINES, VARIANTS, Case, call, check, make_case, make_parameters

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_another_dtype(target, dtype, parameter_dtype):
    """Each gradient comes back in its parameter's dtype (check() looks)."""
    for variant in ("add", "max", "cse", "sse"):
        check(make_case((2, 18, 5, 7), variant, dtype, 2, parameter_dtype=parameter_dtype), target)


def test_every_parameter_of_its_own_dtype(target):
    case = make_case((2, 18, 5, 7), "max", torch.float16)
    dtypes = (*HALF, torch.float32, torch.float64, torch.bfloat16, torch.float32)
    parameters = tuple(p.to(d) for p, d in zip(case.parameters, dtypes, strict=True))
    check(Case("max", case.x, parameters, case.dy), target)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_are_formed_in_float32(target, dtype):
    """With float32 parameters a half x loses nothing but the rounding of y and dx: the gradients
    of the parameters have float32's accuracy."""
    case = make_case((2, 32, 41, 43), "add", dtype, parameter_dtype=torch.float32)
    wide = Case("add", case.x.float(), case.parameters, case.dy.float())
    expected = check(wide, target)
    got = check(case, target)
    for name in ("dw1", "db1", "dw2", "db2", "dws", "dbs"):
        scale = expected[name].abs().max()
        torch.testing.assert_close(got[name] / scale, expected[name] / scale, rtol=0, atol=3e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_changes_nothing(target, dtype, variant):
    case = make_case((2, 16, 9, 7), variant, dtype, parameter_dtype=torch.float32)
    x = case.x.to(target.device)
    parameters = [None if p is None else p.to(target.device) for p in case.parameters]
    outside = call(variant, x, *parameters, backend=target.backend)
    with torch.autocast(target.device, dtype):
        inside = call(variant, x, *parameters, backend=target.backend)
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_average_over_many_large_half_voxels(target, layout):
    """Their sum, 6e9, is far beyond float16's 65504, and their mean is not."""
    shape = (1, 2, 48, 48, 48)
    x = torch.full(shape, 60000.0, dtype=torch.float16)
    x[:, 1] = -30000.0
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    w1 = torch.tensor([[1.0, 1.0]])  # mean 60000 - 30000
    w2 = torch.tensor([[1 / 30000], [-1 / 30000]])
    y = call(
        "cse", *(t.to(target.device) for t in (x, w1)), None, w2.to(target.device), None, None,
        None, backend=target.backend,
    )  # fmt: skip
    gates = torch.sigmoid(torch.tensor([1.0, -1.0]))
    expected = (x.float() * gates.view(1, 2, 1, 1, 1)).to(torch.float16)
    torch.testing.assert_close(y.cpu(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saturated_gates(target, dtype, variant):
    """Pre-activations of +-200 give gates of 0 and 1 and vanishing gradients, never NaN."""
    case = make_case((2, 6, 5, 7), variant, dtype)
    w1, b1, w2, b2, ws, bs = make_parameters(6, 2, variant, dtype)
    sign = torch.tensor([1, -1, 1, -1, 1, -1], dtype=dtype)
    for bias in (200.0, -200.0):
        parameters = (
            w1,
            b1,
            w2,
            None if b2 is None else bias * sign,
            ws,
            None if bs is None else torch.full_like(bs, bias),
        )
        check(Case(variant, case.x, parameters, case.dy), target)


@pytest.mark.parametrize("combine", COMBINES)
def test_gates_saturated_by_large_values(target, combine):
    case = make_case((2, 6, 5, 7), combine)
    check(Case(combine, 1e4 * case.x, case.parameters, case.dy), target)
