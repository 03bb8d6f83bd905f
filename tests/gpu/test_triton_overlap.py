"""Launches of a call that start while the one before ends: which ones, where, and that no bit
depends on it. What such a launch may touch before it waits is checked in all of the emulator's
tests: see `emulator`."""

from functools import partial

import pytest
import torch
from budget import call, make_case, output_and_gradients, same_bits

pytest.importorskip("triton")

from gpu.emulated import BACKWARD, BY_ROWS, FORWARD, emulator

from scse_kernels._triton import plan

#: N, C, H, W and the reduction: an excitation of one launch each way, and of two.
SMALL, MANY_WEIGHTS = ((2, 32, 8, 8), 16), ((2, 256, 4, 4), 2)


def run(kind=SMALL, **options):
    """y and all gradients; and whether each launch overlaps, in order."""
    shape, reduction = kind
    case = make_case(shape, "add", torch.float16, reduction=reduction)
    plan.forget()
    with emulator(**options) as lab:
        results = output_and_gradients(partial(call, backend="triton"), case)
        launches = [launch for made in plan._kept[1].values() for launch in made.launches]
        assert [launch.kernel.__name__ for launch in launches] == [r.kernel for r in lab.reports]
    return results, [
        (launch.kernel.__name__, launch.options.get("launch_pdl", False)) for launch in launches
    ]


def test_all_launches_of_a_call_overlap_but_the_first():
    """What a call reads may be what the launch before it writes, which isn't ours."""
    _, overlaps = run()
    assert overlaps == [
        *((name, i > 0) for i, name in enumerate(FORWARD)),
        *((name, i > 0) for i, name in enumerate(BACKWARD)),
    ]
    _, overlaps = run(MANY_WEIGHTS)
    assert overlaps == [
        *((name, i > 0) for i, name in enumerate(_by_rows(FORWARD))),
        *((name, i > 0) for i, name in enumerate(_by_rows(BACKWARD))),
    ]


def _by_rows(names):
    return [one for name in names for one in BY_ROWS.get(name, (name,))]


@pytest.mark.parametrize("kind", (SMALL, MANY_WEIGHTS), ids=("small", "many weights"))
@pytest.mark.parametrize("target, setting", ((90, "0"), (80, "1")))
def test_without_overlap_bits_are_the_same(kind, target, setting, monkeypatch):
    """Below 9.0 there is none. (There other code is compiled, so bits are compared on 9.0.)"""
    expected, _ = run(kind)
    monkeypatch.setenv("SCSE_TRITON_OVERLAP", setting)
    got, overlaps = run(kind, target=target)
    assert not any(overlap for _, overlap in overlaps)
    if target == 90:
        for name, result in expected.items():
            assert same_bits(got[name], result), name


def test_one_launch_has_none_to_overlap_with():
    _, overlaps = run(launches=1)
    assert overlaps == [("forward_kernel", False), ("backward_kernel", False)]


def test_the_setting_counts_at_each_call(monkeypatch):
    case = make_case(SMALL[0], "add", torch.float16)
    plan.forget()
    with emulator() as lab:
        call("add", case.x, *case.parameters, backend="triton")
        monkeypatch.setenv("SCSE_TRITON_OVERLAP", "0")
        call("add", case.x, *case.parameters, backend="triton")
        monkeypatch.setenv("SCSE_TRITON_OVERLAP", "yes")
        with pytest.raises(ValueError, match="SCSE_TRITON_OVERLAP must be 0 or 1, got 'yes'"):
            call("add", case.x, *case.parameters, backend="triton")
        with_overlap, without = plan._kept[1].values()
    assert len(lab.reports) == 2 * len(FORWARD)
    assert [bool(launch.options.get("launch_pdl")) for launch in with_overlap.launches] == [
        False,
        True,
        True,
    ]
    assert not any(launch.options.get("launch_pdl") for launch in without.launches)
