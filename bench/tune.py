"""Tuner: times the Triton kernels' tiles and launches on this GPU and keeps what is faster.

It starts from the package's own choice, and from what an earlier run found. All choices that are
one change away are timed, round by round, by CUDA events around forward + backward, with a warm and
with a flushed L2. Then those that are one change away from the best, until nothing is better. What
counts is the product of both medians. A choice that disagrees with the float64 reference is
dropped. One that beats the package's own by 3 % is written to the file that the package reads when
it next starts, for this model of device and this version of Triton: SCSE_TUNING names it, else it
lies in the user's cache folder. Nothing else may use the GPU meanwhile. Written: that file, and
tune.csv with all timings.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import scse_kernels.ops
from scse_kernels import backends

from . import ops, options, providers, report, timing
from .cases import SHAPES, Case

if TYPE_CHECKING:  # it imports Triton
    from scse_kernels._triton.tuning import Choice

#: How many times as fast as the package's own choice another must be, to be kept.
_GAIN = 1.03
#: Changes away from it, at most.
_STEPS = 6
#: Bytes of a tile to each thread: at least one load, at most what its registers hold.
_BYTES = (16, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench tune`."""
    parser.add_argument(
        "--shape",
        type=options.shape,
        nargs="+",
        action=options.Several,
        default=SHAPES,
        help="such as 8x64x64x64 1x32x48x48x48",
    )
    parser.add_argument(
        "--dtype", nargs="+", action=options.Several, choices=ops.DTYPES, default=["float16"]
    )
    parser.add_argument(
        "--layout",
        nargs="+",
        action=options.Several,
        choices=ops.LAYOUTS,
        default=ops.LAYOUTS,
        help="default: both",
    )
    parser.add_argument(
        "--combine",
        nargs="+",
        action=options.Several,
        choices=tuple(scse_kernels.ops.COMBINE),
        default=["add"],
    )
    parser.add_argument("--reduction", type=options.positive, default=16, help="%(default)s")
    parser.add_argument("--rounds", type=options.positive, default=15, help="%(default)s")
    parser.add_argument(
        "--jobs", type=options.positive, default=1, help="processes that compile (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Tune every case; returns 1 if a choice was wrong."""
    if args.device.type != "cuda":
        raise SystemExit(f"tune is for GPUs, got --device {args.device}")
    if reason := backends.why_not("triton", args.device):
        raise SystemExit(f"backend triton: {reason}")
    if "SCSE_TRITON_LAUNCHES" in os.environ:
        raise SystemExit("SCSE_TRITON_LAUNCHES is set, which goes before any choice of the tuner")
    cases = [
        Case(shape, getattr(torch, dtype), layout, args.reduction, combine, args.device)
        for combine in args.combine
        for dtype in args.dtype
        for layout in args.layout
        for shape in args.shape
        if layout == "contiguous" or len(shape) > 3
    ]
    for case in cases:
        if case.shape[1] < case.reduction:
            raise SystemExit(f"{case}: no hidden channel is left")
    if args.jobs == 1:
        return tune(cases, args.rounds, args.output / "tune.csv")
    spawn = multiprocessing.get_context("spawn")  # CUDA can't be used in a fork
    with concurrent.futures.ProcessPoolExecutor(args.jobs, spawn) as pool:
        return tune(cases, args.rounds, args.output / "tune.csv", pool)


def tune(
    cases: list[Case],
    rounds: int,
    log: Path,
    pool: concurrent.futures.Executor | None = None,
) -> int:
    """Tune the cases, all on one device; returns 1 if a choice was wrong. The processes of `pool`
    compile what is timed next."""
    from scse_kernels._triton import tuning  # imports Triton

    environment = report.environment(cases[0].device)
    report.print_header(environment, {})
    name = tuning.device_name(cases[0].device)
    file = tuning.path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(tuning.text(name, {}))
    rows, wrong = [], []
    with report.progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            search = Search(case)

            def tell(stage: str, search: Search = search) -> None:
                progress.update(task, description=f"{search.case}: {stage}")
                if search.rows:  # whoever stops it keeps what was timed
                    _write_csv(log, rows + search.rows, environment)

            search.run(rounds, tell, pool)
            rows.extend(search.rows)
            wrong.extend(search.wrong)
            file.write_text(tuning.text(name, search.table))
            _write_csv(log, rows, environment)
            gain = f"{search.gain:.2f} times as fast as" if search.best != search.own else "is"
            report.console.print(f"{case}: {search.best} {gain} the package's own")
            progress.advance(task)
    for problem in wrong:
        report.console.print(f"[red]dropped: {problem}")
    report.console.print(f"Written: {file}, {log}")
    return 1 if wrong else 0


class Search:
    """The search for one case's best choice, in the table that the package's kernels use."""

    def __init__(self, case: Case) -> None:
        from scse_kernels._triton import plan, tuning

        samples, channels, *spatial = case.shape
        map_ = (
            samples,
            channels,
            math.prod(spatial),
            case.dtype,
            case.layout == "channels_last",
            tuning.COMBINES.index(case.combine),
        )
        self.case = case
        self.inputs = case.inputs()
        device = self.inputs.x.device  # with its index
        self.table, self.kind = tuning.table(device), tuning.kind(*map_)
        self.forget = plan.forget  # what was made by the table as it was
        self.known = self.table.pop(self.kind, None)
        self.own = self.best = tuning.choice(device, *map_)
        self.gain = 1.0
        self.module = providers.build(
            "triton", channels, case.reduction, case.combine, len(spatial)
        ).to(case.device, case.dtype)
        providers.load(self.module, self.inputs.parameters)
        self.rows: list[dict[str, object]] = []  # of the log
        self.wrong: list[str] = []

    def run(
        self,
        rounds: int,
        tell: Callable[[str], None],
        pool: concurrent.futures.Executor | None = None,
    ) -> None:
        """Finds `best` and how many times as fast as `own` it is; writes it to the table."""
        right = ops.expected(self.case, self.inputs)
        seen = {self.own}
        asked = [self.known] if self.known else []
        for step in range(1, _STEPS + 1):
            asked += neighbours(self.best, self.case)
            new = [choice for choice in dict.fromkeys(asked) if choice not in seen]
            seen.update(new)
            tell(f"step {step}, compiling {len(new)} choices")
            if pool:
                list(pool.map(_compile, [self.case] * len(new), new))
            usable = [choice for choice in new if self._is_right(choice, right)]
            tell(f"step {step}, timing {len(usable)} choices")
            scores = self._scores([self.own, self.best, *usable], rounds, step)
            winner = min(scores, key=scores.get)
            self.gain = scores[self.own] / scores[winner]
            if winner == self.best:
                break
            self.best, asked = winner, []
        if self.gain < _GAIN:
            self.best, self.gain = self.own, 1.0
        self._use(self.best)

    def _use(self, choice: Choice) -> None:
        if choice == self.own:
            self.table.pop(self.kind, None)
        else:
            self.table[self.kind] = choice
        self.forget()

    def _call(self, choice: Choice) -> Callable[[], object]:
        call = ops.both(self.module, self.inputs)

        def with_choice() -> object:
            self._use(choice)
            return call()

        return with_choice

    def _is_right(self, choice: Choice, right: list[torch.Tensor]) -> bool:
        from triton.errors import TritonError

        self._use(choice)
        try:
            error = ops.disagreement(self.case, self.module, self.inputs, right)
        except TritonError:  # too much shared memory, for instance
            return False
        if error:
            self.wrong.append(f"{self.case}, {choice}: {error}")
        return not error

    def _scores(self, choices: list[Choice], rounds: int, step: int) -> dict[Choice, float]:
        """Seconds by choice: the geometric mean of the medians over both states of L2."""
        calls = {choice: self._call(choice) for choice in choices}
        timings = {
            way: timing.interleaved(calls, self.case.device, rounds, way)
            for way in timing.ways(self.case.device)
            if way != timing.GRAPH
        }
        for way, found in timings.items():
            self.rows += [
                {
                    "shape": self.case.shape_name,
                    "dtype": self.case.dtype_name,
                    "layout": self.case.layout,
                    "combine": self.case.combine,
                    "reduction": self.case.reduction,
                    **asdict(choice),
                    "own": choice == self.own,
                    "step": step,
                    "way": way,
                    "median_s": f"{value.median:.4e}",
                    "iqr_s": f"{value.iqr:.4e}",
                }
                for choice, value in found.items()
            ]
        means = {
            choice: math.prod(found[choice].median for found in timings.values())
            for choice in calls
        }
        return {choice: mean ** (1 / len(timings)) for choice, mean in means.items()}


def _compile(case: Case, choice: Choice) -> None:
    """Leaves the choice's kernels in Triton's cache on disk."""
    search = Search(case)
    search._use(choice)
    with contextlib.suppress(Exception):  # whoever times the choice meets it again, and judges
        ops.both(search.module, search.inputs)()


def neighbours(choice: Choice, case: Case) -> list[Choice]:
    """The choices that are one change away: half or twice the positions or warps of a tile, or
    both, the tiles of a strip, the channels of a tile, the launches."""
    changes = [{"launches": 4 - choice.launches}]
    for names in (("block_s",), ("warps",), ("block_s", "warps"), ("tiles",), ("block_c",)):
        for change in (lambda size: size // 2, lambda size: size * 2):
            changes.append({name: change(getattr(choice, name)) for name in names})
    lanes = 64 if torch.version.hip else 32
    channels = case.shape[1]
    found = []
    for change in changes:
        new = replace(choice, **change)
        bytes_of_thread = (
            new.block_c * new.block_s * case.dtype.itemsize / (lanes * max(new.warps, 1))
        )
        holds = new.block_c >= channels
        if (
            min(new.block_c, new.block_s, new.warps, new.tiles) >= 1
            and new.warps <= 16
            and _BYTES[0] <= bytes_of_thread <= _BYTES[1]
            and (new.block_c < 2 * channels)
            and (holds or new.tiles == 1)
        ):
            found.append(new)
    return found


def _write_csv(path: Path, rows: list[dict[str, object]], environment: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] | environment)
        writer.writeheader()
        writer.writerows(row | environment for row in rows)
