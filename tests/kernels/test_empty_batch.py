"""A batch of no samples: an empty output and gradients of zero."""

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case

import scse_kernels


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ((0, 6, 11), (0, 6, 5, 7), (0, 6, 5, 3, 4)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_functions(target, variant, shape, dtype):
    case = make_case((1, *shape[1:]), variant, dtype)
    tensors = {
        name: None if t is None else t.to(target.device).requires_grad_()
        for name, t in zip(NAMES, (case.x[:0], *case.parameters), strict=True)
    }
    y = call(variant, **tensors, backend=target.backend)
    assert y.shape == (0, 12 if variant == "concat" else 6, *shape[2:])
    assert y.dtype == dtype
    y.backward(torch.ones_like(y))
    assert tensors["x"].grad.shape == shape
    for name in NAMES[1:]:
        if tensors[name] is not None:
            assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name])), name


@pytest.mark.parametrize(
    "layer, axes",
    [
        (scse_kernels.ChannelSELayer(8), 2),
        (scse_kernels.SpatialSELayer(8), 2),
        (scse_kernels.ChannelSpatialSELayer(8), 2),
        (scse_kernels.ChannelSpatialSELayer(8, combine="concat"), 2),
        (scse_kernels.SCSEModule(8, 4), 2),
        (scse_kernels.ChannelSELayer3D(8), 3),
        (scse_kernels.SpatialSELayer3D(8), 3),
        (scse_kernels.ChannelSpatialSELayer3D(8), 3),
    ],
    ids=lambda v: type(v).__name__,
)
def test_modules(layer, axes):
    layer.zero_grad()
    x = torch.empty(0, 8, *(4,) * axes, requires_grad=True)
    layer(x).sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
