"""Counts what the compiled Triton kernels do with memory: prints the tables of docs/gpu.md.

    PYTHONPATH=tests python -m gpu.triton_counts

Each direction starts with a cold L2, and what it leaves dirty there counts as written.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import gpulab
import pytest
import torch
import triton
from budget import make_case
from gpu.emulated import emulator

from scse_kernels import ops

SHAPE = (4, 64, 64, 64)
LAYOUTS = ("contiguous", "channels_last")
VARIANTS = ("add", "max", "concat")
#: The maps of one launch each way, and how many of their samples fit the L2.
QUEUED = ((16, 64, 32, 32), (16, 256, 16, 16))
HELD = 4
#: The maps of which the excitation is shown, at reduction 2.
DEEP = ((8, 512, 16, 16), (8, 1024, 7, 7))


@dataclass(frozen=True)
class Counted:
    """One direction: the reports of its launches; passes over x, read and written."""

    reports: list
    read: float
    written: float

    @property
    def bound(self) -> float:
        """Microseconds: the launches' roofline bounds added up."""
        return sum(report.roofline()["bound_us"] for report in self.reports)


def count(
    variant,
    shape=SHAPE,
    layout="contiguous",
    l2=0.1,
    launches=3,
    reduction=16,
    parameters=None,
    residual=False,
):
    """Forward and backward in float16, with an L2 of `l2` times x; `parameters`: their dtype."""
    case = make_case(shape, variant, torch.float16, reduction, parameter_dtype=parameters)
    case = case.in_layout(layout)
    code = ops.COMBINE.get(variant, 0)
    device = gpulab.H100.scaled(l2_bytes=int(l2 * case.x.nbytes))
    calls = torch.ops.scse_kernels
    counted = []

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(operator, *arguments):
        options = {"launches": launches, "device": device, "checks": False}
        with pytest.MonkeyPatch.context() as patch, emulator(**options) as lab:
            # registers are those of Triton's assembler, whatever toolkit is installed
            patch.setenv("PATH", str(tools), prepend=os.pathsep)
            results = operator(*arguments, residual=residual)
        read, written = lab.dram_read_bytes, lab.dram_write_bytes
        counted.append(Counted(lab.reports, read / case.x.nbytes, written / case.x.nbytes))
        return results

    _, *small = run(calls.triton_forward, case.x, *case.parameters, code)
    needs = (True, True, True)
    run(calls.triton_backward, case.dy, case.x, *case.parameters, *small, code, *needs)
    return counted


def row(*cells) -> str:
    return "| " + " | ".join(cells) + " |"


def passes_row(variant, layout, counted) -> str:
    """A row of the table of passes in three launches."""
    forward, backward = counted
    return row(
        f"{variant}, {layout}",
        *(f"{one.read:.2f} + {one.written:.2f}" for one in counted),
        f"{forward.bound:.1f} / {backward.bound:.1f}",
    )


def wide(widths) -> float:
    """The share of the bytes that go in accesses of 16 bytes to a thread."""
    return 16 * widths[16] / sum(width * lanes for width, lanes in widths.items())


def kernel_row(report, layout) -> str:
    """A row of the table of kernels."""
    line = report.roofline()
    conflicts = report.shared_wavefronts / max(1, report.shared_ideal_wavefronts)
    return row(
        f"{report.kernel}, {layout}",
        str(report.registers),
        f"{100 * wide(report.load_widths):.0f} / {100 * wide(report.store_widths):.0f}",
        f"{100 * report.load_efficiency:.0f} / {100 * report.store_efficiency:.0f}",
        f"{conflicts:.2f}" if report.shared_wavefronts else "none used",
        f"{line['bound_us']:.2f}, {line['binds']}",
    )


def queued_row(shape, layout) -> tuple[str, list[Counted]]:
    """A row of the table of one launch each way, and what was counted in one and in three."""
    l2 = HELD / shape[0]
    one, three = (count("add", shape, layout, l2, launches) for launches in (1, 3))
    cells = (
        " / ".join(f"{direction.read + direction.written:.2f}" for direction in counted)
        for counted in (one, three)
    )
    return row(f"{list(shape)}, {layout}", *cells), [*one, *three]


def excitation_row(shape) -> str:
    """A row of the table of excitations that several programs share: the bound of each launch."""
    counted = count("add", shape, l2=10, reduction=2, parameters=torch.float32)
    cells = (
        " + ".join(
            f"{report.roofline()['bound_us']:.1f}"
            for report in direction.reports
            if report.kernel.startswith("excite")
        )
        for direction in counted
    )
    return row(f"{list(shape)}, reduction 2", *cells)


def spilled() -> str:
    """What docs/gpu.md says of the one kernel that spills."""
    reports = count("add", (1, 384, 4, 4), l2=10)[1].reports
    size = next(r.spill_bytes for r in reports if r.kernel == "excite_backward_kernel")
    return f"{size} bytes at 384 channels, reduction 16"


def main() -> None:
    kernels = []
    for variant in VARIANTS:
        for layout in LAYOUTS:
            counted = count(variant, layout=layout)
            print(passes_row(variant, layout, counted), flush=True)
            if variant == "add":
                kernels += [kernel_row(r, layout) for one in counted for r in one.reports]
    print(*kernels, sep="\n")
    for shape in QUEUED:
        for layout in LAYOUTS:
            print(queued_row(shape, layout)[0], flush=True)
    for shape in DEEP:
        print(excitation_row(shape), flush=True)
    print(spilled())


if __name__ == "__main__":
    main()
