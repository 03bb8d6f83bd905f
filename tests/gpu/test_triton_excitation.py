"""Every activation and every gate in the Triton kernels as compiled, executed in the emulator."""

import os

import budget
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
    """All weights count as many. A function sets the programs' shares, of the layer to the hidden
    channels and of the one from them: samples, outputs, terms to a step, warps."""
    monkeypatch.setattr(heuristics, "_MANY_WEIGHTS", 1)

    def shared(hidden, channels):
        layers = heuristics.Share(*hidden), heuristics.Share(*channels)
        monkeypatch.setattr(heuristics, "rows", lambda *_: heuristics.Rows(*layers, *layers))

    return shared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_a_launch_for_each_layer(many, dtype):
    """The bits of one program to a sample, in any order of execution. The last programs have a
    sample less."""
    i = DTYPES.index(dtype)
    case = make_case((3, 75, 5, 7), ("add", "cse", "max", "concat")[i], dtype)
    many(((2, 4)[i % 2], 16, 16, 2), ((4, 2)[i % 2], 32, 16, 4))
    check(case, orders=((3, None), (3, 1), (1, 1)), target=(80, 90)[i % 2], by_rows=True)


SHARES = (
    ((1, 16, 32, 4), (1, 64, 16, 4)),
    ((2, 16, 16, 2), (4, 16, 32, 1)),
    ((8, 32, 16, 4), (2, 32, 64, 4)),
    ((4, 64, 32, 8), (16, 16, 16, 2)),
)


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

    many((1, 16, 16, 2), (1, 16, 16, 2))
    alone = [of(slice(i, i + 1)) for i in range(5)]
    for shares in SHARES:
        many(*shares)
        for together, *each in zip(of(slice(None)), *alone, strict=True):
            assert same_bits(together, torch.cat(each)), shares


def test_parameters_alone(many):
    """Without dx the second layer's kernel still makes the gradients before the activation."""
    case = make_case((3, 75, 5, 7), "add", reduction=2)
    many((2, 16, 16, 2), (2, 32, 16, 2))
    calls, code = torch.ops.scse_kernels, ops.COMBINE["add"]
    with emulator():
        _, *small = calls.triton_forward(case.x, *case.parameters, code)
        arguments = case.dy, case.x, *case.parameters, *small, code
        _, *expected = calls.triton_backward(*arguments, True, True, True)
        for spatial in (True, False):
            _, *got = calls.triton_backward(*arguments, False, True, spatial)
            for one, other in zip(got[: 6 if spatial else 4], expected, strict=False):
                assert same_bits(one, other)


@pytest.mark.parametrize(
    "shape, reduction, parameters, processors",
    [
        ((2, 512, 4, 8), 2, torch.float32, None),
        ((5, 512, 4, 8), 2, torch.float16, None),
        ((9, 1024, 3, 3), 16, torch.float32, None),
        ((19, 528, 3, 3), 3, torch.float32, 12),
        ((19, 528, 3, 3), 3, torch.float16, 12),
        ((7, 501, 3, 3), 4, torch.float32, 12),
    ],
    ids=str,
)
def test_the_excitation_of_many_weights(shape, reduction, parameters, processors):
    """With the sizes that the heuristics choose; no registers are spilled. The last samples,
    channels and hidden channels are fewer than a program's share."""
    case = make_case(shape, "add", torch.float16, reduction, parameter_dtype=parameters)
    got, lab = results(case, checks=False, processors=processors)
    assert max(budget.errors(case, got).values()) <= 1
    ran = {report.kernel: report for report in lab.reports}
    channels = shape[1]
    for names in BY_ROWS.values():
        for name in names:
            assert ran[name].spill_bytes <= (channels % 16 > 0) * 64
            assert ran[name].ctas >= 3 * (processors or 20) // 4


def test_where_the_excitation_is_shared():
    def segment(channels, hidden, strips=16):
        return heuristics.excitation(channels, hidden, strips, 4).segment

    assert segment(512, 256) == 128
    assert segment(2048, 128) == 512
    assert segment(256, 128) == 64
    assert segment(256, 64) == 0  # 64 KiB of weights: one launch costs less
    assert segment(512, 256, 256) == 0  # a large map


def test_shares():
    def rows(samples, channels, hidden, strips, itemsize=4):
        tiles = heuristics.excitation(channels, hidden, strips, itemsize)
        return heuristics.rows(tiles, samples, channels, hidden, itemsize, 132)

    share = heuristics.Share
    large = rows(256, 2048, 128, 4)
    assert (large.hidden, large.d_hidden) == (share(16, 64, 64, 4),) * 2
    assert (large.gates, large.d_mean) == (share(16, 128, 32, 4),) * 2
    small = rows(8, 512, 256, 16)
    assert (small.hidden, small.d_hidden) == (share(2, 32, 128, 4), share(2, 32, 128, 2))
    assert (small.gates, small.d_mean) == (share(2, 32, 256, 4), share(2, 32, 128, 2))
    assert rows(1, 1024, 512, 4) == rows(3, 1024, 512, 4)  # the same kernels
    assert rows(256, 2048, 128, 4, 8).gates == share(16, 64, 32, 4)  # registers for float64
