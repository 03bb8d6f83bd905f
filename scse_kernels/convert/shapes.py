"""Which modules may be squeeze & excitation, by the shapes of their layers alone.

w1 is [Cr, C], w2 is [C, Cr] and ws is [1, C], each with trailing axes of size one. Where shapes can
be read in several ways, all are tried.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

#: A module with more layers than this is no block; it may hold blocks. Some layers may be unused.
_MOST, _MOST_OTHERS = 5, 2
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Unfit(Exception):
    """Why a block can't be fused, or why its parameters are not those of cSE, sSE or scSE."""


class Reading(NamedTuple):
    """Paths, below the block, of its layers; None where it lacks that branch."""

    channels: int
    squeezing: str | None  # w1, b1
    exciting: str | None  # w2, b2
    spatial: str | None  # ws, bs

    @property
    def excitation(self) -> str:
        if self.squeezing is None:
            return "sse"
        return "cse" if self.spatial is None else "scse"

    @property
    def layers(self) -> tuple[str | None, str | None, str | None]:
        return self[1:]


def parametrised(block: nn.Module) -> dict[str, nn.Module]:
    """The modules in the block, by path, that hold parameters of their own, or should."""
    return {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, _KINDS) or any(p is not None for p in module._parameters.values())
    }


def plain_layers(modules: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """[outputs, inputs, ...] of those that are linear layers or convolutions."""
    return {
        path: tuple(module.weight.shape)
        for path, module in modules.items()
        if isinstance(module, _KINDS)
        and module._parameters.keys() == {"weight", "bias"}
        and all(_is_plain(p) for p in module._parameters.values())
        and not is_lazy(module.weight)
        and module.weight.dim() > 1
    }


def _is_plain(parameter: nn.Parameter | None) -> bool:
    return type(parameter) in (nn.Parameter, type(None), FakeTensor)


def is_block(modules: dict[str, nn.Module]) -> bool:
    """Whether all of them are the layers of one block."""
    return any(True for _ in readings(plain_layers(modules))) and len(modules) == len(
        plain_layers(modules)
    )


def is_small(modules: dict[str, nn.Module]) -> bool:
    """Whether a module with these layers may be one block, rather than hold some."""
    shapes = plain_layers(modules)
    others = [
        path
        for path, module in modules.items()
        if not isinstance(module, _KINDS) or not set(shapes.get(path, ())[2:]) <= {1}
    ]
    return 0 < len(modules) <= _MOST and len(others) <= _MOST_OTHERS


def readings(shapes: dict[str, tuple[int, ...]]) -> Iterator[Reading]:
    """Every way to read layers of these shapes as those of scSE, cSE or sSE, all of them used."""
    flat = {path: shape[:2] for path, shape in shapes.items() if set(shape[2:]) <= {1}}
    if len(flat) != len(shapes) or not 1 <= len(shapes) <= 3:
        return
    if len(flat) == 1:
        for path, (outputs, channels) in flat.items():
            if outputs == 1:
                yield Reading(channels, None, None, path)
        return
    for order in itertools.permutations(flat):
        squeezing, exciting = (flat[path] for path in order[:2])
        channels = squeezing[1]
        if squeezing == exciting[::-1] and all(flat[path] == (1, channels) for path in order[2:]):
            yield Reading(channels, *order[:2], order[2] if len(order) == 3 else None)


def channels(shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """The numbers of channels that x may have, the largest first, whichever layers are used."""
    shapes = {path: shape for path, shape in shapes.items() if set(shape[2:]) <= {1}}
    return sorted(
        {
            reading.channels
            for number in (1, 2, 3)
            for chosen in itertools.combinations(shapes.items(), number)
            for reading in readings(dict(chosen))
        },
        reverse=True,
    )


def why_none(modules: dict[str, nn.Module], used: Iterable[str] | None = None) -> str:
    """Why layers can't be read as those of scSE, cSE or sSE: the modules with parameters, and
    which of them are known to be used."""
    shapes = plain_layers(modules)
    for path in modules if used is None else used:
        module = modules[path]
        if path not in shapes:
            return _why_not_plain(path, module)
        if not set(shapes[path][2:]) <= {1}:
            return f"{path}.weight is not that of a 1x1 convolution: {list(shapes[path])}"
    if used is not None:
        shapes = {path: shapes[path] for path in used}
    wide = [(path, shape[:2]) for path, shape in shapes.items()]
    pairs = [(a, b) for a, b in itertools.combinations(wide, 2) if a[1][0] == b[1][1]]
    if len(wide) == 3 and any(a[1] == b[1][::-1] for a, b in pairs):
        path, (outputs, inputs) = wide[2]
        return f"{path} has {outputs} output channels where a spatial gate has one" + (
            " (segmentation_models.pytorch 0.0.2 gated each channel at each position)"
            if outputs == inputs
            else ""
        )
    if len(wide) == 2 and pairs:
        (first, a), (second, b) = pairs[0]
        return f"{second} {list(b)} doesn't lead back from {first} {list(a)}"
    return "its layers are not those of squeeze & excitation: " + (
        ", ".join(f"{path} {list(shape)}" for path, shape in wide) or "there are none"
    )


def _why_not_plain(path: str, module: nn.Module) -> str:
    if not path:
        return f"it has parameters of its own: {', '.join(module._parameters)}"
    for name, parameter in module._parameters.items():
        if not _is_plain(parameter) and not is_lazy(parameter):
            return f"{path}.{name} is a {type(parameter).__name__}"
    if isinstance(module, _KINDS):
        weight = module._parameters.get("weight")
        if "weight" in vars(module) or (weight is not None and not is_lazy(weight)):
            return (
                f"{path}.weight is not the layer's own any more, as after FullyShardedDataParallel:"
                " convert before that"
            )
    return f"{path} is a {type(module).__name__}"
