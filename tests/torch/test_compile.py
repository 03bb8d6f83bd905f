"""torch.compile(fullgraph=True), static and dynamic, gives what uncompiled code gives."""

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case
from torch._dynamo.testing import CompileCounterWithBackend

import scse_kernels

pytestmark = pytest.mark.filterwarnings("default")  # torch warns of its own parts while tracing

# Inductor is for one pass over everything; the rest checks what this package adds to tracing.
SHAPES = ((2, 6, 9), (2, 6, 5, 7), (2, 6, 3, 4, 5))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _gradients(function, case, device):
    tensors = {
        name: None if t is None else t.detach().clone().to(device).requires_grad_()
        for name, t in zip(NAMES, (case.x, *case.parameters), strict=True)
    }
    present = [t for t in tensors.values() if t is not None]
    y = function(**tensors)
    return [y.detach(), *torch.autograd.grad(y, present, case.dy.to(device))]


def _compare(target, variant, case, backend, dynamic=None):
    def function(**tensors):
        return call(variant, **tensors, **case.excitation, backend=target.backend)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    expected = _gradients(function, case, target.device)
    got = _gradients(compiled, case, target.device)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    return compiled


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s) - 2}d")
def test_static_shapes(target, variant, shape):
    _compare(target, variant, make_case(shape, variant), "aot_eager")


@pytest.mark.parametrize("variant", ("add", "cse", "sse"))
def test_channels_last(target, variant):
    case = make_case((2, 6, 5, 7), variant).in_channels_last()
    _compare(target, variant, case, "aot_eager")


@pytest.mark.parametrize("variant", ("cse", "max"))
def test_residual(target, variant):
    _compare(target, variant, make_case((2, 6, 5, 7), variant, residual=True), "aot_eager")


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_dtypes(target, dtype):
    case = make_case((2, 6, 5, 7), "max", dtype, parameter_dtype=torch.float32)
    _compare(target, "max", case, "aot_eager")


@pytest.mark.parametrize("variant", ("add", "max"))
def test_inductor(target, variant):
    _compare(target, variant, make_case((2, 6, 5, 7), variant), "inductor")


def test_default_backend_argument():
    case = make_case((2, 6, 5, 7))
    compiled = torch.compile(scse_kernels.scse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(case.x, *case.parameters), scse_kernels.scse(case.x, *case.parameters)
    )


@pytest.mark.parametrize("variant", ("add", "max", "concat"))
def test_dynamic_shapes_compile_once(target, variant):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = None
    for shape in ((2, 6, 5, 7), (3, 6, 9, 8), (5, 6, 12, 4)):
        case = make_case(shape, variant)
        if compiled is None:
            compiled = _compare(target, variant, case, counter, dynamic=True)
        got = _gradients(compiled, case, target.device)
        expected = _gradients(
            lambda **t: call(variant, **t, backend=target.backend), case, target.device
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


MODULES = {
    "channel": lambda: scse_kernels.ChannelSELayer(12, 4),
    "spatial": lambda: scse_kernels.SpatialSELayer(12),
    "add": lambda: scse_kernels.ChannelSpatialSELayer(12, 4),
    "max": lambda: scse_kernels.ChannelSpatialSELayer(12, 4, combine="max"),
    "smp": lambda: scse_kernels.SCSEModule(12, 4),
}


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("module", MODULES)
def test_modules(module, dynamic):
    layer = MODULES[module]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 12, 5, 7), (3, 12, 8, 6))[: 1 + dynamic]:
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            case = make_case(shape)
            x = case.x.clone().requires_grad_()
            y = function(x)
            y.backward(case.dy)
            results.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_module_inside_a_network_with_inductor():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        scse_kernels.ChannelSpatialSELayer(8, combine="max"),
        torch.nn.Conv2d(8, 2, 1),
    )
    compiled = torch.compile(network, fullgraph=True)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (network, compiled):
        network.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ("add", "max"))
def test_without_gradients(target, variant):
    case = make_case((2, 6, 5, 7), variant)
    compiled = torch.compile(
        lambda *t: call(variant, *t, backend=target.backend), fullgraph=True, backend="aot_eager"
    )
    tensors = [t.to(target.device) for t in (case.x, *case.parameters)]
    with torch.no_grad():
        got = compiled(*tensors)
        torch.testing.assert_close(got, call(variant, *tensors, backend=target.backend))


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("of", ("x", "parameters"))
def test_a_gradient_penalty_raises_instead_of_being_a_constant(fused, backend, of):
    """Of a compiled layer, and where the penalty is compiled with the loss."""
    case = make_case((2, 6, 5, 7))
    tensors = [t.to(fused.device).requires_grad_() for t in (case.x, *case.parameters)]
    inputs = tensors[:1] if of == "x" else tensors[1:]

    def function(*tensors):
        return call("add", *tensors, backend=fused.backend)

    def loss(*tensors):
        y = function(*tensors)
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return y.sum() + sum(g.square().sum() for g in grads)

    compiled = torch.compile(function, backend=backend)
    compiled(*tensors).sum().backward()
    message = "second derivatives|double backward|create_graph=False"  # the others are torch's own
    with pytest.raises(RuntimeError, match=message):
        y = compiled(*tensors)
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(loss, backend=backend)(*tensors).backward()


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_output_may_be_changed_in_place(fused, backend):
    case = make_case((2, 6, 5, 7))

    def function(**tensors):
        return torch.relu_(call("add", **tensors, backend=fused.backend))

    expected = _gradients(function, case, fused.device)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for a, b in zip(_gradients(compiled, case, fused.device), expected, strict=True):
        torch.testing.assert_close(a, b)
