"""How the two branches are combined, element by element. All Triton kernels take the formulas from
here; C++ has them in csrc/formulas.inc.

x, dy: [BLOCK_C, BLOCK_S]; c: channel gate [BLOCK_C, 1]; s: spatial gate [1, BLOCK_S]. For CONCAT dy
is the gradient of the first half of y and dy2 that of the second. Elsewhere dy2 is not used.
"""

import triton
import triton.language as tl

# The codes of scse_kernels.ops.COMBINE, then the branches alone.
ADD = tl.constexpr(0)
MAX = tl.constexpr(1)
MUL = tl.constexpr(2)
CONCAT = tl.constexpr(3)
CHANNEL = tl.constexpr(4)
SPATIAL = tl.constexpr(5)


@triton.constexpr_function
def by_gates(combine):
    """Whether `shares` needs the gates. Then the spatial gate must be known first, and `direct`
    needs x."""
    return combine == MAX.value or combine == MUL.value


@triton.jit
def value(x, c, s, COMBINE: tl.constexpr):
    """y. Not for CONCAT: `apply_tile` writes its halves one by one."""
    if COMBINE == ADD:
        return x * c + x * s
    elif COMBINE == MAX:  # both products, since a NaN in either must win
        a = x * c
        b = x * s
        return tl.where((a > b) | (a != a), a, b)
    elif COMBINE == MUL:
        return (x * c) * (x * s)
    elif COMBINE == CHANNEL:
        return x * c
    else:
        return x * s


@triton.jit
def choose(x, c, s, won, lost):
    """What the channel branch gets: `won` where it is the larger one, `lost` where the spatial one
    is, half of both in a tie."""
    lead = x * (c - s)
    return tl.where(lead > 0, won, tl.where(lead < 0, lost, 0.5 * (won + lost)))


@triton.jit
def shares(x, dy, dy2, c, s, COMBINE: tl.constexpr):
    """Terms of dL/dc (to be summed over positions) and of dL/ds (over channels)."""
    if COMBINE == MAX:
        share = choose(x, c, s, dy, 0.0)
        return share * x, (dy - share) * x
    elif COMBINE == MUL:
        whole = dy * x
        return whole * (x * s), whole * (x * c)
    elif COMBINE == CONCAT:
        return dy * x, dy2 * x
    else:
        return dy * x, dy * x


@triton.jit
def direct(x, dy, dy2, c, s, COMBINE: tl.constexpr):
    """dL/dx with both gates held fixed."""
    if COMBINE == ADD:
        return dy * c + dy * s
    elif COMBINE == MAX:
        return dy * choose(x, c, s, c, s)
    elif COMBINE == MUL:
        return dy * (2.0 * (x * c) * s)
    elif COMBINE == CONCAT:
        return dy * c + dy2 * s
    elif COMBINE == CHANNEL:
        return dy * c
    else:
        return dy * s
