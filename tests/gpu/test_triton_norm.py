"""The Triton kernels of BatchNorm + ReLU + scSE: executed as compiled, in the emulator with all its
checks, and held to the budget of every other backend; what they read and write of memory; their
registers."""

import os
from collections import Counter
from functools import partial

import budget
import gpulab
import pytest
import torch
from budget import output_and_gradients, same_bits
from gpu.emulated import emulator
from gpu.proof import record
from norm_budget import make_case

from scse_kernels import bn_relu_scse
from scse_kernels.batch_norm import ops

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
STATISTICS = ("norm_statistics_kernel", "norm_merge_kernel")
FORWARD = ("norm_squeeze_kernel", "excite_kernel", "norm_apply_kernel")
BACKWARD = (
    *("norm_reduce_kernel", "excite_backward_kernel", "norm_sums_kernel"),
    "norm_apply_backward_kernel",
)
OVER_THE_MAP = (
    *("norm_statistics_kernel", "norm_squeeze_kernel", "norm_apply_kernel"),
    *("norm_reduce_kernel", "norm_apply_backward_kernel"),
)
LAYOUTS = pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))


def spills_little(case, spills):
    """Some registers of the reduction of a channels_last map (see heuristics._NORM_ELEMENTS)."""
    return not case.x.is_contiguous() and all(
        kernel == "norm_reduce_kernel" and spilled <= 256 for kernel, spilled in spills.items()
    )


def check(case, seeds=(None, 1), target=90, **options):
    """Asserts that all results are within budget, and the same bits in any order of execution."""
    first, ran = None, Counter()
    for seed in seeds:
        with emulator(target, seed=seed, **options) as lab:
            got = output_and_gradients(partial(case.call, backend="triton"), case)
        names = [report.kernel for report in lab.reports]
        expected = (*(STATISTICS if case.training else ()), *FORWARD, *BACKWARD)
        assert names == [n for n in expected if case.variant != "sse" or n != "excite_kernel"]
        spills = {r.kernel: r.spill_bytes for r in lab.reports if r.spill_bytes}
        if case.x[0, 0].numel() % 8 == 0:  # maps of odd sizes may
            assert not spills or spills_little(case, spills), spills
        ran.update(names)
        if first is None:
            first, found = got, budget.errors(case, got)
            for name, error in found.items():
                assert error <= 1, f"{name}: error is {error:.3g} times what is allowed"
        for name, right in first.items():
            assert same_bits(got[name], right), f"{name}: seed {seed}"
    forward = found.pop("y")
    for name, count in ran.items():
        is_forward = name in (*STATISTICS, *FORWARD)
        record("triton", name, target, count, forward if is_forward else max(found.values()))


# variant, dtype, shape; then channels_last, training, target, what else is different
CASES = {
    "add": ("add", F32, (2, 19, 5, 7), False, True, 90, {}),
    "max": ("max", F16, (2, 19, 5, 7), True, True, 80, {}),
    "mul, evaluation": ("mul", F32, (2, 19, 5, 7), False, False, 90, {}),
    "concat": ("concat", BF16, (2, 32, 8, 16), True, True, 90, {"parameter_dtype": F32}),
    "float64": ("add", F64, (2, 9, 5, 6), False, True, 90, {}),
    "sse": ("sse", F16, (2, 19, 5, 7), False, True, 90, {}),
    "cse, evaluation": ("cse", F16, (2, 19, 5, 7), True, False, 80, {}),
    "a mean of many deviations": ("add", F32, (2, 17, 12, 13), False, True, 90, {"mean": 1000.0}),
    "not affine": ("max", F32, (2, 12, 6, 5), True, True, 90, {"affine": False, "biases": False}),
    # Triton has numbers, and no tensors, for arguments that are 1.
    "one strip": ("add", F16, (1, 9, 5, 3), True, True, 90, {}),
    "evaluation of more channels than a tile": (
        *("add", F16, (2, 1100, 3, 5), False, False, 90, {"reduction": 50}),
    ),
    "more channels than a tile": ("add", F16, (2, 1100, 3, 5), False, True, 90, {"reduction": 50}),
}


@pytest.mark.parametrize("name", CASES)
def test_kinds(name):
    variant, dtype, shape, last, training, target, others = CASES[name]
    case = make_case(shape, variant, dtype, training=training, **others)
    check(case.in_channels_last(last), target=target)


@LAYOUTS
def test_tiles_of_large_maps(last):
    """Several warps to a program, and several tiles to a strip."""
    case = make_case((2, 64, 16, 32), "max", F16, reduction=16)
    check(case.in_channels_last(last), seeds=(None,), processors=1)


SUBSETS = ((True, False, False, False), (False, True, False, False), (False, False, True, True))


@pytest.mark.parametrize("of_batch", (True, False))
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_what_is_not_needed_is_empty_and_the_rest_the_same(needs, of_batch):
    case = make_case((2, 19, 5, 7), "add", F32)
    weight, bias, *parameters = case.parameters
    statistics = (None, None) if of_batch else case.running
    with emulator():
        _, *small = ops.FORWARD["triton"](case.x, weight, bias, *statistics, *parameters, 1e-3, 0)
        run = partial(
            ops.BACKWARD["triton"],
            *(case.dy, case.x, weight, bias, *parameters, *small, 1e-3, of_batch, 0),
        )
        everything, some = run(True, True, True, True), run(*needs)
    groups = (needs[0], *(needs[1],) * 2, *(needs[2],) * 4, *(needs[3],) * 2)
    for all_of_it, part, needed in zip(everything, some, groups, strict=True):
        right = all_of_it if needed else all_of_it.new_empty(0)
        torch.testing.assert_close(part, right, rtol=1e-5, atol=1e-5)  # other products are fused


def passes(case):
    """DRAM passes over u and the launches' reports, forward and backward, with an L2 of a tenth of
    the map."""
    weight, bias, *parameters = case.parameters
    device = gpulab.H100.scaled(l2_bytes=case.x.nbytes // 10)
    counted = []

    def run(operator, *arguments):
        with emulator(device=device, checks=False) as lab:
            results = operator(*arguments)
        moved = lab.dram_read_bytes + lab.dram_write_bytes
        counted.append((moved / case.x.nbytes, lab.reports))
        return results

    code = ops.COMBINE[case.variant]
    _, *small = run(
        ops.FORWARD["triton"], case.x, weight, bias, None, None, *parameters, 1e-5, code
    )
    run(
        *(ops.BACKWARD["triton"], case.dy, case.x, weight, bias, *parameters, *small, 1e-5, True),
        *(code, True, True, True, True),
    )
    return counted


@LAYOUTS
def test_passes_over_the_map(last):
    """Four forward and five backward, and what the sums beside the map take."""
    case = make_case((4, 64, 64, 64), "add", F16, reduction=16, parameter_dtype=F32)
    case = case.in_channels_last(last)
    forward, backward = passes(case)
    assert forward[0] <= 4.2
    assert backward[0] <= 5.5
    for _, reports in (forward, backward):
        for report in reports:
            spilled = {report.kernel: report.spill_bytes}
            assert report.spill_bytes == 0 or (last and spills_little(case, spilled)), spilled
            bounds = report.roofline()
            if report.kernel in OVER_THE_MAP:  # the issue of instructions doesn't bind it
                assert bounds["issue_us"] <= 1.25 * bounds["dram_us"], report.kernel
            moved = report.dram_read_bytes + report.dram_write_bytes
            record("triton", report.kernel, 90, passes=moved / case.x.nbytes)


def apart(t):
    """With another element behind each."""
    return torch.stack((t, t), 1)[:, 0]


# dtype of u, of the running statistics, momentum, how they lie in memory
RUNNING = {
    "as usual": (F16, F32, 0.1, torch.clone),
    "mostly the new ones": (F32, F32, 0.75, torch.clone),
    "the new ones": (F32, F32, 1, torch.clone),
    "half": (BF16, F16, 1 / 3, torch.clone),
    "double": (F32, F64, 0.1, torch.clone),
    "double sums": (F64, F64, 1 / 3, torch.clone),
    "apart": (F32, F32, 0.1, apart),
}


@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics(name):
    """Moved by the kernels as by torch, towards the variance that isn't biased; twice, since each
    call has its own."""
    dtype, kept, momentum, place = RUNNING[name]
    case = make_case((2, 19, 5, 7), "add", dtype, parameter_dtype=kept)
    names = ("bn_weight", "bn_bias", "w1", "b1", "w2", "b2", "ws", "bs")
    arguments = dict(zip(names, case.parameters, strict=True))
    got = tuple(map(place, case.running))
    right = tuple(t.double() for t in case.running)
    with emulator(), torch.no_grad():
        for u in (case.x, 3 * case.x):
            bn_relu_scse(
                u, running_mean=got[0], running_var=got[1], **arguments,
                training=True, momentum=momentum, backend="triton",
            )  # fmt: skip
            var, mean = torch.var_mean(u.double(), (0, 2, 3), correction=1)
            right = tuple(r.lerp(t, momentum) for r, t in zip(right, (mean, var), strict=True))
    # an element's share, as a mean may be near 0
    scale = right[1].sqrt()
    roundings = 8 * max(torch.finfo(t).eps for t in (kept, F64 if dtype == F64 else F32))
    for one, wanted, size in zip(got, right, (scale, right[1]), strict=True):
        assert one.dtype == kept
        assert ((one.double() - wanted).abs() <= roundings * (wanted.abs() + size)).all()


def test_the_backward_of_an_evaluation_uses_what_the_running_statistics_were():
    case = make_case((2, 19, 5, 7), "add", F32, training=False)
    with emulator():
        running = tuple(t.clone() for t in case.running)
        weight, bias, *parameters = case.parameters
        _, mean, var, *_ = ops.forward(
            "triton", (case.x, weight, bias, *running, *parameters, 1e-3, 0)
        )
        for t in running:
            t.fill_(7)
    assert torch.equal(mean, case.running[0]) and torch.equal(var, case.running[1])
