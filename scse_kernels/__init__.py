"""Fused scSE (concurrent spatial and channel squeeze & excitation) for PyTorch."""

from . import _torch_version  # noqa: F401
from .backends import set_backend, use_backend
from .batch_norm import BatchNormReLUSCSE, bn_relu_scse
from .convert import Report, convert, revert
from .convert.checkpoints import convert_state_dict
from .functional import cse, scse, sse
from .modules import (
    ChannelSELayer,
    ChannelSELayer3D,
    ChannelSpatialSELayer,
    ChannelSpatialSELayer3D,
    SCSEModule,
    SpatialSELayer,
    SpatialSELayer3D,
)

__version__ = "0.2.0"

__all__ = [
    "BatchNormReLUSCSE",
    "ChannelSELayer",
    "ChannelSELayer3D",
    "ChannelSpatialSELayer",
    "ChannelSpatialSELayer3D",
    "Report",
    "SCSEModule",
    "SpatialSELayer",
    "SpatialSELayer3D",
    "bn_relu_scse",
    "convert",
    "convert_state_dict",
    "cse",
    "revert",
    "scse",
    "set_backend",
    "sse",
    "use_backend",
]
