"""What a block may compute, and the one place that computes it."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..functional import COMBINE, cse, scse, sse

#: Hidden activations, the usual first. Those with a slope (elu: its alpha) and their usual ones.
ACTIVATIONS = ("relu",)
GATES = ("sigmoid",)
SLOPES = {"leaky_relu": 0.01, "elu": 1.0}


class Function(NamedTuple):
    """A function of x and of w1, b1, w2, b2, ws, bs."""

    excitation: str  # "cse", "sse" or "scse"
    combine: str = "add"
    activation: str = "relu"
    slope: float = 0.01
    gate: str = "sigmoid"
    plus_x: bool = False

    def __call__(self, x: Tensor, w1, b1, w2, b2, ws, bs, backend: str = "auto") -> Tensor:
        if self.excitation == "sse":
            y = sse(x, ws, bs, backend=backend)
        elif self.excitation == "cse":
            y = cse(x, w1, b1, w2, b2, backend=backend)
        else:
            y = scse(x, w1, b1, w2, b2, ws, bs, combine=self.combine, backend=backend)
        return y + x if self.plus_x else y

    def __str__(self) -> str:
        parts = [self.excitation]
        if self.excitation == "scse":
            parts.append(self.combine)
        if self.plus_x:
            parts[-1] += " + x"
        if self.excitation != "sse" and self.activation != "relu":
            slope = f"({self.slope:g})" if self.activation in SLOPES else ""
            parts.append(self.activation + slope)
        if self.gate != "sigmoid":
            parts.append(self.gate)
        return ", ".join(parts)


def possible(excitation: str, slopes: dict[str, list[float]]) -> Iterator[Function]:
    """All functions of this excitation, the usual ones first; with `slopes` for activations that
    have one, besides the usual."""
    activations = [
        (activation, slope)
        for activation in (ACTIVATIONS if excitation != "sse" else ACTIVATIONS[:1])
        for slope in dict.fromkeys((*slopes.get(activation, ()), SLOPES.get(activation, 0.01)))
    ]
    for gate in GATES:
        for activation, slope in activations:
            for combine in COMBINE if excitation == "scse" else ("add",):
                for plus_x in (False, True):
                    if not (plus_x and combine == "concat"):
                        yield Function(excitation, combine, activation, slope, gate, plus_x)
