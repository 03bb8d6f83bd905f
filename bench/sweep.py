"""How cost grows: `python -m bench ops --sweep`.

Forward + backward of one block, from 2**12 to 2**27 elements: microseconds against size. The left
of the plot shows what a call costs whatever it computes, the right what an element costs. On a GPU
it is the GPU's time, or the host's time to queue the call where that is longer. Small maps are
checked as in `bench ops`. Of larger ones y and dx of three samples are: no sample depends on
another.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from . import huge, memory, ops, providers, report, timing
from .cases import Case, Inputs
from .report import Measurement
from .timing import Timing

EXPONENTS = range(12, 28)
_CHANNELS, _LARGEST_IMAGE = 64, 128
#: Elements up to which a map is checked as a whole, and timed in 15 rounds: then 5.
_SMALL = 1 << 21
#: Maps in memory at a time: x, dy, y, dx, what eager mode keeps for its backward and adds up there.
_MAPS = 10
_DIRECTION = "forward + backward"


def shape(exponent: int) -> tuple[int, int, int, int]:
    """[N, 64, H, W] of 2**exponent elements: one image that grows to 128 x 128, then more."""
    positions = 2**exponent // _CHANNELS
    n = max(positions // _LARGEST_IMAGE**2, 1)
    height = 2 ** (((positions // n).bit_length() - 1) // 2)
    return n, _CHANNELS, height, positions // n // height


def run(args: argparse.Namespace, names: list[str], reduction: int, combine: str) -> int:
    """Time the providers `names` on every size, then the largest map; returns 1 if one was wrong.

    Written: sweep.csv, sweep.md (the table), sweep.png.
    """
    dtype, device = getattr(torch, args.dtype), args.device
    environment = report.environment(device)
    report.print_header(environment, providers.missing(device))
    measurements, errors = [], []
    with report.progress() as progress:
        task = progress.add_task("", total=len(EXPONENTS))
        for exponent in EXPONENTS:
            case = Case(shape(exponent), dtype, args.layout, reduction, combine, device)
            progress.update(task, description=str(case))
            if too_large := memory.too_large(_MAPS * case.x_bytes, device):
                report.console.print(
                    f"[yellow]From 2**{exponent} elements on left out: {too_large}"
                )
                break
            rounds = args.rounds or (15 if 2**exponent <= _SMALL else 5)
            found, wrong = _measure(case, names, rounds)
            measurements += found
            errors += wrong
            progress.advance(task)
    for error in errors:
        report.console.print(f"[red]not timed: {error}")
    if measurements:
        _show(args.output, measurements, environment)
    for name in providers.usable(device):
        if name in names:
            line = huge.run(name, device, args.layout, reduction, combine)
            report.console.print(f"{name}: {line}")
    return 1 if errors else 0


def _show(folder: Path, measurements: list[Measurement], environment: dict[str, str]) -> None:
    written = [folder / f"sweep.{ending}" for ending in ("csv", "md", "png")]
    report.write_csv(written[0], measurements, environment)
    _print(written[1], measurements, environment)
    try:
        _plot(written[2], measurements, environment)
    except ImportError as error:
        report.console.print(f"[yellow]no plot: {error}")
        written.pop()
    report.console.print(f"Written: {', '.join(map(str, written))}")


def _measure(case: Case, names: list[str], rounds: int) -> tuple[list[Measurement], list[str]]:
    """Check and time the providers on one map; returns measurements and what was wrong."""
    torch._dynamo.reset()  # as for another case of `bench ops`
    inputs = case.inputs()
    calls = {
        timing.FIXED: timing.fixed_clone(case.device),
        providers.CLONE: inputs.x.detach().clone,
    }
    right = ops.expected(case, inputs) if inputs.x.numel() <= _SMALL else None
    errors = []
    for name in names:
        module = ops.module_of(name, case, inputs)
        if right is not None:
            error = ops.disagreement(case, module, inputs, right)
        else:
            y = ops.both(module, inputs)().detach()
            error = next(_wrong_samples(case, inputs, y), None)
            del y
        if error:
            errors.append(f"{name}, {case}: {error}")
        else:
            calls[name] = ops.both(module, inputs)
    timings = timing.interleaved(calls, case.device, rounds)
    noise = timings.pop(timing.FIXED).spread
    return [
        Measurement(case, _DIRECTION, timing.WARM, name, value, case.least_bytes(True), None, noise)
        for name, value in timings.items()
    ], errors


def _wrong_samples(case: Case, inputs: Inputs, y: torch.Tensor) -> Iterator[str]:
    """What y and inputs.x.grad have that the reference has not, in the first, the middle and the
    last sample."""
    n = len(y)
    for i in sorted({0, n // 2, n - 1}):
        sample = Inputs(inputs.x[i : i + 1].detach(), inputs.dy[i : i + 1], inputs.parameters)
        right = ops.expected(case, sample)[:2]
        for name, actual, value in zip(("y", "dx"), (y, inputs.x.grad), right, strict=True):
            if error := ops.too_far(case.dtype, actual[i : i + 1], value):
                yield f"{name} of sample {i} {error}"


def _seconds(taken: Timing) -> Timing:
    """On a GPU the host's time where it is longer."""
    return dataclasses.replace(
        taken, samples=tuple(max(s, taken.host or 0.0) for s in taken.samples)
    )


def _print(path: Path, measurements: list[Measurement], environment: dict[str, str]) -> None:
    """The table: a row for each size. On the terminal and, in Markdown, in a file."""
    by_case: dict[Case, dict[str, Timing]] = {}
    for m in measurements:
        by_case.setdefault(m.case, {})[m.provider] = _seconds(m.timing)
    noise = {m.case: m.noise for m in measurements}
    names = list(dict.fromkeys(m.provider for m in measurements))
    competitors = [name for name in names if name in providers.COMPETITORS]
    ours = [name for name in names if name not in (*competitors, providers.CLONE)]
    ratios = [(name, own) for own in ours for name in competitors]
    header = ["elements", "map", *(f"{name}, µs" for name in names)]
    header += [f"{own}, ns an element" for own in ours]
    header += [f"{own}: x {name}" for name, own in ratios]
    rows = []
    for case, here in by_case.items():
        elements = torch.Size(case.shape).numel()
        row = [f"2**{elements.bit_length() - 1}", case.shape_name]
        row += [f"{here[name].median * 1e6:.4g}" if name in here else "" for name in names]
        row += [f"{here[own].median * 1e9 / elements:.2f}" if own in here else "" for own in ours]
        for name, own in ratios:
            both = name in here and own in here
            row.append(report.ratio(here[name], here[own]) if both else "")
        rows.append(row)
    first = measurements[0].case
    title = f"{_DIRECTION}, {first.combine}, {first.dtype_name}, {first.layout}, reduction"
    title = f"{title} {first.reduction}"
    table = report.table(title)
    for name in header:
        table.add_column(name, justify="left" if name == "map" else "right")
    for row in rows:
        table.add_row(*row)
    report.console.print(table)
    report.print_noise({row[0]: noise[case] for row, case in zip(rows, by_case, strict=True)})
    caption = f"{title}; {report.caption(environment)}"
    path.write_text(report.markdown(caption, header, rows))


def _plot(path: Path, measurements: list[Measurement], environment: dict[str, str]) -> None:
    """Microseconds against elements, both logarithmic, a line for each provider.

    Raises:
        ImportError: matplotlib isn't here.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    panel = figure.add_subplot()
    for name in dict.fromkeys(m.provider for m in measurements):
        own = [m for m in measurements if m.provider == name]
        sizes = [torch.Size(m.case.shape).numel() for m in own]
        microseconds = [_seconds(m.timing).median * 1e6 for m in own]
        style = {"color": "0.4", "ls": "--"} if name == providers.CLONE else {}
        label = "copy (x.clone())" if name == providers.CLONE else name
        panel.plot(sizes, microseconds, marker="o", ms=3, label=label, **style)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set(xlabel="elements of x", ylabel="microseconds")
    panel.grid(alpha=0.3)
    panel.legend()
    case = measurements[0].case
    about = f"{case.block}, {case.combine}, {_DIRECTION}, {case.dtype_name}, {case.layout}"
    figure.suptitle(f"{about}\n{report.caption(environment)}", fontsize=8)
    figure.savefig(path, dpi=130)
