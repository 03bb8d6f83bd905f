"""A layer whose children were replaced or have hooks computes by calling them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import scse_kernels

LAYERS = {
    "ChannelSELayer": lambda: scse_kernels.ChannelSELayer(8),
    "SpatialSELayer": lambda: scse_kernels.SpatialSELayer(8),
    "SpatialSELayer3D": lambda: scse_kernels.SpatialSELayer3D(8),
    "add": lambda: scse_kernels.ChannelSpatialSELayer(8),
    "max": lambda: scse_kernels.ChannelSpatialSELayer3D(8),
    "mul": lambda: scse_kernels.ChannelSpatialSELayer(8, combine="mul"),
    "concat": lambda: scse_kernels.ChannelSpatialSELayer(8, combine="concat"),
    "SCSEModule": lambda: scse_kernels.SCSEModule(8, 2),
}
SHAPES = ((2, 8, 9), (2, 8, 5, 4), (2, 8, 3, 4, 5))


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def _below(layer):
    return [(path, module) for path, module in layer.named_modules() if path]


def _dense(layer):
    return [m for m in layer.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]


def _results(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    parameters = list(layer.parameters())
    return [y, *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def _replace(layer, old, new):
    (path,) = (path for path, module in layer.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    layer.get_submodule(parent)._modules[name] = new


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s) - 2}d")
def test_called_children_compute_the_same(layer, shape):
    """For each module below, a hook on it makes it run, and all results stay what they are."""
    x = torch.randn(shape)
    expected = _results(layer, x)
    for path, module in _below(layer):
        ran = []
        handle = module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        for a, b in zip(_results(layer, x), expected, strict=True):
            torch.testing.assert_close(a, b, msg=path)
        assert ran, f"the hook on {path} didn't run"
        handle.remove()
        ran.clear()
        layer(x)
        assert not ran


@pytest.mark.parametrize("kind", ("forward_pre", "full_backward", "full_backward_pre"))
def test_other_hooks_run(layer, kind):
    for module in layer.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torch wants that of modules with backward hooks
    for path, module in _below(layer):
        ran = []
        register = getattr(module, f"register_{kind}_hook")
        handle = register(lambda *_, ran=ran: ran.append(1) or None)
        layer(torch.randn(2, 8, 5, 4, requires_grad=True)).sum().backward()
        assert ran, path
        handle.remove()


def test_a_patched_forward_runs(layer):
    """As accelerate's cpu_offload does."""
    x = torch.randn(2, 8, 5, 4)
    for path, module in _below(layer):
        before, ran = module.forward, []
        module.forward = lambda x, before=before, ran=ran: ran.append(1) or before(x)
        layer(x)
        assert ran, path
        del module.forward


class _Adapter(nn.Module):
    """Low-rank adaptation, with the properties that stand-ins for a layer have."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.weight.shape[1], 2)
        self.up = nn.Linear(2, base.weight.shape[0])

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        moved = x if x.dim() == 2 else x.movedim(1, -1)
        more = self.up(self.down(moved))
        return self.base(x) + (more if x.dim() == 2 else more.movedim(-1, 1))


def test_adapters_are_called(layer):
    x = torch.randn(2, 8, 5, 4)
    before = layer(x)
    for dense in _dense(layer):
        adapter = _Adapter(dense)
        _replace(layer, dense, adapter)
        after = layer(x)
        assert not torch.allclose(after, before), "the adapter was ignored"
        after.sum().backward()
        assert adapter.down.weight.grad.abs().sum() > 0
        before = after.detach()


def test_another_activation_in_its_place():
    block = scse_kernels.SCSEModule(8, 2)
    block.cSE[2] = nn.SiLU()
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(block(x), x * block.cSE(x) + x * block.sSE(x))
    block = scse_kernels.SCSEModule(8, 2)
    block.cSE.append(nn.Threshold(0.5, 0.0))  # one more
    torch.testing.assert_close(block(x), x * block.cSE(x) + x * block.sSE(x))


def _pruned(dense):
    prune.l1_unstructured(dense, "weight", amount=0.5)


def _weight_normalised(dense):
    weight_norm(dense)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "change", (_pruned, _weight_normalised, parametrizations.weight_norm), ids=lambda f: f.__name__
)
def test_reparametrised_children(layer, change):
    """Two steps of training, then other weights: what the weights are computed from counts."""
    for dense in _dense(layer):
        change(dense)
    x = torch.randn(2, 8, 5, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    outputs = []
    for _ in range(3):
        outputs.append(layer(x))
        optimizer.zero_grad()
        outputs[-1].square().mean().backward()
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])
    twin = copy.deepcopy(layer) if change is parametrizations.weight_norm else layer
    state = {
        k: v if "mask" in k else torch.zeros_like(v) + 0.1 for k, v in twin.state_dict().items()
    }
    twin.load_state_dict(state)
    assert not torch.equal(twin(x), outputs[-1])
    if change is parametrizations.weight_norm:
        for dense in _dense(twin):
            parametrize.remove_parametrizations(dense, "weight")


@pytest.mark.filterwarnings("ignore:.*quantization.*")
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_dynamically_quantised_children():
    layer = scse_kernels.ChannelSpatialSELayer(8)
    x = torch.randn(2, 8, 5, 4)
    expected = layer(x)
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.cSE.fc1) is not nn.Linear
    torch.testing.assert_close(quantised(x), expected, atol=0.1, rtol=0.1)
