"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) as the articles of scSE compare it."""

from torch import nn

from .blocks import Network, Recalibrate, convolution


def u_net(classes: int, width: int, recalibrate: Recalibrate) -> Network:
    """Two convolutions to a block.

    Their size is not in the articles. With 5x5 the network has 2.2 million parameters, which is
    close to the 2.1 million that the TMI article states for it; with 3x3 it has 0.8 million.
    Bilinear interpolation, which has no parameters, enlarges the maps.
    """

    def block(channels: int) -> nn.Module:
        return nn.Sequential(convolution(channels, width), convolution(width, width))

    return Network(classes, width, recalibrate, block)
