"""The nn.Modules: parameters and repr. What they compute is in functional.py.

A layer takes its children's parameters and computes with the fused kernels. Where a child was
replaced or has hooks (see children.py), the layer calls its children, as an eager one does.

All take device and dtype of their parameters as torch's own layers do, by default torch's defaults.
"""

import torch
from torch import Tensor, nn

from .children import Tree, untouched
from .functional import COMBINE, cse, few_shot_sse, scse, sse
from .literals import Combine, Device


def _check_int(argument: str, value: int) -> None:
    if not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be an int, not {type(value).__name__}")


def _check_channels(argument: str, value: int) -> None:
    _check_int(argument, value)
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")


def _hidden_channels(num_channels: int, reduction: int, channels: str, argument: str) -> int:
    _check_channels(channels, num_channels)
    _check_int(argument, reduction)
    if reduction < 1 or num_channels // reduction < 1:
        raise ValueError(
            f"{argument} must be between 1 and the number of channels ({num_channels}), so that a"
            f" hidden channel is left, got {reduction}"
        )
    return num_channels // reduction


class ChannelSELayer(nn.Module):
    """cSE: spatial squeeze and channel excitation (arXiv:1709.01507; as cSE arXiv:1803.02579).

    Args:
        num_channels: C.
        reduction_ratio: r; the excitation has C // r hidden channels.

    Shape: x [N, C, *S] with one to three spatial axes -> [N, C, *S].
    """

    _tree: Tree = ((0, (("fc1", nn.Linear), ("fc2", nn.Linear))),)

    def __init__(
        self,
        num_channels: int,
        reduction_ratio: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden_channels(num_channels, reduction_ratio, "num_channels", "reduction_ratio")
        self.num_channels, self.reduction_ratio = num_channels, reduction_ratio
        self.fc1 = nn.Linear(num_channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not (below := untouched(self, self._tree)):
            return x * self._gate(x)
        _, fc1, fc2 = below
        return cse(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def _gate(self, x: Tensor) -> Tensor:
        """The channel gate [N, C, 1, ...], by calling the children."""
        axes = tuple(range(2, x.dim()))
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(axes)))))
        return gate.reshape(gate.shape + (1,) * len(axes))

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}, reduction_ratio={self.reduction_ratio}"


class SpatialSELayer(nn.Module):
    """sSE: channel squeeze and spatial excitation (arXiv:1803.02579).

    Args:
        num_channels: C.

    Shape: x [N, C, *S] with one to three spatial axes -> [N, C, *S].
    """

    _conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d
    _tree: Tree = ((0, (("conv", nn.Conv2d),)),)

    def __init__(
        self,
        num_channels: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_channels("num_channels", num_channels)
        self.conv = self._conv(num_channels, 1, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Recalibrate x by position.

        `weights` replaces the layer's own squeeze, as in few-shot segmentation by squeeze & excite
        (arXiv:1902.01314): of any shape with C elements per entry of axis 0, it is averaged over
        that axis and used without bias. Gradients flow to it.
        """
        if weights is not None:
            return few_shot_sse(x, weights)
        if not (below := untouched(self, self._tree)):
            axes = 3 if issubclass(self._conv, nn.Conv3d) else 2
            return _for_axes(axes, x, lambda x: x * torch.sigmoid(self.conv(x)))
        _, conv = below
        return sse(x, conv.weight, conv.bias)


def _for_axes(axes: int, x: Tensor, function) -> Tensor:
    """function(x) of x [N, C, *S] with any number of spatial axes, where the function takes `axes`
    of them."""
    if x.dim() == 2 + axes:
        return function(x)
    flat = x.reshape(*x.shape[:2], -1, *(1,) * (axes - 1))
    return function(flat).reshape(x.shape)


class ChannelSpatialSELayer(nn.Module):
    """scSE: concurrent spatial and channel squeeze & excitation (arXiv:1803.02579, 1808.08127).

    Args:
        num_channels: C.
        reduction_ratio: r; the channel excitation has C // r hidden channels.
        combine: "add" (MICCAI 2018), "max", "mul" or "concat" (TMI 2019).

    Shape: x [N, C, *S] with one to three spatial axes -> [N, C, *S]; [N, 2 * C, *S] for "concat".

    Both branches are computed together, unless a module below has hooks or was replaced.
    """

    _layers: tuple[type[ChannelSELayer], type[SpatialSELayer]] = (ChannelSELayer, SpatialSELayer)
    _tree: Tree = (
        (0, (("cSE", ChannelSELayer), ("sSE", SpatialSELayer))),
        (1, ChannelSELayer._tree[0][1]),
        (2, SpatialSELayer._tree[0][1]),
    )

    def __init__(
        self,
        num_channels: int,
        reduction_ratio: int = 2,
        combine: Combine = "add",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if combine not in COMBINE:
            names = ", ".join(map(repr, COMBINE))
            raise ValueError(f"combine must be one of {names}, got {combine!r}")
        channel_layer, spatial_layer = self._layers
        self.cSE = channel_layer(num_channels, reduction_ratio, device, dtype)
        self.sSE = spatial_layer(num_channels, device, dtype)
        self.combine: Combine = combine

    def forward(self, x: Tensor) -> Tensor:
        if not (below := untouched(self, self._tree)):
            return _combined(self.combine, self.cSE(x), self.sSE(x))
        _, _, _, fc1, fc2, conv = below
        return scse(
            x,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            conv.weight,
            conv.bias,
            combine=self.combine,
        )

    def extra_repr(self) -> str:
        return f"combine={self.combine!r}"


def _combined(combine: str, by_channel: Tensor, by_position: Tensor) -> Tensor:
    if combine == "add":
        return by_channel + by_position
    if combine == "max":
        return torch.maximum(by_channel, by_position)
    if combine == "mul":
        return by_channel * by_position
    return torch.cat([by_channel, by_position], 1)


class ChannelSELayer3D(ChannelSELayer):
    """:class:`ChannelSELayer` under the name that volumetric networks use; the same keys."""


class SpatialSELayer3D(SpatialSELayer):
    """:class:`SpatialSELayer` with the weight of a 1x1x1 convolution, [1, C, 1, 1, 1]."""

    _conv = nn.Conv3d
    _tree: Tree = ((0, (("conv", nn.Conv3d),)),)


class ChannelSpatialSELayer3D(ChannelSpatialSELayer):
    """:class:`ChannelSpatialSELayer` for volumes; by default the maximum, as ai-med's and
    pytorch-3dunet's layers of this name."""

    _layers = (ChannelSELayer3D, SpatialSELayer3D)
    _tree: Tree = (
        (0, (("cSE", ChannelSELayer3D), ("sSE", SpatialSELayer3D))),
        (1, ChannelSELayer3D._tree[0][1]),
        (2, SpatialSELayer3D._tree[0][1]),
    )

    def __init__(
        self,
        num_channels: int,
        reduction_ratio: int = 2,
        combine: Combine = "max",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, reduction_ratio, combine, device, dtype)


class SCSEModule(nn.Module):
    """scSE with the parameters, keys and aggregation of segmentation_models.pytorch's `SCSEModule`.

    Args:
        in_channels: C.
        reduction: r; the channel excitation has C // r hidden channels.

    Shape: x [N, C, *S] with one to three spatial axes -> [N, C, *S], the sum of both branches.

    `cSE` and `sSE` hold the parameters under the keys `cSE.1`, `cSE.3` and `sSE.0`; both are
    computed together, unless a module below has hooks or was replaced.
    """

    _tree: Tree = (
        (0, (("cSE", nn.Sequential), ("sSE", nn.Sequential))),
        (
            1,
            (
                ("0", nn.AdaptiveAvgPool2d),
                ("1", nn.Conv2d),
                ("2", nn.ReLU),
                ("3", nn.Conv2d),
                ("4", nn.Sigmoid),
            ),
        ),
        (2, (("0", nn.Conv2d), ("1", nn.Sigmoid))),
    )

    def __init__(
        self,
        in_channels: int,
        reduction: int = 16,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden_channels(in_channels, reduction, "in_channels", "reduction")
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, hidden, 1, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, in_channels, 1, device=device, dtype=dtype),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(
            nn.Conv2d(in_channels, 1, 1, device=device, dtype=dtype), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        if not (below := untouched(self, self._tree)):
            return _for_axes(2, x, lambda x: x * self.cSE(x) + x * self.sSE(x))
        _, _, _, _, fc1, _, fc2, _, conv, _ = below
        return scse(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)
