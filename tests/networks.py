"""A small U-Net with scSE where segmentation_models.pytorch has it, for tests of what people do
with whole networks. It has no batch normalisation: so half a batch gives half the gradient."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scse_kernels
from scse_kernels.backends import why_not

needs_kernels = pytest.mark.skipif(
    why_not("cpu", torch.device("cpu")) is not None,
    reason="without the kernels this would be a test of torch's own operations",
)


def _convolution(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU())


class DecoderBlock(nn.Module):
    """Upsample, join the skip, and recalibrate before and after the convolution."""

    def __init__(self, channels_in: int, channels_skip: int, channels: int) -> None:
        super().__init__()
        joined = channels_in + channels_skip
        self.attention1 = scse_kernels.SCSEModule(joined, reduction=4)
        self.convolution = _convolution(joined, channels)
        self.attention2 = scse_kernels.SCSEModule(channels, reduction=4)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1)
        return self.attention2(self.convolution(self.attention1(x)))


class UNet(nn.Module):
    """Maps [N, 3, H, W] to [N, 2, H, W]; H and W are multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([_convolution(3, 8), _convolution(8, 12)])
        self.bottleneck = _convolution(12, 16)
        self.decoders = nn.ModuleList([DecoderBlock(16, 12, 12), DecoderBlock(12, 8, 8)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for encoder in self.encoders:
            skips.append(encoder(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottleneck(x)
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            x = decoder(x, skip)
        return self.head(x)


def unet() -> UNet:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return UNet()


def images(*shape: int, seed: int = 0) -> Tensor:
    """Random maps of `shape`; each sample's each channel has a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10 ** -torch.rand(*shape[:2], *(1 for _ in shape[2:]), generator=generator)
    return magnitude * torch.randn(shape, generator=generator)


def gradients(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of each parameter, of a loss on every element."""
    x = x.detach().clone().requires_grad_()
    parameters = dict(network.named_parameters())
    y = network(x)
    grads = torch.autograd.grad(y.float().square().sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(("x", *parameters), grads, strict=True))}
