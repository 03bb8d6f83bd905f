"""scse, cse and sse: validation of the arguments."""

import math

import torch
from torch import Tensor, compiler
from torch._C import _get_tracing_state

from . import backends, reference
from .autograd import SCSE
from .literals import Activation, Backend, Combine, Gate
from .ops import (
    ACTIVATION,
    COMBINE,
    GATE,
    codes,
    forward,
    memory_format,
    once_differentiable,
)

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: The activations that have a slope, and which one where it isn't given.
_SLOPES = {"leaky_relu": 0.01, "elu": 1.0}


def scse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ws: Tensor,
    bs: Tensor | None,
    *,
    combine: Combine = "add",
    activation: Activation = "relu",
    slope: float | None = None,
    gate: Gate = "sigmoid",
    residual: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Concurrent spatial and channel squeeze & excitation (arXiv:1803.02579, arXiv:1808.08127).

    ::

        channel_gate = gate(activation(mean_s(x) @ w1.T + b1) @ w2.T + b2)
        spatial_gate = gate(sum_c ws[c] * x[:, c] + bs)
        y = combine(x * channel_gate, x * spatial_gate)  # + x, where residual

    Args:
        x: feature map [N, C, *S] with one to three spatial axes; float32, float64, float16 or
            bfloat16, any strides. Sums are formed in float32 (float64 for float64).
        w1, b1: squeezing layer, [Cr, C] and [Cr] (None: no bias).
        w2, b2: exciting layer, [C, Cr] and [C] (None: no bias).
        ws, bs: channel squeeze, [C] or [1, C], and one element (None: no bias).
        combine: "add", "max", "mul" or "concat".
        activation: of the hidden layer: "relu" as in the articles, "leaky_relu", "silu", "gelu"
            (exact), "gelu_tanh" (its approximation), "elu" or "none".
        slope: leaky_relu's negative slope (None: 0.01) or elu's alpha (None: 1.0). The other
            activations have none.
        gate: what closes both branches: "sigmoid" as in the articles or "hard_sigmoid",
            relu6(v + 3) / 6 as in MobileNetV3 (arXiv:1905.02244).
        residual: whether x is added: y = scSE(x) + x. That takes no further pass, and one rounding
            to x's dtype. Not for "concat", which has twice x's channels.
        backend: "auto", "eager", "cpu", "cuda" or "triton". A named backend is used or raises.
            "auto" takes the fastest one for x's device; under torch.export, torch.jit.trace,
            torch.func and forward-mode differentiation, which need ordinary operations, it takes
            "eager". "cuda" has no kernels for float64.

    Weights may have trailing axes of size one, as those of 1x1 convolutions do. They may have any
    of the four dtypes. Each gradient has the dtype of its tensor.

    Returns:
        y [N, C, *S] ([N, 2 * C, *S] for "concat") in x's dtype, channels_last where x is, dense or
        not, and contiguous otherwise.

    Raises:
        TypeError: an argument is not a tensor or has no real floating-point dtype, or residual is
            no bool.
        ValueError: shapes don't fit together, combine, activation, gate or backend is unknown,
            slope is given to an activation that has none, or residual to "concat".
        RuntimeError: tensors are on several devices, or the named backend can't be used.
    """
    _check_name("scse", "combine", combine, COMBINE)
    excitation = _check_excitation("scse", activation, slope, gate)
    _check_residual("scse", residual, combine)
    _check_tensors("scse", x, (w1, b1, w2, b2), (ws, bs))
    return _dispatch("scse", x, w1, b1, w2, b2, ws, bs, combine, excitation, residual, backend)


def cse(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: Activation = "relu",
    slope: float | None = None,
    gate: Gate = "sigmoid",
    residual: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Spatial squeeze and channel excitation alone (cSE): x * channel_gate, + x where residual.

    Arguments, dtypes and errors as in :func:`scse`; returns [N, C, *S].
    """
    excitation = _check_excitation("cse", activation, slope, gate)
    _check_residual("cse", residual)
    _check_tensors("cse", x, (w1, b1, w2, b2), None)
    return _dispatch("cse", x, w1, b1, w2, b2, None, None, "add", excitation, residual, backend)


def sse(
    x: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    *,
    gate: Gate = "sigmoid",
    residual: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Channel squeeze and spatial excitation alone (sSE): x * spatial_gate, + x where residual.

    Arguments, dtypes and errors as in :func:`scse`; returns [N, C, *S].
    """
    excitation = _check_excitation("sse", "relu", None, gate)
    _check_residual("sse", residual)
    _check_tensors("sse", x, None, (ws, bs))
    none = (None,) * 4
    return _dispatch("sse", x, *none, ws, bs, "add", excitation, residual, backend)


def few_shot_sse(x: Tensor, weights: Tensor) -> Tensor:
    """sSE with the mean over axis 0 of `weights` [K, C, ...] for ws, and no bias."""
    if not tracing():
        _check_x("sse", x)
        _check_weights(x, weights)
    return sse(x, weights.mean(0).flatten(), None)


def _dispatch(name, x, w1, b1, w2, b2, ws, bs, combine, excitation, residual, backend):
    backend = backends.choose(name, backend, x)
    if backend in ("operations", "eager"):
        y = reference.scse(x, w1, b1, w2, b2, ws, bs, combine, *excitation, residual=residual)
        return y if backend == "operations" else y.contiguous(memory_format=memory_format(x))
    if torch.is_grad_enabled():
        if compiler.is_dynamo_compiling():
            x, w1, b1, w2, b2, ws, bs = once_differentiable(x, w1, b1, w2, b2, ws, bs)
        return SCSE.apply(x, w1, b1, w2, b2, ws, bs, combine, excitation, residual, backend)
    return forward(backend, x, w1, b1, w2, b2, ws, bs, *codes(combine, excitation, residual))[0]


def tracing() -> bool:
    """Whether torch.jit.trace is at work. Then sizes are tensors, and comparing them warns: nothing
    is checked."""
    return _get_tracing_state() is not None


def _check_tensors(function, x, channel, spatial):
    """x, and the parameters of each branch (None: the function has none)."""
    if tracing():
        return
    _check_x(function, x)
    if channel is not None:
        _check_channel(function, x, *channel)
    if spatial is not None:
        _check_spatial(function, x, *spatial)


def _check_name(function, argument, value, known):
    if value not in known:
        names = ", ".join(repr(k) for k in known)
        raise ValueError(f"{function}(): {argument} must be one of {names}, got {value!r}")


def _check_excitation(function, activation, slope, gate):
    """(activation, slope, gate), or () for the usual ones."""
    if activation == "relu" and gate == "sigmoid" and slope is None:
        return ()
    _check_name(function, "activation", activation, ACTIVATION)
    _check_name(function, "gate", gate, GATE)
    if activation not in _SLOPES:
        if slope is not None:
            raise ValueError(f"{function}(): activation {activation!r} has no slope, got {slope!r}")
        slope = 0.0
    elif slope is None:
        slope = _SLOPES[activation]
    elif isinstance(slope, bool) or not isinstance(slope, (int, float)):
        raise TypeError(f"{function}(): slope must be a float, not {type(slope).__name__}")
    return activation, float(slope), gate


def _check_residual(function, residual, combine="add"):
    if residual is False:
        return
    if residual is not True:
        raise TypeError(f"{function}(): residual must be a bool, not {type(residual).__name__}")
    if combine == "concat":
        raise ValueError(
            f"{function}(): residual must be False for combine 'concat', which has twice x's"
            " channels"
        )


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


def _check_x(function, x, name="x"):
    _check_tensor(function, name, x)
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{function}(): {name} must be a dense, strided tensor, got {kind}")
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{function}(): {name} must be [N, C, *S] with one to three spatial axes,"
            f" got {x.dim()} axes: {tuple(x.shape)}"
        )
    if x.shape[1] < 1 or 0 in x.shape[2:]:
        raise ValueError(
            f"{function}(): {name} must have at least one channel and no spatial axis of size zero,"
            f" got {tuple(x.shape)}"
        )


def _check_parameter(function, x, argument, value, expected, described, name="x"):
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
        _check_tensor(function, argument, value)
    if value.device != x.device:
        raise RuntimeError(
            f"{function}(): expected all tensors on one device,"
            f" got {name} on {x.device} and {argument} on {value.device}"
        )
    shape = value.shape
    if shape != expected and (
        shape[: len(expected)] != expected or shape.numel() != math.prod(expected)
    ):
        raise ValueError(
            f"{function}(): {_other_channels(argument, shape, expected)}{argument} must have shape"
            f" {described} = {list(expected)}, got {list(shape)}"
        )


def _other_channels(argument, shape, expected):
    """Names the reason where the parameter is right, but for an x with other channels."""
    axis = len(expected) - 1
    if argument not in ("w1", "ws") or len(shape) <= axis or shape[:axis] != expected[:axis]:
        return ""
    return f"x has {expected[axis]} channels, this layer is for {shape[axis]}: "


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
