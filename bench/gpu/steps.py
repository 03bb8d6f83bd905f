"""A step: a name, a command, a limit of time. Its output goes to a file. Processes that it started
end with it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "FAILED", "TIMED OUT", "left out"
#: Seconds that a step has, after it was asked to stop, to say what it has so far.
GRACE = 5.0
#: A step isn't started with less than this.
LEAST = 10.0


@dataclass(frozen=True)
class Step:
    """`needs`: modules and tools without which it can't run. `beside`: it runs beside the next
    one. `environment`: what it is told beyond the environment of all."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a step. `detail`: the exit status, or why it was left out."""

    name: str
    state: str
    seconds: float
    detail: str
    output: str


def missing(needs: Iterable[str], path: str | None) -> str | None:
    """None if all are here, else which aren't. A name with a hyphen or `ncu` is a tool on `path`,
    any other a module."""
    tools = {"ncu", "compute-sanitizer"}
    gone = [
        name
        for name in needs
        if (shutil.which(name, path=path) if name in tools else importlib.util.find_spec(name))
        is None
    ]
    return f"{' and '.join(gone)} not installed" if gone else None


def run(
    steps: Iterable[Step],
    folder: Path,
    seconds: float,
    environment: Mapping[str, str],
    tell: Callable[[Result], None],
) -> list[Result]:
    """Runs the steps in their order, each for at most its limit and all for at most `seconds`;
    outputs go to files in `folder`. Ctrl-C leaves out what is left."""
    end = time.monotonic() + seconds
    results: list[Result] = []
    beside: list[_Running] = []

    def note(result: Result) -> None:
        results.append(result)
        tell(result)

    try:
        for step in steps:
            limit = min(step.limit, end - time.monotonic() - GRACE)
            if reason := missing(step.needs, environment.get("PATH")):
                note(_left_out(step, reason))
            elif limit < LEAST:
                note(_left_out(step, "no time was left"))
            else:
                beside.append(_Running(step, folder, limit, environment))
                if step.beside:
                    continue
            while beside:
                note(beside.pop().finish())
        while beside:
            note(beside.pop().finish())
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        for running in beside:
            note(running.finish(stop=True))
    return results


def _left_out(step: Step, reason: str) -> Result:
    return Result(step.name, LEFT_OUT, 0.0, reason, "")


class _Running:
    """A step that was started, as the leader of a process group of its own."""

    def __init__(
        self, step: Step, folder: Path, limit: float, environment: Mapping[str, str]
    ) -> None:
        self.step, self.limit = step, limit
        self.output = folder / f"{step.name.replace(' ', '-').replace(',', '')}.txt"
        self.start = time.monotonic()
        with self.output.open("w") as file:
            file.write(f"$ {' '.join(step.command)}\n")
            file.flush()
            self.process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, **step.environment},
                start_new_session=True,
            )

    def finish(self, stop: bool = False) -> Result:
        """Waits for the end, or until the limit; nothing of the step runs on after that."""
        try:
            left = 0 if stop else self.start + self.limit - time.monotonic()
            code = self.process.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            code = None
            self._signal(signal.SIGINT)  # Python and pytest sum up what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
        seconds = time.monotonic() - self.start
        if code is None:
            state, detail = TIMED_OUT, f"stopped after {seconds:.0f} s"
        else:
            state, detail = (PASSED, "") if code == 0 else (FAILED, f"exit status {code}")
        return Result(self.step.name, state, seconds, detail, self.output.name)

    def _signal(self, which: int) -> None:
        """To the whole group, which outlives its leader while a child is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, which)
