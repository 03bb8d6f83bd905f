"""What the three networks share: an encoder that halves the map four times, and a decoder."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

BLOCKS = 4

Recalibrate = Callable[[int], nn.Module]


def convolution(channels_in: int, channels: int, size: tuple[int, int] = (5, 5)) -> nn.Sequential:
    """Convolution of the same resolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, size, padding=(size[0] // 2, size[1] // 2)),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Network(nn.Module):
    """Maps [N, 1, H, W] to logits [N, classes, H, W]; H and W are multiples of 2 ** BLOCKS.

    Args:
        classes, width: channels of the logits, and between the blocks.
        recalibrate: makes what follows an encoder or decoder block, for a number of channels.
        block: makes an encoder, bottleneck or decoder block [N, in, ...] -> [N, width, ...], from
            its number of input channels.
        by_indices: whether the decoder puts each value back to where the maximum was found
            (unpooling); otherwise it interpolates.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        recalibrate: Recalibrate,
        block: Callable[[int], nn.Module],
        by_indices: bool = False,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(block(width if i else 1) for i in range(BLOCKS))
        self.bottleneck = block(width)
        self.decoders = nn.ModuleList(block(2 * width) for _ in range(BLOCKS))
        self.recalibrations = nn.ModuleList(recalibrate(width) for _ in range(2 * BLOCKS))
        self.classifier = nn.Conv2d(width, classes, 1)
        self.by_indices = by_indices

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for encoder, recalibrate in zip(self.encoders, self.recalibrations, strict=False):
            skip = recalibrate(encoder(x))
            x, indices = nn.functional.max_pool2d(skip, 2, return_indices=True)
            skips.append((skip, indices))
        x = self.bottleneck(x)
        for decoder, recalibrate in zip(self.decoders, self.recalibrations[BLOCKS:], strict=True):
            skip, indices = skips.pop()
            x = recalibrate(decoder(torch.cat([skip, self._enlarged(x, indices)], 1)))
        return self.classifier(x)

    def _enlarged(self, x: Tensor, indices: Tensor) -> Tensor:
        if self.by_indices:
            return nn.functional.max_unpool2d(x, indices, 2)
        return nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
