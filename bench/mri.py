"""Parity on real input: a U-Net with scSE blocks segments an MR image, eager and fused.

A 2-D U-Net with an scSE block after every encoder and decoder block tells CSF, grey and white
matter apart in axial slices of the ICBM152 T1 template, which nilearn ships (nothing is
downloaded), corrupted by noise and a bias field. It is trained three times at once, step by step in
turn, from the same weights on the same batches: with the eager scSE that people have, with the
fused one, and with BatchNorm, ReLU and scSE as one operator ("BatchNorm + scSE"). Loss curves and
Dice must agree, else the exit status is 1. The blocks are timed inside of the steps, by hooks.

This is one averaged brain: a check of parity and sanity, not a benchmark of accuracy.
Written: mri.png.
"""

import argparse
import copy
import functools
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from scse_kernels import convert

from . import blocks, mri_data, options, providers, report, timing
from .mri_data import OUTSIDE, TISSUES, Slices
from .unet import LEVELS, UNet

_BATCH, _LEARNING_RATE, _MOMENTUM = 8, 0.03, 0.9
# Without it single steps jump, and two runs a rounding apart part ways.
_LARGEST_GRADIENT = 0.3
_REDUCTION = 2
#: The network in which a block, the BatchNorm and the ReLU before it are one operator.
_WITH_NORM = "BatchNorm +"
_SEED = 0

# Tolerances. Before any training both compute the same function, so the loss differs by roundings
# of float32 only. A gradient differs by more, as a rounding may push a ReLU or a maximum to its
# other side: some 1e-4 of its norm, for the eager network as for the fused one. A mistake in a
# backward gives more than 1e-2. Training amplifies such differences. Moving the eager network's own
# initial weights by one rounding bends its loss curve by 7e-4 and moves Dice by 4e-4 (measured with
# the default options on an Intel Xeon, AVX-512, torch 2.13.0). How far is chance, but not ten times
# as far.
_FIRST_LOSS = 1e-5
_FIRST_GRADIENT = 5e-3
_CURVE = 0.01
_DICE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench mri`."""
    parser.add_argument(
        "--steps", type=options.positive, default=100, help="training steps (%(default)s)"
    )
    parser.add_argument(
        "--width", type=options.positive, default=16, help="the U-Net's channels (%(default)s)"
    )
    parser.add_argument(
        "--resolution", type=options.positive, default=2, help="of the volume, in mm (%(default)s)"
    )
    parser.add_argument(
        "--combine", choices=("add", "max", "mul"), default="add", help="%(default)s"
    )
    options.add_reference(parser)


class _Training:
    """One network on its way: weights, optimizer, losses and, with its blocks, the steps' times."""

    def __init__(self, net: UNet, steps: int, own: list[nn.Module], device: torch.device) -> None:
        self.net = net
        self.optimizer = torch.optim.SGD(net.parameters(), _LEARNING_RATE, _MOMENTUM, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []
        self.step = blocks.InStep(self._step, own, device)

    def _step(self, image: Tensor, label: Tensor) -> None:
        loss = _loss(self.net(image), label)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), _LARGEST_GRADIENT)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def predict(self, image: Tensor) -> Tensor:
        """The tissue at every voxel of image [n, 1, H, W], as [n, H, W]."""
        self.net.eval()
        return torch.cat([self.net(batch).argmax(1) for batch in image.split(_BATCH)])


def _loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy plus one minus the mean soft Dice, inside the head."""
    inside = (label != OUTSIDE).unsqueeze(1)
    truth = nn.functional.one_hot(label.clamp(min=0), len(TISSUES)).movedim(-1, 1) * inside
    probability = logits.softmax(1) * inside
    overlap = 2 * (probability * truth).sum((0, 2, 3))
    dice = (overlap / ((probability + truth).sum((0, 2, 3)) + 1)).mean()
    return nn.functional.cross_entropy(logits, label, ignore_index=OUTSIDE) + 1 - dice


def _nets(names: tuple[str, str], width: int, combine: str) -> dict[str, UNet]:
    """The same U-Net with the scSE blocks of two providers, with the same weights."""
    torch.manual_seed(_SEED)
    first, second = (
        UNet(
            len(TISSUES),
            width,
            functools.partial(providers.build, name, reduction=_REDUCTION, combine=combine, axes=2),
        )
        for name in names
    )
    providers.load(second, first.parameters())
    return dict(zip(names, (first, second), strict=True))


def _with_batch_norm(eager: UNet, image: Tensor) -> UNet:
    """The eager network, converted together with its blocks' BatchNorms and ReLUs."""
    net = copy.deepcopy(eager)
    found = convert(net, (image,))
    if any(entry.alone is not None for entry in found.converted):
        raise SystemExit(f"A BatchNorm is computed by itself:\n{found}")
    return net


def run(args: argparse.Namespace) -> int:
    """Train all, compare, report; returns 1 if they disagree."""
    console, device = report.console, args.device
    torch.backends.cudnn.allow_tf32 = False  # the tolerances are those of float32
    names = ("eager", providers.fused(device, "--reference", args.reference)[0])
    environment = report.environment(device)
    report.print_header(environment, providers.missing(device))

    train, test = mri_data.load(args.resolution, 2**LEVELS)
    console.print(
        f"ICBM152 T1 at {args.resolution} mm: {len(train.label)} axial slices for training,"
        f" {len(test.label)} for testing, {tuple(train.label.shape[1:])} voxels"
    )
    scores = {
        f"two thresholds, {which}": mri_data.two_thresholds(
            getattr(train, field), train.label, getattr(test, field), test.label
        )
        for which, field in (("clean volume", "clean"), ("corrupted volume", "image"))
    }
    train, test = (Slices(*(t.to(device) for t in part)) for part in (train, test))
    nets = {name: net.to(device) for name, net in _nets(names, args.width, args.combine).items()}
    if providers.usable(device, "bn_relu_scse"):
        nets[_WITH_NORM] = _with_batch_norm(nets["eager"], train.image[:2])
        names = (*names, _WITH_NORM)
    middle = slice(len(train.label) // 2, len(train.label) // 2 + _BATCH)
    first = _first_gradients(nets, train.image[middle], train.label[middle])
    # A block of the third network computes BatchNorm and ReLU as well: its share is of another
    # kind.
    blocks_of = {
        name: net.recalibrations() if name != _WITH_NORM else [] for name, net in nets.items()
    }
    trainings = {
        name: _Training(net, args.steps, blocks_of[name], device) for name, net in nets.items()
    }
    noise = _train(trainings, train, args.steps)
    predicted = {name: training.predict(test.image) for name, training in trainings.items()}
    for name in names:
        scores[f"U-Net, {name} scSE"] = mri_data.dice(predicted[name], test.label)

    table = report.table("Dice on the test slices")
    table.add_column("")
    for tissue in (*TISSUES, "mean"):
        table.add_column(tissue, justify="right")
    for name, values in scores.items():
        mean = sum(values) / len(values)
        table.add_row(name, *(f"{value:.4f}" for value in (*values, mean)))
    console.print(table)

    _print_times(trainings, noise)
    picture = args.output / "mri.png"
    _picture(picture, test, predicted, trainings, environment)
    console.print(
        "One averaged brain: a check of parity and sanity, not a benchmark of accuracy.\n"
        f"Written: {picture}"
    )
    return _verdict(names, first, trainings, [scores[f"U-Net, {name} scSE"] for name in names])


def _train(trainings: dict[str, _Training], train: Slices, steps: int) -> float:
    """Train all in turn; the spread of the fixed clone."""
    yardstick = timing.Yardstick(train.label.device)
    generator = torch.Generator().manual_seed(_SEED)
    with report.progress() as progress:
        task = progress.add_task("training", total=steps)
        for i in range(steps):
            batch = torch.randperm(len(train.label), generator=generator)[:_BATCH]
            batch = batch.to(train.label.device)
            image, label = train.image[batch], train.label[batch]
            turns = list(trainings.values())
            for training in turns if i % 2 else reversed(turns):
                training.step(image, label)
            yardstick.sample()
            losses = ", ".join(f"{n} {t.losses[-1]:.4f}" for n, t in trainings.items())
            progress.update(task, advance=1, description=f"loss: {losses}")
    return yardstick.timing().spread


def _print_times(trainings: dict[str, _Training], noise: float) -> None:
    report.console.print(
        f"Seconds of a training step, and of its {trainings['eager'].step.calls} scSE blocks,"
        " forward and backward, in the same steps"
    )
    table = report.table("Training step")
    table.add_column("")
    for name in ("median", "IQR", "x eager", "of which scSE", "share"):
        table.add_column(name, justify="right")
    found = {
        name: training.step.summary(without=len(training.losses) // 10)
        for name, training in trainings.items()
    }
    for name, (step, scse, share) in found.items():
        table.add_row(
            f"{name} scSE",
            f"{step.median:.4f} s",
            f"{step.iqr:.4f} s",
            report.ratio(found["eager"][0], step) if name != "eager" else "",
            *((f"{scse.median:.4f} s", f"{share:.0%}") if name != _WITH_NORM else ("", "")),
        )
    report.console.print(table)
    report.print_noise({"": noise})


def _first_gradients(
    nets: dict[str, UNet], image: Tensor, label: Tensor
) -> dict[str, tuple[float, float]]:
    """Each network's loss on one batch, and the distance of its gradient from that of the eager
    network in float64, in units of the latter's norm."""

    def compute(net: UNet, image: Tensor) -> tuple[float, Tensor]:
        net = copy.deepcopy(net)  # leaves the running statistics alone
        loss = _loss(net(image), label)
        loss.backward()
        return loss.item(), torch.cat([p.grad.double().flatten() for p in net.parameters()])

    _, right = compute(copy.deepcopy(nets["eager"]).double(), image.double())
    found = {name: compute(net, image) for name, net in nets.items()}
    return {
        name: (loss, ((gradient - right).norm() / right.norm()).item())
        for name, (loss, gradient) in found.items()
    }


def _verdict(
    names: tuple[str, ...],
    first: dict[str, tuple[float, float]],
    trainings: dict[str, _Training],
    scores: list[list[float]],
) -> int:
    """Print how far the others are from the first; 1 if that is too far."""
    losses = [torch.tensor(trainings[name].losses, dtype=torch.float64) for name in names]
    checks = [(f"gradient of {n} against float64", first[n][1], _FIRST_GRADIENT) for n in names]
    for i, name in enumerate(names[1:], 1):
        loss = _relative(first[names[0]][0], first[name][0])
        curve = (losses[0] - losses[i]).abs().mean() / losses[0].mean()
        checks += [
            (f"{name} scSE: loss before training, relative", loss, _FIRST_LOSS),
            (f"{name} scSE: loss curve, mean distance over mean", curve.item(), _CURVE),
            (
                f"{name} scSE: Dice, most distant tissue",
                max(map(_distance, scores[0], scores[i])),
                _DICE,
            ),
        ]
    table = report.table("Agreement of eager and fused")
    table.add_column("")
    table.add_column("differs by", justify="right")
    table.add_column("tolerance", justify="right")
    for name, value, tolerance in checks:
        table.add_row(name, f"{value:.1e}", f"{tolerance:g}")
    report.console.print(table)
    agree = all(value <= tolerance for _, value, tolerance in checks)  # False for NaN
    report.console.print("[green]They agree." if agree else "[red]They DISAGREE.")
    return 0 if agree else 1


def _distance(a: float, b: float) -> float:
    return abs(a - b)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(a)


def _picture(
    path: Path,
    test: Slices,
    predicted: dict[str, Tensor],
    trainings: dict[str, _Training],
    environment: dict[str, str],
) -> None:
    """The middle test slice, its truth and all predictions; below, the loss curves."""
    i = len(test.label) // 2
    inside = test.label[i] != OUTSIDE
    tissues = {"truth": test.label[i]}
    tissues |= {f"{n} scSE": p[i].where(inside, OUTSIDE) for n, p in predicted.items()}
    figure = Figure(figsize=(3 * (1 + len(tissues)), 7.4), layout="constrained")
    panels = figure.subplot_mosaic(
        [["image", *tissues], ["losses"] * (1 + len(tissues))], height_ratios=[3, 2]
    )
    panels["image"].imshow(test.image[i, 0].T.cpu(), cmap="gray", origin="lower")
    panels["image"].set_title("corrupted T1")
    colors = ListedColormap(("black", "tab:blue", "tab:orange", "white"))
    for name, tissue in tissues.items():
        panels[name].imshow(
            tissue.T.cpu(),
            cmap=colors,
            vmin=OUTSIDE,
            vmax=len(TISSUES) - 1,
            origin="lower",
            interpolation="nearest",
        )
        panels[name].set_title(name)
    for name in ("image", *tissues):
        panels[name].axis("off")
    keys = [
        Patch(facecolor=color, edgecolor="gray", label=tissue)
        for color, tissue in zip(colors.colors[1:], TISSUES, strict=True)
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    for (name, training), style in zip(trainings.items(), ("-", "--", ":"), strict=False):
        panels["losses"].plot(training.losses, style, label=f"{name} scSE")
    panels["losses"].set(xlabel="step", ylabel="training loss")
    panels["losses"].legend()
    panels["losses"].grid(alpha=0.3)
    figure.suptitle(
        "Parity on real input, not a benchmark of accuracy: one averaged brain\n"
        + report.caption(environment),
        fontsize=8,
    )
    figure.savefig(path, dpi=120)
