"""docs/gpu.md has the counts that counts.py prints."""

import re
from pathlib import Path

import pytest
from counts import (
    DEEP,
    ISSUED,
    LAYOUTS,
    ROWS,
    SHAPE,
    count,
    deep_row,
    issued_row,
    kernel_row,
    passes_row,
)
from gpu import proof

from scse_kernels.ops import COMBINE

DOCUMENT = Path(__file__).parents[3] / "docs" / "gpu.md"


@pytest.mark.parametrize("variant, layout", ROWS)
def test_the_document_has_what_is_counted(variant, layout):
    x_bytes, labs = count(SHAPE, variant, layout)
    text = DOCUMENT.read_text()
    assert passes_row(SHAPE, variant, layout, x_bytes, labs) in text
    for lab in labs:
        for report in lab.reports:
            passes = (report.dram_read_bytes + report.dram_write_bytes) / x_bytes
            proof.record("nvcc", report.kernel.split("<")[0], 90, passes=passes)
            assert report.spill_bytes == 0
            assert report.atomic_requests == 0
            if variant == "add":
                # The compiler's version decides about registers.
                expected = re.escape(kernel_row(report, layout, x_bytes))
                expected = re.sub(rf"\\\|\\ {report.registers}\\ ", r"\\|\\ \\d+\\ ", expected)
                assert re.search(expected, text), kernel_row(report, layout, x_bytes)


@pytest.mark.parametrize("shape", [*DEEP][:2], ids=str)
def test_deep_levels(shape):
    assert deep_row(shape) in DOCUMENT.read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ISSUED, ids=str)
def test_instructions(shape, layout):
    assert issued_row(shape, layout) in DOCUMENT.read_text()


@pytest.mark.parametrize("variant", ("add", "max", "mul"))
@pytest.mark.parametrize("kernel", ("planes", "channels_last"))
def test_memory_is_waited_for_once(kernels, kernel, variant):
    """In reduce all loads of x and of dy stand before x is first used, which is when it is put into
    shared memory; also where the gates come before dy is used."""
    name = f"reduce_{kernel}<__half, 8, {COMBINE[variant]}>"
    (function,) = [f for f in kernels.functions.values() if f.readable == name]
    code = function.image(90).module(function.name).kernels[function.name].instrs
    used = next(i for i, ins in enumerate(code) if ins.op == "st" and "shared" in ins.mods)
    loads = [i for i in code[:used] if i.op == "ld" and {"global", "nc", "v4"} <= set(i.mods)]
    # Of either map eight rows, or at its end up to seven.
    assert len(loads) == 2 * (8 + 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_costs_no_pass(layout):
    """Beside the operator, it would cost three forward (x and y read, their sum written) and three
    backward."""
    (_, plain), (_, added) = (count(SHAPE, "add", layout, residual) for residual in (False, True))
    for without, with_it in zip(plain, added, strict=True):
        assert with_it.dram_read_bytes == without.dram_read_bytes
        assert with_it.dram_write_bytes == without.dram_write_bytes
