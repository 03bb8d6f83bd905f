"""SD-Net (Roy et al. 2017, arXiv:1705.00938): skip connections and unpooling by indices."""

from torch import nn

from .blocks import Network, Recalibrate, convolution


def sd_net(classes: int, width: int, recalibrate: Recalibrate) -> Network:
    """One convolution to a block, 7x3 as in the article of SD-Net.

    The decoder puts each value back to where the encoder's pooling found the maximum, beside the
    skip connection.
    """

    def block(channels: int) -> nn.Module:
        return convolution(channels, width, (7, 3))

    return Network(classes, width, recalibrate, block, by_indices=True)
