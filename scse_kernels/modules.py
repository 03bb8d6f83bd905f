"""The nn.Modules: parameters and repr. What they compute is in functional.py.

All take device and dtype of their parameters as torch's own layers do, by default torch's defaults.
"""

import torch
from torch import Tensor, nn

from .functional import COMBINE, cse, few_shot_sse, scse, sse
from .literals import Combine, Device


def _hidden_channels(num_channels: int, reduction: int, argument: str) -> int:
    if num_channels < 1:
        raise ValueError(f"num_channels must be at least 1, got {num_channels}")
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

    def __init__(
        self,
        num_channels: int,
        reduction_ratio: int = 2,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden_channels(num_channels, reduction_ratio, "reduction_ratio")
        self.num_channels, self.reduction_ratio = num_channels, reduction_ratio
        self.fc1 = nn.Linear(num_channels, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return cse(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)

    def extra_repr(self) -> str:
        return f"num_channels={self.num_channels}, reduction_ratio={self.reduction_ratio}"


class SpatialSELayer(nn.Module):
    """sSE: channel squeeze and spatial excitation (arXiv:1803.02579).

    Args:
        num_channels: C.

    Shape: x [N, C, *S] with one to three spatial axes -> [N, C, *S].
    """

    _conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d

    def __init__(
        self,
        num_channels: int,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = self._conv(num_channels, 1, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Recalibrate x by position.

        `weights` replaces the layer's own squeeze, as in few-shot segmentation by squeeze & excite
        (arXiv:1902.01314): of any shape with C elements per entry of axis 0, it is averaged over
        that axis and used without bias. Gradients flow to it.
        """
        if weights is None:
            return sse(x, self.conv.weight, self.conv.bias)
        return few_shot_sse(x, weights)


class ChannelSpatialSELayer(nn.Module):
    """scSE: concurrent spatial and channel squeeze & excitation (arXiv:1803.02579, 1808.08127).

    Args:
        num_channels: C.
        reduction_ratio: r; the channel excitation has C // r hidden channels.
        combine: "add" (MICCAI 2018), "max", "mul" or "concat" (TMI 2019).

    Shape: x [N, C, *S] with one to three spatial axes -> [N, C, *S]; [N, 2 * C, *S] for "concat".

    Both branches are computed together, so forward hooks of the children don't fire.
    """

    _layers: tuple[type[ChannelSELayer], type[SpatialSELayer]] = (ChannelSELayer, SpatialSELayer)

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
        channel, conv = self.cSE, self.sSE.conv
        fc1, fc2 = channel.fc1, channel.fc2
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


class ChannelSELayer3D(ChannelSELayer):
    """:class:`ChannelSELayer` under the name that volumetric networks use; the same keys."""


class SpatialSELayer3D(SpatialSELayer):
    """:class:`SpatialSELayer` with the weight of a 1x1x1 convolution, [1, C, 1, 1, 1]."""

    _conv = nn.Conv3d


class ChannelSpatialSELayer3D(ChannelSpatialSELayer):
    """:class:`ChannelSpatialSELayer` for volumes; by default the maximum, as ai-med's and
    pytorch-3dunet's layers of this name."""

    _layers = (ChannelSELayer3D, SpatialSELayer3D)

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
    computed together, so forward hooks of the children don't fire.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: int = 16,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden_channels(in_channels, reduction, "reduction")
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
        _, fc1, _, fc2, _ = self.cSE  # an index would take longer
        conv, _ = self.sSE
        return scse(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)
