"""The figures of docs/gpu.md for the Triton kernels are counted here again: each row stands there
to the letter (`PYTHONPATH=tests python -m gpu.triton_counts` prints them all)."""

import os
import re
from math import prod
from pathlib import Path

import pytest
from gpu import triton_counts
from gpu.proof import record

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)
if not triton.__version__.startswith("3.7."):
    pytest.skip("the figures are of Triton 3.7", allow_module_level=True)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()


def stands_there(line):
    assert line in DOCUMENT.replace("\n", " "), f"docs/gpu.md lacks: {line}"


def note(counted, shape):
    x_bytes = 2 * prod(shape)
    for report in (report for direction in counted for report in direction.reports):
        passes = (report.dram_read_bytes + report.dram_write_bytes) / x_bytes
        record("triton", report.kernel, 90, passes=passes)


@pytest.mark.parametrize("layout", triton_counts.LAYOUTS)
@pytest.mark.parametrize("variant", triton_counts.VARIANTS)
def test_three_launches(variant, layout):
    counted = triton_counts.count(variant, layout=layout)
    note(counted, triton_counts.SHAPE)
    stands_there(triton_counts.passes_row(variant, layout, counted))
    if variant == "add":
        for report in (report for direction in counted for report in direction.reports):
            stands_there(triton_counts.kernel_row(report, layout))


@pytest.mark.parametrize("layout", triton_counts.LAYOUTS)
@pytest.mark.parametrize("shape", triton_counts.QUEUED, ids=str)
def test_one_launch(shape, layout):
    row, counted = triton_counts.queued_row(shape, layout)
    note(counted, shape)
    kind = row.split(" | ")[0]
    there = [line for line in DOCUMENT.splitlines() if line.startswith(f"{kind} | ")]
    # Where in L2 scratch memory lies differs from run to run, and with it a few lines read again.
    numbers = [[float(n) for n in re.findall(r"\d+\.\d+", line)] for line in (row, *there)]
    assert len(there) == 1, f"docs/gpu.md lacks: {row}"
    assert numbers[1] == pytest.approx(numbers[0], abs=0.02), f"docs/gpu.md lacks: {row}"


@pytest.mark.parametrize("shape", triton_counts.DEEP, ids=str)
def test_excitation_of_many_weights(shape):
    stands_there(triton_counts.excitation_row(shape))


def test_what_spills():
    stands_there(triton_counts.spilled())


@pytest.mark.parametrize("layout", triton_counts.LAYOUTS)
def test_a_residual_costs_no_pass(layout):
    """Beside the operator, it would cost three forward (x and y read, their sum written) and three
    backward."""
    counts = [triton_counts.count("add", layout=layout, residual=r) for r in (False, True)]
    for without, with_it in zip(*counts, strict=True):
        assert with_it.read == pytest.approx(without.read, abs=0.01)
        assert with_it.written == pytest.approx(without.written, abs=0.01)
