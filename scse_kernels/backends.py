"""Which backend a call gets, and why not another."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor, compiler
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad

from . import _build_info, _native
from .literals import Backend
from .ops import BACKENDS

#: What "auto" tries on each type of device, in this order. CUDA C++ comes before Triton: its calls
#: take a fraction of the host's time (docs/performance.md), and the first one compiles nothing.
AUTO = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}


def _known(said_by: str, backend: str) -> str:
    if backend not in get_args(Backend):
        names = ", ".join(map(repr, get_args(Backend)))
        raise ValueError(f"{said_by} must be one of {names}, got {backend!r}")
    return backend


# The choice for calls that name no backend, and where it comes from. These are globals of the
# process, as in torch.backends, and not of a thread: backward passes run in threads of their own,
# and torch.compile guards on globals.
_chosen = _known("SCSE_BACKEND", os.environ.get("SCSE_BACKEND") or "auto")
_chosen_by = " (from SCSE_BACKEND)" if os.environ.get("SCSE_BACKEND") else ""


def set_backend(backend: Backend) -> None:
    """Choose who computes where a call doesn't say it: in the layers, in converted blocks, and in
    the functions with their default backend="auto". An argument of a call overrides this choice,
    and this choice overrides the environment variable SCSE_BACKEND.

    As in the functions, a named backend is used or the call raises; "auto" is the fastest.

    There is one setting for the process and all its threads. A call that runs elsewhere at the same
    time may use the old choice or the new one. A backward uses the backend of its forward.
    torch.compile compiles anew for another choice.

    Raises:
        ValueError: backend is unknown.
    """
    global _chosen, _chosen_by
    _chosen = _known("set_backend(): backend", backend)
    _chosen_by = " (from set_backend())"


@contextlib.contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """:func:`set_backend` for the time of a with block. Afterwards the earlier choice holds again.

    It holds for all threads too, so blocks of several threads must not overlap. What
    torch.utils.checkpoint computes again in the backward uses the choice that holds then.
    """
    global _chosen, _chosen_by
    before = _chosen, _chosen_by
    _chosen = _known("use_backend(): backend", backend)
    _chosen_by = " (from use_backend())"
    try:
        yield
    finally:
        _chosen, _chosen_by = before


def chosen() -> str | None:
    """The backend for calls that name none, and where that comes from; None if it is "auto"."""
    return None if _chosen == "auto" else f"'{_chosen}'{_chosen_by}"


def choose(function: str, backend: str, x: Tensor, among: tuple[str, ...] = BACKENDS) -> str:
    """The backend that `function` computes with for x. A named one is used or raises. "auto" is the
    one that was chosen for such calls, else the fastest. The result "operations" stands for the
    reference's ordinary operations. `among`: the backends that have kernels for the function.

    Raises:
        ValueError: backend is unknown.
        RuntimeError: it can't be used for x, or not here.
    """
    chosen_by = ""
    if backend == "auto":
        backend, chosen_by = _chosen, _chosen_by
    if tool := taken_apart_by():
        if backend not in ("auto", "eager"):
            raise RuntimeError(
                f"{function}(): {tool} needs ordinary operations, which backend 'auto'"
                f" and 'eager' give it, got backend '{backend}'{chosen_by}"
            )
        return "operations"
    if backend == "auto":
        return _fastest(x.device, x.dtype, among)
    if backend not in ("eager", *BACKENDS):
        _known(f"{function}(): backend", backend)
    reason = why_not(backend, x.device, x.dtype)
    if backend not in ("eager", *among):
        reason = f"it has no kernels for {function}"
    if reason:
        raise RuntimeError(
            f"{function}(): backend '{backend}'{chosen_by} is not available: {reason}"
        )
    return backend


#: (backend, device, dtype) -> the reason or None. What can run here doesn't change in a process.
_KNOWN: dict[tuple, str | None] = {}


def why_not(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """None if `backend` (any but "auto") can run tensors on `device`, else the reason.

    `dtype`: of the tensors, one of the four that the functions take. torch.compile does not trace
    this function; it calls it while tracing.
    """
    try:
        return _KNOWN[backend, device, dtype]
    except KeyError:
        reason = _find_out(backend, device, dtype)
        # A device without index is the current one, which may change.
        if device.type == "cpu" or device.index is not None:
            _KNOWN[backend, device, dtype] = reason
        return reason


# What torch.compiler.assume_constant_result would do; that imports all of torch._dynamo.
why_not._dynamo_marked_constant = True


def _find_out(backend, device, dtype):
    if backend == "eager":
        return None
    if backend == "triton":
        from . import _triton  # imported here: only who asks for Triton pays for it

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
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return "it needs a device of compute capability 8.0 or more"
    if dtype == torch.float64:
        return "it has no kernels for float64"
    described = f"{properties.name}, of compute capability {properties.major}.{properties.minor}"
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        code = torch.ops.scse_kernels.cuda_architecture(index)
    except RuntimeError as error:  # the driver's
        return f"its kernels don't load on {described}: {error}"
    return None if code else f"it was built without code for {described}"


def _fastest(device, dtype, among=BACKENDS):
    """What "auto" takes: the first of AUTO that can be used and is `among` these."""
    for backend in AUTO.get(device.type, ()):
        if backend in among and why_not(backend, device, dtype) is None:
            return backend
    if device.type in AUTO and device.type not in _warned and not compiler.is_compiling():
        _warned.add(device.type)
        warnings.warn(missing_kernels(device, dtype), RuntimeWarning, stacklevel=2)
    return "eager"


#: The types of devices for which the warning was given.
_warned: set[str] = set()


def missing_kernels(
    device: torch.device | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """None if "auto" has kernels for tensors on `device` (and of `dtype`). Else one line that says
    why not, and what mends it. Without a device: for a GPU if there is one, else for the CPU."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {b: why_not(b, device, dtype) for b in AUTO.get(device.type, ())}
    if None in reasons.values():
        return None
    told = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items()) or "no backend"
    return (
        f"scse_kernels has no kernels for {device.type} tensors here and computes them by PyTorch's"
        f" eager operations ({told}). `python -m scse_kernels` says more;"
        f" `{_build_info.mending_command()}` installs it anew."
    )


def taken_apart_by() -> str | None:
    """The tool, if one is at work, that records or transforms the call's operations.

    Such a tool gets ordinary operations. A program recorded of them runs where this package is not
    (C++, ONNX) and can be trained, while an operator of ours would have no gradient there. And
    transforms have rules for ordinary operations only.
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
