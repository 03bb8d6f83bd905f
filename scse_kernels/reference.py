"""The definition of scSE in plain PyTorch operations; every backend is held to it.

Roy, Navab, Wachinger: "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional
Networks" (MICCAI 2018, arXiv:1803.02579) defines cSE, sSE and their sum; the extended article (TMI
2019, arXiv:1808.08127) adds the maximum, the product and the concatenation. Imports torch only.

No backend leaves its gradients to autograd. They are derived here, once for all. For one sample
x[c, s], with m for the pooled value, a() for the activation and gate() for what closes a branch:

    m[c] = mean_s x[c, s]           h = W1 m + b1        e = W2 a(h) + b2       g = gate(e)
    q[s] = sum_c ws[c] x[c, s] + bs                                             p = gate(q)

    add     y = x g + x p           by_g = dy x          by_p = dy x       direct = dy (g + p)
    mul     y = (x g) (x p)         by_g = dy x x p      by_p = dy x x g   direct = 2 dy x g p
    max     y = max(x g, x p)       by_g = dy x where x g is the larger, by_p = dy x where x p is,
                                    half of it each where they are equal; direct = dy g or dy p
    concat  y = [x g, x p]          by_g = dy1 x         by_p = dy2 x      direct = dy1 g + dy2 p

    de[c] = gate'(e[c]) sum_s by_g[c, s]     dh = a'(h) * (W2^T de)     dm = W1^T dh / S
    dq[s] = gate'(q[s]) sum_c by_p[c, s]
    dx[c, s] = direct[c, s] + dm[c] + ws[c] dq[s]

With `residual`, y has x added and dx has dy; no other gradient changes.

Summed over the samples dW2 = de a(h)^T, db2 = de, dW1 = dh m^T, db1 = dh,
dws[c] = sum_s dq[s] x[c, s], dbs = sum_s dq[s].

So one pass over x and dy gives all sums (*reduce*), the two small layers follow, and a second pass
gives dx (*apply*). The second pass needs x again only where `direct` does. In the kernels m is
called pooled, g channel_gate and p spatial_gate; de is d_excited, dh d_hidden and dm d_mean.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: name -> function of (the hidden layer before it, the slope that some have)
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda v, slope: torch.relu(v),
    "leaky_relu": F.leaky_relu,
    "silu": lambda v, slope: F.silu(v),
    "gelu": lambda v, slope: F.gelu(v),
    "gelu_tanh": lambda v, slope: F.gelu(v, approximate="tanh"),
    "elu": F.elu,
    "none": lambda v, slope: v,
}

#: name -> function of what a gate is formed from
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    # not F.hardsigmoid, which has no second derivative
    "hard_sigmoid": lambda v: F.relu6(v + 3) / 6,
}


def channel_gate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "relu",
    slope: float = 0.0,
    gate: str = "sigmoid",
) -> Tensor:
    """Spatial squeeze and channel excitation (cSE) of x [N, C, *S]: gates in [0, 1], [N, C]."""
    pooled = x.mean(tuple(range(2, x.dim())))
    hidden = ACTIVATIONS[activation](F.linear(pooled, w1, b1), slope)
    return GATES[gate](F.linear(hidden, w2, b2))


def spatial_gate(x: Tensor, ws: Tensor, bs: Tensor | None, gate: str = "sigmoid") -> Tensor:
    """Channel squeeze and spatial excitation (sSE) of x [N, C, *S]: gates in [0, 1], [N, 1, *S]."""
    # Not a convolution: its weight gradient is summed in one long chain, which rounds more.
    squeezed = (x * ws.reshape(-1, *(1,) * (x.dim() - 2))).sum(1, keepdim=True)
    return GATES[gate](squeezed if bs is None else squeezed + bs)


def scse(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    ws: Tensor | None,
    bs: Tensor | None,
    combine: str = "add",
    activation: str = "relu",
    slope: float = 0.0,
    gate: str = "sigmoid",
    residual: bool = False,
) -> Tensor:
    """Recalibrate x [N, C, *S] by both gates; without `w1` by the spatial one alone, without `ws`
    by the channel one alone.

    w1 [Cr, C], w2 [C, Cr], ws [C] or [1, C], with trailing axes of size one allowed. `activation`
    is the hidden layer's (slope: leaky_relu's negative one, elu's alpha), `gate` closes both
    branches, `residual` adds x (not for combine="concat"). Computes in float32 (float64 for float64
    x) whatever the dtypes of x and of the parameters. Returns x's dtype, [N, C, *S];
    [N, 2 * C, *S] for combine="concat".
    """
    with out_of_autocast(x):
        return _scse(x, w1, b1, w2, b2, ws, bs, combine, activation, slope, gate, residual)


def out_of_autocast(x: Tensor) -> AbstractContextManager:
    """A context without autocast on x's device: it would round what is computed in float32."""
    device = x.device.type
    # Only where autocast is on: an exported program would keep the region as a program of its own.
    if not x.is_meta and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _matrix(w: Tensor) -> Tensor:
    """w [R, C] without its trailing axes of size one. So that the gradient gets w's strides: in
    channels_last those are other numbers, and DistributedDataParallel compares them."""
    in_channels_last = w.dim() > 2 and w.stride(-1) != 1
    return (w.movedim(1, -1) if in_channels_last else w).flatten(1)


def _scse(x, w1, b1, w2, b2, ws, bs, combine, activation, slope, gate, residual):
    dtype = accumulation_dtype(x.dtype)
    xa = x.to(dtype)
    by_channel = by_position = None
    if w1 is not None:
        w1, b1, w2, b2 = (None if p is None else p.to(dtype) for p in (w1, b1, w2, b2))
        c = channel_gate(xa, _matrix(w1), b1, _matrix(w2), b2, activation, slope, gate)
        by_channel = xa * c.reshape(c.shape + (1,) * (x.dim() - 2))
    if ws is not None:
        ws, bs = ws.to(dtype), None if bs is None else bs.to(dtype).flatten()
        ws = _matrix(ws).flatten() if ws.dim() > 1 else ws
        by_position = xa * spatial_gate(xa, ws, bs, gate)

    if by_position is None:
        y = by_channel
    elif by_channel is None:
        y = by_position
    elif combine == "add":
        y = by_channel + by_position
    elif combine == "max":
        y = torch.maximum(by_channel, by_position)
    elif combine == "mul":
        y = by_channel * by_position
    else:
        y = torch.cat([by_channel, by_position], 1)
    if residual:
        y = y + xa
    return y.to(x.dtype)
