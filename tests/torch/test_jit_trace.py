"""torch.jit.trace records ordinary operations: the program can be saved, frozen and trained, and is
right for other sizes than the traced one."""

import io

import pytest
import torch
from networks import gradients, images, unet

import scse_kernels

# That torch deprecates all of it is known; a TracerWarning stays an error.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

MODULES = {
    "channel": (lambda: scse_kernels.ChannelSELayer(6), (2, 6, 5, 4)),
    "spatial": (lambda: scse_kernels.SpatialSELayer(6), (2, 6, 5, 4)),
    "concat": (lambda: scse_kernels.ChannelSpatialSELayer(6, combine="concat"), (2, 6, 5, 4)),
    "volume": (lambda: scse_kernels.ChannelSpatialSELayer3D(6), (2, 6, 5, 4, 3)),
    "smp": (lambda: scse_kernels.SCSEModule(6, 2), (2, 6, 5, 4)),
    "network": (unet, (2, 3, 16, 12)),
}


def _other_sizes(shape):
    return (shape[0] + 1, shape[1], *(s + 4 for s in shape[2:]))


@pytest.mark.parametrize("kind", MODULES)
def test_saved_and_loaded(kind):
    make, shape = MODULES[kind]
    module = make()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, images(*shape)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in (shape, _other_sizes(shape)):
        x = images(*size)
        expected, got = gradients(module, x), gradients(loaded, x)
        for name, t in expected.items():
            torch.testing.assert_close(got[name], t, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", MODULES)
def test_frozen(kind):
    make, shape = MODULES[kind]
    module = make().eval()
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(module, images(*shape)))
        frozen = torch.jit.optimize_for_inference(frozen)
        for size in (shape, _other_sizes(shape)):
            x = images(*size)
            for _ in range(3):  # TorchScript optimizes what it has seen twice
                torch.testing.assert_close(frozen(x), module(x))


def test_channels_last():
    module = scse_kernels.SCSEModule(6, 2)
    x = images(2, 6, 5, 4)
    traced = torch.jit.trace(module, x)
    x = x.contiguous(memory_format=torch.channels_last)
    y = traced(x)
    torch.testing.assert_close(y, module(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_few_shot_weights():
    layer = scse_kernels.SpatialSELayer(6)
    traced = torch.jit.trace(lambda x, w: layer(x, w), (images(2, 6, 5, 4), images(3, 6)))
    x, weights = images(3, 6, 9, 8), images(5, 6)
    torch.testing.assert_close(traced(x, weights), layer(x, weights))


def test_a_named_backend_is_refused(fused):
    layer = scse_kernels.SpatialSELayer(6).to(fused.device)

    def function(x):
        return scse_kernels.sse(x, layer.conv.weight, None, backend=fused.backend)

    with pytest.raises(RuntimeError, match=f"torch.jit.trace.*got backend '{fused.backend}'"):
        torch.jit.trace(function, images(2, 6, 5, 4).to(fused.device))
