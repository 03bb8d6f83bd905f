"""Host-side helpers: bf16 bit patterns and uninitialised arrays."""

from dataclasses import dataclass, field

import numpy as np

from .memory import empty  # noqa: F401
from .numerics import bf16_to_f32, f32_to_bf16


class BF16Array(np.ndarray):
    """uint16 bit patterns that Triton launches should treat as bfloat16."""

    gpulab_bf16 = True


def as_bf16(bits):
    """Mark an existing uint16 array as bfloat16 bit patterns (no copy)."""
    return np.asarray(bits, np.uint16).view(BF16Array)


def float_to_bf16(x):
    """float array -> bfloat16 bit patterns, round to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    return f32_to_bf16(x).reshape(x.shape).view(BF16Array)


def bf16_to_float(bits):
    """bfloat16 bit patterns -> float32."""
    return bf16_to_f32(np.asarray(bits).view(np.ndarray).astype(np.uint16))


@dataclass(frozen=True)
class Struct:
    """A parameter by its bytes; at the offsets in ``pointers`` lie pointers to those arrays."""

    raw: bytes
    pointers: dict = field(default_factory=dict)
