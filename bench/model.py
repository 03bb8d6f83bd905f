"""A training step of whole networks: as their libraries have them, and after `convert`.

  smp       segmentation_models.pytorch's Unet, ResNet-34, with scSE in the decoder
  smp-b0    the same over timm's EfficientNet-B0, with squeeze & excitation (SiLU) in the encoder
  smp-b4    the same over EfficientNet-B4
  smp-mn3   the same over MobileNetV3 (hard sigmoid)
  3dunet    pytorch-3dunet's ResidualUNetSE3D
  unet      the U-Net of `bench mri`, with an scSE block after every encoder and decoder block

Each network is built once and copied; the copy is converted, and a second one is converted together
with the BatchNorms and ReLUs that only a block reads ("with batch norm"). A step is forward, loss,
backward and optimizer. All are timed in turn, round by round. In other steps, in turn with these,
hooks time the blocks too: this shows how much of a step can be won at all. Before that, output and
gradient of all are compared with the original's in float64, computed as they are and in float64
too. If conversion takes them further away, the exit status is 1. (With --autocast they are as far
away as its dtype takes them.)
--compile times original and converted under torch.compile as well, and says how many seconds their
first step took: nearly all of it is compiling. A network whose library can't be imported is left
out, with the reason. Written: model.png, the steps as bars.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scse_kernels import convert

from . import blocks, memory, options, providers, report, timing
from .cases import LAYOUTS
from .unet import UNet

_SEED = 0
ORIGINAL, CONVERTED, WITH_NORM = "original", "converted", "with batch norm"
#: A converted network's output may be this many times as far from float64 as the original's. So may
#: its gradient, which jumps where a rounding pushes a ReLU to its other side, or a max pooling to
#: another value: by 1e-3 where rounding alone takes it 1e-6 away.
_TIMES_AS_FAR = 4, 50
#: In float64 nothing jumps. So this is what shows that conversion leaves the mathematics alone.
#: (The backward of torch's own hardsigmoid has a sixth in float32, which is off by 3e-8.)
_IN_FLOAT64 = 1e-7


class _Model(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the images


class _Bar(NamedTuple):
    """A step in the picture."""

    network: str  # and its images
    which: str
    milliseconds: float
    blocks: float  # milliseconds of it; 0 where they were not timed


def _smp(encoder: str) -> nn.Module:
    _allow_torchvision()
    import segmentation_models_pytorch as smp

    net = smp.Unet(encoder, encoder_weights=None, decoder_attention_type="scse", classes=4)
    for module in net.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # who drops another path computes something else
    return net


@functools.cache
def _allow_torchvision() -> torch.library.Library:
    """Let torchvision be imported where its compiled operators don't fit this torch. The libraries
    import it, but the networks here call none of its operators."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # it registers fakes of operators that there are none of
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:  # who needs it will say so
        pass
    return library


def _unet3d() -> nn.Module:
    from pytorch3dunet.unet3d.model import ResidualUNetSE3D

    return ResidualUNetSE3D(1, 4, f_maps=16, num_levels=4)


def _unet() -> nn.Module:
    return UNet(
        4, 16, functools.partial(providers.build, "eager", reduction=2, combine="add", axes=2)
    )


MODELS = {
    "smp": _Model(functools.partial(_smp, "resnet34"), (2, 3, 256, 256)),
    "smp-b0": _Model(functools.partial(_smp, "timm-efficientnet-b0"), (2, 3, 256, 256)),
    "smp-b4": _Model(functools.partial(_smp, "timm-efficientnet-b4"), (2, 3, 256, 256)),
    "smp-mn3": _Model(functools.partial(_smp, "timm-mobilenetv3_large_100"), (2, 3, 256, 256)),
    "3dunet": _Model(_unet3d, (1, 1, 48, 64, 64)),
    "unet": _Model(_unet, (8, 1, 128, 128)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench model`."""
    parser.add_argument(
        "--models",
        nargs="+",
        action=options.Several,
        choices=tuple(MODELS),
        default=tuple(MODELS),
        help="default: all",
    )
    parser.add_argument(
        "--rounds", type=options.positive, default=9, help="of timing (%(default)s)"
    )
    parser.add_argument(
        "--images",
        type=_images,
        help="how many and how large, such as 16x512x512, for networks with as many axes",
    )
    parser.add_argument("--autocast", choices=("float16", "bfloat16"), help="default: float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks, too")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="%(default)s")
    options.add_reference(parser)


def _images(text: str) -> tuple[int, ...]:
    number, *sizes = options.shape(text.replace("x", "x1x", 1))
    return number, *sizes[1:]


def run(args: argparse.Namespace) -> int:
    """Compare and time the chosen networks; returns 1 if one was wrong."""
    providers.fused(args.device, "--reference", args.reference)
    report.print_header(report.environment(args.device), providers.missing(args.device))
    agree, bars = True, []
    for name in args.models:
        shape = MODELS[name].shape
        if args.images and len(args.images) != len(shape) - 1:
            report.console.print(f"[yellow]{name} is left out: it takes {len(shape) - 2} axes")
            continue
        try:
            original = _build(MODELS[name])
        except ImportError as error:
            report.console.print(f"[yellow]{name} is left out: {error}")
            continue
        right, own = _measure(name, original, args)
        agree &= right
        bars += own
    if bars:
        picture = args.output / "model.png"
        try:
            _picture(picture, bars, report.caption(report.environment(args.device)))
        except ImportError as error:
            report.console.print(f"[yellow]{picture.name} is left out: {error}")
        else:
            report.console.print(f"Written: {picture}")
    return 0 if agree else 1


def _build(model: _Model) -> nn.Module:
    torch.manual_seed(_SEED)
    return model.build()


def _measure(name: str, original: nn.Module, args: argparse.Namespace) -> tuple[bool, list[_Bar]]:
    """Print what conversion does to one network. Returns False if it gives something else; and its
    steps."""
    console, device = report.console, args.device
    shape = MODELS[name].shape
    if args.images:
        shape = (args.images[0], shape[1], *args.images[1:])
    memory_format = torch.contiguous_format
    if args.layout == "channels_last":
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    autocast = args.autocast and getattr(torch, args.autocast)
    original = original.to(device, memory_format=memory_format)
    image = torch.randn(shape, device=device).to(memory_format=memory_format)
    nets = {ORIGINAL: original, CONVERTED: copy.deepcopy(original)}
    converted = convert(nets[CONVERTED])
    paths = [entry.paths[0] for entry in converted.converted]
    nets[WITH_NORM] = copy.deepcopy(original)
    with_norm = convert(nets[WITH_NORM], (image[:2],))
    norms = sum(entry.alone is None for entry in with_norm.converted)
    if not norms:  # it would be the converted one once more
        del nets[WITH_NORM]

    title = f"{name}, {'x'.join(map(str, image.shape))}"
    table = report.table(f"{title}: distance from float64")
    for column in ("", "output", "gradient", "gradient, in float64"):
        table.add_column(column, justify="right" if column else "left")
    errors, in_float64 = _errors(nets, image[:2], autocast)
    for which, error in errors.items():
        gradient = in_float64[which][1:] if which in in_float64 else ()
        table.add_row(which, *(f"{value:.1e}" for value in (*error, *gradient)))
    console.print(table)

    steps = {which: _Step(net, image, autocast) for which, net in nets.items()}
    if args.compile:
        torch.compiler.reset()
        for which in (ORIGINAL, CONVERTED):
            net = torch.compile(copy.deepcopy(nets[which]))
            steps[f"{which}, compiled"] = _Step(net, image, autocast)
    first = {which: _seconds(step) for which, step in steps.items()}
    peaks = {which: memory.peak(step, device) for which, step in steps.items()}
    inside = {}
    for which in (ORIGINAL, CONVERTED):
        own = [nets[which].get_submodule(path) for path in paths]
        inside[which] = blocks.InStep(steps[which], own, device)
    calls = {timing.FIXED: timing.fixed_clone(device), **steps}
    calls |= {f"{which}, blocks timed": step for which, step in inside.items()}
    done = iter(range(args.rounds))
    with report.progress() as progress:
        task = progress.add_task(f"timing {name}", total=args.rounds)
        times = timing.interleaved(
            calls, device, args.rounds, on_round=lambda: progress.update(task, completed=next(done))
        )
    noise = times[timing.FIXED].spread

    table = report.table(
        f"{name}: a training step, {inside[ORIGINAL].calls} calls of {len(paths)} blocks in it,"
        f" {norms} of them with batch norm"
    )
    table.add_column("")
    for column in (
        "ms",
        "IQR",
        "speedup",
        "peak MiB",
        "first step, s",
        "blocks in it, ms",
        "share",
    ):
        table.add_column(column, justify="right")
    bars = []
    for which in steps:
        timed, cells, within = times[which], ("", ""), 0.0
        if which in inside:
            _, part, share = inside[which].summary()
            cells = f"{part.median * 1e3:.1f}", f"{share:.0%}"
            within = share * timed.median * 1e3
        bars.append(_Bar(title, which, timed.median * 1e3, within))
        table.add_row(
            which,
            f"{timed.median * 1e3:.1f}",
            f"{timed.iqr * 1e3:.1f}",
            report.ratio(times[ORIGINAL], timed) if which != ORIGINAL else "",
            f"{peaks[which] / 2**20:.0f}",
            f"{first[which]:.1f}",
            *cells,
        )
    console.print(table)
    report.print_noise({"": noise})
    # A comparison with NaN is False.
    right = bool(paths) and all(
        error <= times * own
        for which in nets
        for error, times, own in zip(errors[which], _TIMES_AS_FAR, errors[ORIGINAL], strict=True)
    )
    right &= all(error < _IN_FLOAT64 for both in in_float64.values() for error in both)
    if not right:
        console.print(f"[red]{name}: original and converted DISAGREE, or nothing was converted")
        console.print(str(with_norm))
    return right, bars


def _picture(path: Path, bars: list[_Bar], caption: str) -> None:
    """The steps, a group of bars for each network, with the blocks' part of them.

    Raises:
        ImportError: matplotlib isn't here.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(bar.network for bar in bars))
    figure = Figure(figsize=(8, 0.6 + 0.3 * (len(bars) + len(groups))), layout="constrained")
    panel = figure.add_subplot()
    at = [i + 0.8 * groups.index(bar.network) for i, bar in enumerate(bars)]
    whole, blocks = [bar.milliseconds for bar in bars], [bar.blocks for bar in bars]
    colors = ["0.7" if bar.which.startswith(ORIGINAL) else "tab:blue" for bar in bars]
    panel.barh(at, whole, color=colors)
    panel.barh(
        at, blocks, color="tab:orange", label="scSE blocks (with batch norm: not timed apart)"
    )
    for y, bar in zip(at, bars, strict=True):
        panel.text(bar.milliseconds, y, f" {bar.milliseconds:.0f} ms", va="center")
    panel.set_yticks(at, [bar.which for bar in bars])
    for group in groups:
        first = next(y for y, bar in zip(at, bars, strict=True) if bar.network == group)
        panel.text(0, first - 0.55, group, va="bottom", weight="bold")
    panel.invert_yaxis()
    panel.set(xlabel="milliseconds of a training step", xlim=(0, 1.12 * max(whole)))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="lower right", fontsize=8)
    figure.suptitle(caption, fontsize=8)
    figure.savefig(path, dpi=130)


def _seconds(step: Callable[[], None]) -> float:
    """How long a first step takes; it makes the gradients and the optimizer's state."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class _Step:
    """A step of training with SGD, on random targets."""

    def __init__(self, net: nn.Module, image: Tensor, autocast: torch.dtype | None) -> None:
        self.net, self.image, self.autocast = net, image, autocast
        self.target: Tensor | None = None
        self.optimizer = torch.optim.SGD(net.parameters(), 1e-4, 0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with _autocast(self.image, self.autocast):
            logits = self.net(self.image)
            if self.target is None:  # made on the host: not in every step
                self.target = _target(logits)
            loss = nn.functional.cross_entropy(logits, self.target)
        loss.backward()
        self.optimizer.step()


def _autocast(image: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(image.device.type, dtype, enabled=dtype is not None)


def _target(logits: Tensor) -> Tensor:
    """Random classes, which the shape decides."""
    generator = torch.Generator().manual_seed(_SEED)
    target = torch.randint(logits.shape[1], logits[:, 0].shape, generator=generator)
    return target.to(logits.device)


def _errors(
    nets: dict[str, nn.Module], image: Tensor, autocast: torch.dtype | None
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Relative errors of the output and of the gradient of the parameters, from the original
    network in float64: of each network as it is, and in float64 of all but the original."""

    def compute(
        net: nn.Module, image: Tensor, autocast: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        net = copy.deepcopy(net).to(image.dtype)  # leaves the running statistics alone
        with _autocast(image, autocast):
            logits = net(image)
            loss = nn.functional.cross_entropy(logits, _target(logits))
        loss.backward()
        grads = [p.grad.double().flatten() for p in net.parameters() if p.grad is not None]
        return logits.double(), torch.cat(grads)

    right = compute(nets[ORIGINAL], image.double())

    def distance(output: Tensor, gradient: Tensor) -> tuple[float, float]:
        both = zip((output, gradient), right, strict=True)
        return tuple(((a - b).norm() / b.norm()).item() for a, b in both)

    errors = {which: distance(*compute(net, image, autocast)) for which, net in nets.items()}
    in_float64 = {
        which: distance(*compute(net, image.double()))
        for which, net in nets.items()
        if which != ORIGINAL
    }
    return errors, in_float64
