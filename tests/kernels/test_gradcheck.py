"""First and second derivatives against finite differences, in float64."""

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case
from torch.autograd import gradcheck, gradgradcheck

import scse_kernels

DTYPE = torch.float64
SHAPES = ((2, 4, 5), (2, 4, 3, 2), (1, 3, 2, 2, 3))


def _problem(target, variant, shape, **options):
    """The call as a function of its tensors, and those tensors."""
    case = make_case(shape, variant, DTYPE, **options)
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


def test_few_shot_weights():
    layer = scse_kernels.SpatialSELayer(3).double()
    x = make_case((2, 3, 3, 2), dtype=DTYPE).x.requires_grad_()
    weights = torch.randn(2, 3, 1, 1, dtype=DTYPE, requires_grad=True)
    assert gradcheck(layer, (x, weights))
    assert gradgradcheck(layer, (x, weights))


def _check_both_orders(target, names, build):
    """The call on build(*leaves): gradients with and without create_graph, and their own."""
    case = make_case((2, 4, 3, 2), "add", DTYPE, reduction=1)
    tensors = dict(zip(NAMES, (case.x, *case.parameters), strict=True))
    leaves = [tensors[name].to(target.device).requires_grad_() for name in names]

    def function(*leaves):
        return call("add", *build(*leaves), backend=target.backend)

    dy = case.dy.to(target.device)
    plain = torch.autograd.grad(function(*leaves), leaves, dy)
    differentiable = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=True)
    for name, a, b in zip(names, plain, differentiable, strict=True):
        torch.testing.assert_close(a, b, msg=f"d{name} differs with create_graph=True")
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_one_parameter_in_two_places(target):
    """w1 and w2 may be one square matrix and b1 and b2 one vector."""
    _check_both_orders(
        target,
        ("x", "w1", "b1", "ws", "bs"),
        lambda x, w, b, ws, bs: (x, w, b, w, b, ws, bs),
    )


def test_parameters_computed_from_x(target):
    """As a hypernetwork does; x then has two ways to the output."""
    _check_both_orders(
        target, NAMES, lambda x, *rest: (x, *rest[:4], x.mean((0, 2, 3)) + rest[4], rest[5])
    )


def test_gradient_penalty(target):
    """A loss on the gradient itself, as in WGAN-GP, against the same in plain operations."""
    case = make_case((2, 6, 5, 4), "max", DTYPE)
    results = []
    for backend in ("eager", target.backend):
        tensors = [t.to(target.device).requires_grad_() for t in (case.x, *case.parameters)]
        y = call("max", *tensors, backend=backend)
        (dx,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_of_one_branch_frozen(target):
    case = make_case((2, 4, 3, 2), "add", DTYPE)
    x, *parameters = (t.to(target.device) for t in (case.x, *case.parameters))
    channel = [p.requires_grad_() for p in parameters[:4]]
    assert gradgradcheck(
        lambda *channel: call("add", x, *channel, *parameters[4:], backend=target.backend), channel
    )
