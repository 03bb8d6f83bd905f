"""Fused scSE (concurrent spatial and channel squeeze & excitation) for PyTorch."""

from .batch_norm import BatchNormReLUSCSE, bn_relu_scse
from .checkpoints import convert_state_dict
from .convert import Report, convert, revert
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

__version__ = "0.1.0"

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
    "sse",
]
