"""The recalibration blocks as people have them, in plain PyTorch. `convert` finds them."""

import torch
from torch import Tensor, nn

PATTERNS = ("none", "cSE", "sSE", "scSE")
_REDUCTION = 2


class ChannelGate(nn.Module):
    """cSE: x recalibrated by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // _REDUCTION)
        self.fc2 = nn.Linear(channels // _REDUCTION, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class SpatialGate(nn.Module):
    """sSE: x recalibrated by position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class BothGates(nn.Module):
    """scSE: the sum of both, as in the MICCAI article."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cSE, self.sSE = ChannelGate(channels), SpatialGate(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.cSE(x) + self.sSE(x)


def recalibration(pattern: str, channels: int) -> nn.Module:
    """The block of one of PATTERNS for [N, channels, H, W]."""
    if pattern == "none":
        return nn.Identity()
    return {"cSE": ChannelGate, "sSE": SpatialGate, "scSE": BothGates}[pattern](channels)
