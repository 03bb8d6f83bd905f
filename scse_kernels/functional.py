"""scse, cse and sse: validation of the arguments and choice of the backend."""

import math

import torch
from torch import Tensor, compiler
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad

from . import _native, reference
from .autograd import SCSE
from .ops import BACKENDS, COMBINE, FORWARD, memory_format

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def scse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ws: Tensor,
    bs: Tensor | None,
    *,
    combine: str = "add",
    backend: str = "auto",
) -> Tensor:
    """Concurrent spatial and channel squeeze & excitation (arXiv:1803.02579, arXiv:1808.08127).

    ::

        channel_gate = sigmoid(relu(mean_s(x) @ w1.T + b1) @ w2.T + b2)
        spatial_gate = sigmoid(sum_c ws[c] * x[:, c] + bs)
        y = combine(x * channel_gate, x * spatial_gate)

    Args:
        x: feature map [N, C, *S] with one to three spatial axes; float32, float64, float16 or
            bfloat16, any strides. Sums are formed in float32 (float64 for float64).
        w1, b1: squeezing layer, [Cr, C] and [Cr] (None: no bias).
        w2, b2: exciting layer, [C, Cr] and [C] (None: no bias).
        ws, bs: channel squeeze, [C] or [1, C], and one element (None: no bias).
        combine: "add", "max", "mul" or "concat".
        backend: "auto", "eager", "cpu", "cuda" or "triton". A named backend is used or raises;
            "auto" takes the fastest one for x's device, and "eager" under torch.export,
            torch.jit.trace, torch.func and forward-mode differentiation, which need ordinary
            operations. "cuda" has no kernels for float64.

    Weights may have trailing axes of size one, as those of 1x1 convolutions do, and any of the
    four dtypes; each gradient has the dtype of its tensor.

    Returns:
        y [N, C, *S] ([N, 2 * C, *S] for "concat") in x's dtype, channels_last where x is and
        contiguous otherwise.

    Raises:
        TypeError: an argument is not a tensor or has no real floating-point dtype.
        ValueError: shapes don't fit together, or combine or backend is unknown.
        RuntimeError: tensors are on several devices, or the named backend can't be used.
    """
    _check_name("scse", "combine", combine, COMBINE)
    if not _get_tracing_state():  # sizes are tensors there, and comparing them warns
        _check_x("scse", x)
        _check_channel("scse", x, w1, b1, w2, b2)
        _check_spatial("scse", x, ws, bs)
    return _dispatch("scse", x, w1, b1, w2, b2, ws, bs, combine, backend)


def cse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Spatial squeeze and channel excitation alone (cSE): x * channel_gate.

    Arguments, dtypes and errors as in :func:`scse`; returns [N, C, *S].
    """
    if not _get_tracing_state():
        _check_x("cse", x)
        _check_channel("cse", x, w1, b1, w2, b2)
    return _dispatch("cse", x, w1, b1, w2, b2, None, None, "add", backend)


def sse(x: Tensor, ws: Tensor, bs: Tensor | None, *, backend: str = "auto") -> Tensor:
    """Channel squeeze and spatial excitation alone (sSE): x * spatial_gate.

    Arguments, dtypes and errors as in :func:`scse`; returns [N, C, *S].
    """
    if not _get_tracing_state():
        _check_x("sse", x)
        _check_spatial("sse", x, ws, bs)
    return _dispatch("sse", x, None, None, None, None, ws, bs, "add", backend)


def few_shot_sse(x: Tensor, weights: Tensor) -> Tensor:
    """sSE with the mean over axis 0 of `weights` [K, C, ...] for ws, and no bias."""
    if not _get_tracing_state():
        _check_x("sse", x)
        _check_weights(x, weights)
    return sse(x, weights.mean(0).flatten(), None)


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


def _fastest(device, dtype):
    """What "auto" takes. Estimates from launches and passes over the map; no GPU was timed.

    `cuda` before `triton`: as many passes in the same number of launches, but each takes a few
    microseconds of host time instead of tens, and small maps are launch-bound. Where a sample fits
    on chip, `cuda` passes over the map fewer times still (it chooses by itself, see
    csrc/cuda/ops.cpp). `triton` has float64 and AMD devices, and needs nothing to be built.
    """
    for backend in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        if why_not(backend, device, dtype) is None:
            return backend
    return "eager"


def _dispatch(name, x, w1, b1, w2, b2, ws, bs, combine, backend):
    if taken_apart_by := _taken_apart_by():
        if backend not in ("auto", "eager"):
            raise RuntimeError(
                f"{name}(): {taken_apart_by} needs ordinary operations, which backend 'auto' and"
                f" 'eager' give it, got backend '{backend}'"
            )
        return reference.scse(x, w1, b1, w2, b2, ws, bs, combine)
    if backend == "auto":
        backend = _fastest(x.device, x.dtype)
    else:
        _check_name(name, "backend", backend, ("auto", "eager", *BACKENDS))
        if reason := why_not(backend, x.device, x.dtype):
            raise RuntimeError(f"{name}(): backend '{backend}' is not available: {reason}")
    if backend == "eager":
        return reference.scse(x, w1, b1, w2, b2, ws, bs, combine).contiguous(
            memory_format=memory_format(x)
        )
    if torch.is_grad_enabled():
        return SCSE.apply(x, w1, b1, w2, b2, ws, bs, combine, backend)
    return FORWARD[backend](x, w1, b1, w2, b2, ws, bs, COMBINE[combine])[0]


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


def _check_name(function, argument, value, known):
    if value not in known:
        names = ", ".join(repr(k) for k in known)
        raise ValueError(f"{function}(): {argument} must be one of {names}, got {value!r}")


def _check_tensor(function, argument, value):
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{argument}' must be Tensor, not {type(value).__name__}"
        )
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{function}(): argument '{argument}' must be float32, float64, float16 or bfloat16,"
            f" got {value.dtype}"
        )


def _check_x(function, x):
    _check_tensor(function, "x", x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{function}(): x must be [N, C, *S] with one to three spatial axes,"
            f" got {x.dim()} axes: {tuple(x.shape)}"
        )
    if x.shape[1] < 1 or 0 in x.shape[2:]:
        raise ValueError(
            f"{function}(): x must have at least one channel and no spatial axis of size zero,"
            f" got {tuple(x.shape)}"
        )


def _check_parameter(function, x, argument, value, expected, described):
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
        _check_tensor(function, argument, value)
    if value.device != x.device:
        raise RuntimeError(
            f"{function}(): expected all tensors on one device,"
            f" got x on {x.device} and {argument} on {value.device}"
        )
    shape = value.shape
    if shape != expected and (
        shape[: len(expected)] != expected or shape.numel() != math.prod(expected)
    ):
        raise ValueError(
            f"{function}(): {argument} must have shape {described} = {list(expected)},"
            f" got {list(shape)}"
        )


def _check_weights(x, weights):
    _check_tensor("sse", "weights", weights)
    if weights.dim() < 2 or weights[:1].numel() != x.shape[1]:
        raise ValueError(
            f"sse(): weights must have {x.shape[1]} elements (x's channels) per entry of axis 0,"
            f" got shape {list(weights.shape)}"
        )


def _check_channel(function, x, w1, b1, w2, b2):
    channels = x.shape[1]
    if not isinstance(w1, Tensor) or not w1.dim() or not (hidden := w1.shape[0]):
        _check_tensor(function, "w1", w1)
        raise ValueError(
            f"{function}(): w1 must have shape [hidden, C] with at least one hidden channel,"
            f" got {list(w1.shape)}"
        )
    _check_parameter(function, x, "w1", w1, (hidden, channels), "[hidden, C]")
    _check_parameter(function, x, "w2", w2, (channels, hidden), "[C, hidden]")
    if b1 is not None:
        _check_parameter(function, x, "b1", b1, (hidden,), "[hidden]")
    if b2 is not None:
        _check_parameter(function, x, "b2", b2, (channels,), "[C]")


def _check_spatial(function, x, ws, bs):
    channels = x.shape[1]
    if isinstance(ws, Tensor) and ws.dim() == 1:
        _check_parameter(function, x, "ws", ws, (channels,), "[C]")
    else:
        _check_parameter(function, x, "ws", ws, (1, channels), "[1, C]")
    if bs is not None:
        scalar = isinstance(bs, Tensor) and not bs.dim()
        _check_parameter(function, x, "bs", bs, () if scalar else (1,), "[1]")
