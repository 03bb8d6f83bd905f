"""bn_relu_scse: validation of the arguments, and the running statistics."""

import torch
from torch import Tensor, compiler

from .. import backends
from ..functional import (
    _check_channel,
    _check_name,
    _check_parameter,
    _check_spatial,
    _check_x,
    tracing,
)
from ..ops import COMBINE, memory_format, once_differentiable
from . import ops, reference
from .autograd import BNReLUSCSE

_NAME = "bn_relu_scse"


def bn_relu_scse(
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    combine: str = "add",
    backend: str = "auto",
) -> Tensor:
    """BatchNorm (arXiv:1502.03167), ReLU and scSE (arXiv:1803.02579) of u, in one operator.

    ::

        z = relu(batch_norm(u, running_mean, running_var, bn_weight, bn_bias,
                            training, momentum, eps))
        y = scse(z, w1, b1, w2, b2, ws, bs, combine=combine)

    z is never stored: the backward computes it again from u.

    Args:
        u: feature map [N, C, *S] with one to three spatial axes, such as a convolution's output;
            float32, float64, float16 or bfloat16, any strides. Sums are formed in float32 (float64
            for float64).
        bn_weight, bn_bias: BatchNorm's, [C] (None: 1 and 0).
        running_mean, running_var: its running statistics, [C]. In training each call moves them
            towards those of u, in place; they may be None. Else they are used as they are.
        w1, b1, w2, b2: the channel excitation, as in :func:`scse` (w1 and w2 None: sSE alone).
        ws, bs: the spatial one, as in :func:`scse` (None: cSE alone).
        training: normalise by the statistics of u, as torch.nn.functional.batch_norm does.
        momentum: the share of u's statistics in the new running ones; the variance that joins them
            is the unbiased one.
        eps: is added to the variance.
        combine, backend: as in :func:`scse`; "cuda" has no kernels for this, and "auto" takes
            "triton" for CUDA tensors.

    Parameters and running statistics may have any of the four dtypes; each gradient has the dtype
    of its tensor.

    Returns:
        y [N, C, *S] ([N, 2 * C, *S] for "concat") in u's dtype, channels_last where u is and
        contiguous otherwise.

    Raises:
        TypeError: an argument is not a tensor or has no real floating-point dtype.
        ValueError: shapes don't fit together; combine or backend is unknown; both branches are
            missing; statistics are missing where they are needed; one value to a channel in
            training.
        RuntimeError: tensors are on several devices, or the named backend can't be used.
    """
    _check_name(_NAME, "combine", combine, COMBINE)
    if not tracing():
        _check_x(_NAME, u, "u")
        _check_batch_norm(u, bn_weight, bn_bias, running_mean, running_var, training)
        if w1 is None and ws is None:
            raise ValueError(f"{_NAME}(): w1 and ws are both None, expected at least one branch")
        if w1 is not None:
            _check_channel(_NAME, u, w1, b1, w2, b2)
        if ws is not None:
            _check_spatial(_NAME, u, ws, bs)
    if w1 is None:
        b1 = w2 = b2 = None
    if ws is None:
        bs = None
    norm, parameters = (u, bn_weight, bn_bias), (w1, b1, w2, b2, ws, bs)
    used = (None, None) if training else (running_mean, running_var)
    # As with torch's: an empty batch leaves the running statistics alone.
    tracked = training and running_mean is not None and u.numel() > 0

    moving = (running_mean, running_var, momentum) if tracked else None
    backend = backends.choose(_NAME, backend, u, ops.BACKENDS)
    if backend in ("operations", "eager"):
        if tracked:
            reference.move(u, *reference.statistics(u), *moving)
        if backend == "eager" and not training:  # both may change before the backward reads them
            used = (running_mean.clone(), running_var.clone())
        y = reference.bn_relu_scse(*norm, *used, *parameters, eps, combine)
        return y.contiguous(memory_format=memory_format(u)) if backend == "eager" else y
    if torch.is_grad_enabled() and not compiler.is_dynamo_compiling():
        # The statistics move while this runs. Afterwards would be too late: torch.utils.checkpoint
        # may end a recomputation by an exception, as soon as the saved tensors are packed.
        return BNReLUSCSE.apply(*norm, *parameters, *used, eps, combine, backend, moving)[0]
    if torch.is_grad_enabled():
        inputs = once_differentiable(*norm, *parameters)
        y, *statistics = BNReLUSCSE.apply(*inputs, *used, eps, combine, backend)
        if tracked:
            reference.move(u, *statistics, *moving)
        return y
    arguments = (*norm, *used, *parameters, eps, COMBINE[combine])
    return ops.forward(backend, arguments, moving)[0]


def _check_batch_norm(u, bn_weight, bn_bias, running_mean, running_var, training):
    channels = (u.shape[1],)
    for argument, value in (
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if value is not None:
            _check_parameter(_NAME, u, argument, value, channels, "[C]", "u")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{_NAME}(): running_mean and running_var must both be given or both None")
    if not training and running_mean is None:
        raise ValueError(f"{_NAME}(): running_mean and running_var are needed unless training")
    if training and u.numel() == u.shape[1]:
        raise ValueError(
            f"{_NAME}(): expected more than 1 value per channel when training,"
            f" got u of shape {list(u.shape)}"
        )
