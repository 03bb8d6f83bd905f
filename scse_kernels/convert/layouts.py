"""Where the libraries keep the parameters of their squeeze & excitation blocks.

The table that checkpoints are mapped by. `convert` finds blocks by their shapes instead.
"""

from typing import NamedTuple

from torch import nn

from .shapes import Unfit


class Layout(NamedTuple):
    """Paths, below the block, of its layers; None where a block lacks that branch."""

    used_by: str
    squeezing: str | None  # w1, b1
    exciting: str | None  # w2, b2
    spatial: str | None  # ws, bs


#: A block may hold several of these. It is the first of them, so the longest come first.
LAYOUTS = (
    Layout("the article, ai-med, pytorch-3dunet: scSE", "cSE.fc1", "cSE.fc2", "sSE.conv"),
    Layout("segmentation_models.pytorch: SCSEModule", "cSE.1", "cSE.3", "sSE.0"),
    Layout("cSE of ai-med and pytorch-3dunet, torchvision, timm: SEModule", "fc1", "fc2", None),
    Layout("MONAI: ChannelSELayer", "fc.0", "fc.2", None),
    Layout("timm: SqueezeExcite of its EfficientNets", "conv_reduce", "conv_expand", None),
    Layout("sSE of ai-med and pytorch-3dunet", None, None, "conv"),
)


def find(block: nn.Module) -> Layout | None:
    """The layout whose layers `block` has, of whatever kind they are."""
    paths = {path for path, module in block.named_modules() if module is not None}
    for layout in LAYOUTS:
        if all(path is None or path in paths for path in layout[1:]):
            return layout
    return None


def check_shapes(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise `Unfit` unless the weights' shapes, by path, are w1 [Cr, C], w2 [C, Cr], ws [1, C],
    with trailing axes of size one."""
    flat = {path: tuple(shape[:2]) for path, shape in shapes.items()}
    for path, shape in shapes.items():
        if len(shape) < 2 or any(size != 1 for size in shape[2:]):
            raise Unfit(f"{path}.weight is not that of a 1x1 convolution: {list(shape)}")
    if layout.spatial is not None:
        outputs, channels = flat[layout.spatial]
        if outputs != 1:
            raise Unfit(
                f"{layout.spatial} has {outputs} output channels where a spatial gate has one"
                + (
                    " (segmentation_models.pytorch 0.0.2 gated each channel at each position)"
                    if outputs == channels
                    else ""
                )
            )
    if layout.squeezing is not None:
        squeezing, exciting = flat[layout.squeezing], flat[layout.exciting]
        if squeezing != exciting[::-1]:
            raise Unfit(
                f"{layout.exciting} [{exciting[0]}, {exciting[1]}] doesn't lead back from"
                f" {layout.squeezing} [{squeezing[0]}, {squeezing[1]}]"
            )
