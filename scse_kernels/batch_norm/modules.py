"""The nn.Module: a BatchNorm, a ReLU and a block of scSE, computed together."""

from torch import Tensor, nn

from ..children import hooked, untouched
from ..modules import (
    ChannelSELayer,
    ChannelSELayer3D,
    ChannelSpatialSELayer,
    ChannelSpatialSELayer3D,
    SCSEModule,
    SpatialSELayer,
    SpatialSELayer3D,
)
from .functional import bn_relu_scse

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: type of block -> where the squeezing, the exciting and the spatial layer are in its tree
_LAYERS = {
    SCSEModule: (4, 6, 8),
    ChannelSpatialSELayer: (3, 4, 5),
    ChannelSpatialSELayer3D: (3, 4, 5),
    ChannelSELayer: (1, 2, None),
    ChannelSELayer3D: (1, 2, None),
    SpatialSELayer: (None, None, 1),
    SpatialSELayer3D: (None, None, 1),
}


class BatchNormReLUSCSE(nn.Module):
    """``Sequential(batch_norm, ReLU(), block)`` as one operator, with the same state_dict.

    Args:
        batch_norm: torch.nn.BatchNorm1d, 2d or 3d, with any of its options.
        block: one of this package's modules: scSE, cSE or sSE.

    Shape: x [N, C, *S], as `batch_norm` takes it -> [N, C, *S]; [N, 2 * C, *S] for "concat".

    The children "0", "1" and "2" hold parameters and running statistics under a Sequential's keys,
    and each is used as it is set: a BatchNorm in eval mode inside of a model in training normalises
    by its running statistics. All are computed together. Where a child has hooks or was replaced
    (as convert_sync_batchnorm replaces "0"), they are called one after the other.

    Raises:
        TypeError: batch_norm or block is of another type.
        ValueError: they have different numbers of channels.
    """

    def __init__(self, batch_norm: nn.Module, block: nn.Module) -> None:
        super().__init__()
        if type(batch_norm) not in _NORMS:
            raise TypeError(
                "batch_norm must be a BatchNorm1d, BatchNorm2d or BatchNorm3d,"
                f" not {type(batch_norm).__name__}"
            )
        parts = _parts(block)
        if parts is None:
            raise TypeError(
                "block must be a module of scse_kernels with its own layers,"
                f" not {type(block).__name__}"
            )
        channels = next(p for p in (parts[4], parts[0]) if p is not None).shape[1]
        if channels != batch_norm.num_features:
            raise ValueError(
                f"block has {channels} channels, batch_norm {batch_norm.num_features};"
                " expected as many"
            )
        self.add_module("0", batch_norm)
        self.add_module("1", nn.ReLU())
        self.add_module("2", block)

    def forward(self, x: Tensor) -> Tensor:
        norm, relu, block = self._modules.values()
        parts = None if any(map(hooked, (norm, relu, block))) else _parts(block)
        if parts is None or type(norm) not in _NORMS or type(relu) is not nn.ReLU:
            return block(relu(norm(x)))
        norm._check_input_dim(x)
        *parameters, combine = parts
        return bn_relu_scse(
            x, norm.weight, norm.bias, *_statistics(norm), *parameters,
            **_options(norm), eps=norm.eps, combine=combine,
        )  # fmt: skip


def _statistics(norm):
    """The running statistics that a call uses or updates; (None, None) in training without
    tracking."""
    if norm.training and not norm.track_running_stats:
        return None, None
    return norm.running_mean, norm.running_var


def _options(norm):
    """training and momentum of a call. The call is counted, as torch.nn.BatchNorm does."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a plain average over all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    without = norm.running_mean is None and norm.running_var is None
    return {"training": norm.training or without, "momentum": momentum}


def _parts(block):
    """w1, b1, w2, b2, ws, bs and combine of a block; None if it isn't one of this package's, or
    must call its children."""
    if type(block) not in _LAYERS or not (below := untouched(block, block._tree)):
        return None
    layers = (None if at is None else below[at] for at in _LAYERS[type(block)])
    parameters = ((None, None) if m is None else (m.weight, m.bias) for m in layers)
    return *(p for pair in parameters for p in pair), getattr(block, "combine", "add")
