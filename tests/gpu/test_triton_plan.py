"""The plans of calls (scse_kernels/_triton/plan.py): they launch what Triton's own way would
launch, whatever changes from call to call. Nothing is compiled here. A recorder stands in for
compiled kernels; in place of code it knows what a kernel is specialised on."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from budget import call, make_case
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

triton = pytest.importorskip("triton")

from gpu import recorder  # noqa: E402
from gpu.recorder import Driver, Watch, a_profiler, moved, recording, sizes  # noqa: E402, F401
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from scse_kernels import ops, scse, use_backend  # noqa: E402
from scse_kernels._triton import launch, plan, tuning  # noqa: E402

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret, reason="the interpreter keeps no plans, and knows no compiled kernels"
)


def both(case, needs=None, **options):
    """Forward and backward of a case."""
    leaves = [case.x, *case.parameters]
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            leaf.requires_grad_(needs is None or i in needs)
    y = call(case.variant, case.x, *case.parameters, backend="triton", **options)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    torch.autograd.grad(y, wanted, case.dy)


def shown(case, log):
    """Launches without what differs from call to call."""
    named = zip(("x", "w1", "b1", "w2", "b2", "ws", "bs"), (case.x, *case.parameters), strict=False)
    names = {tensor.data_ptr(): name for name, tensor in named if tensor is not None}
    return recorder.shown({**names, case.dy.data_ptr(): "dy"}, log)


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


def with_moved(case, name):
    names = ("w1", "b1", "w2", "b2", "ws", "bs")
    if name in ("x", "dy"):
        return replace(case, **{name: moved(getattr(case, name), 1)})
    parameters = list(case.parameters)
    parameters[names.index(name)] = moved(parameters[names.index(name)], 1)
    return replace(case, parameters=tuple(parameters))


SHAPE = (2, 32, 6, 8)


def sliced(case, name):
    """With rows of which every second one is used, samples apart."""
    whole = torch.empty((2, 64, 6, 8), dtype=case.x.dtype)
    return replace(case, **{name: whole[:, ::2].copy_(getattr(case, name))})


def expanded(case):
    return replace(case, dy=case.dy[:1, :1, :1, :1].expand(case.dy.shape))


def without(case, *places):
    kept = (None if i in places else p for i, p in enumerate(case.parameters))
    return replace(case, parameters=tuple(kept))


def with_dtype(case, place, dtype):
    return replace(
        case,
        parameters=tuple(p.to(dtype) if i == place else p for i, p in enumerate(case.parameters)),
    )


def strided_weights(case):
    w1, *others = case.parameters
    return replace(case, parameters=(w1.t().contiguous().t(), *others))


#: What differs from the first -> the case and options of `both`.
KINDS = {
    "first": lambda: (make_case(SHAPE), {}),
    "samples": lambda: (make_case((1, *SHAPE[1:])), {}),
    "positions": lambda: (make_case((*SHAPE[:2], 6, 9)), {}),
    "axes": lambda: (make_case((2, 32, 48)), {}),
    "channels": lambda: (make_case((2, 33, 6, 8)), {}),
    "hidden": lambda: (make_case(SHAPE, reduction=4), {}),
    "dtype": lambda: (make_case(SHAPE, dtype=torch.float16), {}),
    "half": lambda: (make_case(SHAPE, dtype=torch.bfloat16), {}),
    "double": lambda: (make_case(SHAPE, dtype=torch.float64), {}),
    "dtype of maps": lambda: (
        make_case(SHAPE, dtype=torch.float16, parameter_dtype=torch.float32),
        {},
    ),
    "channels_last": lambda: (make_case(SHAPE).in_channels_last(), {}),
    "x in slices": lambda: (sliced(make_case(SHAPE), "x"), {}),
    "dy in slices": lambda: (sliced(make_case(SHAPE), "dy"), {}),
    "dy expanded": lambda: (expanded(make_case(SHAPE)), {}),
    "w1 strided": lambda: (strided_weights(make_case(SHAPE)), {}),
    "no b1": lambda: (without(make_case(SHAPE), 1), {}),
    "no b2": lambda: (without(make_case(SHAPE), 3), {}),
    "no bs": lambda: (without(make_case(SHAPE), 5), {}),
    "max": lambda: (make_case(SHAPE, "max"), {}),
    "concat": lambda: (make_case(SHAPE, "concat"), {}),
    "cse": lambda: (make_case(SHAPE, "cse"), {}),
    "sse": lambda: (make_case(SHAPE, "sse"), {}),
    "activation": lambda: (make_case(SHAPE), {"activation": "silu"}),
    "slope": lambda: (make_case(SHAPE), {"activation": "elu", "slope": 0.5}),
    "another slope": lambda: (make_case(SHAPE), {"activation": "elu", "slope": 0.25}),
    "gate": lambda: (make_case(SHAPE), {"gate": "hard_sigmoid"}),
    "dx alone": lambda: (make_case(SHAPE), {"needs": (0,)}),
    "dw1 alone": lambda: (make_case(SHAPE), {"needs": (1,)}),
    "dws alone": lambda: (make_case(SHAPE), {"needs": (5,)}),
    **{
        f"{name} moved": lambda name=name: (with_moved(make_case(SHAPE), name), {})
        for name in ("x", "dy", "w1", "b1", "w2", "b2", "ws", "bs")
    },
    **{
        f"{name} half": lambda i=i: (with_dtype(make_case(SHAPE), i, torch.float16), {})
        for i, name in enumerate(("w1", "b1", "w2", "b2", "ws", "bs"))
    },
}


@pytest.mark.parametrize("launches", [3, 1])
def test_every_kind_launches_what_tritons_own_way_does(gpu, monkeypatch, launches):
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", str(launches))
    both(make_case(SHAPE))  # its plans are there for all others to be taken for
    first = check(gpu, make_case(SHAPE))
    for name, kind in KINDS.items():
        case, options = kind()
        # all differ, but that kernels know no axes
        assert (check(gpu, case, **options) == first) == (name in ("first", "axes")), name
    plans = plan._kept[1].values()
    assert all(p._prepared is not None for p in plans if p.launches)


def test_known_kinds_go_past_tritons_binder(gpu, monkeypatch):
    case = make_case(SHAPE)
    both(case)
    launched = len(gpu.log)

    def run(*_, **__):
        raise AssertionError("Triton's own way")

    monkeypatch.setattr(JITFunction, "run", run)
    both(make_case(SHAPE, seed=5))  # other tensors of the same kind
    assert len(gpu.log) == 2 * launched == 12
    with pytest.raises(AssertionError, match="own way"):
        both(with_moved(case, "ws"))


def test_scratch_is_one_allocation_of_pieces_apart(gpu):
    both(make_case((3, 33, 5, 7)))
    pieces = 0
    for made in plan._kept[1].values():
        prepared, itemsize = made._prepared, made._sums.itemsize
        ends = [o + n * itemsize for o, n in zip(prepared.offsets, made._sizes, strict=True)]
        assert all(offset % 16 == 0 for offset in prepared.offsets)
        for end, following in zip(ends, [*prepared.offsets[1:], None], strict=True):
            assert end <= (prepared.memory * itemsize if following is None else following)
        pieces += len(ends)
    assert pieces > 8


def test_environment(gpu, monkeypatch):
    case = make_case(SHAPE)
    for launches, kernels in ((3, 6), (1, 2), (3, 6)):
        monkeypatch.setenv("SCSE_TRITON_LAUNCHES", str(launches))
        assert len(check(gpu, case)) == kernels
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "2")
    with pytest.raises(ValueError, match="SCSE_TRITON_LAUNCHES must be 1 or 3, got '2'"):
        both(case)


def test_tuning_file(gpu, monkeypatch, tmp_path):
    case = make_case(SHAPE)
    own = check(gpu, case)
    entry = {
        "channels": 32,
        "positions": 64,
        "samples": 2,
        "dtype": "float32",
        "layout": "contiguous",
        "combine": "add",
        "block_c": 32,
        "block_s": 4,
        "warps": 1,
        "tiles": 1,
        "launches": 3,
    }
    file = {"device": "cpu", "triton": triton.__version__, "entries": [entry]}
    (tmp_path / "file.json").write_text(json.dumps(file))
    monkeypatch.setenv("SCSE_TUNING", str(tmp_path / "file.json"))
    tuning.table.cache_clear()
    try:
        tuned = check(gpu, case)
        assert tuned[0][2] == (2 * 12, 1, 1) != own[0][2]
        table = tuning.table(case.x.device)
        (kind,) = table
        table[kind] = replace(table[kind], block_s=8)  # as the tuner does
        plan.forget()
        assert check(gpu, case)[0][2] == (2 * 6, 1, 1)
    finally:
        monkeypatch.delenv("SCSE_TUNING")
        tuning.table.cache_clear()
    assert check(gpu, case) == own


def test_another_device(gpu):
    case = make_case(SHAPE)
    own = check(gpu, case)
    other = Driver()
    driver.set_active(other)
    assert [k[:3] for k in check(other, case)] == [k[:3] for k in own]
    assert other.compiled == len(own)


def test_plans_are_not_kept_without_end(gpu, monkeypatch):
    monkeypatch.setattr(plan, "_MOST", 4)
    for size in range(8):
        check(gpu, make_case((1, 4, 3, 3 + size)))
        assert len(plan._kept[1]) <= 5


def test_hooks_fire(gpu):
    case = make_case(SHAPE)
    both(case)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        both(case)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert seen == 6 * ["of the launch"]
    both(case)
    assert len(seen) == 6


def test_a_kernels_own_hook_fires(gpu, monkeypatch):
    case = make_case(SHAPE)
    both(case)
    seen = []
    monkeypatch.setattr(launch.apply_kernel, "pre_run_hooks", launch.apply_kernel.pre_run_hooks)
    launch.apply_kernel.add_pre_run_hook(lambda *arguments, **_: seen.append(len(arguments)))
    try:
        both(case)
    finally:
        launch.apply_kernel.pre_run_hooks.clear()
    assert len(seen) == 1


def test_other_passes_of_the_compiler_are_heeded(gpu, monkeypatch):
    case = make_case(SHAPE)
    both(case)
    before = gpu.compiled
    monkeypatch.setattr(knobs.runtime, "debug", True)
    both(case)
    assert gpu.compiled == 2 * before
    both(make_case((2, 32, 6, 9)))  # met with them first
    more = gpu.compiled - 2 * before
    assert more > 0
    monkeypatch.setattr(knobs.runtime, "debug", False)
    check(gpu, make_case((2, 32, 6, 9)))
    assert gpu.compiled == 2 * (before + more)


@pytest.mark.parametrize("unknown", ["launcher", "version"])
def test_what_is_unknown_is_launched_in_tritons_own_way(gpu, monkeypatch, unknown):
    if unknown == "launcher":
        monkeypatch.setattr(Driver, "launcher_cls", type("Another", (), {}))
    else:
        monkeypatch.setattr(triton, "__version__", "3.10.0")
    check(gpu, make_case(SHAPE))
    assert [p._prepared for p in plan._kept[1].values()] == [None, None]


def test_threads(gpu):
    """All at once, at kinds that are new to them."""
    cases = [make_case((1 + i % 2, 8 + i, 3, 4)) for i in range(6)]

    def work(first):
        for i in range(30):
            both(cases[(first + i) % 6])

    recorder.at_once(work, 6)
    assert len(gpu.log) == 6 * 30 * 6
    launched = sizes(gpu.log)
    gpu.log.clear()
    with a_profiler():
        for case in cases:
            both(case)
    assert launched == sizes(gpu.log)


# Who must still see operators.

NAMES = ["scse_kernels.triton_forward.default", "scse_kernels.triton_backward.default"]


def test_a_dispatch_mode_sees_the_operators(gpu):
    with Watch() as watch:
        both(make_case(SHAPE))
    assert watch.seen == NAMES


def test_a_profiler_sees_the_operators(gpu):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        both(make_case(SHAPE))
    names = [event.name for event in seen.events() if event.name.startswith("scse_kernels::")]
    assert names == ["scse_kernels::triton_forward", "scse_kernels::triton_backward"]


def test_nobody_sees_them_otherwise(gpu, monkeypatch):
    monkeypatch.setattr(ops, "FORWARD", {})
    monkeypatch.setattr(ops, "BACKWARD", {})
    both(make_case(SHAPE))
    with torch.no_grad():
        case = make_case(SHAPE)
        call("add", case.x, *case.parameters, backend="triton")
    assert len(gpu.log) == 9


def test_make_fx_sees_the_operators(gpu):
    case = make_case(SHAPE)

    def gradient(x, dy):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(scse(x, *case.parameters, backend="triton"), x, dy)

    graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(case.x, case.dy)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert [t for t in targets if "scse_kernels" in t] == NAMES
    assert gpu.log == []


def test_compiled_calls_launch_the_same(gpu):
    case = make_case(SHAPE)
    plain = check(gpu, case)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in (case.x, *case.parameters)]
    for _ in range(2):
        gpu.log.clear()
        torch.autograd.grad(compiled("add", *leaves, backend="triton"), leaves, case.dy)
        assert [k[:3] for k in shown(case, gpu.log)] == [k[:3] for k in plain]


def test_a_tensor_that_stands_for_another_is_made_real(gpu):
    case = make_case(SHAPE)
    negative = torch._neg_view(case.x)
    assert negative.is_neg() and negative.data_ptr() == case.x.data_ptr()
    call("add", negative, *case.parameters, backend="triton")
    assert case.x.data_ptr() not in gpu.log[0][4]


def test_the_chosen_backend_is_heeded(gpu):
    case = make_case(SHAPE)
    for backend, launched in (("triton", 3), ("eager", 0), ("triton", 3)):
        gpu.log.clear()
        with use_backend(backend), torch.no_grad():
            call("add", case.x, *case.parameters)
        assert len(gpu.log) == launched
