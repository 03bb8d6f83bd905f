"""A 2-D U-Net with a recalibration block after every encoder and decoder block."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: The encoder halves the resolution this often.
LEVELS = 3


def _convolutions(channels_in: int, channels: int) -> nn.Sequential:
    layers = []
    for c in (channels_in, channels):
        layers += [nn.Conv2d(c, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Maps [N, 1, H, W] to logits [N, classes, H, W]; H and W are multiples of 2 ** LEVELS.

    Args:
        classes: channels of the output.
        width: channels at full resolution; they double with each halving of it.
        recalibration: makes a block for a number of channels.
    """

    def __init__(self, classes: int, width: int, recalibration: Callable[[int], nn.Module]) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(LEVELS)]
        self.encoders = nn.ModuleList(
            nn.Sequential(_convolutions(c_in, c), recalibration(c))
            for c_in, c in zip([1, *sizes], sizes, strict=False)
        )
        self.bottleneck = _convolutions(sizes[-1], 2 * sizes[-1])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in sizes)
        self.decoders = nn.ModuleList(
            nn.Sequential(_convolutions(2 * c, c), recalibration(c)) for c in sizes
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for up, decoder, skip in reversed(list(zip(self.ups, self.decoders, skips, strict=True))):
            x = decoder(torch.cat([skip, up(x)], 1))
        return self.head(x)

    def recalibrations(self) -> list[nn.Module]:
        """The recalibration blocks, in the encoder's and then the decoder's order."""
        return [block[1] for block in (*self.encoders, *self.decoders)]
