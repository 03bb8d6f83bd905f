"""The three networks that the articles put squeeze & excitation into, each with four patterns.

As Roy et al. (MICCAI 2018, arXiv:1803.02579; TMI 2019, arXiv:1808.08127) describe them for their
comparison: four encoder blocks, a bottleneck, four decoder blocks, a classifier; `width` (64)
channels throughout; after every encoder and decoder block one recalibration of the chosen pattern,
with reduction ratio 2. What the articles leave open is said where it is decided.
"""

from torch import nn

from .blocks import Network
from .dense import dense_net
from .recalibration import PATTERNS, recalibration
from .sd_net import sd_net
from .u_net import u_net

NETWORKS = {"U-Net": u_net, "SD-Net": sd_net, "DenseNet": dense_net}

#: H and W of an image are multiples of this.
MULTIPLE = 16


def build(network: str, pattern: str, classes: int, width: int = 64) -> Network:
    """One of NETWORKS with one of PATTERNS: maps [N, 1, H, W] to logits [N, classes, H, W]."""

    def recalibrate(channels: int) -> nn.Module:
        return recalibration(pattern, channels)

    return NETWORKS[network](classes, width, recalibrate)


__all__ = ["MULTIPLE", "NETWORKS", "PATTERNS", "Network", "build"]
