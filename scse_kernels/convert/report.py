"""What `convert` did, as the user reads it."""

import dis
import itertools
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .. import backends
from . import shapes

#: Parts of class names by which a reader expects attention on maps, or squeeze & excitation.
_NAMES = re.compile(
    r"(?i:excit|attention|attn|recalibrat|scse)"
    r"|(?<![A-Z])(SC|C|S)?SE(?![a-z])"
    r"|(?<![A-Z])(C?BAM|ECA|GAB)(?![a-z])"
    r"|(Channel|Spatial)\w*Gate"
    r"|(?<![A-Za-z])[cs]se(?![a-z])"
)


@dataclass(frozen=True)
class Entry:
    """One block of the model.

    Attributes:
        paths: where it is in the model ("" for the model itself); several if it is shared.
        module: the name of its class.
        status: "converted", "already fused" or "left alone".
        detail: what it computes, such as "scse, max" or "batch norm, relu, scse, max", or why it
            was left alone.
        alone: with example_inputs, why a converted block doesn't compute a BatchNorm and a ReLU.
    """

    paths: tuple[str, ...]
    module: str
    status: str
    detail: str
    alone: str | None = None


@dataclass(frozen=True)
class Report:
    """What `convert` did; prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def converted(self) -> list[Entry]:
        """The blocks that this call converted."""
        return [entry for entry in self.entries if entry.status == "converted"]

    @property
    def left_alone(self) -> list[Entry]:
        """The blocks that look like squeeze & excitation but were left as they are."""
        return [entry for entry in self.entries if entry.status == "left alone"]

    def __str__(self) -> str:
        if not self.entries:
            return "no squeeze & excitation block was found"
        rows = [("path", "class", "result")]
        for entry in self.entries:
            path = entry.paths[0] or "(the model itself)"
            if len(entry.paths) > 1:
                path += f" (shared, {len(entry.paths)} places)"
            alone = f"; without BatchNorm: {entry.alone}" if entry.alone else ""
            rows.append((path, entry.module, f"{entry.status}: {entry.detail}{alone}"))
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
        without = backends.missing_kernels() if len(self.left_alone) < len(self.entries) else None
        return "\n".join([*lines, without] if without else lines)


def would_be_missed(module: nn.Module, layers: dict[str, nn.Module]) -> bool:
    """Whether a reader would call this module, whose `layers` have parameters, attention or squeeze
    & excitation, by its name or by its code: layers that lead back, a sigmoid, a product."""
    if not layers or all(_is_torchs(cls) or cls is object for cls in type(module).__mro__):
        return False
    if is_named_so(module):
        return True
    kinds = {type(m) for m in module.modules()}
    if len(layers) > 4 or not any(_has_gate(kind) for kind in kinds):
        return False
    fits = [
        (weight.shape[0], weight.shape[1])
        for weight in (getattr(layer, "weight", None) for layer in layers.values())
        if weight is not None and not is_lazy(weight) and weight.dim() > 1
    ]
    if any(map(is_lazy, module.parameters())):
        return True
    pair = any(a == b[::-1] for a, b in itertools.combinations(fits, 2))
    if shapes.is_block(layers):
        return any(map(_multiplies, kinds))
    return _multiplies(type(module)) and (pair or any(outputs == 1 for outputs, _ in fits))


def is_named_so(module: nn.Module) -> bool:
    """Whether the name of the module's class, or of one that it inherits from, says attention or
    squeeze & excitation. Not torch's own classes: their attention is between tokens."""
    if isinstance(module, torch.jit.ScriptModule):
        return bool(_NAMES.search(module.original_name))
    return any(_NAMES.search(cls.__name__) for cls in type(module).__mro__ if not _is_torchs(cls))


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch" and not issubclass(
        cls, torch.jit.ScriptModule
    )


def _codes(cls: type) -> Iterator[types.CodeType]:
    for base in cls.__mro__:
        if not _is_torchs(base):
            for value in vars(base).values():
                if isinstance(value, types.FunctionType) and value.__name__ != "__init__":
                    yield value.__code__


def _has_gate(cls: type) -> bool:
    names = [cls.__name__, *(name for code in _codes(cls) for name in code.co_names)]
    return any("igmoid" in name or "oftmax" in name for name in names)


def _multiplies(cls: type) -> bool:
    return any(
        not {"mul", "mul_", "multiply", "einsum"}.isdisjoint(code.co_names)
        or any(
            i.opname.startswith("BINARY") and "*" in i.argrepr for i in dis.get_instructions(code)
        )
        for code in _codes(cls)
    )
