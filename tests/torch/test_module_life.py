"""What happens to modules in people's code: copied, pickled, saved, their parameters shared or
computed from others, recomputed in the backward."""

import copy
import io
import pickle

import pytest
import torch
from networks import gradients, images, unet
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import scse_kernels

MODULES = {
    "channel": lambda: scse_kernels.ChannelSELayer(6),
    "spatial": lambda: scse_kernels.SpatialSELayer(6),
    "max": lambda: scse_kernels.ChannelSpatialSELayer(6, combine="max"),
    "volume": lambda: scse_kernels.ChannelSpatialSELayer3D(6),
    "smp": lambda: scse_kernels.SCSEModule(6, 2),
}


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    "clone",
    (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved),
    ids=("deepcopy", "pickle", "torch.save"),
)
def test_copies(clone, kind):
    module = MODULES[kind]()
    module.eval().requires_grad_(False)
    x = images(2, 6, 5, 4)
    other = clone(module)
    assert type(other) is type(module) and str(other) == str(module)
    assert not other.training and not any(p.requires_grad for p in other.parameters())
    assert torch.equal(other(x), module(x))
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (module, other)]
    assert pointers[0].isdisjoint(pointers[1])


def _eager(x, layer):
    """The layer's own parameters, or what stands for them, by the reference."""
    fc1, fc2, conv = layer.cSE.fc1, layer.cSE.fc2, layer.sSE.conv
    parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)
    return scse_kernels.scse(x, *parameters, backend="eager")


class _Eager(torch.nn.Module):
    """Layers one after the other, by the reference."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x):
        for layer in self.layers:
            x = _eager(x, layer)
        return x


def _same_gradients(*layers):
    reference = _Eager(*layers)
    x = images(2, 6, 5, 4)
    expected, got = gradients(reference, x), gradients(reference.layers, x)
    assert len(got) == len(expected)
    for a, b in zip(expected.values(), got.values(), strict=True):
        torch.testing.assert_close(b, a)


def test_parameters_shared_by_two_modules():
    first, second = (scse_kernels.ChannelSpatialSELayer(6) for _ in range(2))
    second.cSE.fc1.weight = first.cSE.fc1.weight
    second.sSE.conv = first.sSE.conv
    _same_gradients(first, second)


def test_module_used_twice():
    layer = scse_kernels.ChannelSpatialSELayer(6)
    _same_gradients(layer, layer)


@pytest.mark.parametrize("parametrize", (parametrizations.weight_norm, parametrizations.orthogonal))
def test_parametrizations(parametrize):
    layer = scse_kernels.ChannelSpatialSELayer(6)
    parametrize(layer.cSE.fc1, "weight")
    parametrize(layer.cSE.fc2, "weight")
    assert "cSE.fc1.weight" not in dict(layer.named_parameters())
    _same_gradients(layer)


class _Calls(TorchDispatchMode):
    """Counts the forward operators of this package that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "scse_kernels" and func.name().endswith("_forward")
        return func(*args, **(kwargs or {}))


class _Recomputed(torch.nn.Module):
    def __init__(self, network, use_reentrant):
        super().__init__()
        self.network, self.use_reentrant = network, use_reentrant

    def forward(self, x):
        return checkpoint(self.network, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_activation_checkpointing(use_reentrant, autocast):
    network, x = unet(), images(2, 3, 16, 12)
    leaves = [x.requires_grad_(), *network.parameters()]
    results, calls = [], []
    for function in (network, _Recomputed(network, use_reentrant)):
        with _Calls() as counted, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(x).float().square().sum()
        with counted:
            loss.backward()  # reentrant checkpointing knows no torch.autograd.grad
        results.append([t.grad for t in leaves])
        calls.append(counted.count)
        network.zero_grad()
        x.grad = None
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert calls[1] == 2 * calls[0]
