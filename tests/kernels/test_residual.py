"""residual=True adds x to y, and so dy to dx, and to nothing else; on every backend."""

import pytest
import torch
from budget import VARIANTS, call, check, make_case, output_and_gradients, same_bits
from torch.autograd import gradcheck, gradgradcheck

WITH_RESIDUAL = tuple(v for v in VARIANTS if v != "concat")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _arranged(case, memory_format):
    def arrange(t):
        return t.contiguous(memory_format=memory_format)

    return case.arranged(arrange, arrange)


def _results(target, case):
    def function(variant, **arguments):
        return call(variant, **arguments, backend=target.backend)

    return output_and_gradients(function, case, target.device)


@pytest.mark.parametrize("variant", WITH_RESIDUAL)
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(target, dtype, memory_format, variant):
    case = make_case((2, 17, 13, 11), variant, dtype, residual=True)
    check(_arranged(case, memory_format), target)


@pytest.mark.parametrize("variant", WITH_RESIDUAL)
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_of_several_strips_with_another_excitation(target, memory_format, variant):
    more = {} if variant == "sse" else {"activation": "silu"}
    case = make_case((1, 8, 97, 131), variant, gate="hard_sigmoid", residual=True, **more)
    check(_arranged(case, memory_format), target)


@pytest.mark.parametrize("variant", WITH_RESIDUAL)
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
def test_the_parameters_gradients_stay(target, memory_format, variant):
    """To the last bit. y and dx differ by x and dy: so it can't be forgotten in either."""
    without = _arranged(make_case((3, 16, 9, 8), variant), memory_format)
    plain = _results(target, without)
    added = _results(
        target, _arranged(make_case((3, 16, 9, 8), variant, residual=True), memory_format)
    )
    for name, gradient in plain.items():
        if name not in ("y", "dx"):
            assert same_bits(added[name], gradient), name
    torch.testing.assert_close(added["y"].cpu(), plain["y"].cpu() + without.x)
    torch.testing.assert_close(added["dx"].cpu(), plain["dx"].cpu() + without.dy)


@pytest.mark.parametrize("variant", WITH_RESIDUAL)
def test_derivatives(target, variant):
    if target.backend == "cuda":
        pytest.skip("cuda: it has no kernels for float64")
    case = make_case((2, 4, 3, 2), variant, torch.float64)
    tensors = {
        name: t.to(target.device).requires_grad_()
        for name, t in zip(case.names, (case.x, *case.parameters), strict=True)
        if t is not None
    }

    def function(*leaves):
        given = dict.fromkeys(case.names) | dict(zip(tensors, leaves, strict=True))
        return call(variant, **given, residual=True, backend=target.backend)

    leaves, dy = tuple(tensors.values()), case.dy.to(target.device)
    plain = torch.autograd.grad(function(*leaves), leaves, dy)
    again = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=True)
    torch.testing.assert_close(again, plain)
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("variant", WITH_RESIDUAL)
@pytest.mark.parametrize("sign", (-1, 1), ids=("closed", "open"))
@pytest.mark.parametrize("residual", (False, True))
def test_an_infinite_element(target, residual, sign, variant):
    """It closes the channel gates of its sample and the spatial gate of its position: then it
    becomes NaN. Or it opens them: then it stays infinite. With x added and without."""
    x = torch.randn(2, 4, 6)
    x[0, 1, 2] = torch.inf
    channel = (torch.ones(1, 4), None, torch.full((4, 1), float(sign)), None)
    spatial = (torch.tensor([0.0, sign, 0.0, 0.0]), None)
    if variant in ("cse", "sse"):
        channel, spatial = (channel, (None,) * 2) if variant == "cse" else ((None,) * 4, spatial)
    got, expected = (
        call(
            variant,
            *(t if t is None else t.to(device) for t in (x, *channel, *spatial)),
            gate="hard_sigmoid",
            residual=residual,
            backend=backend,
        ).cpu()
        for backend, device in (target, ("eager", "cpu"))
    )
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert got[0, 1, 2].isnan() if sign < 0 else got[0, 1, 2].isinf()
    assert got.isfinite().sum() == got.numel() - 1
