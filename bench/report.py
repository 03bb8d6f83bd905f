"""What is shown and written: tables on the terminal, a CSV file, a plot; each with the device and
the versions it was measured on."""

import csv
import datetime
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import scse_kernels

from . import timing
from .cases import Case
from .providers import CLONE, COMPETITORS
from .timing import Ratio, Timing

console = Console(highlight=False)
if not console.is_terminal:  # rich assumes 80 columns, and the tables are wider
    console = Console(highlight=False, width=int(os.environ.get("COLUMNS", 120)))

_YARDSTICKS = (*COMPETITORS, CLONE)
#: From this spread of the fixed clone on, a machine was busy: times are longer than elsewhere.
_BUSY = 0.1
#: The bounds of a ratio that can be trusted are nearer than this factor.
_NEAR = 1.1
_COLORS = ("tab:red", "tab:orange", "tab:purple", "tab:blue", "tab:green", "tab:cyan", "tab:pink")


@dataclass(frozen=True)
class Measurement:
    """One provider's time (seconds per call) on one case in one direction."""

    case: Case
    direction: str
    way: str
    provider: str
    timing: Timing
    least_bytes: int
    peak_bytes: int | None
    #: The spread of the fixed clone in the same rounds.
    noise: float

    @property
    def bandwidth(self) -> float:
        """Least bytes over median time, bytes per second."""
        return self.least_bytes / self.timing.median


def environment(device: torch.device) -> dict[str, str]:
    """The device and the versions; they stand beside every figure."""
    versions = {
        "scse_kernels": scse_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        versions["cuda"] = torch.version.cuda or f"HIP {torch.version.hip}"
    else:
        name = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": name,
        "threads": str(torch.get_num_threads()),
        **versions,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def progress() -> Progress:
    """A progress bar, gone when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def print_header(environment: dict[str, str], missing: dict[str, str]) -> None:
    """The environment and the backends that are not usable."""
    console.print(caption(environment))
    for name, reason in missing.items():
        console.print(f"[yellow]backend {name} is left out: {reason}")


def caption(environment: dict[str, str]) -> str:
    """The environment in one line."""
    versions = (f"{name} {environment[name]}" for name in ("scse_kernels", "torch", "python"))
    cuda = (f"CUDA {environment['cuda']}",) if "cuda" in environment else ()
    threads = f"{environment['threads']} threads"
    return ", ".join((environment["device"], threads, *versions, *cuda, environment["date"]))


def print_noise(spreads: dict[str, float]) -> None:
    """How noisy the machine was: the spread of the fixed clone in the rounds of each of several
    measurements."""
    found = ", ".join(f"{name} {spread:.0%}".strip() for name, spread in spreads.items())
    console.print(
        "Noise: the interquartile range over the median of a clone of a fixed map, timed in the"
        f" same rounds: {found}"
    )
    if any(doubt(spread) for spread in spreads.values()):
        console.print(
            f"[yellow]Above {_BUSY:.0%} the machine was busy: times are longer than they need be."
            " Ratios are of the same rounds, with a ? where those differ too much."
        )


def doubt(noise: float) -> str:
    """The mark of times that can't be trusted, if the fixed clone spread so much. NaN: nothing is
    known of it."""
    return "" if noise <= _BUSY else "?"


def ratio(over: Timing, under: Timing) -> str:
    """How many times as long `over` takes as `under`; see `marked`."""
    return marked(timing.ratio(over, under))


def marked(ratio: Ratio) -> str:
    """A ratio, with a question mark where it can't be trusted: its bounds are more than a tenth
    away, or 1 lies between them."""
    near = ratio.median / _NEAR <= ratio.low and ratio.high <= ratio.median * _NEAR
    return f"{ratio.median:.2f}{'' if near and not ratio.low <= 1 <= ratio.high else '?'}"


def _key(m: Measurement) -> tuple:
    return m.case, m.direction, m.way


def _timings(measurements: Iterable[Measurement]) -> dict[tuple, dict[str, Timing]]:
    """By provider, for each case, direction and way."""
    timings: dict[tuple, dict[str, Timing]] = {}
    for m in measurements:
        timings.setdefault(_key(m), {})[m.provider] = m.timing
    return timings


def _competitors(measurements: list[Measurement]) -> list[str]:
    """Those that have a column of their own: who stands in a report of this block."""
    unfused = any(m.case.block == "bn_relu_scse" for m in measurements)
    return [name for name in COMPETITORS if unfused or name != "unfused"]


def _copy_bandwidth(measurements: Iterable[Measurement]) -> dict[tuple, float]:
    return {_key(m): m.bandwidth for m in measurements if m.provider == CLONE}


#: What the columns of both tables mean.
LEGEND = (
    "ms, IQR: median of the rounds and interquartile range, milliseconds. x NAME: how many times as"
    " fast as NAME. clones: time in units of x.clone(). GB/s: least bytes over the median. of copy:"
    " that over the bandwidth of x.clone(). peak: of forward + backward beyond x, y, dy, dx, in"
    " units of x. host: milliseconds to queue the work on a GPU, which other columns are without."
    " ?: a ratio that can't be trusted, since its rounds differ by more than a tenth, or some are"
    " above 1 and some below."
)


def print_case(case: Case, measurements: list[Measurement]) -> None:
    """One case's table: a row per provider, for each direction (and way to time)."""
    several = len({m.way for m in measurements}) > 1
    grid = table(f"{case} ({case.x_bytes / 2**20:.3g} MiB)")
    grid.add_column("pass", no_wrap=True)
    grid.add_column("provider", no_wrap=True)
    competitors = _competitors(measurements)
    for name in ("ms", "IQR", *(f"x {name}" for name in competitors), "clones"):
        grid.add_column(name, justify="right")
    for name in ("GB/s", "of copy", "peak", *(["host"] if several else [])):
        grid.add_column(name, justify="right")
    timings, copy = _timings(measurements), _copy_bandwidth(measurements)
    previous = None
    for m in measurements:
        here = timings[_key(m)]
        first = _key(m) != previous
        if first and previous is not None:
            grid.add_section()
        previous = _key(m)
        ratios = (
            ratio(here[name], m.timing) if name in here and m.provider != CLONE else ""
            for name in competitors
        )
        peak = "" if m.peak_bytes is None else f"{m.peak_bytes / case.x_bytes:.3f}"
        grid.add_row(
            _label(m.direction, m.way, several) if first else "",
            m.provider,
            f"{m.timing.median * 1e3:.3f}",
            f"{m.timing.iqr * 1e3:.3f}",
            *ratios,
            ratio(m.timing, here[CLONE]) if m.provider != CLONE else "1.00",
            f"{m.bandwidth / 1e9:.1f}",
            f"{m.bandwidth / copy[_key(m)]:.0%}",
            peak,
            *([] if m.timing.host is None else [f"{m.timing.host * 1e3:.3f}"]),
        )
    console.print(grid)
    print_noise({_label(m.direction, m.way, several): m.noise for m in measurements})


def table(title: str) -> Table:
    """An empty table in the style of all."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def markdown(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The caption, and a table under it."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join((caption, "", *lines)) + "\n"


def _label(direction: str, way: str, several: bool) -> str:
    return f"{direction}, {way}" if several else direction


def print_summary(measurements: list[Measurement], fused: list[str]) -> None:
    """Over all cases of a combine: the geometric mean and the worst of how each fused backend
    stands against the others. Against clone it is the time's multiple: less is better."""
    timings = _timings(measurements)
    several = len({m.way for m in measurements}) > 1
    grid = table("Over all shapes and reductions: geometric mean (worst)")
    for name in ("backend", "combine", "pass"):
        grid.add_column(name)
    competitors = _competitors(measurements)
    for name in (*(f"x {name}" for name in competitors), "clones"):
        grid.add_column(name, justify="right")
    groups = dict.fromkeys((m.case.combine, m.direction, m.way) for m in measurements)
    for backend in fused:
        for combine, direction, way in groups:
            rows = [
                here
                for key, here in timings.items()
                if (key[0].combine, *key[1:]) == (combine, direction, way) and backend in here
            ]
            cells = []
            for name in (*competitors, CLONE):
                both = [(here[name], here[backend]) for here in rows if name in here]
                if name == CLONE:
                    both = [(own, clone) for clone, own in both]
                ratios = [timing.ratio(*pair) for pair in both]
                worst: Callable = max if name == CLONE else min
                cells.append(f"{marked(_mean(ratios))} ({marked(worst(ratios))})" if ratios else "")
            grid.add_row(backend, combine, _label(direction, way, several), *cells)
    console.print(grid)


def _mean(ratios: list[Ratio]) -> Ratio:
    """The geometric mean, and that of the bounds: it lies between them still more surely. (Not by
    statistics.geometric_mean: a bound may be 0 or infinite.)"""
    return Ratio(*(math.prod(v) ** (1 / len(v)) for v in zip(*ratios, strict=True)))


def write_csv(path: Path, measurements: list[Measurement], environment: dict[str, str]) -> None:
    """One row per measurement; seconds, bytes and ratios."""
    timings, copy = _timings(measurements), _copy_bandwidth(measurements)
    with path.open("w", newline="") as file:
        writer = None
        for m in measurements:
            case, here = m.case, timings[_key(m)]
            row = {
                "block": case.block,
                "shape": case.shape_name,
                "dtype": case.dtype_name,
                "layout": case.layout,
                "reduction": case.reduction,
                "combine": case.combine,
                "pass": m.direction,
                "way": m.way,
                "provider": m.provider,
                "median_s": f"{m.timing.median:.4e}",
                "iqr_s": f"{m.timing.iqr:.4e}",
                "rounds": len(m.timing.samples),
                "calls_per_round": m.timing.calls,
                "noise": f"{m.noise:.3g}",
                "host_s": "" if m.timing.host is None else f"{m.timing.host:.4e}",
                **{
                    f"{name}_over_this": f"{timing.ratio(here[name], m.timing).median:.4g}"
                    if name in here
                    else ""
                    for name in _YARDSTICKS
                },
                "x_bytes": case.x_bytes,
                "least_bytes": m.least_bytes,
                "bytes_per_s": f"{m.bandwidth:.4e}",
                "of_copy_bandwidth": f"{m.bandwidth / copy[_key(m)]:.4g}",
                "peak_bytes_beyond_x_y_dy_dx": "" if m.peak_bytes is None else m.peak_bytes,
                **environment,
            }
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)


def plot(path: Path, measurements: list[Measurement], environment: dict[str, str]) -> None:
    """Bandwidth against the size of x: a row of panels for each combine, a column for each pass, a
    line per provider through the geometric means over shapes of one size; the dots are shapes.

    Raises:
        ImportError: matplotlib isn't here.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    several = len({m.way for m in measurements}) > 1
    columns = list(dict.fromkeys((m.direction, m.way) for m in measurements))
    rows = list(dict.fromkeys(m.case.combine for m in measurements))
    names = [n for n in dict.fromkeys(m.provider for m in measurements) if n != CLONE]
    colors = dict(zip(names, _COLORS, strict=False))
    size = (5.5 * len(columns) + 1.5, 3.6 * len(rows) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    for i, combine in enumerate(rows):
        for j, (direction, way) in enumerate(columns):
            panel = panels[i, j]
            here = [
                m
                for m in measurements
                if (m.case.combine, m.direction, m.way) == (combine, direction, way)
            ]
            for name in (CLONE, *names):
                style = {"color": colors.get(name, "0.4"), "ls": "--" if name == CLONE else "-"}
                points = [(m.case.x_bytes / 2**20, m.bandwidth / 1e9) for m in here]
                points = [p for p, m in zip(points, here, strict=True) if m.provider == name]
                if not points:
                    continue
                sizes = sorted({size for size, _ in points})
                means = [statistics.geometric_mean(b for s, b in points if s == z) for z in sizes]
                label = "copy (x.clone())" if name == CLONE else name
                panel.plot(sizes, means, lw=1.8, label=label, **style)
                panel.plot(*zip(*points, strict=True), ".", ms=5, color=style["color"])
            panel.set_xscale("log", base=2)
            sizes = sorted({m.case.x_bytes / 2**20 for m in measurements})
            if len(sizes) < 4:  # there may be one power of two in their range, or none
                panel.set_xticks(sizes)
                panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.set_title(f"{combine}, {_label(direction, way, several)}")
    for panel in panels[-1]:
        panel.set_xlabel("size of x, MiB")
    for panel in panels[:, 0]:
        panel.set_ylabel("least bytes over time, GB/s")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    case = measurements[0].case
    title = f"{case.block}, {case.dtype_name}, {case.layout}\n{caption(environment)}"
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130)
