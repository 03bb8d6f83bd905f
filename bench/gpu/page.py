"""The page: what passed, what failed, how fast each kernel is, which estimates were wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from . import estimates, figures, plan
from .steps import FAILED, LEFT_OUT, TIMED_OUT, Result
from .tables import Row, copy_speed, rows_of, table

#: An output's lines that say what went wrong.
_TELLING = re.compile(
    r"^(E  |FAILED|ERROR|dropped|not timed|[\w.]*(Error|Exception)\b)|WRONG|DISAGREE|\berror:"
    r"|^=+ (Invalid|Error|.*(hazard|Race))"
)
_LINES = 6


def text(facts: Mapping, results: Iterable[Result], folder: Path, seconds: float) -> str:
    """The page, in Markdown."""
    results = list(results)
    kernels = rows_of([folder / "kernels.csv"])
    parts = [
        f"# {facts['device']}, {facts['capability']}",
        _facts(facts, kernels, seconds),
        "## Steps",
        table(("step", "", "s", "last line"), (_step(r, folder) for r in results)),
        *_failures(results, folder),
        "## Kernels",
        _part(figures.kernels, kernels),
        "## Deep levels",
        _part(figures.deep, rows_of([folder / "deep.csv"])),
        "## Estimates",
        "### Pass counts (docs/gpu.md)",
        _part(estimates.pass_counts, folder),
        "### CUDA or Triton (scse_kernels/backends.py)",
        _part(estimates.backends, kernels),
        "### Tiles (scse_kernels/_triton/heuristics.py)",
        _part(estimates.tiles, folder),
        "## Operators",
        _part(figures.operators, folder),
    ]
    return "\n\n".join(parts) + "\n"


def first_lines(file: Path) -> list[str]:
    """The first lines of an output that say what went wrong, else its last ones."""
    lines = [line.rstrip() for line in file.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    telling = [line for line in lines[1:] if _TELLING.search(line)]
    return telling[:_LINES] or lines[-_LINES:]


def _part(function: Callable[..., str], *arguments: object) -> str:
    """A part of the page; what one can't read must not cost the others."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"This part could not be written: {type(error).__name__}: {error}"


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
    if copy := copy_speed(kernels):
        lines.append(f"a copy of {plan.LARGE}, float16, reads and writes {copy / 1e6:.2f} TB/s")
    return "\n".join(f"- {line}" for line in lines)


def _step(result: Result, folder: Path) -> tuple[object, ...]:
    last = result.detail
    if result.output and result.state != TIMED_OUT:
        lines = (folder / result.output).read_text(errors="replace").splitlines()[1:]
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
