"""gpulab: run and measure compiled CUDA kernels (PTX) on a CPU."""

from .arrays import Struct, as_bf16, bf16_to_float, empty, float_to_bf16
from .caches import L2Cache
from .counters import Report
from .devices import A100, B200, H100, PRESETS, RTX4090, Device
from .errors import (
    AsyncError,
    Deadlock,
    GlobalRace,
    GpuLabError,
    KernelFault,
    MisalignedAccess,
    OutOfBounds,
    OverlapError,
    PtxSyntaxError,
    SharedRace,
    Trap,
    UninitialisedRead,
    UnsupportedInstruction,
)
from .interception import intercept
from .module import Module
from .nvcc import nvcc_ptx
from .resources import Resources, resources
from .summary import summary, summary_text
from .triton_front import triton_compile, triton_launch

__all__ = [
    "A100",
    "B200",
    "H100",
    "PRESETS",
    "RTX4090",
    "AsyncError",
    "Deadlock",
    "Device",
    "GlobalRace",
    "GpuLabError",
    "KernelFault",
    "L2Cache",
    "MisalignedAccess",
    "Module",
    "OutOfBounds",
    "OverlapError",
    "PtxSyntaxError",
    "Report",
    "Resources",
    "SharedRace",
    "Struct",
    "Trap",
    "UninitialisedRead",
    "UnsupportedInstruction",
    "as_bf16",
    "bf16_to_float",
    "empty",
    "float_to_bf16",
    "intercept",
    "nvcc_ptx",
    "resources",
    "summary",
    "summary_text",
    "triton_compile",
    "triton_launch",
]
