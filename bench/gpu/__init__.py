"""Everything that has to be seen on a GPU, in one command that ends with one page.

  device       what is here
  build        both extensions, for this device alone; meanwhile Triton's kernels are compiled
  self-check   `python -m scse_kernels`
  tests        of the device, of the CUDA kernels, of Triton's
  kernels      the time of every kernel against its passes at the speed of a copy, for each family
  ops          `python -m bench ops`, by dtype and layout
  ncu          the bytes that every kernel moves through DRAM
  tune         `python -m bench tune` on one map
  model        `python -m bench model`
  memcheck, racecheck   compute-sanitizer on one call of each kernel

Needs Python and torch; a step that needs more says what is missing, and the others go on. Nothing
is downloaded, nothing is written outside the checkout. Each step has its own limit of time; in all
it takes at most --minutes, and what comes last is left out first.
Written: results/gpu/page.md, and beside it the full output of each step. Exits with 2 where there
is no GPU, with 1 where a step failed.
"""

import argparse
import json
import os
import shutil
import time

from .. import options
from . import page, plan, steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench gpu`."""
    parser.add_argument("--minutes", type=options.positive, default=9, help="in all (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs all steps and prints the page."""
    start = time.monotonic()
    folder = plan.RESULTS
    shutil.rmtree(folder, ignore_errors=True)  # files of an earlier run would be reported again
    folder.mkdir(parents=True)
    environment = plan.environment(os.environ, plan.CACHE)

    def perform(some: list[steps.Step]) -> list[steps.Result]:
        left = 60 * args.minutes - (time.monotonic() - start)
        return steps.run(some, folder, left, environment, tell)

    results = perform([plan.device_step(folder)])
    facts = folder / "device.json"
    if not facts.exists():
        print(
            f"make gpu: torch finds no GPU that it can use; {results[0].output} in {folder} says"
            f" why: {page.first_lines(folder / results[0].output)[-1]}"
        )
        return 2
    facts = json.loads(facts.read_text())
    results += perform(plan.steps(facts, folder))
    text = page.text(facts, results, folder, time.monotonic() - start)
    (folder / "page.md").write_text(text)
    print(f"\n{text}\nWritten: {folder / 'page.md'}; send back the folder {folder}")
    return 1 if any(result.state in (steps.FAILED, steps.TIMED_OUT) for result in results) else 0


def tell(result: steps.Result) -> None:
    """A line for each step that is over."""
    detail = f" ({result.detail})" if result.detail else ""
    print(f"{result.name}: {result.state}{detail}, {result.seconds:.0f} s", flush=True)
