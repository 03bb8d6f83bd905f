"""Counts what the compiled CUDA kernels do with memory: prints the tables of docs/gpu.md.

    PYTHONPATH=tests python tests/gpu/cuda/counts.py

Each direction starts with a cold L2, and what it leaves dirty there counts as written. All in
float16, reduction 16, with an L2 of a tenth of the map.
"""

import re
from functools import partial
from itertools import product

import gpulab
import torch
from budget import make_case
from cases import in_layout
from fakecuda import Lab, connect, running_on
from gpulab import H100
from gpulab.counters import UNCHARGED

from scse_kernels import ops

LAYOUTS = ("contiguous", "channels_last")
SHAPE = (4, 64, 64, 64)
#: Rows of the first tables.
ROWS = [(variant, layout) for variant in ("add", "max", "concat") for layout in LAYOUTS]
#: Deep levels, and what their channels are reduced by. Rows of 14 x 14 and 7 x 7 are no multiples
#: of 16 bytes.
DEEP = {
    (8, 512, 14, 14): 2,
    (2, 1024, 7, 7): 2,
    (8, 64, 64, 64): 16,
    (8, 256, 16, 16): 2,
    (8, 512, 16, 16): 2,
    (32, 512, 16, 16): 2,
    (8, 1024, 7, 7): 2,
    (256, 2048, 7, 7): 16,
}
#: Maps whose kernels are counted by the instructions that they issue.
ISSUED = ((8, 64, 64, 64), (8, 256, 16, 16))

#: Maps that a kernel reads, by its name and for max: x and dy.
MAPS = {
    "squeeze": (1, 1),
    "apply": (1, 1),
    "reduce": (2, 2),
    "apply_backward": (1, 2),
}


def count(
    shape, variant, layout, residual=False, excitation=None, l2_bytes=None, **how
) -> tuple[int, list[Lab]]:
    """The bytes of x, and what was executed forward and backward, with an L2 of a tenth of x or of
    `l2_bytes`. `excitation`: as of make_case, `how`: as of running_on."""
    case = make_case(shape, variant, torch.float16, **(excitation or {"reduction": 16}))
    case = case.arranged(*[partial(in_layout, layout)] * 2)
    connect()
    emulated, code = torch.ops.scse_kernels_emulated, ops.COMBINE.get(variant, 0)
    how, added = {"count": True, **how}, {"residual": residual}
    l2_bytes = l2_bytes or case.x.nbytes // 10
    with running_on(H100, l2=gpulab.L2Cache(l2_bytes), **how) as forward:
        _, *small = emulated.cuda_forward(case.x, *case.parameters, code, **added)
    with running_on(H100, l2=gpulab.L2Cache(l2_bytes), **how) as backward:
        inputs = case.dy, case.x, *case.parameters, *small
        emulated.cuda_backward(*inputs, code, True, True, True, **added)
    return case.x.nbytes, [forward, backward]


def row(*cells) -> str:
    return "| " + " | ".join(cells) + " |"


def passes_row(shape, variant, layout, x_bytes, labs) -> str:
    """Passes over x, reads + writes; microseconds of the roofline bounds added up."""
    return row(
        f"{list(shape)}, {variant}, {layout}",
        *(
            f"{lab.dram_read_bytes / x_bytes:.2f} + {lab.dram_write_bytes / x_bytes:.2f}"
            for lab in labs
        ),
        " / ".join(f"{sum(r.roofline()['bound_us'] for r in lab.reports):.1f}" for lab in labs),
    )


def wide(widths) -> float:
    """The share of the bytes that go in accesses of 16 bytes to a thread."""
    return 16 * widths[16] / sum(width * lanes for width, lanes in widths.items())


def issued(report, variant, x_bytes) -> str:
    """Warp instructions to each KiB of the maps that a kernel over the map reads, without moves and
    loads of parameters, most of which ptxas removes."""
    kernel = re.sub("(_planes|_channels_last|_flat)?<.*", "", report.kernel)
    if kernel not in MAPS:
        return "none"
    instructions = report.warp_instructions - sum(report.instructions[k] for k in UNCHARGED)
    return f"{instructions / (MAPS[kernel][variant == 'max'] * x_bytes / 1024):.0f}"


def kernel_row(report, layout, x_bytes) -> str:
    """Of the sum: registers to a thread, shares of wide accesses and of used bytes in touched
    sectors (loads / stores), passes of shared memory over those without conflicts, instructions,
    the bound and what binds."""
    line = report.roofline()
    conflicts = report.shared_wavefronts / max(1, report.shared_ideal_wavefronts)
    return row(
        f"{report.kernel}, {layout}",
        str(report.registers),
        f"{100 * wide(report.load_widths):.0f} / {100 * wide(report.store_widths):.0f}",
        f"{100 * report.load_efficiency:.0f} / {100 * report.store_efficiency:.0f}",
        f"{conflicts:.2f}" if report.shared_wavefronts else "none used",
        issued(report, "add", x_bytes),
        f"{line['bound_us']:.2f}, {line['binds']}",
    )


def deep_row(shape) -> str:
    """The bound of each launch, that of the longest chain of instructions that wait for one another
    too, by the columns of the table; and their sum."""
    excitation = {"reduction": DEEP[shape], "parameter_dtype": torch.float32}
    how = {"l2_bytes": H100.l2_bytes, "latency": True}
    _, labs = count(shape, "add", "contiguous", excitation=excitation, **how)
    bounds = [[report.roofline()["bound_us"] for report in lab.reports] for lab in labs]
    cells = [cell for squeeze, *excite, apply in bounds for cell in ([squeeze], excite, [apply])]
    shown = (" + ".join(f"{us:.2f}" for us in cell) for cell in cells)
    return row(str(list(shape)), *shown, f"{sum(map(sum, bounds)):.1f}")


def issued_row(shape, layout) -> str:
    """`issued` of each kernel over a map, for add / max."""
    numbers = []
    for variant in ("add", "max"):
        x_bytes, labs = count(shape, variant, layout)
        numbers.append([issued(r, variant, x_bytes) for lab in labs for r in lab.reports])
    pairs = zip(*numbers, strict=True)
    over_maps = [f"{add} / {largest}" for add, largest in pairs if add != "none"]
    return row(f"{list(shape)}, {layout}", *over_maps)


def rows(variant, layout) -> list[str]:
    """A row of passes, and of the sum those of its kernels."""
    x_bytes, labs = count(SHAPE, variant, layout)
    kernels = [kernel_row(report, layout, x_bytes) for lab in labs for report in lab.reports]
    return [passes_row(SHAPE, variant, layout, x_bytes, labs), *kernels * (variant == "add")]


if __name__ == "__main__":
    for what in ROWS:
        print("\n".join(rows(*what)), flush=True)
    for shape in DEEP:
        print(deep_row(shape), flush=True)
    for shape, layout in product(ISSUED, LAYOUTS):
        print(issued_row(shape, layout), flush=True)
