"""Fused scSE (concurrent spatial and channel squeeze & excitation) for PyTorch."""

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

__version__ = "0.1.0"

__all__ = [
    "ChannelSELayer",
    "ChannelSELayer3D",
    "ChannelSpatialSELayer",
    "ChannelSpatialSELayer3D",
    "Report",
    "SCSEModule",
    "SpatialSELayer",
    "SpatialSELayer3D",
    "convert",
    "convert_state_dict",
    "cse",
    "revert",
    "scse",
    "sse",
]
