"""Every activation and every gate in the Triton kernels as compiled, executed in the emulator."""

import os
from functools import partial

import pytest
import torch
from budget import ACTIVATIONS, GATES, make_case, same_bits
from gpu.emulated import BY_ROWS, check, emulator, results

from scse_kernels import ops

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)

from scse_kernels._triton import heuristics

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gates(activation, gate):
    """In three launches and in one; dtypes, variants and layouts take turns."""
    i = 2 * ACTIVATIONS.index(activation) + GATES.index(gate)
    slope = 0.3 if activation in ("leaky_relu", "elu") else None
    variant, dtype = ("cse", "max", "add")[i % 3], DTYPES[i % 4]
    case = make_case((2, 19, 5, 7), variant, dtype, activation=activation, slope=slope, gate=gate)
    case = case.in_channels_last(i % 2 == 1)
    check(case, orders=((3, None), (1, 1)), target=(80, 90)[i % 2])


def test_hard_gates_of_the_spatial_branch_alone():
    check(make_case((2, 19, 5, 7), "sse", gate="hard_sigmoid"), orders=((3, None), (1, 1)))


@pytest.fixture
def many(monkeypatch):
    """All weights count as many, and sums take several steps. A function sets a program's share."""
    monkeypatch.setattr(heuristics, "_MANY_WEIGHTS", 1)
    monkeypatch.setattr(heuristics, "_MANY_TERMS", 16)

    def shared(hidden, channels, warps=4):
        rows = heuristics.Rows(heuristics.Share(*hidden), heuristics.Share(*channels), warps)
        excitation = partial(_with_rows, heuristics.excitation, rows)
        monkeypatch.setattr(heuristics, "excitation", excitation)

    return shared


def _with_rows(excitation, rows, *arguments):
    return excitation(*arguments)[0], rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_a_launch_for_each_layer(many, dtype):
    """The bits of one program to a sample, in any order of execution. The last programs have a
    sample less."""
    i = DTYPES.index(dtype)
    case = make_case((3, 75, 5, 7), ("add", "cse", "max", "concat")[i], dtype)
    many((16, (2, 4)[i % 2]), (16, (4, 2)[i % 2]))
    check(case, orders=((3, None), (3, 1), (1, 1)), target=(80, 90)[i % 2], by_rows=True)


SHARES = (((16, 1), (64, 1)), ((16, 2), (16, 4)), ((32, 8), (32, 2)), ((64, 4), (16, 16)))


def test_no_share_changes_a_bit(many):
    case = make_case((5, 75, 5, 7), reduction=2, parameter_dtype=torch.float16)
    first = check(case, by_rows=True)
    for shares in SHARES:
        many(*shares)
        for name, got in check(case, by_rows=True).items():
            assert same_bits(got, first[name]), f"{name}: {shares}"


def test_no_batch_changes_a_bit(many, monkeypatch):
    """A sample's results are those of a batch of one, whoever shares its programs."""
    case = make_case((5, 75, 5, 7), "max", reduction=2)
    tile = heuristics.Tile(128, 16, 2, 1, True)
    monkeypatch.setattr(heuristics, "tile", lambda *_: tile)
    calls = torch.ops.scse_kernels

    def of(some):
        code = ops.COMBINE["max"]
        x, dy = case.x[some], case.dy[some]
        with emulator():
            y, *small = calls.triton_forward(x, *case.parameters, code)
            needs = True, False, False
            dx, *_ = calls.triton_backward(dy, x, *case.parameters, *small, code, *needs)
        pooled, hidden, gate = small
        return y, pooled, hidden.transpose(0, 1), gate, dx

    many((16, 1), (16, 1))
    alone = [of(slice(i, i + 1)) for i in range(5)]
    for shares in SHARES:
        many(*shares)
        for together, *each in zip(of(slice(None)), *alone, strict=True):
            assert same_bits(together, torch.cat(each)), shares


@pytest.mark.parametrize(
    "shape, reduction, parameters",
    [
        ((2, 512, 4, 8), 2, torch.float32),
        ((5, 512, 4, 8), 2, torch.float16),
        ((9, 1024, 3, 3), 16, torch.float32),
    ],
    ids=str,
)
def test_the_excitation_of_many_weights(shape, reduction, parameters):
    """With the sizes that the heuristics choose; no registers are spilled."""
    case = make_case(shape, "add", torch.float16, reduction, parameter_dtype=parameters)
    _, lab = results(case, checks=False)
    ran = {report.kernel: report for report in lab.reports}
    for names in BY_ROWS.values():
        for name in names:
            samples, blocks = ran[name].grid[:2]
            assert ran[name].spill_bytes == 0 and samples <= 3 and blocks >= 4


def test_where_the_excitation_is_shared():
    def rows(channels, hidden, strips=16, itemsize=4):
        return heuristics.excitation(channels, hidden, strips, itemsize)[1]

    two, four, eight = (heuristics.Share(16, n) for n in (2, 4, 8))
    assert rows(512, 256) == heuristics.Rows(four, four, 8)
    assert rows(512, 256, 17) == heuristics.Rows(two, four, 8)
    assert rows(512, 256, itemsize=8) == heuristics.Rows(four, four, 8)
    assert rows(2048, 128) == heuristics.Rows(four, eight, 8)
    assert rows(256, 128) == heuristics.Rows(four, eight, 8)
    assert rows(256, 64) is None  # 64 KiB of weights: one launch costs less
    assert rows(512, 256, 256) is None  # a large map
