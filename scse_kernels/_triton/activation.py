"""The hidden layer's activations and the gates. All Triton kernels take the formulas from here; C++
has them in csrc/formulas.inc."""

import triton
import triton.language as tl

# The codes of scse_kernels.ops.ACTIVATION and GATE.
RELU = tl.constexpr(0)
LEAKY_RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)
GELU_TANH = tl.constexpr(4)
ELU = tl.constexpr(5)
SIGMOID = tl.constexpr(0)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The activation's value and its derivative. SLOPE: leaky_relu's negative slope, elu's
    alpha."""
    one = tl.full(v.shape, 1.0, v.dtype)
    if ACTIVATION == RELU:
        return tl.where(v < 0, 0.0, v), tl.where(v <= 0, 0.0, one)  # NaN stays
    elif ACTIVATION == LEAKY_RELU:
        slope = tl.where(v > 0, one, SLOPE)
        return slope * v, slope
    elif ACTIVATION == SILU:
        s = tl.sigmoid(v)
        return v * s, s * (1.0 + v * (1.0 - s))
    elif ACTIVATION == GELU:
        below = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))  # of the normal distribution
        return v * below, below + v * (0.3989422804014327 * tl.exp(-0.5 * v * v))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 is sigmoid(2 * u); the factor is sqrt(8 / pi).
        s = tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        inner = 1.5957691216057308 * (1.0 + 3 * 0.044715 * v * v)
        return v * s, s + v * s * (1.0 - s) * inner
    elif ACTIVATION == ELU:
        e = tl.exp(tl.where(v > 0, 0.0, v))
        return tl.where(v > 0, v, SLOPE * (e - 1.0)), tl.where(v > 0, one, SLOPE * e)
    else:
        return v, one


@triton.jit
def gate_of(v, GATE: tl.constexpr):
    """The gate that v opens: sigmoid(v), or hard sigmoid, relu6(v + 3) / 6."""
    if GATE == SIGMOID:
        return tl.sigmoid(v)
    else:
        positive = tl.where(v < -3, 0.0, v + 3.0)  # NaN stays
        return tl.where(positive > 6, 6.0, positive) / 6.0


@triton.jit
def gate_gradient(d, gate, GATE: tl.constexpr):
    """The gradient before the gate, from d, that of the gate, and the gate."""
    if GATE == SIGMOID:
        return d * gate * (1.0 - gate)
    else:
        return tl.where((gate > 0) & (gate < 1), d / 6.0, 0.0)
