"""BatchNorm and ReLU, which every pass over the map applies to u.

v = scale * (u - mean) + shift,  z = relu(v)        scale = weight / sqrt(var + eps)
"""

import triton
import triton.language as tl

from .primitives import load


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x): the hardware's approximation and a step of Newton's method. An error here would
    be one of the whole channel."""
    r = tl.rsqrt(x)
    return r * (1.5 - 0.5 * x * r * r)


@triton.jit
def load_norm(
    mean_ptr,  # [C]
    var_ptr,  # [C]
    weight_ptr,  # [C] or None: 1
    bias_ptr,  # [C] or None: 0
    c,
    C,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """mean, scale and shift of channels c, each [BLOCK_C, 1]. Beyond the last channel v is 0."""
    mean = load(mean_ptr + c, c < C, ACC)
    scale = reciprocal_root(tl.load(var_ptr + c, mask=c < C, other=1.0).to(ACC) + EPS)
    if weight_ptr is not None:
        scale *= load(weight_ptr + c, c < C, ACC)
    shift = mean * 0.0 if bias_ptr is None else load(bias_ptr + c, c < C, ACC)
    return mean[:, None], scale[:, None], shift[:, None]


@triton.jit
def normalised(ud, scale, shift, mask):
    """v of ud = u - mean; 0 outside of the map, where u is 0 but v need not be."""
    return tl.where(mask, ud * scale + shift, 0.0)


@triton.jit
def active(v, t):
    """t where v > 0 (or is NaN, as torch has it), else 0: relu(v) is active(v, v)."""
    return tl.where(v <= 0, 0.0, t)
