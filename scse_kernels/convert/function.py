"""What a block may compute: a function of x and the parameters, which is compared and called."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..batch_norm.functional import bn_relu_scse
from ..functional import cse, scse, sse
from ..ops import ACTIVATION, COMBINE, GATE

#: Activations that have a slope (elu: its alpha).
SLOPED = ("leaky_relu", "elu")


class Function(NamedTuple):
    """A function of x and of w1, b1, w2, b2, ws, bs."""

    excitation: str  # "cse", "sse" or "scse"
    combine: str = "add"
    activation: str = "relu"
    slope: float | None = None
    gate: str = "sigmoid"
    residual: bool = False

    def __call__(self, x: Tensor, w1, b1, w2, b2, ws, bs, backend: str = "auto") -> Tensor:
        how = {"gate": self.gate, "residual": self.residual, "backend": backend}
        if self.excitation == "sse":
            return sse(x, ws, bs, **how)
        how |= {"activation": self.activation, "slope": self.slope}
        if self.excitation == "cse":
            return cse(x, w1, b1, w2, b2, **how)
        return scse(x, w1, b1, w2, b2, ws, bs, combine=self.combine, **how)

    @property
    def follows_batch_norm(self) -> bool:
        """Whether `after_batch_norm` can compute it."""
        hidden = self.excitation == "sse" or self.activation == "relu"
        return hidden and self.gate == "sigmoid" and not self.residual

    def after_batch_norm(self, u: Tensor, *tensors, **options) -> Tensor:
        """The same of relu(BatchNorm(u)); arguments as those of `bn_relu_scse`."""
        return bn_relu_scse(u, *tensors, combine=self.combine, **options)

    def __str__(self) -> str:
        parts = [self.excitation]
        if self.excitation == "scse":
            parts.append(self.combine)
        if self.residual:
            parts[-1] += " + x"
        if self.excitation != "sse" and self.activation != "relu":
            slope = "" if self.slope is None else f"({self.slope:g})"
            activation = "no activation" if self.activation == "none" else self.activation
            parts.append(activation + slope)
        if self.gate != "sigmoid":
            parts.append(self.gate)
        return ", ".join(parts)


def possible(excitation: str, slopes: dict[str, list[float]]) -> Iterator[Function]:
    """All functions of this excitation, the usual ones first. `slopes`: for the activations that
    have one."""
    activations = [
        (activation, slope)
        for activation in (ACTIVATION if excitation != "sse" else ("relu",))
        for slope in slopes.get(activation, [] if activation in SLOPED else [None])
    ]
    for gate in GATE:
        for activation, slope in activations:
            for combine in COMBINE if excitation == "scse" else ("add",):
                for residual in (False, True):
                    if not (residual and combine == "concat"):
                        yield Function(excitation, combine, activation, slope, gate, residual)
