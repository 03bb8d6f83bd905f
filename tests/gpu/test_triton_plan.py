"""The plans of calls (scse_kernels/_triton/plan.py): they launch what Triton's own way would
launch, whatever changes from call to call. Nothing is compiled here. A recorder stands in for
compiled kernels; in place of code it knows what a kernel is specialised on. What BatchNorm + ReLU +
scSE has besides is tested in test_triton_norm_plan.py."""

import json
from dataclasses import replace

import pytest
import torch
from budget import call, make_case
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

triton = pytest.importorskip("triton")

from gpu import recorder  # noqa: E402
from gpu.planned import NORM, SCSE, SHAPE  # noqa: E402
from gpu.recorder import Driver, Watch, a_profiler, moved, recording, sizes  # noqa: E402, F401
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402

from scse_kernels import use_backend  # noqa: E402
from scse_kernels._triton import launch, plan, tuning  # noqa: E402

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret, reason="the interpreter keeps no plans, and knows no compiled kernels"
)
both, check, shown = SCSE.both, SCSE.check, SCSE.shown

# Of both operators.


@pytest.fixture(params=[SCSE, NORM], ids=["scse", "bn_relu_scse"])
def operator(request):
    return request.param


@pytest.mark.parametrize("launches", [3, 1])
def test_every_kind_launches_what_tritons_own_way_does(gpu, monkeypatch, operator, launches):
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", str(launches))
    operator.both(operator.make_case(SHAPE))  # its plans are there for all others to be taken for
    first = operator.check(gpu, operator.make_case(SHAPE))
    assert len(first) == (2 if (operator, launches) == (SCSE, 1) else operator.launches)
    for name, (case, options) in operator.kinds().items():
        # all differ, but that kernels know no axes
        assert (operator.check(gpu, case, **options) == first) == (name in ("first", "axes")), name
    plans = plan._kept[1].values()
    assert all(p._prepared is not None for p in plans if p.launches)


def test_known_kinds_go_past_tritons_binder(gpu, monkeypatch, operator):
    operator.both(operator.make_case(SHAPE))
    assert len(gpu.log) == operator.launches
    recorder.forbid_tritons_own_way(monkeypatch)
    operator.both(operator.make_case(SHAPE, seed=5))  # other tensors of the same kind
    assert len(gpu.log) == 2 * operator.launches
    with pytest.raises(AssertionError, match="own way"):
        operator.both(operator.changed("ws", lambda t: moved(t, 1)))


def test_a_wrong_setting(gpu, monkeypatch, operator):
    case = operator.make_case(SHAPE)
    operator.check(gpu, case)
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "2")
    with pytest.raises(ValueError, match="SCSE_TRITON_LAUNCHES must be 1 or 3, got '2'"):
        operator.both(case)


def test_another_device(gpu, operator):
    case = operator.make_case(SHAPE)
    own = operator.check(gpu, case)
    other = Driver()
    driver.set_active(other)
    assert [k[:3] for k in operator.check(other, case)] == [k[:3] for k in own]
    assert other.compiled == len(own)


def test_hooks_fire(gpu, operator):
    case = operator.make_case(SHAPE)
    operator.both(case)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        operator.both(case)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert seen == operator.launches * ["of the launch"]
    operator.both(case)
    assert len(seen) == operator.launches


# Who must still see operators.


def test_a_dispatch_mode_sees_the_operators(gpu, operator):
    with Watch() as watch:
        operator.both(operator.make_case(SHAPE))
    assert tuple(watch.seen) == operator.seen


def test_a_profiler_sees_the_operators(gpu, operator):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        operator.both(operator.make_case(SHAPE))
    names = [event.name for event in seen.events() if event.name.startswith("scse_kernels::")]
    assert names == [name.removesuffix(".default").replace(".", "::") for name in operator.seen]


def test_nobody_sees_them_otherwise(gpu, monkeypatch, operator):
    monkeypatch.setattr(operator.tables, "FORWARD", {})
    monkeypatch.setattr(operator.tables, "BACKWARD", {})
    operator.both(operator.make_case(SHAPE))
    with torch.no_grad():
        operator.call(operator.make_case(SHAPE))
    assert len(gpu.log) == 2 * operator.forward + operator.backward


def test_make_fx_sees_the_operators(gpu, operator):
    case = operator.make_case(SHAPE, **({} if operator is SCSE else {"training": False}))

    def gradient(x, dy):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(operator.call(case, x), x, dy)

    graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(case.x, case.dy)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert tuple(t for t in targets if "scse_kernels" in t) == operator.seen
    assert gpu.log == []


# Of scSE alone.


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


def test_plans_are_not_kept_without_end(gpu, monkeypatch):
    monkeypatch.setattr(plan, "_MOST", 4)
    for size in range(8):
        check(gpu, make_case((1, 4, 3, 3 + size)))
        assert len(plan._kept[1]) <= 5


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
