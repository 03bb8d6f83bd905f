"""torch.func's transforms and forward-mode derivatives, by way of the reference's operations."""

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case
from networks import needs_kernels
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import scse_kernels

# torch builds its own decompositions for jvp with what it deprecates
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def _function(variant, case):
    """The call as a function of the tensors that are there, and those tensors."""
    names = [
        name for name, t in zip(NAMES, (case.x, *case.parameters), strict=True) if t is not None
    ]

    def function(*tensors, **options):
        given = dict(zip(names, tensors, strict=True))
        return call(variant, **{name: given.get(name) for name in NAMES}, **options)

    return function, tuple(t for t in (case.x, *case.parameters) if t is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad(variant):
    case = make_case((2, 6, 5, 4), variant)
    function, tensors = _function(variant, case)
    every = tuple(range(len(tensors)))
    got = grad(lambda *t: (function(*t) * case.dy).sum(), argnums=every)(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(function(*leaves), leaves, case.dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("axis", (0, 1, -1))
def test_vmap_over_x(axis, variant):
    """Also where the mapped axis lies within x's own, so that its strides are odd."""
    case = make_case((2, 6, 5, 4), variant)
    function, (_, *parameters) = _function(variant, case)
    xs = torch.stack([make_case((2, 6, 5, 4), variant, seed=seed).x for seed in range(3)], axis)
    got = vmap(lambda x: function(x, *parameters), in_dims=axis)(xs)
    for i, y in enumerate(got):
        torch.testing.assert_close(y, function(xs.select(axis, i), *parameters))


def test_vmap_over_parameters():
    """As in an ensemble."""
    layers = [scse_kernels.ChannelSpatialSELayer(6) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    x = make_case((2, 6, 5, 4)).x
    got = vmap(lambda parameters: functional_call(layers[0], parameters, (x,)))(stacked)
    for y, layer in zip(got, layers, strict=True):
        torch.testing.assert_close(y, layer(x))


def test_gradients_for_each_sample():
    """vmap of grad, as differential privacy has it."""
    layer = scse_kernels.SCSEModule(6, 2)
    parameters = dict(layer.named_parameters())
    case = make_case((3, 6, 5, 4))

    def loss(parameters, x, dy):
        return (functional_call(layer, parameters, (x[None],))[0] * dy).sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, case.x, case.dy)
    for i in range(3):
        y = layer(case.x[i : i + 1])
        expected = torch.autograd.grad(y, list(parameters.values()), case.dy[i : i + 1])
        for name, t in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got[name][i], t)


@pytest.mark.parametrize("variant", VARIANTS)
def test_jvp_and_reverse_mode_agree(variant):
    """<dy, J v> = <J^T dy, v>; the right side is the kernels'."""
    case = make_case((2, 6, 5, 4), variant, torch.float64)
    function, tensors = _function(variant, case)
    generator = torch.Generator().manual_seed(1)
    directions = tuple(torch.randn(t.shape, generator=generator).double() for t in tensors)
    y, forward = jvp(function, tensors, directions)
    torch.testing.assert_close(y, function(*tensors))
    leaves = [t.clone().requires_grad_() for t in tensors]
    reverse = torch.autograd.grad(function(*leaves), leaves, case.dy)
    expected = sum((g * v).sum() for g, v in zip(reverse, directions, strict=True))
    torch.testing.assert_close((forward * case.dy).sum(), expected)


def test_forward_mode_by_finite_differences():
    function, tensors = _function("max", make_case((2, 4, 3, 2), "max", torch.float64))
    leaves = [t.requires_grad_() for t in tensors]
    assert gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)


def test_jacobian_and_hessian():
    layer = scse_kernels.ChannelSpatialSELayer(4).double()
    x = make_case((1, 4, 2, 2), dtype=torch.float64).x
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(jacrev(layer)(x), expected)

    def loss(x):
        return layer(x).square().sum()

    torch.testing.assert_close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


def test_several_gradients_at_once():
    """is_grads_batched maps the backward alone, which stays the kernels'."""
    case = make_case((2, 6, 5, 4))
    leaves = [t.requires_grad_() for t in (case.x, *case.parameters)]
    y = call("add", *leaves)
    dys = torch.stack([case.dy, 2 * case.dy, case.dy.square()])
    got = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        expected = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[i], b)


@needs_kernels
def test_functional_call_alone_uses_the_kernels():
    class Operators(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (func.name(),)
            return func(*args, **(kwargs or {}))

    layer = scse_kernels.SCSEModule(6, 2)
    x = make_case((2, 6, 5, 4)).x
    others = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    with Operators() as plain:
        layer(x)
    with Operators() as functional:
        y = functional_call(layer, others, (x,))
    assert functional.seen == plain.seen
    layer.load_state_dict(others)
    assert torch.equal(y, layer(x))


@pytest.mark.filterwarnings("default")  # torch warns of its own parts while tracing
def test_compiled():
    torch.compiler.reset()
    layer = scse_kernels.ChannelSpatialSELayer(6)
    xs = torch.stack([make_case((2, 6, 5, 4), seed=seed).x for seed in range(3)])

    def mapped(xs):
        return vmap(lambda x: layer(x))(xs)

    def derived(xs):
        return grad(lambda x: layer(x).square().sum())(xs[0])

    for function in (mapped, derived):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(xs), function(xs))


def _dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", (lambda f, x: grad(f)(x), lambda f, x: vmap(f)(x), _dual))
def test_a_named_backend_is_refused(fused, transform):
    case = make_case((2, 6, 5, 4))
    xs = torch.stack([case.x, case.x]).to(fused.device)
    parameters = [p.to(fused.device) for p in case.parameters]

    def function(x):
        return call("add", x.reshape(-1, *x.shape[-3:]), *parameters, backend=fused.backend).sum()

    with pytest.raises(RuntimeError, match=f"torch.*got backend '{fused.backend}'"):
        transform(function, xs)
    function(xs)  # and what comes after is not
