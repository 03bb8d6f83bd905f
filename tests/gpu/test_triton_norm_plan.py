"""The plans of BatchNorm + ReLU + scSE (scse_kernels/_triton/batch_norm.py): what they have besides
what test_triton_plan.py tests, running statistics above all."""

from dataclasses import replace

import pytest
import torch
from norm_budget import make_case
from torch import nn

triton = pytest.importorskip("triton")

from gpu import recorder  # noqa: E402
from gpu.planned import NORM, SHAPE  # noqa: E402
from gpu.recorder import a_profiler, moved, recording, sizes  # noqa: E402, F401
from triton import knobs  # noqa: E402

from scse_kernels import BatchNormReLUSCSE, ChannelSpatialSELayer, bn_relu_scse, use_backend  # noqa: E402
from scse_kernels._triton import plan  # noqa: E402

pytestmark = pytest.mark.skipif(
    knobs.runtime.interpret, reason="the interpreter keeps no plans, and knows no compiled kernels"
)
both, check, shown, changed = NORM.both, NORM.check, NORM.shown, NORM.changed


def test_evaluation_is_a_kind_of_its_own(gpu, monkeypatch):
    both(make_case(SHAPE))
    both(make_case(SHAPE, training=False))
    recorder.forbid_tritons_own_way(monkeypatch)
    both(make_case(SHAPE, seed=5, training=False))
    assert len(gpu.log) == NORM.forward + 2 * NORM.evaluation + 3 * NORM.backward
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
        bn_relu_scse(**NORM.arguments(case))
    assert numbers(gpu.log)[0] == 0.1


def test_an_empty_batch_launches_nothing_forward(gpu):
    for training in (True, False):
        case = make_case(SHAPE, training=training)
        case = replace(case, x=case.x[:0])
        with torch.no_grad():
            bn_relu_scse(**NORM.arguments(case))
    assert gpu.log == []


def test_threads(gpu):
    """All at once, at kinds that are new to them, each with a momentum of its own."""
    cases = [make_case((1 + i % 2, 8 + i, 3, 4), training=i % 3 > 0) for i in range(6)]

    def work(first):
        for i in range(20):
            both(cases[(first + i) % 6], momentum=(first + i) % 6 / 6)

    recorder.at_once(work, 6)

    def launched():
        found = sizes(gpu.log)
        assert len(found) == 4 * NORM.forward + 2 * NORM.evaluation + 6 * NORM.backward
        return found, set(numbers(gpu.log))

    at_once = launched()
    gpu.log.clear()
    with a_profiler():
        for i, case in enumerate(cases):
            both(case, momentum=i / 6)
    assert at_once == launched()


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
        torch.autograd.grad(compiled(**NORM.arguments(case)), leaves, case.dy)
        launched = shown(case, gpu.log)
        assert [(k[0], k[2]) for k in launched] == [(k[0], k[2]) for k in plain]
        for one, right in zip(launched, plain, strict=True):
            assert one[1] == right[1] or one[0] == "norm_merge_kernel"
        assert [t._version > b for t, b in zip(case.running, before, strict=True)] == 2 * [training]
