"""The module: its keys, what it accepts, what it does with children that were replaced."""

import copy
import pickle

import pytest
import torch
from norm_budget import WITH_KERNELS  # noqa: F401
from torch import nn

import scse_kernels
from scse_kernels import BatchNormReLUSCSE

BLOCKS = {
    "smp": lambda: scse_kernels.SCSEModule(6, 2),
    "add": lambda: scse_kernels.ChannelSpatialSELayer(6),
    "max": lambda: scse_kernels.ChannelSpatialSELayer(6, combine="max"),
    "concat": lambda: scse_kernels.ChannelSpatialSELayer(6, combine="concat"),
    "3D": lambda: scse_kernels.ChannelSpatialSELayer3D(6),
    "cSE": lambda: scse_kernels.ChannelSELayer(6),
    "sSE": lambda: scse_kernels.SpatialSELayer(6),
}


def _input(axes=2):
    return torch.randn(3, 6, *(7, 5, 4)[:axes], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", BLOCKS)
def test_is_the_sequence(block):
    axes = 3 if block == "3D" else 2
    norm = nn.BatchNorm3d if axes == 3 else nn.BatchNorm2d
    plain = nn.Sequential(norm(6), nn.ReLU(), BLOCKS[block]())
    fused = BatchNormReLUSCSE(norm(6), BLOCKS[block]())
    fused.load_state_dict(plain.state_dict(), strict=True)
    results = []
    for module in (plain, fused):
        x = _input(axes).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _calls_of_the_operator(module, x):
    seen = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Calls():
        module(x)
    return [name for name in seen if "bn_forward" in name]


def test_one_operator_computes_it(fused):
    if fused.backend != "cpu":
        pytest.skip("what 'auto' takes here")
    assert _calls_of_the_operator(BatchNormReLUSCSE(nn.BatchNorm2d(6), BLOCKS["smp"]()), _input())


@pytest.mark.parametrize(
    "name, other",
    [
        ("0", lambda: nn.InstanceNorm2d(6, affine=True)),
        ("1", lambda: nn.LeakyReLU(0.2)),
        ("2", lambda: nn.Conv2d(6, 3, 1)),
        ("2.cSE.2", lambda: nn.SiLU()),
        ("2.sSE.1", lambda: nn.Hardsigmoid()),
    ],
)
def test_replaced_children_are_called(name, other):
    """Whatever stands in a child's place computes what it computes."""
    module = BatchNormReLUSCSE(nn.BatchNorm2d(6), BLOCKS["smp"]())
    module.set_submodule(name, other())
    norm, relu, block = module.children()
    x = _input()
    assert not _calls_of_the_operator(module, x)
    torch.testing.assert_close(module(x), block(relu(norm(x))))


def test_copies_and_pickles():
    module = BatchNormReLUSCSE(nn.BatchNorm2d(6), BLOCKS["smp"]())
    x = _input()
    right = copy.deepcopy(module)(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), right)


def test_bad_children():
    with pytest.raises(TypeError, match=r"batch_norm must be a BatchNorm1d.*not SyncBatchNorm"):
        BatchNormReLUSCSE(nn.SyncBatchNorm(6), BLOCKS["smp"]())
    with pytest.raises(TypeError, match=r"block must be a module of scse_kernels.*not Conv2d"):
        BatchNormReLUSCSE(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1))
    with pytest.raises(ValueError, match="block has 6 channels, batch_norm 8"):
        BatchNormReLUSCSE(nn.BatchNorm2d(8), BLOCKS["sSE"]())


def test_sync_batch_norm_takes_its_place():
    module = BatchNormReLUSCSE(nn.BatchNorm2d(6), BLOCKS["smp"]())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    assert type(converted.get_submodule("0")) is nn.SyncBatchNorm
    assert list(converted.state_dict()) == list(module.state_dict())
    torch.testing.assert_close(converted.eval()(_input()), module.eval()(_input()))
