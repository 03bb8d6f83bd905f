"""torch.library.opcheck of every operator: schema, fake implementation, behaviour under tracing."""

import pytest
import torch
from budget import channels_last, make_case, moved

from scse_kernels import ops

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "channel sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "channels_last, channel sliced": lambda t: channels_last(torch.cat([t, t], 1))[:, : t.shape[1]],
    "spatial axes swapped": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
VARIANTS = ("cse", "sse", *ops.COMBINE)


def _arguments(device, variant, dtype=torch.float32, layout="contiguous", shape=(2, 6, 5, 7), **kw):
    case = make_case(shape, variant, dtype, **kw).arranged(LAYOUTS[layout], LAYOUTS[layout])
    parameters = [None if p is None else p.to(device) for p in case.parameters]
    return moved(case.x, device), parameters, moved(case.dy, device), ops.COMBINE.get(variant, 0)


def _operators(backend):
    namespace = torch.ops.scse_kernels
    return (
        getattr(namespace, f"{backend}_forward").default,
        getattr(namespace, f"{backend}_backward").default,
    )


def _check(target, variant, needs=(True, True, True), residual=False, **kw):
    x, parameters, dy, combine = _arguments(target.device, variant, **kw)
    forward, backward = _operators(target.backend)
    how = {"residual": True} if residual else {}
    torch.library.opcheck(forward, (x, *parameters, combine), how)
    _, *small = forward(x, *parameters, combine, **how)
    torch.library.opcheck(backward, (dy, x, *parameters, *small, combine, *needs), how)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_and_layouts(fused, variant, layout):
    _check(fused, variant, layout=layout)


@pytest.mark.parametrize("variant", ("cse", "sse", "mul"))
def test_residual(fused, variant):
    _check(fused, variant, residual=True)


def test_no_residual_of_a_concatenation(fused):
    x, parameters, dy, combine = _arguments(fused.device, "concat")
    forward, backward = _operators(fused.backend)
    _, *small = forward(x, *parameters, combine)
    for device in (fused.device, "meta"):
        given = [None if t is None else t.to(device) for t in (x, *parameters)]
        with pytest.raises(RuntimeError, match="residual can't be added to concat"):
            forward(*given, combine, residual=True)
        saved = [t.to(device) for t in small]
        with pytest.raises(RuntimeError, match="residual can't be added to concat"):
            backward(dy.to(device), *given, *saved, combine, True, True, True, residual=True)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(fused, dtype):
    _check(fused, "max", dtype=dtype)
    _check(fused, "add", dtype=dtype, parameter_dtype=torch.float32)


@pytest.mark.parametrize("shape", ((2, 6, 9), (2, 6, 3, 4, 5), (1, 1, 1, 1), (0, 6, 5, 7)))
def test_shapes(fused, shape):
    _check(fused, "add", shape=shape)


def test_parameters_of_convolutions_and_without_biases(fused):
    _check(fused, "add", trailing=2)
    _check(fused, "add", biases=False)


@pytest.mark.parametrize("variant", ("cse", "sse", "max"))
@pytest.mark.parametrize(
    "needs",
    [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, True, True),
        (True, False, True),
        (False, False, False),
    ],
)
def test_needs(fused, variant, needs):
    _check(fused, variant, needs)
