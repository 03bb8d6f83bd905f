"""The page's estimates: which of them were wrong, and by how much."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from . import plan
from .kernels import OVERLAPPING, SPAN, passes, short
from .tables import MAPS, Row, by_map, label, mean, rows_of, table


def pass_counts(folder: Path) -> str:
    """Counted passes beside those that the hardware's counters saw."""
    x_bytes = 2 * math.prod(map(int, plan.LARGE.split("x")))
    found: dict[tuple[str, ...], dict[str, str]] = {}
    place = -1
    # `bench.gpu.kernels --once` goes through the maps in their order, forward and backward.
    for name, read, written in _counted(folder / "ncu.csv"):
        kernel = short(name)
        place += kernel in _FIRST
        where = MAPS[place % len(MAPS)]
        if passes(kernel, "add") != 0:
            cell = f"{read / x_bytes:.2f} + {written / x_bytes:.2f}"
            found.setdefault(label(kernel), {})[where] = cell
    if not found:
        return "Not counted by ncu; the table above has the times."
    said = folder / "ncu.txt"
    failed = said.exists() and "FAILED" in said.read_text(errors="replace")
    doubt = " **A call failed (ncu.txt): columns may be mixed up.**" if failed else ""
    return (
        "Passes through DRAM by ncu, read + written. What a kernel leaves in L2 when it ends is not"
        f" written yet.{doubt}\n\n{by_map(('kernel', 'passes'), found)}"
    )


#: The kernel that a forward begins with.
_FIRST = {"squeeze_kernel", "squeeze_planes", "squeeze_channels_last", "forward_kernel"}


def _counted(file: Path) -> list[tuple[str, float, float]]:
    """Kernel, bytes read and bytes written, from what `ncu --csv --page raw` writes."""
    if not file.exists():
        return []
    lines = [line for line in file.read_text(errors="replace").splitlines() if line[:1] == '"']
    found = []
    for row in csv.DictReader(lines):
        read, written = row.get("dram__bytes_read.sum"), row.get("dram__bytes_write.sum")
        try:
            found.append((row["Kernel Name"], _number(read), _number(written)))
        except (KeyError, ValueError):  # the line of units
            continue
    return found


def _number(text: str | None) -> float:
    return float((text or "").replace(",", ""))


def backends(kernels: list[Row]) -> str:
    """Triton's span over that of CUDA: the faster one is what `auto` should take first."""
    spans: dict[tuple, dict[str, float]] = {}
    for row in kernels:
        if row["kernel"] == SPAN and row["family"] in OVERLAPPING:
            key = tuple(row[name] for name in ("shape", "layout", "combine", "direction"))
            spans.setdefault(key, {})[row["backend"]] = float(row["us"])
    ratios: dict[str, list[float]] = {}
    for key, times in spans.items():
        if {"cuda", "triton"} <= times.keys():
            ratios.setdefault(key[0], []).append(times["triton"] / times["cuda"])
    if not ratios:
        return "Not measured with both."
    rows = [(s, f"{mean(r):.2f}", f"{min(r):.2f}", f"{max(r):.2f}") for s, r in ratios.items()]
    header = ("shape", "Triton's time over CUDA's", "least", "most")
    return table(header, rows)


def tiles(folder: Path) -> str:
    """The tuner's best choice against the heuristic's, by the mean of both states of L2."""
    times: dict[tuple, dict[tuple, list[float]]] = {}
    own: dict[tuple, tuple] = {}
    for row in rows_of([folder / "tune.csv"]):
        case = tuple(row[n] for n in ("shape", "dtype", "layout", "combine"))
        choice = tuple(row[n] for n in ("block_c", "block_s", "warps", "tiles", "launches"))
        # Each step of the search times its own choices, and the package's own among them.
        times.setdefault((*case, row["step"]), {}).setdefault(choice, []).append(
            float(row["median_s"])
        )
        if row["own"] == "True":
            own[case] = choice
    best: dict[tuple, tuple[float, tuple]] = {}
    for (*case, _), choices in times.items():
        case = tuple(case)
        means = {choice: mean(medians) for choice, medians in choices.items()}
        if own.get(case) in means:
            fastest = min(means, key=means.get)
            gain = means[own[case]] / means[fastest]
            best[case] = max(best.get(case, (0.0, ())), (gain, fastest))
    if not best:
        return "Not tuned."
    rows = [
        (", ".join(case), " ".join(own[case]), " ".join(choice), f"{gain:.2f}")
        for case, (gain, choice) in best.items()
    ]
    header = ("map", "own: block_c block_s warps tiles launches", "best", "times as fast")
    return table(header, rows)
