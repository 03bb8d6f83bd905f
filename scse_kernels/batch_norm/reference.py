"""The definition of BatchNorm + ReLU + scSE in plain PyTorch operations.

BatchNorm is that of Ioffe and Szegedy (arXiv:1502.03167). With u [N, C, S] and M = N * S values to
a channel, in training::

    ud = u - mean_c        rstd_c = 1 / sqrt(mean(ud^2) + eps)        scale_c = weight_c * rstd_c
    z  = relu(v)           v = scale_c * ud + bias_c                  y = scse(z)

How the kernels get by with two passes over u and dy backward. Let m be 1 where v > 0 and else 0;
k what dy gives z directly, the gates held fixed (for "add": dy * (channel_gate + spatial_gate));
dq the gradient before the spatial gate's sigmoid; and d_mean that of the pooled value, divided by
S. Then

    dv = m * (k + ws * dq + d_mean)

is the gradient at BatchNorm's output. BatchNorm's own backward wants two sums of it per channel,

    sum dv    = d bias               sum dv * ud = d weight / rstd

    du = scale * (dv - (sum dv) / M - ud * rstd^2 * (sum dv * ud) / M)

and d_mean is one number to a sample and channel, so it can be multiplied in after the sums over
positions: with g = m * (k + ws * dq),

    sum dv    = sum_n (sum_s g      + d_mean * sum_s m)
    sum dv ud = sum_n (sum_s g * ud + d_mean * sum_s m * ud)

All four sums over s are known once the channels of a position have been summed, so in the first
pass over u and dy, which scSE needs anyway; d_mean follows from that pass' other sums. The second
pass reads u and dy again and writes du. v and z are computed anew from u wherever they are used.

With running statistics (evaluation) mean and rstd are constants: the two terms in 1 / M fall away.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference import accumulation_dtype, out_of_autocast, scse


def bn_relu_scse(
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    eps: float,
    combine: str = "add",
) -> Tensor:
    """scse(relu(batch_norm(u))) of u [N, C, *S], with the statistics `mean` and `var` [C] or, where
    these are None, with those of u itself.

    Computes in float32 (float64 for float64 u), also between the three; returns u's dtype.
    """
    dtype = accumulation_dtype(u.dtype)
    with out_of_autocast(u):
        norm = (None if t is None else t.to(dtype) for t in (mean, var, bn_weight, bn_bias))
        z = F.relu(F.batch_norm(u.to(dtype), *norm, mean is None, 0.0, eps))
        return scse(z, w1, b1, w2, b2, ws, bs, combine).to(u.dtype)


def statistics(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of u's channels, [C] each, in the dtype of sums."""
    values = u.detach().to(accumulation_dtype(u.dtype))
    var, mean = torch.var_mean(values, (0, *range(2, u.dim())), correction=0)
    return mean, var


def move(
    u: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float
) -> None:
    """Move the running statistics towards those of u, as torch.nn.functional.batch_norm does.

    Neither has a gradient. (A no_grad region would be a program of its own in an exported one.)
    """
    values = u.numel() // u.shape[1]
    for running, batch in ((running_mean, mean), (running_var, var * (values / (values - 1)))):
        if running.dtype == batch.dtype:
            running.lerp_(batch, momentum)
        else:
            running.copy_(running.to(batch.dtype).lerp(batch, momentum))
