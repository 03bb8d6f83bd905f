"""What is computed: one shape, type, layout, reduction and combine, with its inputs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: The shapes of a U-Net's levels, a large image, a channel count of no power of two, a volume.
SHAPES = (
    (8, 256, 16, 16),
    (8, 128, 32, 32),
    (8, 64, 64, 64),
    (8, 32, 128, 128),
    (4, 16, 256, 256),
    (8, 384, 32, 32),
    (1, 32, 48, 48, 48),
)
LAYOUTS = ("contiguous", "channels_last")


class Inputs(NamedTuple):
    """x [N, C, *S], a leaf that requires a gradient; dy as y; w1, b1, w2, b2, ws, bs, after
    BatchNorm's weight and bias where the block has one."""

    x: Tensor
    dy: Tensor
    parameters: list[Tensor]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    reduction: int
    combine: str
    device: torch.device
    block: str = "scse"

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        block = () if self.block == "scse" else (self.block,)
        names = (*block, self.shape_name, self.dtype_name, self.layout)
        return " ".join((*names, self.combine, f"reduction {self.reduction}"))

    @property
    def x_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def y_bytes(self) -> int:
        return self.x_bytes * (2 if self.combine == "concat" else 1)

    def least_bytes(self, backward: bool) -> int:
        """The bytes that any kernel must move. Forward reads x and writes y; backward reads x and
        dy and writes dx. Parameters and gates are negligible beside them."""
        forward = self.x_bytes + self.y_bytes
        return forward + (2 * self.x_bytes + self.y_bytes if backward else 0)

    def inputs(self) -> Inputs:
        """Random inputs, the same for every provider.

        x and dy have means away from zero. So the terms of a parameter's gradient don't cancel, and
        a relative tolerance means something.
        """
        channels, hidden = self.shape[1], self.shape[1] // self.reduction
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        shape_of_y = (self.shape[0], self.y_bytes // self.x_bytes * channels, *self.shape[2:])
        # A sum over a large map would overflow float16. (A loss that is a mean has such gradients.)
        half = self.dtype == torch.float16
        small = min(1.0, 2**15 / torch.Size(self.shape).numel()) if half else 1.0
        x = self.place(normal(*self.shape) + 0.5)
        dy = self.place((normal(*shape_of_y) + 0.5) * small)
        parameters = [
            normal(hidden, channels) / channels**0.5,
            normal(hidden).abs() + 1,  # few hidden channels, or the only one, should not be dead
            normal(channels, hidden) / hidden**0.5,
            normal(channels),
            normal(channels) / channels**0.5,
            normal(1),
        ]
        if self.block == "bn_relu_scse":
            parameters = [normal(channels) / 4 + 1, normal(channels) / 4, *parameters]
        return Inputs(x.requires_grad_(), dy, [p.to(self.device, self.dtype) for p in parameters])

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, in the dtype and the layout."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        channels_last = self.layout == "channels_last"
        memory_format = formats[tensor.dim()] if channels_last else torch.contiguous_format
        return tensor.to(self.device, self.dtype).contiguous(memory_format=memory_format)
