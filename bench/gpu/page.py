"""The page: what passed, what failed, how fast each kernel is, which estimates were wrong."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..cases import LAYOUTS
from ..timing import COLD
from . import plan
from .kernels import ALONE, AUTO, COPY, GENERAL, ON_CHIP, ONE, SPAN, THREE, passes, short
from .steps import FAILED, LEFT_OUT, TIMED_OUT, Result

Row = dict[str, str]
#: An output's lines that say what went wrong.
_TELLING = re.compile(
    r"^(E  |FAILED|ERROR|dropped|not timed)|WRONG|DISAGREE|[Ee]rror\b|========= (Invalid|.*hazard)"
)
_LINES = 6


def text(facts: Mapping, results: Iterable[Result], folder: Path, seconds: float) -> str:
    """The page, in Markdown."""
    results = list(results)
    kernels = _rows([folder / "kernels.csv"])
    parts = [
        f"# {facts['device']}, {facts['capability']}",
        _facts(facts, kernels, seconds),
        "## Steps",
        _table(("step", "", "s", "last line"), (_step(r, folder) for r in results)),
        *_failures(results, folder),
        "## Kernels",
        _kernels(kernels),
        "## Estimates",
        *_estimates(facts, kernels, folder),
        "## Operators",
        _operators(folder),
    ]
    return "\n\n".join(parts) + "\n"


def first_lines(file: Path) -> list[str]:
    """The first lines of an output that say what went wrong, else its last ones."""
    lines = [line.rstrip() for line in file.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines[1:] if _TELLING.search(line)]
    return telling[:_LINES] or lines[-_LINES:]


def _facts(facts: Mapping, kernels: list[Row], seconds: float) -> str:
    memory, l2 = facts["memory"] / 2**30, facts["l2"] / 2**20
    absent = [name for kind in ("modules", "tools") for name, on in facts[kind].items() if not on]
    lines = [
        f"{facts['multiprocessors']} multiprocessors, {memory:.0f} GiB, L2 of {l2:.0f} MiB;"
        f" driver {facts['driver']}, {facts['cores']} cores",
        f"torch {facts['torch']}, CUDA {facts['cuda']}, Triton {facts['triton']},"
        f" Python {facts['python']}; commit {facts['commit']}; {seconds / 60:.1f} minutes",
        f"not installed: {', '.join(absent) or 'nothing'}",
    ]
    if copy := _copy_speed(kernels):
        lines.append(f"a copy of {plan.LARGE}, float16, reads and writes {copy / 1e6:.2f} TB/s")
    return "\n".join(f"- {line}" for line in lines)


def _step(result: Result, folder: Path) -> tuple[object, ...]:
    last = result.detail
    if result.output:
        lines = (folder / result.output).read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return result.name, result.state, f"{result.seconds:.0f}", last[:100].replace("|", "\\|")


def _failures(results: list[Result], folder: Path) -> list[str]:
    failed = [r for r in results if r.state in (FAILED, TIMED_OUT)]
    parts = ["## What failed"] if failed else ["Nothing failed."]
    for result in failed:
        lines = "\n".join(line[:160] for line in first_lines(folder / result.output))
        parts.append(f"{result.name}, {result.detail}: {result.output}\n\n```\n{lines}\n```")
    if out := [f"{r.name} ({r.detail})" for r in results if r.state == LEFT_OUT]:
        parts.append(f"Left out: {', '.join(out)}.")
    return parts


def _kernels(kernels: list[Row]) -> str:
    """The large map's kernels one by one, without overlap, which counts a kernel's waiting; then
    the calls by size."""
    maps = [f"{layout}, {combine}" for layout in LAYOUTS for combine in ("add", "max")]
    large: dict[tuple[str, str], dict[str, str]] = {}
    for row in kernels:
        alone = row["family"] in (ALONE, ON_CHIP, THREE, ONE)
        if row["shape"] == plan.LARGE and row["kernel"] not in (COPY, SPAN) and alone:
            name = re.sub("_(planes|channels_last)$", "", row["kernel"])
            cell = f"{float(row['us']):.1f}"
            if row["of_copy"]:
                cell += f" us, {row['passes']} passes, {float(row['of_copy']):.0%}"
            here = large.setdefault((row["backend"], row["family"], name), {})
            here[f"{row['layout']}, {row['combine']}"] = cell
    if not large:
        return "Not measured."
    spans: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in kernels:
        if row["kernel"] == SPAN and row["of_copy"]:
            here = spans.setdefault((row["shape"], row["direction"]), {})
            here.setdefault(f"{row['backend']}, {row['family']}", []).append(float(row["of_copy"]))
    whose = list(dict.fromkeys(name for here in spans.values() for name in here))
    return "\n\n".join(
        (
            f"{plan.LARGE}, float16, reduction 16, cold L2. Percent: the speed of the kernel's"
            " passes over that of a copy of the same map.",
            _table(
                ("backend", "family", "kernel", *maps),
                ((*key, *(here.get(m, "") for m in maps)) for key, here in large.items()),
            ),
            "Whole calls by size, the same percentage from the first kernel's start to the last"
            " one's end; geometric mean of both layouts, add and max:",
            _table(
                ("shape", "", *whose),
                (
                    (*key, *(f"{_mean(here[w]):.0%}" if w in here else "" for w in whose))
                    for key, here in spans.items()
                ),
            ),
        )
    )


def _estimates(facts: Mapping, kernels: list[Row], folder: Path) -> list[str]:
    return [
        "### Pass counts (docs/gpu.md)",
        _pass_counts(folder),
        "### On chip or general (csrc/cuda/choose.h)",
        _choices(kernels),
        _constants(facts, kernels),
        "### CUDA or Triton (scse_kernels/backends.py)",
        _backends(kernels),
        "### Tiles (scse_kernels/_triton/heuristics.py)",
        _tiles(folder),
    ]


def _pass_counts(folder: Path) -> str:
    """Counted passes beside those that the hardware's counters saw."""
    x_bytes = 2 * math.prod(map(int, plan.LARGE.split("x")))
    # `bench.gpu.kernels --once` goes through them in this order, both directions of each.
    maps = [f"{layout}, {combine}" for layout in LAYOUTS for combine in ("add", "max")]
    found = []
    place = -1
    for name, read, written in _counted(folder / "ncu.csv"):
        kernel = short(name)
        place += kernel.rpartition("::")[2] in _FIRST
        where = maps[place % len(maps)]
        estimate = passes(kernel, where.rpartition(" ")[2])
        if estimate != 0:
            moved = (read / x_bytes, (read + written) / x_bytes)
            found.append((kernel, where, estimate, *(f"{m:.2f}" for m in moved)))
    if not found:
        return "Not counted by ncu; the table above has the times."
    table = _table(("kernel", "map", "passes", "read by ncu", "read and written"), found)
    return f"What a kernel leaves in L2 when it ends is not written yet.\n\n{table}"


#: The kernel that a forward begins with.
_FIRST = {
    *("squeeze_kernel", "squeeze_planes", "squeeze_channels_last"),
    "forward_kernel",
}


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


def _choices(kernels: list[Row]) -> str:
    """Each call's span in both families, and whether `auto` took the shorter one."""
    spans: dict[tuple, dict[str, float]] = {}
    taken: dict[tuple, str] = {}
    for row in kernels:
        if row["backend"] != "cuda" or not row["direction"]:
            continue
        key = tuple(row[name] for name in ("shape", "layout", "combine", "direction"))
        if row["kernel"] == SPAN:
            spans.setdefault(key, {})[row["family"]] = float(row["us"])
        elif row["family"] == AUTO:
            taken.setdefault(key, ON_CHIP if row["kernel"].startswith("on_chip") else GENERAL)
    both = {k: v for k, v in spans.items() if {GENERAL, ON_CHIP} <= v.keys() and k in taken}
    if not both:
        return "Not measured in both families."
    wrong = []
    for key, times in both.items():
        best = min(GENERAL, ON_CHIP, key=times.get)
        if taken[key] != best:
            cost = times[taken[key]] / times[best]
            us = [f"{times[name]:.1f}" for name in (GENERAL, ON_CHIP)]
            wrong.append((cost, (*key, *us, taken[key], f"{cost:.2f}")))
    if not wrong:
        return f"Of {len(both)} calls all took the faster family."
    rows = [row for _, row in sorted(wrong, reverse=True)]
    header = ("shape", "layout", "combine", "", "general, us", "on chip, us", "taken", "times")
    return f"Of {len(both)} calls {len(rows)} took the slower family:\n\n{_table(header, rows)}"


def _constants(facts: Mapping, kernels: list[Row]) -> str:
    """The constants of choose.h beside what was measured."""
    source = (plan.ROOT / "csrc/cuda/choose.h").read_text()
    own = [row for row in kernels if row["backend"] == "cuda" and row["direction"]]
    on_chip = [
        float(row["speed"]) / int(row["blocks"])
        for row in own
        if row["kernel"].startswith("on_chip")
        and row["speed"]
        and int(row["blocks"]) > 0
        and int(row["blocks"]) <= facts["multiprocessors"]
    ]
    gaps = [float(r["gap"]) for r in own if r["gap"] and r["family"] == ALONE]
    copy = _copy_speed(kernels)
    measured = {
        "kBandwidthOfSM": (copy / facts["multiprocessors"] if copy else None, "bytes/us, a copy"),
        "kBandwidthOfBlock": (
            max(on_chip, default=None),
            "bytes/us, the best on-chip kernel with a block to a multiprocessor at most",
        ),
        "kNextLaunch": (
            statistics.median(gaps) if gaps else None,
            "us, median from a kernel's end to the next one's start, no overlap",
        ),
    }
    rows = []
    for name, (value, what) in measured.items():
        estimate = re.search(rf"{name} = ([\d.e]+)", source)
        estimate = float(estimate[1]) if estimate else None
        off = f"{value / estimate:.2f}" if value and estimate else ""
        rows.append((name, _short(estimate), _short(value), off, what))
    return _table(("constant", "estimate", "measured", "times", ""), rows)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _backends(kernels: list[Row]) -> str:
    """Triton's span over that of CUDA, which `auto` takes first where it is built."""
    spans: dict[tuple, dict[str, float]] = {}
    for row in kernels:
        if row["kernel"] == SPAN and row["family"] in (AUTO, THREE):
            key = tuple(row[name] for name in ("shape", "layout", "combine", "direction"))
            spans.setdefault(key, {})[row["backend"]] = float(row["us"])
    ratios: dict[str, list[float]] = {}
    for key, times in spans.items():
        if {"cuda", "triton"} <= times.keys():
            ratios.setdefault(key[0], []).append(times["triton"] / times["cuda"])
    if not ratios:
        return "Not measured with both."
    rows = [(s, f"{_mean(r):.2f}", f"{min(r):.2f}", f"{max(r):.2f}") for s, r in ratios.items()]
    header = ("shape", "Triton's time over CUDA's", "least", "most")
    return _table(header, rows)


def _tiles(folder: Path) -> str:
    """The tuner's best choice against the heuristic's, by the mean of both states of L2."""
    times: dict[tuple, dict[tuple, list[float]]] = {}
    own: dict[tuple, tuple] = {}
    for row in _rows([folder / "tune.csv"]):
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
        means = {choice: _mean(medians) for choice, medians in choices.items()}
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
    return _table(header, rows)


def _operators(folder: Path) -> str:
    """What `bench ops` found with a cold L2: geometric means over the shapes."""
    ratios: dict[tuple, dict[tuple, list[float]]] = {}
    for row in _rows(sorted(folder.glob("ops-*/ops.csv"))):
        if row["way"] == COLD:
            key = tuple(row[name] for name in ("dtype", "layout", "combine", "pass"))
            for column in _COLUMNS:
                if row[column] and row["provider"] in ("cuda", "triton"):
                    here = ratios.setdefault(key, {})
                    here.setdefault((row["provider"], column), []).append(float(row[column]))
    if not ratios:
        return "Not measured."
    columns = [(who, column) for who in ("cuda", "triton") for column in _COLUMNS]
    header = ("dtype", "layout", "combine", "pass", *(f"{w}: {_COLUMNS[c]}" for w, c in columns))
    rows = (
        (*key, *(f"{_mean(here[c]):.2f}" if c in here else "" for c in columns))
        for key, here in ratios.items()
    )
    return (
        "How many times as fast as others with a cold L2, and the share of a copy's bandwidth;"
        f" geometric means over the shapes that were timed.\n\n{_table(header, rows)}"
    )


_COLUMNS = {
    "eager_over_this": "x eager",
    "compile_over_this": "x compile",
    "rewritten_over_this": "x rewritten",
    "of_copy_bandwidth": "of copy",
}


def _copy_speed(kernels: list[Row]) -> float | None:
    """Bytes per microsecond of a copy of the large map, read and written."""
    speeds = [
        float(row["speed"])
        for row in kernels
        if row["kernel"] == COPY and row["shape"] == plan.LARGE
    ]
    return statistics.median(speeds) if speeds else None


def _mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)


def _rows(files: Iterable[Path]) -> list[Row]:
    rows: list[Row] = []
    for path in files:
        if path.exists():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    return rows


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
