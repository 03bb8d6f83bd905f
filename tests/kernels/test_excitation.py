"""Every activation of the hidden layer and every gate, on every backend, against float64."""

import pytest
import torch
from budget import (
    ACTIVATIONS,
    GATES,
    VARIANTS,
    call,
    check,
    make_case,
    output_and_gradients,
    same_bits,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from scse_kernels import ops, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SLOPES = {"leaky_relu": (None, 0.3, -0.5), "elu": (None, 0.4)}
EXCITATIONS = [
    {"activation": activation, "gate": gate} for activation in ACTIVATIONS for gate in GATES
]


def _id(excitation):
    return "-".join(map(str, excitation.values()))


def test_names_are_the_operators_codes():
    assert tuple(ops.ACTIVATION) == tuple(reference.ACTIVATIONS) == ACTIVATIONS
    assert tuple(ops.GATE) == tuple(reference.GATES) == GATES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_activations_and_gates(target, excitation, dtype):
    variant = "max" if dtype.itemsize == 4 else "cse"
    check(make_case((3, 20, 5, 7), variant, dtype, **excitation), target)


@pytest.mark.parametrize(
    "activation, slope", [(name, slope) for name, slopes in SLOPES.items() for slope in slopes]
)
def test_slopes(target, activation, slope):
    check(make_case((3, 20, 5, 7), "add", activation=activation, slope=slope), target)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_hard_gates_of_both_branches(target, layout, variant):
    """In several strips, with gates that are closed, open and between."""
    excitation = {"gate": "hard_sigmoid"}
    if variant != "sse":
        excitation["activation"] = "silu"
    check(make_case((2, 9, 37, 41), variant, **excitation).in_layout(layout), target)


@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_derivatives(fused, excitation):
    dtype = torch.float64
    if fused.backend == "cuda":
        pytest.skip("cuda: it has no kernels for float64")
    case = make_case((2, 4, 3, 2), "add", dtype, **excitation)
    tensors = [t.to(fused.device).requires_grad_() for t in (case.x, *case.parameters)]

    def function(*tensors):
        return call("add", *tensors, backend=fused.backend, **excitation)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("gate", GATES)
def test_gates_at_their_corners(target, gate):
    """b2 makes the channel gates -4, -3, 0, 3 and 4 before closing, and 4 positions do so too."""
    corners = torch.tensor([-4.0, -3.0, 0.0, 3.0, 4.0])
    zero = torch.zeros(1, 5)
    tensors = {"x": torch.randn(2, 5, 9), "w1": zero, "b1": None, "w2": zero.T, "b2": corners}
    leaves = {name: t if t is None else t.to(target.device) for name, t in tensors.items()}
    for name in ("x", "b2"):
        leaves[name].requires_grad_()
    y = call("cse", **leaves, ws=None, bs=None, gate=gate, backend=target.backend)
    dy = torch.randn(y.shape).to(y)
    function = torch.sigmoid if gate == "sigmoid" else F.hardsigmoid
    expected = leaves["x"] * function(leaves["b2"])[:, None]
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(o, (leaves["x"], leaves["b2"]), dy) for o in (y, expected))
    torch.testing.assert_close(got, want)
    if gate == "hard_sigmoid":
        assert got[1].eq(0).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_nan_spreads_as_in_torch(target, excitation):
    """A NaN in one channel makes its sample's every gate NaN, and nothing of the other sample."""
    case = make_case((2, 6, 4, 4), "cse", **excitation)
    case.x[1, 2, 0, 0] = torch.nan

    def function(variant, **arguments):
        return call(variant, **arguments, backend=target.backend)

    got = output_and_gradients(function, case, target.device)
    assert got["y"][0].isfinite().all() and got["y"][1].isnan().all()
    assert got["dx"][0].isfinite().all()


@pytest.mark.parametrize("excitation", EXCITATIONS, ids=_id)
def test_repeatable(fused, excitation):
    case = make_case((3, 16, 40, 41), "add", torch.float16, **excitation)

    def function(variant, **arguments):
        return call(variant, **arguments, backend=fused.backend)

    a, b = (output_and_gradients(function, case, fused.device) for _ in range(2))
    for name in a:
        assert same_bits(a[name], b[name]), name
