"""The Triton kernels' arithmetic, run by Triton's interpreter on CPU tensors. What the compiled
kernels do is tested in tests/gpu; here, whether those who debug with the interpreter are served.

The interpreter must be chosen before Triton is imported. So the tests run in a process of their
own, which the first test starts. bfloat16 is missing: the interpreter truncates when it casts to
it.

A program takes the interpreter 15 ms. So maps are as small as they can be: a few strips.
"""

import os
import subprocess
import sys

import pytest
import torch
from budget import (
    ACTIVATIONS,
    GATES,
    VARIANTS,
    Case,
    call,
    check,
    check_infinite_weight,
    make_case,
    same_bits,
)
from targets import Target

from scse_kernels import ops

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not 1")
TRITON = Target("triton", "cpu")


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1")
def test_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1")
def test_without_the_interpreter_cpu_tensors_are_refused():
    case = make_case((2, 6, 5, 7))
    with pytest.raises(RuntimeError, match=r"'triton'.*TRITON_INTERPRET=1"):
        call("add", case.x, *case.parameters, backend="triton")


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
def test_odd_sizes(variant):
    """dtypes take turns."""
    dtype = (torch.float32, torch.float16, torch.float64)[VARIANTS.index(variant) % 3]
    check(make_case((2, 19, 3, 7), variant, dtype), TRITON)
    case = make_case((3, 5, 1, 4, 3), variant, dtype, residual=variant != "concat")
    check(case.in_channels_last(), TRITON)


@interpreted
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
def test_aligned_sizes_of_several_strips(last):
    check(make_case((1, 32, 4, 12), "max", torch.float16).in_channels_last(last), TRITON)


@interpreted
@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 1, 1), (3, 2, 5, 3, 2)], ids=str)
def test_shapes(shape):
    check(make_case(shape, "max"), TRITON)


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gates(activation, monkeypatch):
    odd = ACTIVATIONS.index(activation) % 2
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "31"[odd])
    slope = 0.3 if activation in ("leaky_relu", "elu") else None
    for gate, dtype in zip(GATES, (torch.float32, torch.float64), strict=True):
        case = make_case(
            (2, 10, 2, 5), "max" if odd else "cse", dtype,
            activation=activation, slope=slope, gate=gate,
        )  # fmt: skip
        check(case.in_channels_last(odd), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ("mul",))
def test_hard_spatial_gates(variant):
    check(make_case((2, 19, 2, 7), variant, gate="hard_sigmoid"), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ("max",))
def test_an_infinite_weight(variant):
    case = make_case((2, 19, 2, 7), variant)
    check_infinite_weight(case, TRITON)
    check_infinite_weight(case.in_channels_last(), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ("add", "max"))
def test_more_channels_than_a_tile(variant, monkeypatch):
    from scse_kernels._triton import heuristics

    monkeypatch.setattr(heuristics, "_CHANNELS", 16)
    last = variant == "max"
    assert not heuristics.tile(2, 37, 15, 4, 32, last, 132).hold
    check(make_case((2, 37, 3, 5), variant, reduction=5).in_channels_last(last), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ["max"])
def test_channels_that_fill_a_warp(variant):
    check(make_case((1, 130, 3, 7), variant).in_channels_last(), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ["max"])
def test_strips_of_several_tiles(variant, monkeypatch):
    from scse_kernels._triton import heuristics

    monkeypatch.setattr(heuristics, "_STRIPS", 2)
    case = make_case((1, 33, 5, 7), variant)
    for last in (False, True):
        assert heuristics.tile(1, 33, 35, 4, 32, last, 132).tiles > 1
        check(case.in_channels_last(last), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ["concat"])
def test_64_bit_offsets_change_nothing(variant, monkeypatch):
    from scse_kernels._triton import launch

    case = make_case((2, 20, 3, 8), variant)
    narrow = check(case, TRITON)
    monkeypatch.setattr(launch, "_WIDE", 1)
    wide = check(case, TRITON)
    assert all(same_bits(narrow[name], wide[name]) for name in narrow)


@interpreted
@pytest.mark.parametrize("variant", ["add"])
def test_parameters_of_another_dtype_without_biases(variant):
    check(
        make_case(
            (2, 12, 3, 5), variant, torch.float16, biases=False, parameter_dtype=torch.float32
        ),
        TRITON,
    )
    check(make_case((2, 12, 3, 5), variant, parameter_dtype=torch.float64, trailing=2), TRITON)


@interpreted
def test_strided_inputs():
    case = make_case((3, 10, 3, 4))

    def every_second(t):
        wide = torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan, dtype=t.dtype)
        wide[::2] = t
        return wide[::2]

    def transposed(t):
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    plain = check(case, TRITON)
    for arrange in (every_second, transposed):
        strided = check(case.arranged(arrange, arrange), TRITON)
        assert all(same_bits(plain[name], strided[name]) for name in plain)
    check(case.arranged(None, lambda t: t[:1, :1, :1, :1].expand_as(t)), TRITON)


@interpreted
@pytest.mark.parametrize("variant", ["add"])
def test_what_is_not_needed_is_empty_and_the_rest_the_same(variant):
    case = make_case((2, 10, 2, 7), variant)
    combine = ops.COMBINE.get(variant, 0)
    namespace = torch.ops.scse_kernels
    _, *small = namespace.triton_forward(case.x, *case.parameters, combine)

    def gradients(*need):
        return namespace.triton_backward(case.dy, case.x, *case.parameters, *small, combine, *need)

    whole = gradients(True, True, True)
    for mask in range(7):
        need = tuple(bool(mask >> bit & 1) for bit in range(3))
        of_branch = (need[0], *[need[1]] * 4, *[need[2]] * 2)
        for part, all_of_it, needed in zip(gradients(*need), whole, of_branch, strict=True):
            if needed:
                assert same_bits(part, all_of_it)
            else:
                assert part.numel() == 0


@interpreted
def test_maximum_of_ties_and_nan():
    """Where x is 0 both products tie; a NaN reaches every result that depends on it."""
    x = torch.tensor([[[0.0, 1.0, -2.0, 0.0], [3.0, 0.0, -1.0, 2.0]]])
    parameters = make_case((1, 2, 4), "max").parameters
    dy = torch.arange(1.0, 9.0).reshape(1, 2, 4)

    def both(x):
        for backend in ("triton", "eager"):
            leaf = x.clone().requires_grad_()
            y = call("max", leaf, *parameters, backend=backend)
            yield y.detach(), *torch.autograd.grad(y, leaf, dy)

    got, expected = both(x)
    torch.testing.assert_close(got, expected)
    x[0, 0, 1] = torch.nan
    got, expected = both(x)
    torch.testing.assert_close(got, expected, equal_nan=True)


@interpreted
@pytest.mark.parametrize("variant", ["cse", "sse", "concat"])
def test_empty_batch(variant):
    case = make_case((2, 4, 3, 3), variant)
    leaves = [t.requires_grad_() for t in (case.x[:0].clone(), *case.parameters) if t is not None]
    it = iter(leaves)
    x = next(it)
    parameters = [None if p is None else next(it) for p in case.parameters]
    y = call(variant, x, *parameters, backend="triton")
    assert y.shape[0] == 0
    dx, *gradients = torch.autograd.grad(y, leaves, case.dy[:0])
    assert dx.shape == x.shape
    assert all(g.eq(0).all() for g in gradients)


@interpreted
def test_operators_are_well_behaved():
    case = make_case((2, 4, 3, 5))
    torch.library.opcheck(
        torch.ops.scse_kernels.triton_forward.default, (case.x, *case.parameters, 0)
    )


def in_both(case: Case, monkeypatch, *need):
    """The operators' results in three launches each way and in one: asserts that they are equal."""
    combine = ops.COMBINE.get(case.variant, 0)
    namespace = torch.ops.scse_kernels
    results = []
    for launches in ("3", "1"):
        monkeypatch.setenv("SCSE_TRITON_LAUNCHES", launches)
        y, *small = namespace.triton_forward(case.x, *case.parameters, combine)
        gradients = namespace.triton_backward(
            case.dy, case.x, *case.parameters, *small, combine, *(need or (True,) * 3)
        )
        results.append((y, *small, *gradients))
    assert not results[0][0].isnan().any()
    for index, (three, one) in enumerate(zip(*results, strict=True)):
        assert same_bits(three, one), index


@interpreted
@pytest.mark.parametrize("variant", ["add", "max"])
def test_one_launch_gives_the_bits_of_three(variant, monkeypatch):
    in_both(make_case((2, 19, 3, 9), variant), monkeypatch)
    in_both(make_case((2, 33, 3, 15), variant, torch.float16).in_channels_last(), monkeypatch)


@interpreted
@pytest.mark.parametrize("lead", [0, 100])
def test_one_launch_by_several_programs(lead, monkeypatch):
    from scse_kernels._triton import heuristics

    monkeypatch.setattr(heuristics, "queue", lambda *_: heuristics.Queue(3, lead))
    in_both(make_case((2, 5, 5, 7), "max"), monkeypatch)
    in_both(make_case((1, 5, 3), "add"), monkeypatch)


@interpreted
def test_one_launch_of_more_channels_than_a_tile_and_strips_of_several(monkeypatch):
    from scse_kernels._triton import heuristics

    with monkeypatch.context() as patch:
        patch.setattr(heuristics, "_CHANNELS", 16)
        in_both(make_case((2, 37, 2, 5), "max", reduction=5), patch)
    monkeypatch.setattr(heuristics, "_STRIPS", 2)
    in_both(make_case((1, 33, 5, 7), "concat").in_channels_last(), monkeypatch)


@interpreted
@pytest.mark.parametrize("variant", ["add"])
def test_one_launch_of_what_is_needed(variant, monkeypatch):
    case = make_case((2, 10, 3, 7), variant)
    for mask in (1, 4, 6):
        in_both(case, monkeypatch, *(bool(mask >> bit & 1) for bit in range(3)))


@interpreted
def test_number_of_launches_is_checked(monkeypatch):
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "2")
    case = make_case((2, 4, 3, 3))
    with pytest.raises(ValueError, match="SCSE_TRITON_LAUNCHES must be 1 or 3, got '2'"):
        call("add", case.x, *case.parameters, backend="triton")
