"""The page's figures: the times of kernels and of operators."""

from __future__ import annotations

from pathlib import Path

from ..timing import COLD
from . import plan
from .kernels import COPY, OVERLAPPING, SPAN
from .tables import Row, by_map, label, mean, rows_of, table


def kernels(rows: list[Row]) -> str:
    """The large map's kernels one by one, without overlap, which counts a kernel's waiting; then
    the calls by size."""
    large: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        alone = row["family"] not in OVERLAPPING
        if row["shape"] == plan.LARGE and row["kernel"] not in (COPY, SPAN) and alone:
            cell = f"{float(row['us']):.1f} us"
            if row["of_copy"]:
                cell += f", {float(row['of_copy']):.0%}"
            key = row["backend"], row["family"], *label(row["kernel"])
            large.setdefault(key, {})[f"{row['layout']}, {row['combine']}"] = cell
    if not large:
        return "Not measured."
    spans: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["kernel"] == SPAN and row["of_copy"]:
            here = spans.setdefault((row["shape"], row["direction"]), {})
            here.setdefault(f"{row['backend']}, {row['family']}", []).append(float(row["of_copy"]))
    whose = list(dict.fromkeys(name for here in spans.values() for name in here))
    return "\n\n".join(
        (
            f"{plan.LARGE}, float16, reduction 16, cold L2. Percent: the speed of the kernel's"
            " passes over that of a copy of the same map.",
            by_map(("backend", "family", "kernel", "passes"), large),
            "Whole calls by size, the same percentage from the first kernel's start to the last"
            " one's end; geometric mean of both layouts, add and max:",
            table(
                ("shape", "", *whose),
                (
                    (*key, *(f"{mean(here[w]):.0%}" if w in here else "" for w in whose))
                    for key, here in spans.items()
                ),
            ),
        )
    )


def deep(rows: list[Row]) -> str:
    """Each kernel of the deep levels, in the order of the calls."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in rows:
        if row["direction"]:
            here = found.setdefault((row["shape"], row["layout"], row["family"]), {})
            name = label(row["kernel"])[0].removesuffix("_kernel")
            us = f"{float(row['us']):.1f}"
            here.setdefault(row["direction"], []).append(
                f"**{us}**" if row["kernel"] == SPAN else f"{name} {us}"
            )
    if not found:
        return "Not measured."
    return (
        "float16, add, reduction 2, cold L2. Microseconds of each kernel, and from the first one's"
        " start to the last one's end.\n\n"
        + table(
            ("shape", "layout", "family", "forward", "backward"),
            (
                (*key, *(", ".join(here.get(way, ())) for way in ("forward", "backward")))
                for key, here in found.items()
            ),
        )
    )


def operators(folder: Path) -> str:
    """What `bench ops` found with a cold L2: geometric means over the shapes."""
    ratios: dict[tuple, dict[tuple, list[float]]] = {}
    for row in rows_of(sorted(folder.glob("ops-*/ops.csv"))):
        if row["way"] == COLD:
            key = tuple(row[name] for name in ("block", "dtype", "layout", "combine", "pass"))
            for column in _COLUMNS:
                if row[column] and row["provider"] in ("cuda", "triton"):
                    here = ratios.setdefault(key, {})
                    here.setdefault((row["provider"], column), []).append(float(row[column]))
    if not ratios:
        return "Not measured."
    columns = [(who, column) for who in ("cuda", "triton") for column in _COLUMNS]
    header = (
        "block",
        "dtype",
        "layout",
        "combine",
        "pass",
        *(f"{w}: {_COLUMNS[c]}" for w, c in columns),
    )
    rows = (
        (*key, *(f"{mean(here[c]):.2f}" if c in here else "" for c in columns))
        for key, here in ratios.items()
    )
    return (
        "How many times as fast as others with a cold L2, and the share of a copy's bandwidth;"
        f" geometric means over the shapes that were timed.\n\n{table(header, rows)}"
    )


_COLUMNS = {
    "eager_over_this": "x eager",
    "compile_over_this": "x compile",
    "rewritten_over_this": "x rewritten",
    "of_copy_bandwidth": "of copy",
}
