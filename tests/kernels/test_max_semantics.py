"""combine="max" is torch.maximum of both products: ties, signs, NaN and infinity."""

import pytest
import torch
from budget import Case, call, check, make_case, output_and_gradients

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _layout(case, memory_format):
    def arrange(t):
        return t.contiguous(memory_format=memory_format)

    return case.arranged(arrange, arrange)


def _run(target, case):
    return output_and_gradients(
        lambda v, *a, **k: call(v, *a, **k, backend=target.backend), case, target.device
    )


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_at_the_zeros_that_relu_leaves(target, dtype, memory_format):
    case = make_case((3, 9, 11, 7), "max", dtype)
    rectified = case.arranged(x=torch.relu)
    assert (rectified.x == 0).float().mean() > 0.2
    check(_layout(rectified, memory_format), target)


def test_gradient_at_a_map_of_zeros_is_the_mean_of_both_gates(target):
    """Nothing else reaches x there: q = 0 * dy, and the squeezes' weights are zero."""
    zeros = torch.zeros(2, 4, 5, 3)
    dy = make_case((2, 4, 5, 3), "max").dy
    w2, b2 = torch.zeros(4, 2), torch.tensor([-2.0, -1.0, 1.0, 2.0])
    parameters = (torch.zeros(2, 4), torch.zeros(2), w2, b2, torch.zeros(4), torch.tensor([0.5]))
    got = _run(target, Case("max", zeros, parameters, dy))
    gates = (torch.sigmoid(b2).view(1, 4, 1, 1) + torch.sigmoid(torch.tensor(0.5))) / 2
    torch.testing.assert_close(got["dx"].cpu(), dy * gates)
    assert got["dws"].abs().max() == 0


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_gates_share_the_gradient(target, dtype, memory_format):
    """All weights zero: both gates are sigmoid(0), so every position of every channel ties."""
    case = make_case((2, 6, 7, 5), "max", dtype)
    parameters = tuple(torch.zeros_like(p) for p in case.parameters)
    tied = _layout(Case("max", case.x, parameters, case.dy), memory_format)
    got = check(tied, target)
    half_of_all = (case.dy.double() * case.x.double()).sum() * 0.25 / 2
    torch.testing.assert_close(got["dbs"].cpu().double().sum(), half_of_all, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("sign", (1, -1))
def test_sign_of_x_picks_the_gate(target, sign):
    """A product is largest with the larger gate for positive x, with the smaller for negative."""
    case = make_case((3, 8, 9, 7), "max")
    got = check(case.arranged(x=lambda t: sign * t.abs()), target)
    w1, b1, w2, b2, ws, bs = (p.to(target.device) for p in case.parameters)
    x = (sign * case.x.abs()).to(target.device)
    by_channel = call("cse", x, w1, b1, w2, b2, None, None, backend=target.backend)
    by_position = call("sse", x, None, None, None, None, ws, bs, backend=target.backend)
    torch.testing.assert_close(got["y"], torch.maximum(by_channel, by_position))


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", ("add", "max", "mul", "concat"))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_not_finite_values_go_where_torch_sends_them(target, value, combine, dtype, memory_format):
    """One NaN or infinity: its channel's gate and its position's gate carry it on."""
    case = make_case((2, 6, 5, 7), combine, dtype)
    w1, b1, w2, b2, ws, bs = case.parameters
    x = case.x.clone()
    x[1, 2, 3, 4] = value
    arranged = x.contiguous(memory_format=memory_format).to(target.device)
    y = call(combine, arranged, *(p.to(target.device) for p in case.parameters),
             backend=target.backend).cpu()  # fmt: skip

    wide = x.double()
    pooled = wide.mean((2, 3))
    hidden = torch.relu(pooled @ w1.double().T + b1.double())
    channel_gate = torch.sigmoid(hidden @ w2.double().T + b2.double())[:, :, None, None]
    squeezed = (wide * ws.double().view(1, -1, 1, 1)).sum(1, keepdim=True) + bs.double()
    by_channel, by_position = wide * channel_gate, wide * torch.sigmoid(squeezed)
    expected = {
        "add": lambda: by_channel + by_position,
        "max": lambda: torch.maximum(by_channel, by_position),
        "mul": lambda: by_channel * by_position,
        "concat": lambda: torch.cat([by_channel, by_position], 1),
    }[combine]()
    assert torch.equal(y.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(y.double()[infinite], expected[infinite])
    assert y[expected.isfinite()].isfinite().all()
