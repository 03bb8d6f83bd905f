"""The plans of BatchNorm + ReLU + scSE (scse_kernels/_triton/batch_norm.py), tested as those of
scSE in test_triton_plan.py: whatever changes from call to call, they launch what Triton's own way
would."""

import contextlib
from dataclasses import replace

import pytest
import torch
from norm_budget import make_case
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

triton = pytest.importorskip("triton")

from gpu import recorder  # noqa: E402
from gpu.recorder import Driver, Watch, a_profiler, moved, recording, sizes  # noqa: E402, F401
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from scse_kernels import BatchNormReLUSCSE, ChannelSpatialSELayer, bn_relu_scse, use_backend  # noqa: E402
from scse_kernels._triton import plan  # noqa: E402
from scse_kernels.batch_norm import ops  # noqa: E402

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret, reason="the interpreter keeps no plans, and knows no compiled kernels"
)
SHAPE = (2, 32, 6, 8)
NAMES = ("u", "bn_weight", "bn_bias", "w1", "b1", "w2", "b2", "ws", "bs")
TRAINING, EVALUATION = 5, 3  # launches forward
BACKWARD = 4


def arguments(case, momentum=0.1, eps=1e-3):
    """Those of bn_relu_scse; its running statistics are the case's own."""
    mean, var = case.running or (None, None)
    combine = case.variant if case.variant in ("max", "mul", "concat") else "add"
    named = dict(zip(NAMES, (case.x, *case.parameters), strict=True))
    named |= {"running_mean": mean, "running_var": var, "training": case.training}
    return named | {"momentum": momentum, "eps": eps, "combine": combine, "backend": "triton"}


def both(case, needs=None, **options):
    """Forward and backward of a case."""
    leaves = [case.x, *case.parameters]
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.requires_grad_(needs is None or i in needs)
    y = bn_relu_scse(**arguments(case, **options))
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    torch.autograd.grad(y, wanted, case.dy)


def shown(case, log):
    """Launches without what differs from call to call."""
    running = case.running or (None, None)
    tensors = zip(
        (*NAMES, "dy", "running_mean", "running_var"),
        (case.x, *case.parameters, case.dy, *running),
        strict=True,
    )
    return recorder.shown({t.data_ptr(): name for name, t in tensors if t is not None}, log)


def check(gpu, case, **options):
    """Asserts that a call and the next one launch what Triton's own way does."""
    seen = []
    for way in (contextlib.nullcontext, contextlib.nullcontext, a_profiler):
        gpu.log.clear()
        with way():
            both(case, **options)
        seen.append(shown(case, gpu.log))
    assert seen[0] == seen[1] == seen[2]
    return seen[0]


def sliced(t):
    """With rows of which every second one is used, samples apart."""
    return torch.empty((2, 64, 6, 8), dtype=t.dtype)[:, ::2].copy_(t)


def changed(place, change):
    """The first case with one of its tensors (u, a parameter, dy, a running one) changed."""
    case = make_case(SHAPE)
    if place in ("u", "dy"):
        name = "x" if place == "u" else place
        return replace(case, **{name: change(getattr(case, name))})
    if place in ("running_mean", "running_var"):
        at = place == "running_var"
        running = tuple(change(t) if i == at else t for i, t in enumerate(case.running))
        return replace(case, running=running)
    parameters = list(case.parameters)
    at = NAMES.index(place) - 1
    parameters[at] = change(parameters[at])
    return replace(case, parameters=tuple(parameters))


#: What differs from the first -> the case and options of `both`.
KINDS = {
    "first": lambda: (make_case(SHAPE), {}),
    "samples": lambda: (make_case((1, *SHAPE[1:])), {}),
    "positions": lambda: (make_case((*SHAPE[:2], 6, 9)), {}),
    "axes": lambda: (make_case((2, 32, 48)), {}),
    "channels": lambda: (make_case((2, 33, 6, 8)), {}),
    "hidden": lambda: (make_case(SHAPE, reduction=4), {}),
    "dtype": lambda: (make_case(SHAPE, dtype=torch.float16), {}),
    "double": lambda: (make_case(SHAPE, dtype=torch.float64), {}),
    "dtype of maps": lambda: (
        make_case(SHAPE, dtype=torch.float16, parameter_dtype=torch.float32),
        {},
    ),
    "channels_last": lambda: (make_case(SHAPE).in_channels_last(), {}),
    "u in slices": lambda: (changed("u", sliced), {}),
    "dy in slices": lambda: (changed("dy", sliced), {}),
    "dy expanded": lambda: (changed("dy", lambda t: t[:1, :1, :1, :1].expand(t.shape)), {}),
    "max": lambda: (make_case(SHAPE, "max"), {}),
    "concat": lambda: (make_case(SHAPE, "concat"), {}),
    "cse": lambda: (make_case(SHAPE, "cse"), {}),
    "sse": lambda: (make_case(SHAPE, "sse"), {}),
    "not affine": lambda: (make_case(SHAPE, affine=False), {}),
    "evaluation": lambda: (make_case(SHAPE, training=False), {}),
    "not tracked": lambda: (replace(make_case(SHAPE), running=None), {}),
    "eps": lambda: (make_case(SHAPE), {"eps": 1e-2}),
    "momentum": lambda: (make_case(SHAPE), {"momentum": 0.3}),
    "du alone": lambda: (make_case(SHAPE), {"needs": (0,)}),
    "d_bn_weight alone": lambda: (make_case(SHAPE), {"needs": (1,)}),
    "dw1 alone": lambda: (make_case(SHAPE), {"needs": (3,)}),
    "dws alone": lambda: (make_case(SHAPE), {"needs": (7,)}),
    **{
        f"{name} moved": lambda name=name: (changed(name, lambda t: moved(t, 1)), {})
        for name in (*NAMES, "dy", "running_mean", "running_var")
    },
    **{
        f"{name} half": lambda name=name: (changed(name, torch.Tensor.half), {})
        for name in (*NAMES[1:], "running_mean", "running_var")
    },
}


def test_every_kind_launches_what_tritons_own_way_does(gpu):
    both(make_case(SHAPE))  # its plans are there for all others to be taken for
    first = check(gpu, make_case(SHAPE))
    assert len(first) == TRAINING + BACKWARD
    for name, kind in KINDS.items():
        case, options = kind()
        # all differ, but that kernels know no axes
        assert (check(gpu, case, **options) == first) == (name in ("first", "axes")), name
    assert all(p._prepared is not None for p in plan._kept[1].values() if p.launches)


def test_known_kinds_go_past_tritons_binder(gpu, monkeypatch):
    both(make_case(SHAPE))
    both(make_case(SHAPE, training=False))
    assert len(gpu.log) == TRAINING + EVALUATION + 2 * BACKWARD

    def run(*_, **__):
        raise AssertionError("Triton's own way")

    monkeypatch.setattr(JITFunction, "run", run)
    both(make_case(SHAPE, seed=5))  # other tensors of the same kind
    both(make_case(SHAPE, seed=5, training=False))
    assert len(gpu.log) == 2 * (TRAINING + EVALUATION + 2 * BACKWARD)
    with pytest.raises(AssertionError, match="own way"):
        both(changed("running_var", lambda t: moved(t, 1)))


def test_each_kernel_has_its_own_epsilon(gpu):
    keys = [
        {launched[0]: launched[1] for launched in check(gpu, make_case(SHAPE), eps=eps)}
        for eps in (1e-3, 1e-2)
    ]
    differ = {name for name, key in keys[0].items() if keys[1][name] != key}
    assert differ == {
        *("norm_squeeze_kernel", "norm_apply_kernel", "norm_reduce_kernel", "norm_sums_kernel"),
        "norm_apply_backward_kernel",
    }


def numbers(log):
    """The floats that kernels were given."""
    return [
        value
        for *_, values, kinds in log
        for value, kind in zip(values, kinds, strict=True)
        if kind == "fp32"
    ]


def test_each_call_has_its_own_momentum_and_running_statistics(gpu):
    """In one plan: with momentum=None it is another number at each call."""
    unbiased = 2 * 48 / (2 * 48 - 1)
    for i, momentum in enumerate((0.5, 1 / 3, 0.25, 1)):
        case = make_case(SHAPE, seed=i)
        gpu.log.clear()
        both(case, momentum=momentum)
        assert numbers(gpu.log) == [momentum, unbiased]
        merge = shown(case, gpu.log)[1]
        assert merge[0] == "norm_merge_kernel"
        assert [v for v in merge[-1] if "running" in str(v)] == ["running_mean", "running_var"]
    assert len(plan._kept[1]) == 2


def test_momentum_of_a_module_that_averages_over_all_batches(gpu):
    module = BatchNormReLUSCSE(nn.BatchNorm2d(32, momentum=None), ChannelSpatialSELayer(32))
    with torch.no_grad(), use_backend("triton"):
        for _ in range(3):
            module(make_case(SHAPE).x)
    assert numbers(gpu.log)[::2] == [1.0, 0.5, 1 / 3]


def test_versions_tell_that_running_statistics_moved(gpu):
    """Autograd's, by which it knows that what it saved was overwritten."""
    for training in (True, False, True):
        case = make_case(SHAPE, training=training)
        before = [t._version for t in case.running]
        both(case)
        assert [t._version - b for t, b in zip(case.running, before, strict=True)] == 2 * [training]


def apart(t):
    """With another element behind each."""
    return torch.stack((t, t), 1)[:, 0]


def inferred(t):
    with torch.inference_mode():
        return t.clone()


class Another(torch.Tensor):
    """A tensor of another type."""


OTHERS = {
    "float64": lambda: make_case(SHAPE, dtype=torch.float64),
    "strided": lambda: changed("running_mean", apart),
    "no plain tensor": lambda: changed("running_var", lambda t: t.as_subclass(Another)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_running_statistics_that_the_kernels_do_not_move_are_moved_all_the_same(gpu, kind):
    case = OTHERS[kind]()
    before = [t._version for t in case.running]
    both(case)
    assert [t._version - b for t, b in zip(case.running, before, strict=True)] == [1, 1]
    merge = shown(case, gpu.log)[1]
    assert not any("running" in str(value) for value in merge[-1])


def test_running_statistics_of_inference_mode(gpu):
    case = replace(make_case(SHAPE), running=tuple(map(inferred, make_case(SHAPE).running)))
    with pytest.raises(RuntimeError, match="inference tensor"):  # as torch's batch_norm
        both(case)
    gpu.log.clear()
    with torch.inference_mode():
        bn_relu_scse(**arguments(case))
    assert numbers(gpu.log)[0] == 0.1


def test_an_empty_batch_launches_nothing_forward(gpu):
    for training in (True, False):
        case = make_case(SHAPE, training=training)
        case = replace(case, x=case.x[:0])
        with torch.no_grad():
            bn_relu_scse(**arguments(case))
    assert gpu.log == []


def test_environment(gpu, monkeypatch):
    case = make_case(SHAPE)
    check(gpu, case)
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "2")
    with pytest.raises(ValueError, match="SCSE_TRITON_LAUNCHES must be 1 or 3, got '2'"):
        both(case)


def test_another_device(gpu):
    case = make_case(SHAPE)
    own = check(gpu, case)
    other = Driver()
    driver.set_active(other)
    assert [k[:3] for k in check(other, case)] == [k[:3] for k in own]
    assert other.compiled == len(own)


def test_hooks_fire(gpu):
    case = make_case(SHAPE)
    both(case)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        both(case)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert seen == (TRAINING + BACKWARD) * ["of the launch"]


def test_threads(gpu):
    """All at once, at kinds that are new to them, each with a momentum of its own."""
    cases = [make_case((1 + i % 2, 8 + i, 3, 4), training=i % 3 > 0) for i in range(6)]

    def work(first):
        for i in range(20):
            both(cases[(first + i) % 6], momentum=(first + i) % 6 / 6)

    recorder.at_once(work, 6)

    def launched():
        found = sizes(gpu.log)
        assert len(found) == 4 * TRAINING + 2 * EVALUATION + 6 * BACKWARD
        return found, set(numbers(gpu.log))

    at_once = launched()
    gpu.log.clear()
    with a_profiler():
        for i, case in enumerate(cases):
            both(case, momentum=i / 6)
    assert at_once == launched()


# Who must still see operators.

OPERATORS = ["scse_kernels.triton_bn_forward.default", "scse_kernels.triton_bn_backward.default"]


def test_a_dispatch_mode_sees_the_operators(gpu):
    with Watch() as watch:
        both(make_case(SHAPE))
    assert watch.seen == OPERATORS


def test_a_profiler_sees_the_operators(gpu):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        both(make_case(SHAPE))
    names = [event.name for event in seen.events() if event.name.startswith("scse_kernels::")]
    assert names == ["scse_kernels::triton_bn_forward", "scse_kernels::triton_bn_backward"]


def test_nobody_sees_them_otherwise(gpu, monkeypatch):
    monkeypatch.setattr(ops, "FORWARD", {})
    monkeypatch.setattr(ops, "BACKWARD", {})
    both(make_case(SHAPE))
    with torch.no_grad():
        bn_relu_scse(**arguments(make_case(SHAPE, training=False)))
    assert len(gpu.log) == TRAINING + BACKWARD + EVALUATION


def test_make_fx_sees_the_operators(gpu):
    case = make_case(SHAPE, training=False)

    def gradient(u, dy):
        u = u.detach().requires_grad_()
        return torch.autograd.grad(bn_relu_scse(**(arguments(case) | {"u": u})), u, dy)

    graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(case.x, case.dy)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert [t for t in targets if "scse_kernels" in t] == OPERATORS
    assert gpu.log == []


@pytest.mark.parametrize("training", (True, False))
def test_compiled_calls_launch_the_same(gpu, training):
    """But for running statistics, which the compiled program moves."""
    case = make_case(SHAPE, training=training)
    plain = check(gpu, case)
    torch._dynamo.reset()
    compiled = torch.compile(bn_relu_scse, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (case.x, *case.parameters)]
    for _ in range(2):
        gpu.log.clear()
        before = [t._version for t in case.running]
        torch.autograd.grad(compiled(**arguments(case)), leaves, case.dy)
        launched = shown(case, gpu.log)
        assert [(k[0], k[2]) for k in launched] == [(k[0], k[2]) for k in plain]
        for one, right in zip(launched, plain, strict=True):
            assert one[1] == right[1] or one[0] == "norm_merge_kernel"
        assert [t._version > b for t, b in zip(case.running, before, strict=True)] == 2 * [training]
