"""The fully convolutional DenseNet (Jegou et al. 2017, arXiv:1611.09326)."""

import torch
from torch import Tensor, nn

from .blocks import Network, Recalibrate, convolution


class DenseBlock(nn.Module):
    """Two 5x5 convolutions, each of which sees all maps before it, and a 1x1 one that brings all
    of them back to `width` channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(convolution(channels + i * width, width) for i in range(2))
        self.transition = convolution(channels + 2 * width, width, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.transition(x)


def dense_net(classes: int, width: int, recalibrate: Recalibrate) -> Network:
    """A dense block in the place of each of U-Net's blocks.

    The articles of scSE give neither the number of layers nor how maps are enlarged: two layers, as
    the blocks of these authors' QuickNAT have (arXiv:1801.04161), and bilinear interpolation.
    """

    def block(channels: int) -> nn.Module:
        return DenseBlock(channels, width)

    return Network(classes, width, recalibrate, block)
