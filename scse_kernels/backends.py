"""Which backend a call gets, and why not another."""

import torch
from torch import Tensor, compiler
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad

from . import _native
from .ops import BACKENDS


def choose(function: str, backend: str, x: Tensor, among: tuple[str, ...] = BACKENDS) -> str:
    """The backend that `function` computes with for x: a named one is used or raises, "auto" is
    the fastest. "operations" stands for the reference's ordinary operations, as they are. `among`:
    those that have kernels for the function.

    Raises:
        ValueError: backend is unknown.
        RuntimeError: it can't be used for x, or not here.
    """
    if taken_apart_by := _taken_apart_by():
        if backend not in ("auto", "eager"):
            raise RuntimeError(
                f"{function}(): {taken_apart_by} needs ordinary operations, which backend 'auto'"
                f" and 'eager' give it, got backend '{backend}'"
            )
        return "operations"
    if backend == "auto":
        return _fastest(x.device, x.dtype, among)
    if backend not in ("eager", *BACKENDS):
        names = ", ".join(map(repr, ("auto", "eager", *BACKENDS)))
        raise ValueError(f"{function}(): backend must be one of {names}, got {backend!r}")
    reason = why_not(backend, x.device, x.dtype)
    if backend not in ("eager", *among):
        reason = f"it has no kernels for {function}"
    if reason:
        raise RuntimeError(f"{function}(): backend '{backend}' is not available: {reason}")
    return backend


def why_not(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None if `backend` (any but "auto") can run tensors on `device`, else the reason.

    With a `dtype`, of tensors of that dtype: one of the four that the functions take.
    """
    if backend == "eager":
        return None
    if backend == "triton":
        from . import _triton  # not with the package: only who asks for Triton pays for it

        return _triton.why_not(device)
    if backend == "cuda":
        return _why_not_cuda(device, dtype)
    if device.type != "cpu":
        return f"it runs on cpu tensors, got {device.type}"
    return _native.why_not("_C")


def _why_not_cuda(device, dtype):
    if reason := _native.why_not("_C_cuda"):
        return reason
    if not torch.cuda.is_available():
        return "built, no device: torch finds no CUDA device"
    if device.type != "cuda":
        return f"it runs on cuda tensors, got {device.type}"
    if torch.cuda.get_device_properties(device).major < 8:
        return "it needs a device of compute capability 8.0 or more"
    if dtype == torch.float64:
        return "it has no kernels for float64"
    return None


def _fastest(device, dtype, among):
    """What "auto" takes. Estimates from launches and passes over the map; no GPU was timed.

    `cuda` before `triton`: as many passes in the same number of launches, but each takes a few
    microseconds of host time instead of tens, and small maps are launch-bound. Where a sample fits
    on chip, `cuda` passes over the map fewer times still (it chooses by itself, see
    csrc/cuda/ops.cpp). `triton` has float64 and AMD devices, and needs nothing to be built.
    """
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        if backend in among and why_not(backend, device, dtype) is None:
            return backend
    return "eager"


def _taken_apart_by() -> str | None:
    """The tool, if one is at work, that makes something of its own of the call's operations.

    A recorded program of ordinary operations runs where this package is not (C++, ONNX) and can be
    trained; an operator in it would have no gradient. Transforms know rules for ordinary operations
    only.
    """
    # Not is_exporting(), which older versions of torch.compile take to be always true.
    if compiler._is_exporting_flag:
        return "torch.export"
    if _get_tracing_state():
        return "torch.jit.trace"
    if _are_functorch_transforms_active():
        return "torch.func"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad"
    return None
