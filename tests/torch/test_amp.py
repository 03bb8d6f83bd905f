"""Mixed precision. Autocast leaves the functions alone: y has x's dtype, sums are formed in
float32, and each gradient has its tensor's dtype; GradScaler sees what overflows."""

from contextlib import nullcontext

import pytest
import torch
from budget import NAMES, VARIANTS, call, check, make_case
from networks import gradients, images, unet

import scse_kernels

HALF = (torch.bfloat16, torch.float16)


def _results(variant, case, target, forward, backward, **options):
    """y, and the gradients, of a call and a backward in the two contexts given."""
    tensors = {
        name: None if t is None else t.detach().to(target.device).requires_grad_()
        for name, t in zip(NAMES, (case.x, *case.parameters), strict=True)
    }
    given = [t for t in tensors.values() if t is not None]
    with forward:
        y = call(variant, **tensors, backend=target.backend)
    with backward:
        grads = torch.autograd.grad(y, given, case.dy.to(target.device), **options)
    for t, grad in zip(given, grads, strict=True):
        assert grad.dtype == t.dtype
    return [y.detach(), *(grad.detach() for grad in grads)]


@pytest.mark.parametrize("autocast", HALF, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_changes_nothing(target, variant, dtype, autocast):
    case = make_case((2, 6, 5, 7), variant, dtype, parameter_dtype=torch.float32)
    outside = nullcontext()
    expected = _results(variant, case, target, outside, outside)
    got = _results(variant, case, target, torch.autocast(target.device, autocast), outside)
    assert got[0].dtype == dtype
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("create_graph", (False, True))
@pytest.mark.parametrize("variant", VARIANTS)
def test_not_even_a_backward_inside_it(fused, variant, create_graph):
    """Against torch's advice, but seen; autocast would round the matrices' products to bfloat16."""
    case = make_case((2, 6, 5, 7), variant)
    outside, options = nullcontext(), {"create_graph": create_graph}
    expected = _results(variant, case, fused, outside, outside, **options)
    inside = torch.autocast(fused.device, torch.bfloat16)
    for a, b in zip(
        _results(variant, case, fused, inside, inside, **options), expected, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_map_and_float32_parameters(target, dtype):
    for variant in VARIANTS:
        check(make_case((2, 12, 9, 7), variant, dtype, parameter_dtype=torch.float32), target)


@pytest.mark.parametrize("combine", ("add", "max"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_dtype_is_that_of_the_plain_module(combine, dtype):
    """What the modules in people's networks give under autocast, for any dtype of x."""
    layer = scse_kernels.ChannelSpatialSELayer(6, combine=combine)
    fc1, fc2, conv = layer.cSE.fc1, layer.cSE.fc2, layer.sSE.conv
    x = images(2, 6, 5, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        channel_gate = torch.sigmoid(fc2(torch.relu(fc1(x.mean((2, 3))))))[..., None, None]
        a, b = x * channel_gate, x * torch.sigmoid(conv(x))
        plain = a + b if combine == "add" else torch.maximum(a, b)
        y = layer(x)
    assert y.dtype == plain.dtype == dtype
    torch.testing.assert_close(y, plain, rtol=3e-2, atol=3e-2)


def test_network_in_bfloat16():
    network, x = unet(), images(2, 3, 16, 12)
    expected = gradients(network, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(network, x)
    assert got["y"].dtype == torch.bfloat16
    for name, p in network.named_parameters():
        assert got[name].dtype == p.dtype == torch.float32
    for name, t in expected.items():
        assert (got[name] - t).norm() < 0.1 * t.norm(), name


@pytest.mark.filterwarnings("default")  # torch warns of its own parts while tracing
def test_compiled_under_autocast():
    torch.compiler.reset()
    network, x = unet(), images(2, 3, 16, 12)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = gradients(network, x), gradients(compiled, x)
    for (name, a), b in zip(expected.items(), got.values(), strict=True):
        assert b.dtype == a.dtype, name
        assert (b - a).norm() < 0.1 * a.norm(), name


def _step(network, optimizer, scaler, x):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(x).float().square().sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = [p.grad.clone() for p in network.parameters()]
    scaler.step(optimizer)
    scaler.update()
    return grads


def test_grad_scaler():
    network, x = unet(), images(2, 3, 16, 12)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    unscaled = _step(network, optimizer, torch.amp.GradScaler("cpu", enabled=False), x)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for a, b in zip(_step(network, optimizer, scaler, x), unscaled, strict=True):
        torch.testing.assert_close(a, b)
    assert scaler.get_scale() == 1024


def test_grad_scaler_skips_a_step_that_overflows():
    """In float16 a scale of 2**16 makes dy infinite, and so the gradients of every parameter."""
    layer = scse_kernels.SCSEModule(6, 2)
    # A random layer's hidden channels may all be dead, and then w1's and b1's gradients are zero.
    torch.nn.init.ones_(layer.cSE[1].bias)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    y = layer(images(2, 6, 5, 7).half())
    scaler.scale(y.float().sum()).backward()
    assert not any(p.grad.isfinite().all() for p in layer.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    for p, q in zip(layer.parameters(), before, strict=True):
        assert torch.equal(p, q)
