"""First and second derivatives against finite differences, and against autograd of plain torch."""

import pytest
import torch
from budget import VARIANTS, output_and_gradients
from norm_budget import WITH_KERNELS, make_case  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck

DTYPE = torch.float64
MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))


def _problem(target, variant, shape, training, layout=torch.contiguous_format, **options):
    """The call as a function of its tensors, and those tensors."""
    case = make_case(shape, variant, DTYPE, training=training, **options)
    arguments = dict(zip(case.names, (case.x, *case.parameters), strict=True))
    present = [name for name, t in arguments.items() if t is not None]

    def function(*tensors):
        given = dict.fromkeys(case.names) | dict(zip(present, tensors, strict=True))
        return case.call(variant, **given, backend=target.backend)

    tensors = [arguments[name].to(target.device) for name in present]
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    return function, [t.requires_grad_() for t in tensors]


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
def test_derivatives(target, variant, training):
    function, tensors = _problem(target, variant, (2, 3, 5), training)
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@MODES
@pytest.mark.parametrize("variant", ("add", "max", "concat"))
def test_derivatives_channels_last_without_affine_parameters(target, variant, training):
    function, tensors = _problem(
        target, variant, (2, 3, 3, 2), training, torch.channels_last, affine=False, biases=False
    )
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ((3, 7, 9, 11), (2, 5, 6, 7, 8), (2, 33, 41, 29)), ids=str)
def test_against_autograd_to_ten_digits(target, shape, variant, training):
    case = make_case(shape, variant, DTYPE, training=training)

    def ours(variant, **arguments):
        return case.call(variant, **arguments, backend=target.backend)

    got = output_and_gradients(ours, case, target.device)
    for name, right in output_and_gradients(case.formulas, case).items():
        error = (got[name].cpu() - right).abs().max()
        assert error <= 1e-10 * right.abs().max(), f"{name} is off by {error:.1e}"


def test_second_derivatives_leave_the_running_statistics_alone(target):
    case = make_case((2, 4, 3, 2), "add", DTYPE)
    from scse_kernels import bn_relu_scse

    mean, var = (t.to(target.device, copy=True) for t in case.running)
    tensors = [t.to(target.device).requires_grad_() for t in (case.x, *case.parameters)]
    y = bn_relu_scse(*tensors[:3], mean, var, *tensors[3:], training=True, backend=target.backend)
    after = mean.clone(), var.clone()
    (du,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    du.square().sum().backward()
    assert torch.equal(mean, after[0]) and torch.equal(var, after[1])
    assert not torch.equal(mean, case.running[0].to(target.device))


def test_gradient_penalty(target):
    """A loss on the gradient itself, against the same in plain operations."""
    case = make_case((2, 6, 5, 4), "max", DTYPE)
    results = []
    for backend in ("eager", target.backend):
        tensors = [t.to(target.device).requires_grad_() for t in (case.x, *case.parameters)]
        arguments = dict(zip(case.names, tensors, strict=True))
        y = case.call("max", **arguments, backend=backend)
        (du,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        results.append(torch.autograd.grad(du.square().sum(), tensors))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
