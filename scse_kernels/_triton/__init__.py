"""The Triton backend: kernels for CUDA devices (NVIDIA and AMD), and under Triton's interpreter for
CPU tensors. Importing this package does not import Triton; `launch` does."""

import os

import torch

#: The first and the last version of Triton with which all kernels were compiled and executed. They
#: come with torch 2.10 and 2.14. A newer one is used too.
OLDEST, NEWEST = (3, 6), (3, 8)


def version(text: str) -> tuple[int, int]:
    """(major, minor) of a version such as "3.6.0+git0d6f"."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def why_not(device: torch.device) -> str | None:
    """None if Triton kernels can run on tensors of `device`, else the reason. Imports Triton.

    torch.compile traces this function. So it makes only calls that a trace can evaluate.
    """
    if device.type not in ("cpu", "cuda"):
        return f"it runs on cuda tensors, got {device.type}"
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    if version(triton.__version__) < OLDEST:
        return f"Triton {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {triton.__version__}"
    # as Triton reads it, when it defines a kernel
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
        return None
    if device.type == "cpu":
        return "it runs on cpu tensors only under Triton's interpreter (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
        return "Triton needs a device of compute capability 8.0 or more"
    return None
