"""First and second derivatives against finite differences, in float64."""

import pytest
import torch
from budget import VARIANTS, Case, call, make_case
from torch.autograd import gradcheck, gradgradcheck

import scse_kernels

SHAPES = ((2, 4, 5), (2, 4, 3, 2), (1, 3, 2, 2, 3))


def _problem(target, variant, shape, **options):
    """The call as a function of its tensors, and those tensors."""
    case = make_case(shape, variant, torch.float64, **options)
    arguments = (case.x, *case.parameters)
    present = [i for i, t in enumerate(arguments) if t is not None]

    def function(*tensors):
        full = [None] * len(arguments)
        for i, t in zip(present, tensors, strict=True):
            full[i] = t
        return call(variant, *full, backend=target.backend)

    return function, [arguments[i].to(target.device).requires_grad_() for i in present]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s) - 2}d")
def test_first_derivatives(target, variant, shape):
    function, tensors = _problem(target, variant, shape)
    assert gradcheck(function, tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_derivatives_channels_last_without_biases(target, variant):
    function, tensors = _problem(target, variant, (2, 4, 3, 2), biases=False)
    x = tensors[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert gradcheck(function, [x, *tensors[1:]])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s) - 2}d")
def test_second_derivatives(target, variant, shape):
    function, tensors = _problem(target, variant, shape)
    assert gradgradcheck(function, tensors)


def test_few_shot_weights(monkeypatch):
    layer = scse_kernels.SpatialSELayer(3).double()
    x = make_case((2, 3, 3, 2), dtype=torch.float64).x.requires_grad_()
    weights = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x, weights))
    assert gradgradcheck(layer, (x, weights))


def _both_orders(target, build):
    """Gradients with and without create_graph of build(x, ...) must be the same numbers."""
    case = make_case((2, 4, 3, 2), "add", torch.float64, reduction=1)
    leaves = [t.to(target.device).requires_grad_() for t in (case.x, *case.parameters)]
    dy = case.dy.to(target.device)
    used = build(*leaves)
    y = call("add", *used, backend=target.backend)
    leaves = [t for t in leaves if any(t is u for u in used)]
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, leaves, dy, create_graph=True)
    for a, b in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(a, b)

    def function(*tensors):
        replacement = {id(leaf): t for leaf, t in zip(leaves, tensors, strict=True)}
        arguments = [replacement.get(id(t), t) for t in all_leaves]
        return call("add", *build(*arguments), backend=target.backend)

    all_leaves = [t.to(target.device) for t in (case.x, *case.parameters)]
    all_leaves = [next((v for v in leaves if torch.equal(v, t)), t) for t in all_leaves]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_one_parameter_in_two_places(target):
    """w1 and w2 may be one square matrix and the biases one vector."""
    _both_orders(target, lambda x, w1, b1, w2, b2, ws, bs: (x, w1, b1, w1, b1, ws, bs))


def test_parameters_computed_from_x(target):
    """As a hypernetwork does; x then has two ways to the output."""
    _both_orders(
        target,
        lambda x, w1, b1, w2, b2, ws, bs: (x, w1, b1, w2, b2, x.mean((0, 2, 3)) + ws, bs),
    )


def test_gradient_penalty(target):
    """A loss on the gradient itself, as in WGAN-GP, against the same in plain operations."""
    case = make_case((2, 6, 5, 4), "max", torch.float64)
    results = []
    for backend in ("eager", target.backend):
        tensors = [t.to(target.device).requires_grad_() for t in (case.x, *case.parameters)]
        y = call("max", *tensors, backend=backend)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_of_one_branch_frozen(target):
    case: Case = make_case((2, 4, 3, 2), "add", torch.float64)
    x, *parameters = (t.to(target.device) for t in (case.x, *case.parameters))
    channel = [p.requires_grad_() for p in parameters[:4]]
    assert gradgradcheck(
        lambda *channel: call("add", x, *channel, *parameters[4:], backend=target.backend), channel
    )
