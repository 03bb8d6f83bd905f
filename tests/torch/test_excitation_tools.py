"""Activations and gates under torch's tools: compile, autocast, opcheck, export, tracing."""

import warnings

import pytest
import torch
from budget import ACTIVATIONS, GATES, NAMES, call, make_case

import scse_kernels
from scse_kernels import ops

EXCITATIONS = [
    {"activation": activation, "gate": GATES[i % 2]} for i, activation in enumerate(ACTIVATIONS)
] + [{"activation": "relu", "gate": "hard_sigmoid"}, {"activation": "leaky_relu", "slope": 0.3}]


def _id(excitation):
    return "-".join(map(str, excitation.values()))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _gradients(function, case, device):
    tensors = {
        name: t.detach().clone().to(device).requires_grad_()
        for name, t in zip(NAMES, (case.x, *case.parameters), strict=True)
    }
    y = function(**tensors)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), case.dy.to(device))]


@pytest.mark.filterwarnings("default")  # torch warns of its own parts while tracing
@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_compile(target, excitation):
    case = make_case((2, 6, 5, 7), "max")

    def function(**tensors):
        return call("max", **tensors, backend=target.backend, **excitation)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = _gradients(function, case, target.device)
    for a, b in zip(_gradients(compiled, case, target.device), expected, strict=True):
        torch.testing.assert_close(a, b)


class _Block(torch.nn.Module):
    def __init__(self, **excitation):
        super().__init__()
        parameters = make_case((2, 6, 5, 7)).parameters
        self.parameters_ = torch.nn.ParameterList(parameters)
        self.excitation = excitation

    def forward(self, x):
        return scse_kernels.scse(x, *self.parameters_, **self.excitation)


@pytest.mark.filterwarnings("default")
def test_a_slope_that_changes_under_compile():
    """A number on a module may become a symbol when it changes."""
    block = _Block(activation="leaky_relu", slope=0.1)
    compiled = torch.compile(block, backend="aot_eager")
    x = make_case((2, 6, 5, 7)).x
    for slope in (0.1, 0.2, 0.4):
        block.excitation["slope"] = slope
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_autocast_changes_nothing(target, excitation):
    case = make_case((2, 6, 5, 7), "add", torch.float16, parameter_dtype=torch.float32)

    def function(**tensors):
        return call("add", **tensors, backend=target.backend, **excitation)

    def within(**tensors):
        with torch.autocast(target.device, torch.bfloat16):
            return function(**tensors)

    expected, got = (_gradients(f, case, target.device) for f in (function, within))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("activation", ops.ACTIVATION.values())
@pytest.mark.parametrize("gate", ops.GATE.values())
def test_operators(fused, activation, gate):
    case = make_case((2, 6, 5, 7))
    x, dy = case.x.to(fused.device), case.dy.to(fused.device)
    parameters = [p.to(fused.device) for p in case.parameters]
    forward, backward = ops.FORWARD[fused.backend], ops.BACKWARD[fused.backend]
    codes = (0, activation, 0.2, gate)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, (x, *parameters, *codes), test_utils=checks)
    _, *small = forward(x, *parameters, *codes)
    torch.library.opcheck(
        backward, (dy, x, *parameters, *small, 0, True, True, True, gate), test_utils=checks
    )


@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_export_as_ordinary_operations(excitation):
    block, x = _Block(**excitation), make_case((2, 6, 5, 7)).x
    program = torch.export.export(block, (x,))
    assert "scse_kernels" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), block(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block, x)
    torch.testing.assert_close(traced(x), block(x))


@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_vmap(excitation):
    case = make_case((3, 6, 5, 7))

    def function(x):
        return scse_kernels.scse(x[None], *case.parameters, **excitation)[0]

    expected = scse_kernels.scse(case.x, *case.parameters, **excitation)
    torch.testing.assert_close(torch.func.vmap(function)(case.x), expected)
