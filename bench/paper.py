"""The articles' experiment in small: whole-brain segmentation by twelve networks.

U-Net, SD-Net and DenseNet, each without blocks and with cSE, sSE and scSE (bench/networks), learn
to find 16 structures in coronal slices of four people and are tested on two others
(bench/anatomy.py): Dice of each structure, over several seeds. Networks are trained with the fused
blocks that `convert` makes. At the end of each run a step of every network is timed, with eager and
with fused blocks in turn.

Intensities are synthetic and six people are few: it shows whether the blocks help here, not how
well brains can be segmented.
Each training's result is kept in paper.jsonl at once; a stopped run goes on where it was.
Written: paper.jsonl, paper.md, paper.png.
"""

import argparse
import copy
import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor, nn

from scse_kernels import convert

from . import anatomy, blocks, networks, options, report, timing
from .anatomy import CLASSES

_LEARNING_RATE, _WEIGHT_DECAY = 3e-3, 1e-4
#: A pixel's weight beside its class's, where labels meet.
_BOUNDARY = 0.5
#: What --quick stands for: a few minutes on two cores.
_QUICK = {"networks": ["U-Net"], "seeds": 1, "width": 8, "steps": 150}

#: Of timing a step.
_ROUNDS = 15
_LEGEND = (
    "Blocks: their share of the same steps. ?: the machine was busy, or the rounds' ratios differ"
    " too much."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench paper`."""
    known = tuple(networks.NETWORKS)
    parser.add_argument("--networks", nargs="+", choices=known, default=known, help="default: all")
    for name, default, help_ in (
        ("width", 16, "channels (%(default)s; the articles: 64)"),
        ("steps", 1200, "of training (%(default)s)"),
        ("batch", 4, "slices to a step (%(default)s)"),
        ("seeds", 3, "trainings of each network (%(default)s)"),
        ("spacing", 2, "of coronal slices, in mm (%(default)s)"),
    ):
        parser.add_argument(f"--{name}", type=options.positive, default=default, help=help_)
    parser.add_argument(
        "--quick", action="store_true", help="U-Net alone, narrow, one seed, few steps"
    )


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, then print and write the results."""
    if args.quick:
        vars(args).update(_QUICK)
    report.print_header(report.environment(args.device), {})
    train = [anatomy.load(name, args.spacing) for name in anatomy.TRAIN]
    test = [anatomy.load(name, args.spacing) for name in anatomy.TEST]
    report.console.print(
        f"{sum(len(p.structures) for p in train)} coronal slices of {len(train)} people to learn"
        f" from, {sum(len(p.structures) for p in test)} of {len(test)} others to test on"
    )
    weight = class_weights(torch.cat([anatomy.truth(p.structures) for p in train]))
    weight = weight.to(args.device)
    results = _Results(args.output / "paper.jsonl", args)
    kinds = list(itertools.product(args.networks, networks.PATTERNS))
    todo = [(seed, *kind) for seed in range(args.seeds) for kind in kinds]
    todo = [key for key in todo if not results.has(*key)]
    with report.progress() as progress:
        progress.columns = (*progress.columns, TimeRemainingColumn())
        task = progress.add_task("", total=len(todo) * args.steps)
        for seed, network, pattern in todo:
            progress.update(task, description=f"{network}, {pattern}, seed {seed}")
            results.add(
                seed,
                network,
                pattern,
                **_trained(args, seed, network, pattern, weight, train, test, progress, task),
            )
        task = progress.add_task("", total=len(kinds))
        times = {}
        for network, pattern in kinds:
            progress.update(task, description=f"{network}, {pattern}: seconds")
            times[network, pattern] = _timed(args, network, pattern, weight, train)
            progress.advance(task)
    _print(results, times, args)
    return 0


class _Results:
    """The trainings that were done with the same options, one line of a file each."""

    def __init__(self, file: Path, args: argparse.Namespace) -> None:
        self.file = file
        self.options = {k: getattr(args, k) for k in ("width", "steps", "batch", "spacing")}
        lines = file.read_text().splitlines() if file.exists() else []
        self.lines = [x for x in map(json.loads, lines) if x["options"] == self.options]

    def has(self, seed: int, network: str, pattern: str) -> bool:
        return any(
            (x["seed"], x["network"], x["pattern"]) == (seed, network, pattern) for x in self.lines
        )

    def add(self, seed: int, network: str, pattern: str, **values: object) -> None:
        line = {"options": self.options, "seed": seed, "network": network, "pattern": pattern}
        self.lines.append(line | values)
        with self.file.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    def dice(self, network: str, pattern: str) -> np.ndarray:
        """[seeds, people, structures]."""
        lines = [x for x in self.lines if (x["network"], x["pattern"]) == (network, pattern)]
        return np.array([x["dice"] for x in lines])


def _trained(
    args: argparse.Namespace,
    seed: int,
    network: str,
    pattern: str,
    weight: Tensor,
    train: list[anatomy.Person],
    test: list[anatomy.Person],
    progress: Progress,
    task: int,
) -> dict[str, object]:
    """Train one network; its Dice [people, structures], and its last losses' mean."""
    net = _network(args, seed, network, pattern)
    convert(net)
    optimizer = torch.optim.AdamW(net.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, args.steps)
    losses = []
    stream = anatomy.batches(train, args.batch, seed)
    for image, label in itertools.islice(stream, args.steps):
        value = loss(net(image.to(args.device)), label.to(args.device), weight)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        progress.advance(task)
    scores = [dice(net, person, args.device) for person in test]
    return {"dice": scores, "loss": float(np.mean(losses[-20:]))}


def _network(args: argparse.Namespace, seed: int, network: str, pattern: str) -> networks.Network:
    torch.manual_seed(seed)
    net = networks.build(network, pattern, len(CLASSES), args.width)
    # On a CPU, convolutions of few channels are a sixth faster so.
    return net.to(args.device, memory_format=torch.channels_last)


def class_weights(label: Tensor) -> Tensor:
    """The root of median frequency balancing: of the median of the classes' frequencies over each.

    The articles have no root. Without it rare structures spread over the background for longer
    than this experiment trains: frequencies differ by a factor of 7,000.
    """
    count = torch.bincount(label.flatten(), minlength=len(CLASSES)).double().clamp(min=1)
    return (count.median() / count).sqrt().float()


def loss(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy, each pixel weighted by its class and more where labels meet.

    The articles add a constant on boundaries, which they don't state; here it is _BOUNDARY.
    """
    padded = nn.functional.pad(label[:, None].float(), (1, 1, 1, 1), mode="replicate")
    largest = nn.functional.max_pool2d(padded, 3, 1)
    smallest = -nn.functional.max_pool2d(-padded, 3, 1)
    boundary = (largest != smallest)[:, 0]
    pixel = weight[label] + _BOUNDARY * boundary
    return (pixel * nn.functional.cross_entropy(logits, label, reduction="none")).mean()


@torch.no_grad()
def dice(net: nn.Module, person: anatomy.Person, device: torch.device) -> list[float]:
    """Dice of each structure over all slices of a person; images without deformation."""
    net.eval()
    generator = torch.Generator().manual_seed(0)
    n = len(person.structures)
    image = anatomy.images(person.structures, person.intensities.expand(n, -1), generator)
    found = torch.cat([net(part.to(device)).argmax(1).cpu() for part in image.split(16)])
    right = anatomy.truth(person.structures)
    scores = []
    for k in range(1, len(CLASSES)):
        both = ((found == k) & (right == k)).sum()
        scores.append((2 * both / ((found == k).sum() + (right == k).sum())).item())
    return scores


class _Times(NamedTuple):
    """A step, forward and backward, with eager and with fused blocks in turn."""

    whole: dict[str, timing.Timing]  # by "eager" and "fused"
    share: dict[str, float]  # of the blocks in it
    noise: float  # how much a fixed clone spread in the same rounds


def _timed(
    args: argparse.Namespace,
    network: str,
    pattern: str,
    weight: Tensor,
    people: list[anatomy.Person],
) -> _Times:
    image, label = next(anatomy.batches(people, args.batch, 0))
    image, label = image.to(args.device), label.to(args.device)
    nets = {"eager": _network(args, 0, network, pattern)}
    nets["fused"] = copy.deepcopy(nets["eager"])
    convert(nets["fused"])

    def step(net: nn.Module) -> None:
        net.zero_grad()
        loss(net(image), label, weight).backward()

    steps = {}
    for name, net in nets.items():
        with_parameters = [b for b in net.recalibrations if any(True for _ in b.parameters())]
        steps[name] = blocks.InStep(functools.partial(step, net), with_parameters, args.device)
        steps[name]()
    calls = {timing.FIXED: timing.fixed_clone(args.device), **steps}
    whole = timing.interleaved(calls, args.device, _ROUNDS)
    noise = whole.pop(timing.FIXED).spread
    share = {name: timed.summary(without=1)[2] for name, timed in steps.items()}
    return _Times(whole, share, noise)


def _print(
    results: _Results, times: dict[tuple[str, str], _Times], args: argparse.Namespace
) -> None:
    """The tables, on the terminal and in paper.md, and the figure."""
    names = [name.removeprefix("left ") for name in CLASSES[1::2]]
    header = (
        "",
        "pattern",
        "mean Dice",
        "spread",
        "ms a step, eager",
        "fused",
        "x eager",
        "blocks, eager",
        "fused",
        *names,
    )
    rows = []
    for (network, pattern), timed in times.items():
        scores = results.dice(network, pattern)  # [seeds, people, structures]
        by_seed = scores.mean((1, 2))
        steps = timed.whole
        times_as_fast = report.ratio(steps["eager"], steps["fused"]) if pattern != "none" else ""
        doubt = report.doubt(timed.noise)
        rows.append(
            (
                network if pattern == "none" else "",
                pattern,
                f"{by_seed.mean():.3f}",
                f"{by_seed.min():.3f} to {by_seed.max():.3f}",
                *(f"{1e3 * step.median:.0f}{doubt}" for step in steps.values()),
                times_as_fast,
                *(f"{share:.0%}" for share in timed.share.values()),
                *(f"{both.mean():.2f}" for both in _pairs(scores)),
            )
        )
    settings = ", ".join(f"{name} {value}" for name, value in results.options.items())
    title = f"Dice on two people, {args.seeds} seeds ({settings})"
    table = report.table(title)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in rows:
        table.add_row(*row)
    report.console.print(table)
    environment = report.environment(args.device)
    caption = f"{title}; {report.caption(environment)}"
    (args.output / "paper.md").write_text(f"{report.markdown(caption, header, rows)}\n{_LEGEND}\n")
    _picture(args.output / "paper.png", results, args, names, report.caption(environment))
    report.console.print(
        f"{_LEGEND}\nIntensities are synthetic and six people are few.\n"
        f"Written: {args.output}/paper.jsonl, paper.md, paper.png"
    )


def _pairs(scores: np.ndarray) -> list[np.ndarray]:
    """Scores [seeds, people, structures], left and right together."""
    return [scores[..., i : i + 2] for i in range(0, scores.shape[-1], 2)]


def _picture(
    path: Path, results: _Results, args: argparse.Namespace, names: list[str], caption: str
) -> None:
    """Boxes of Dice for each structure and pattern, a row for each network."""
    rows = len(args.networks)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    colors = ("lightgray", "tab:blue", "tab:orange", "tab:green")
    for row, network in enumerate(args.networks):
        panel = figure.add_subplot(rows, 1, row + 1)
        for i, (pattern, color) in enumerate(zip(networks.PATTERNS, colors, strict=True)):
            values = [both.ravel() for both in _pairs(results.dice(network, pattern))]
            at = np.arange(len(values)) + (i - 1.5) * 0.2
            boxes = panel.boxplot(
                values,
                positions=at,
                widths=0.17,
                patch_artist=True,
                flierprops={"markersize": 2},
                medianprops={"color": "black"},
            )
            for box in boxes["boxes"]:
                box.set_facecolor(color)
            panel.plot([], [], "s", color=color, label=pattern)
        panel.set_xticks(range(len(names)), names)
        panel.set(ylabel="Dice", title=network)
        panel.grid(axis="y", alpha=0.3)
    panel.legend(ncols=len(colors), loc="lower left")
    figure.suptitle(
        "Two people, left and right, all seeds. Synthetic intensities, six people in all.\n"
        + caption,
        fontsize=8,
    )
    figure.savefig(path, dpi=120)
