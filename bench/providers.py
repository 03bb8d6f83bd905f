"""The providers: the modules that people have today, what torch.compile makes of them, and ours.

Every module has its parameters in the order w1, b1, w2, b2, ws, bs, after those of BatchNorm where
the block has one, so that `load` can give all of them the same values.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from scse_kernels import (
    ChannelSpatialSELayer,
    ChannelSpatialSELayer3D,
    backends,
    batch_norm,
    bn_relu_scse,
    functional,
)
from scse_kernels.ops import BACKENDS

#: x.clone(): what copying x costs; the bandwidth that the others are measured by.
CLONE = "clone"
COMPETITORS = ("eager", "compile", "rewritten", "unfused")
COMPILED = ("compile", "rewritten")
#: What is timed -> the backends that have kernels for it.
BLOCKS = {"scse": BACKENDS, "bn_relu_scse": batch_norm.ops.BACKENDS}

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOL = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class EagerConvolutions(nn.Module):
    """scSE as segmentation_models.pytorch has it: 1x1 convolutions throughout."""

    def __init__(self, channels: int, reduction: int, combine: str, axes: int) -> None:
        super().__init__()
        conv, hidden = _CONV[axes], channels // reduction
        self.cSE = nn.Sequential(
            _POOL[axes](1),
            conv(channels, hidden, 1),
            nn.ReLU(inplace=True),
            conv(hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(conv(channels, 1, 1), nn.Sigmoid())
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        if self.combine == "add":
            return x * self.cSE(x) + x * self.sSE(x)
        if self.combine == "mul":
            return (x * self.cSE(x)) * (x * self.sSE(x))
        return torch.cat([x * self.cSE(x), x * self.sSE(x)], 1)


class EagerLinear(nn.Module):
    """scSE as ai-med's squeeze_and_excitation has it: linear layers, the maximum of both."""

    def __init__(self, channels: int, reduction: int, axes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)
        self.conv = _CONV[axes](channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.reshape(*x.shape[:2], -1).mean(2)
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(pooled))))
        by_channel = x * gate.view(gate.shape + (1,) * (x.dim() - 2))
        by_position = x * torch.sigmoid(self.conv(x))
        return torch.max(by_channel, by_position)


class Rewritten(nn.Module):
    """The same mathematics in the form that Inductor fuses best: sums instead of convolutions and
    pooling, the gates combined before they meet x.

    The maximum chooses the gate by x's sign. `torch.maximum` of the two products compiles to as
    many passes (three forward, five backward) and was no faster; this form has fewer operations in
    each, since its backward needn't share out ties. (It gives all of a tie at x = 0 to one side.)
    """

    def __init__(self, channels: int, reduction: int, combine: str, axes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)
        self.conv = _CONV[axes](channels, 1, 1)  # only holds the parameters
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.flatten(2).mean(2)))))
        channel_gate = gate.view(gate.shape + (1,) * (x.dim() - 2))
        squeezed = (x * self.conv.weight[0]).sum(1, keepdim=True)
        spatial_gate = torch.sigmoid(squeezed + self.conv.bias)
        if self.combine == "add":
            return x * (channel_gate + spatial_gate)
        if self.combine == "max":
            larger = (x >= 0) == (channel_gate >= spatial_gate)
            return x * torch.where(larger, channel_gate, spatial_gate)
        if self.combine == "mul":
            return x * x * (channel_gate * spatial_gate)
        return torch.cat([x * channel_gate, x * spatial_gate], 1)


def _through(backend: str, channels: int, reduction: int, combine: str, axes: int) -> nn.Module:
    """This package's module, held to one backend."""
    base = ChannelSpatialSELayer3D if axes == 3 else ChannelSpatialSELayer

    class Layer(base):
        def forward(self, x: Tensor) -> Tensor:
            fc1, fc2, conv = self.cSE.fc1, self.cSE.fc2, self.sSE.conv
            parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)
            return functional.scse(x, *parameters, combine=self.combine, backend=backend)

    return Layer(channels, reduction, combine)


def _norm_through(
    backend: str, channels: int, reduction: int, combine: str, axes: int
) -> nn.Module:
    """BatchNorm, ReLU and this package's module as one operator, held to one backend."""

    class Layer(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            norm, block = self
            fc1, fc2, conv = block.cSE.fc1, block.cSE.fc2, block.sSE.conv
            return bn_relu_scse(
                *(x, norm.weight, norm.bias, norm.running_mean, norm.running_var),
                *(fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias),
                training=True,
                combine=combine,
                backend=backend,
            )

    return Layer(_NORM[axes](channels), ChannelSpatialSELayer(channels, reduction, combine))


def competitors(block: str) -> tuple[str, ...]:
    """Who computes the block today. unfused: torch's BatchNorm and ReLU, then this package."""
    return COMPETITORS if block == "bn_relu_scse" else COMPETITORS[:-1]


def usable(device: torch.device, block: str = "scse") -> list[str]:
    """The backends of this package that can run on `device`, apart from the eager reference."""
    return [name for name in BLOCKS[block] if backends.why_not(name, device) is None]


def missing(device: torch.device) -> dict[str, str]:
    """The backends that can't run on `device`, each with the reason."""
    reasons = {name: backends.why_not(name, device) for name in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def fused(
    device: torch.device, asked: str, is_asked: bool = False, block: str = "scse"
) -> list[str]:
    """The providers whose speed is shown: the usable backends. Where there are none it is
    `reference`, this package's eager operations, but only if it `is_asked` for, by the option
    `asked`: its figures under this package's name would mislead."""
    if here := usable(device, block):
        return here
    if is_asked:
        return ["reference"]
    reason = backends.missing_kernels(device)
    raise SystemExit(f"There are no kernels to time. {reason}\n{asked} times its eager operations.")


def build(
    name: str, channels: int, reduction: int, combine: str, axes: int, block: str = "scse"
) -> nn.Module:
    """The provider's module for feature maps of `axes` spatial axes; not compiled yet."""
    if block == "bn_relu_scse":
        if name not in COMPETITORS:
            backend = "eager" if name == "reference" else name
            return _norm_through(backend, channels, reduction, combine, axes)
        name = "auto" if name == "unfused" else name
        follows = build(name, channels, reduction, combine, axes)
        return nn.Sequential(_NORM[axes](channels), nn.ReLU(), follows)
    if name in ("eager", "compile"):
        if combine == "max":
            return EagerLinear(channels, reduction, axes)
        return EagerConvolutions(channels, reduction, combine, axes)
    if name == "rewritten":
        return Rewritten(channels, reduction, combine, axes)
    return _through("eager" if name == "reference" else name, channels, reduction, combine, axes)


def compiled(name: str, module: nn.Module) -> nn.Module:
    """The module as its provider runs it. Compilation happens at its first call."""
    return torch.compile(module, dynamic=False) if name in COMPILED else module


def load(module: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Copy w1, b1, w2, b2, ws, bs into the module, whatever shapes it keeps them in."""
    with torch.no_grad():
        for own, value in zip(module.parameters(), parameters, strict=True):
            own.copy_(value.view_as(own))
