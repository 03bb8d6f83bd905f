"""opcheck, torch.compile, torch.export, tracing, and what autograd is asked for and saves."""

import pytest
import torch
from budget import VARIANTS, channels_last, output_and_gradients, same_bits
from norm_budget import WITH_KERNELS, make_case  # noqa: F401
from torch import nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import scse_kernels
from scse_kernels import BatchNormReLUSCSE, bn_relu_scse
from scse_kernels.batch_norm import ops

pytestmark = pytest.mark.filterwarnings("default")  # torch warns of its own parts while tracing

MODES = pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "spatial axes swapped": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(fused, variant, layout, training):
    case = make_case((2, 6, 5, 7), variant, training=training)
    case = case.arranged(LAYOUTS[layout], LAYOUTS[layout])
    move = lambda t: None if t is None else t.to(fused.device)  # noqa: E731
    u, dy, (weight, bias, *parameters) = move(case.x), move(case.dy), map(move, case.parameters)
    statistics = (None, None) if training else tuple(map(move, case.running))
    combine = ops.COMBINE.get(variant, 0)
    forward, backward = ops.FORWARD[fused.backend], ops.BACKWARD[fused.backend]
    torch.library.opcheck(forward, (u, weight, bias, *statistics, *parameters, 1e-5, combine))
    _, *small = forward(u, weight, bias, *statistics, *parameters, 1e-5, combine)
    for needs in ((True,) * 4, (True, False, False, False), (False, True, False, True)):
        torch.library.opcheck(
            backward,
            (dy, u, weight, bias, *parameters, *small, 1e-5, training, combine, *needs),
        )


def _step(function, module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = function(x)
    y.square().sum().backward()
    buffers = [b.clone() for b in module.buffers()]
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters()), *buffers]


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_module(backend, dynamic):
    """Gradients, and running statistics after several steps, are those of uncompiled code."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = scse_kernels.ChannelSpatialSELayer(6, combine="max")
        module = BatchNormReLUSCSE(nn.BatchNorm2d(6), block)
        function = module
        if compiled:
            function = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
        g = torch.Generator().manual_seed(0)
        results.append([])
        for shape in ((2, 6, 5, 7), (3, 6, 8, 6))[: 1 + dynamic]:
            results[-1] += _step(function, module, 2 + torch.randn(shape, generator=g))
        module.eval()
        results[-1] += _step(function, module, 2 + torch.randn((2, 6, 5, 7), generator=g))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_function(target, variant, training):
    case = make_case((2, 6, 5, 7), variant, training=training)

    def function(variant, **arguments):
        return case.call(variant, **arguments, backend=target.backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(function, case, target.device)
    for name, t in output_and_gradients(compiled, case, target.device).items():
        torch.testing.assert_close(t, expected[name])


def _module():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return BatchNormReLUSCSE(norm, scse_kernels.SCSEModule(6, 2))


@MODES
@pytest.mark.parametrize("strict", (False, True), ids=("non-strict", "strict"))
def test_export_makes_ordinary_operations(strict, training):
    module = _module().train(training)
    x = torch.randn(2, 6, 5, 4)
    sizes = {"x": {0: Dim("n"), 2: Dim("h"), 3: Dim("w")}}
    program = torch.export.export(module, (x,), dynamic_shapes=sizes, strict=strict)
    names = {n.target.namespace for n in program.graph.nodes if hasattr(n.target, "namespace")}
    assert names == {"aten"}
    exported = program.module()
    x = torch.randn(3, 6, 8, 7)
    torch.testing.assert_close(exported(x), module(x))
    buffers = dict(module.named_buffers())
    for name, t in exported.named_buffers():
        torch.testing.assert_close(t, buffers[name])


def test_jit_trace():
    module = _module().eval()
    traced = torch.jit.trace(module, (torch.randn(2, 6, 5, 4),))
    x = torch.randn(3, 6, 8, 7)
    torch.testing.assert_close(traced(x), module(x))


def test_per_sample_gradients():
    """torch.func, with running statistics (in training it cannot take samples apart)."""
    module = _module().eval()
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, x[None]).square().sum()

    x = torch.randn(3, 6, 8, 7)
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        module.zero_grad()
        module(x[i : i + 1]).square().sum().backward()
        for name, p in parameters.items():
            torch.testing.assert_close(got[name][i], p.grad, rtol=1e-4, atol=1e-4)


def _tensors(case, device, wanted):
    return {
        name: None if t is None else t.detach().to(device).requires_grad_(name in wanted)
        for name, t in zip(case.names, (case.x, *case.parameters), strict=True)
    }


SUBSETS = {  # and what the operator is told to be needed: du, affine, channel, spatial
    ("u",): (True, False, False, False),
    ("bn_weight",): (False, True, False, False),
    ("bn_bias", "b2"): (False, True, True, False),
    ("w1",): (False, False, True, False),
    ("bs",): (False, False, False, True),
    ("u", "ws"): (True, False, False, True),
    ("u", "bn_weight", "w2"): (True, True, True, False),
}


class _BackwardFlags(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().endswith("bn_backward"):
            self.seen.append(tuple(args[-4:]))
        return func(*args, **(kwargs or {}))


@MODES
@pytest.mark.parametrize("variant", ("cse", "sse", "add", "max"))
@pytest.mark.parametrize("subset", SUBSETS, ids=" ".join)
def test_gradients_only_where_wanted(fused, subset, variant, training):
    case = make_case((2, 6, 5, 7), variant, training=training)

    def function(variant, **arguments):
        return case.call(variant, **arguments, backend=fused.backend)

    everything = output_and_gradients(function, case, fused.device)
    tensors = _tensors(case, fused.device, subset)
    y = function(variant, **tensors)
    wanted = [name for name, t in tensors.items() if t is not None and t.requires_grad]
    assert y.requires_grad == bool(wanted)
    if not wanted:
        return
    with _BackwardFlags() as recorded:
        y.backward(case.dy.to(fused.device))
    if len(wanted) == len(subset):
        assert recorded.seen == [SUBSETS[subset]]
    for name in wanted:
        torch.testing.assert_close(tensors[name].grad, everything[f"d{name}"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_only_u_is_saved(fused, memory_format, variant):
    case = make_case((2, 16, 33, 31), variant)
    case = case.arranged(x=lambda t: t.contiguous(memory_format=memory_format))
    tensors = _tensors(case, fused.device, case.names)
    given = {t.untyped_storage().data_ptr() for t in tensors.values() if t is not None}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = case.call(variant, **tensors, backend=fused.backend)
    assert y.is_contiguous(memory_format=memory_format)
    assert tensors["u"].untyped_storage().data_ptr() in saved
    extra = sum(size for pointer, size in saved.items() if pointer not in given)
    assert extra <= 4 * 16 * (2 + 2 * 3)  # [C] twice and a few [N, C]


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ((3, 8, 67, 71), (5, 33, 17, 9), (2, 130, 9, 8)), ids=str)
def test_any_number_of_threads(fused, threads, shape, variant, training):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        case = make_case(shape, variant, training=training)
        case = case.arranged(x=lambda t, f=memory_format: t.contiguous(memory_format=f))
        results = []
        for number in (1, 2, 3, 2):
            threads(number)
            results.append(
                output_and_gradients(
                    lambda v, **k: case.call(v, **k, backend=fused.backend),  # noqa: B023
                    case,
                    fused.device,
                )
            )
        for other in results[1:]:
            for name, t in other.items():
                assert same_bits(results[0][name], t), f"{name} differs"


def _call(case, **changed):
    names = (*case.names, "running_mean", "running_var")
    arguments = dict(zip(names, (case.x, *case.parameters, *case.running), strict=True))
    options = {"training": True}
    return bn_relu_scse(**{**arguments, **options, **changed})


BAD = [
    ({"u": torch.ones(2, 6)}, ValueError, "u must be"),
    ({"u": torch.ones(2, 6, 3, dtype=torch.int64)}, TypeError, "'u' must be float32"),
    ({"bn_weight": torch.ones(5)}, ValueError, r"bn_weight must have shape \[C\] = \[6\]"),
    ({"bn_bias": 1.0}, TypeError, "'bn_bias' must be Tensor"),
    ({"running_mean": None}, ValueError, "both be given or both None"),
    (
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        "needed unless training",
    ),
    ({"running_var": torch.ones(7)}, ValueError, "running_var must have shape"),
    ({"w1": None, "ws": None}, ValueError, "at least one branch"),
    ({"w1": torch.ones(3, 5)}, ValueError, "w1 must have shape"),
    ({"ws": torch.ones(5)}, ValueError, "ws must have shape"),
    ({"combine": "sum"}, ValueError, "combine must be one of"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
    ({"backend": "cuda"}, RuntimeError, "'cuda' is not available: it has no kernels for bn_relu"),
    ({"bn_bias": torch.ones(6, device="meta")}, RuntimeError, "got u on cpu and bn_bias on meta"),
]


@pytest.mark.parametrize("changed, error, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        _call(make_case((2, 6, 5, 7)), **changed)
