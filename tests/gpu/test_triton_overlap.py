"""Launches of a call that start while the one before ends: which ones, where, and that no bit
depends on it. What such a launch may touch before it waits is checked in all of the emulator's
tests: see `emulator`."""

from functools import partial

import norm_budget
import pytest
import torch
from budget import call, make_case, output_and_gradients, same_bits

pytest.importorskip("triton")

from gpu.emulated import BACKWARD, BY_ROWS, FORWARD, emulator

from scse_kernels._triton import plan

#: N, C, H, W and the reduction: an excitation of one launch each way, and of two.
SMALL, MANY_WEIGHTS = ((2, 32, 8, 8), 16), ((2, 256, 4, 4), 2)
NORM_FORWARD = (
    *("norm_statistics_kernel", "norm_merge_kernel"),
    *("norm_squeeze_kernel", "excite_kernel", "norm_apply_kernel"),
)
NORM_BACKWARD = (
    *("norm_reduce_kernel", "excite_backward_kernel"),
    *("norm_sums_kernel", "norm_apply_backward_kernel"),
)


def case_of(kind=SMALL):
    shape, reduction = kind
    return make_case(shape, "add", torch.float16, reduction=reduction)


def run(case, call, **options):
    """y and all gradients; and each launch's kernel, and whether it overlaps, in order."""
    plan.forget()
    with emulator(**options) as lab:
        results = output_and_gradients(partial(call, backend="triton"), case)
        launches = [launch for made in plan._kept[1].values() for launch in made.launches]
        assert [launch.kernel.__name__ for launch in launches] == [r.kernel for r in lab.reports]
    return results, [(launch.kernel.__name__, overlaps(launch)) for launch in launches]


def overlaps(launch):
    return launch.options.get("launch_pdl", False)


def by_rows(names):
    return [one for name in names for one in BY_ROWS.get(name, (name,))]


norm_case = norm_budget.make_case(SMALL[0], dtype=torch.float16)


@pytest.mark.parametrize(
    "case, call, forward, backward",
    [
        pytest.param(case_of(), call, FORWARD, BACKWARD, id="scse"),
        pytest.param(
            case_of(MANY_WEIGHTS), call, by_rows(FORWARD), by_rows(BACKWARD), id="many weights"
        ),
        pytest.param(norm_case, norm_case.call, NORM_FORWARD, NORM_BACKWARD, id="bn_relu_scse"),
    ],
)
def test_all_launches_of_a_call_overlap_but_the_first(case, call, forward, backward):
    """What comes before the first isn't ours."""
    _, found = run(case, call)
    assert found == [(name, i > 0) for names in (forward, backward) for i, name in enumerate(names)]


def test_what_is_left_of_an_empty_batch_overlaps_with_nothing():
    shape, reduction = SMALL
    _, found = run(make_case((0, *shape[1:]), "add", torch.float16, reduction=reduction), call)
    assert found == [("apply_backward_kernel", False)]


@pytest.mark.parametrize("kind", (SMALL, MANY_WEIGHTS), ids=("small", "many weights"))
def test_without_overlap_bits_are_the_same(kind, monkeypatch):
    case = case_of(kind)
    expected, _ = run(case, call)
    monkeypatch.setenv("SCSE_TRITON_OVERLAP", "0")
    got, found = run(case, call)
    assert not any(overlap for _, overlap in found)
    for name, result in expected.items():
        assert same_bits(got[name], result), name


def test_below_compute_capability_9_there_is_none():
    _, found = run(case_of(), call, target=80)
    assert not any(overlap for _, overlap in found)


def test_one_launch_has_none_to_overlap_with():
    _, found = run(case_of(), call, launches=1)
    assert found == [("forward_kernel", False), ("backward_kernel", False)]


def test_the_setting_counts_at_each_call(monkeypatch):
    case = case_of()
    forward = partial(call, "add", case.x, *case.parameters, backend="triton")
    plan.forget()
    with emulator() as lab:
        forward()
        monkeypatch.setenv("SCSE_TRITON_OVERLAP", "0")
        forward()
        monkeypatch.setenv("SCSE_TRITON_OVERLAP", "yes")
        with pytest.raises(ValueError, match="SCSE_TRITON_OVERLAP must be 0 or 1, got 'yes'"):
            forward()
        found = [[overlaps(launch) for launch in made.launches] for made in plan._kept[1].values()]
    assert len(lab.reports) == 2 * len(FORWARD)
    assert found == [[False, True, True], [False, False, False]]
