"""What the parts of the page share: rows of CSV files, tables in Markdown."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..cases import LAYOUTS
from . import plan
from .kernels import COPY, passes

#: A row of a CSV file, by its header.
Row = dict[str, str]
#: The maps that kernels are measured on.
MAPS = [f"{layout}, {combine}" for layout in LAYOUTS for combine in ("add", "max")]


def label(name: str) -> tuple[str, str]:
    """A kernel's name in both layouts, and its passes for add and max."""
    counts = [passes(name, combine) for combine in ("add", "max")]
    shown = " / ".join("?" if count is None else str(count) for count in dict.fromkeys(counts))
    return re.sub("_(planes|channels_last)$", "", name), shown


def by_map(header: tuple[str, ...], cells: Mapping[tuple[str, ...], Mapping[str, str]]) -> str:
    """A table with a column for each kind of map."""
    rows = ((*key, *(here.get(m, "") for m in MAPS)) for key, here in cells.items())
    return table((*header, *MAPS), rows)


def copy_speed(kernels: list[Row]) -> float | None:
    """Bytes per microsecond of a copy of the large map, read and written."""
    speeds = [
        float(row["speed"])
        for row in kernels
        if row["kernel"] == COPY and row["shape"] == plan.LARGE
    ]
    return statistics.median(speeds) if speeds else None


def mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def rows_of(files: Iterable[Path]) -> list[Row]:
    rows: list[Row] = []
    for path in files:
        if path.exists():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    return rows


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
