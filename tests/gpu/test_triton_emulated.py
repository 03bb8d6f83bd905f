"""The Triton kernels as compiled, executed in the emulator with all its checks: bounds, races,
memory that nothing wrote, deadlock. Results are held to the budget of every other backend.

Each kind of case stands once with each of the others' kinds, not with all of them.
"""

import os
from functools import partial

import budget
import gpulab
import pytest
import torch
from budget import (
    VARIANTS,
    call,
    check_infinite_weight,
    make_case,
    output_and_gradients,
    same_bits,
)
from gpu.emulated import check, emulator, kernels, results
from gpu.proof import record
from targets import Target

from scse_kernels import ops
from scse_kernels._triton import heuristics, launch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SEVERAL = ((3, None), (3, 1), (3, 2), (1, None), (1, 1), (1, 2))
BOTH = ((3, None), (1, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant(variant):
    """Odd sizes in one layout, aligned ones with x added in the other; test_triton_versions.py runs
    this with other versions of Triton."""
    expected = os.environ.get("SCSE_TEST_TRITON", triton.__version__)
    assert triton.__version__ == expected
    check(make_case((2, 19, 5, 7), variant, F16), SEVERAL)
    how = {"biases": False, "parameter_dtype": F32, "residual": variant != "concat"}
    check(make_case((2, 32, 8, 16), variant, BF16, **how).in_channels_last(), BOTH, target=80)


# variant, dtype, shape; then layout, target, what else is different, and the orders
CASES = {
    "float32": ("max", F32, (2, 20, 6, 6), False, 80, {}, BOTH),
    "float64": ("add", F64, (2, 9, 5, 6), False, 90, {}, BOTH),
    "bfloat16": ("add", BF16, (3, 19, 5, 7), True, 90, {"parameter_dtype": F32}, BOTH),
    "wide parameters": ("mul", F32, (2, 12, 6, 5), True, 90, {"parameter_dtype": F64}, BOTH),
    "narrow parameters": ("max", F32, (2, 16, 8, 8), True, 90, {"parameter_dtype": F16}, BOTH),
    "one axis": ("cse", F32, (3, 7, 33), False, 80, {"trailing": 1}, ((3, 1),)),
    "three axes": ("sse", F16, (2, 32, 3, 4, 8), True, 90, {"trailing": 3}, ((3, 1),)),
    "aligned": ("concat", F16, (2, 16, 8, 16), False, 90, {"parameter_dtype": F32}, BOTH),
    "halves": ("concat", F32, (3, 13, 4, 5), True, 80, {"biases": False}, BOTH),
    "one of everything": ("max", F16, (1, 1, 1), False, 90, {"reduction": 1}, BOTH),
    "many samples": ("add", F16, (41, 5, 3, 3), False, 90, {"reduction": 1}, ((3, None), (1, 5))),
    "seventeen samples": ("max", F64, (17, 33, 2, 3), True, 90, {"reduction": 1}, BOTH),
    "float64 on an A100": ("mul", F64, (18, 20, 3, 3), False, 80, {"reduction": 1}, BOTH),
    "many hidden": ("add", F32, (2, 300, 2, 2), False, 90, {"reduction": 1}, BOTH),
    "many strips": ("add", F16, (1, 16, 50, 50), False, 90, {}, BOTH),
    # A thread has channels far apart and several positions of each.
    "channels apart": ("add", F32, (2, 512, 5, 4), True, 90, {"reduction": 128}, BOTH),
    "the same in float64": ("cse", F64, (1, 256, 3, 4), True, 90, {"reduction": 64}, BOTH),
    "more channels than a tile": ("max", F16, (1, 1100, 3, 5), False, 90, {"reduction": 550}, BOTH),
    "the same in float32": ("add", F32, (1, 1100, 5, 8), True, 80, {"reduction": 550}, ((3, 1),)),
}


@pytest.mark.parametrize("name", CASES)
def test_other_kinds(name):
    variant, dtype, shape, last, target, others, orders = CASES[name]
    case = make_case(shape, variant, dtype, **others)
    check(case.in_channels_last(last), orders, target, by_rows=name == "many hidden")


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_tiles_of_large_maps(last):
    """Eight warps to a program; in channels_last one, and several tiles to a strip."""
    case = make_case((1, 256, 9, 24), "max", F16, reduction=16)
    check(case.in_channels_last(last), BOTH, processors=1)


def test_strips_of_several_tiles(monkeypatch):
    monkeypatch.setattr(heuristics, "_STRIPS", 2)
    check(make_case((2, 17, 12, 13), "concat", F16), BOTH)


@pytest.mark.parametrize("programs, lead, seeds", [(1, 0, 1), (3, 0, 3), (3, 100, 3), (16, 1, 12)])
def test_few_programs_do_all_strips(programs, lead, seeds, monkeypatch):
    """With many seeds where programs wait most, as it takes luck to see one that does not."""
    monkeypatch.setattr(heuristics, "queue", lambda *_: heuristics.Queue(programs, lead))
    orders = ((1, None), *((1, seed) for seed in range(1, seeds + 1)), (3, None))
    check(make_case((3, 19, 5, 23), "max", F16), orders)


def test_few_programs_fit_the_device(monkeypatch):
    """Fewer run at once than were launched: none may wait for one that has not begun."""
    device = gpulab.H100.scaled(sms=1, max_threads_per_sm=64)
    monkeypatch.setattr(heuristics, "queue", lambda *_: heuristics.Queue(12, 2))
    check(make_case((3, 19, 5, 23), "add", F16), ((1, None), (1, 1)), device=device)


def test_strided_maps():
    case = make_case((3, 10, 6, 8), "max", F16)

    def every_second(t):
        wide = torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan, dtype=t.dtype)
        wide[::2] = t
        return wide[::2]

    def transposed(t):
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    plain = check(case, BOTH)
    for arrange in (every_second, transposed):
        strided, _ = results(case.arranged(arrange, arrange))
        assert all(same_bits(plain[name], strided[name]) for name in plain)
    check(case.arranged(None, lambda t: t[:1, :1, :1, :1].expand_as(t)), BOTH)
    aligned = make_case((3, 16, 4, 8), "concat", F16)
    check(aligned.in_channels_last().arranged(lambda t: t[::2], lambda t: t[::2]), BOTH)


@pytest.mark.parametrize("variant", ["add", "max"])
def test_an_infinite_weight(variant):
    with emulator():
        check_infinite_weight(make_case((2, 19, 5, 7), variant, F16), Target("triton", "cpu"))


NEEDS = ((True, False, False), (False, True, False), (False, False, True), (True, False, True))


@pytest.mark.parametrize("launches", [3, 1])
@pytest.mark.parametrize("variant", ["cse", "sse", "max"])
def test_what_is_not_needed_is_empty_and_the_rest_the_same(variant, launches):
    case = make_case((2, 19, 5, 7), variant, F16)
    combine = ops.COMBINE.get(variant, 0)
    namespace = torch.ops.scse_kernels
    with emulator(launches=launches) as lab:
        _, *small = namespace.triton_forward(case.x, *case.parameters, combine)
        gradients = partial(
            namespace.triton_backward, case.dy, case.x, *case.parameters, *small, combine
        )
        whole = gradients(True, True, True)
        for need in NEEDS if variant == "max" else NEEDS[1:]:
            of_branch = (need[0], *[need[1]] * 4, *[need[2]] * 2)
            for part, all_of_it, needed in zip(gradients(*need), whole, of_branch, strict=True):
                if needed:
                    assert same_bits(part, all_of_it)
                else:
                    assert part.numel() == 0
    for report in lab.reports:
        record("triton", report.kernel, 90)


@pytest.mark.parametrize("launches", [3, 1])
@pytest.mark.parametrize("variant", ["cse", "sse", "concat"])
def test_empty_batch(variant, launches):
    case = make_case((2, 4, 3, 3), variant)
    leaves = [t.requires_grad_() for t in (case.x[:0].clone(), *case.parameters) if t is not None]
    it = iter(leaves)
    x = next(it)
    parameters = [None if p is None else next(it) for p in case.parameters]
    with emulator(launches=launches) as lab:
        y = call(variant, x, *parameters, backend="triton")
        assert y.shape[0] == 0
        dx, *gradients = torch.autograd.grad(y, leaves, case.dy[:0])
    assert dx.shape == x.shape
    assert all(g.eq(0).all() for g in gradients)
    assert [report.kernel for report in lab.reports] == ["apply_backward_kernel"]


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

    with emulator():
        got, expected = both(x)
        torch.testing.assert_close(got, expected)
        x[0, 0, 1] = torch.nan
        got, expected = both(x)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_64_bit_offsets_change_nothing(monkeypatch):
    case = make_case((3, 20, 9, 8), "concat", F16)
    narrow = check(case)
    monkeypatch.setattr(launch, "_WIDE", 1)
    wide = check(case, BOTH)
    assert all(same_bits(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize("launches", [3, 1])
def test_later_calls_of_a_kind_go_by_the_plan_of_the_first(launches, monkeypatch):
    """Past Triton's binder, with other tensors of the same kind."""
    with emulator(launches=launches) as lab:
        for seed in range(2):
            case = make_case((2, 24, 5, 8), "max", torch.float16, seed=seed)
            first = len(lab.reports)
            got = output_and_gradients(partial(call, backend="triton"), case)
            for name, error in budget.errors(case, got).items():
                assert error <= 1, f"{name}: error is {error:.3g} times what is allowed"
            names = tuple(report.kernel for report in lab.reports[first:])
            assert names == kernels("max", launches)
            monkeypatch.setattr(triton.JITFunction, "run", None)
