"""The modules: their parameters, the networks whose state_dicts they load, few-shot weights."""

import pytest
import torch
from budget import formulas, make_case
from peers import Both, Channel, Smp, Spatial

import scse_kernels as ours

KEYS = {
    ours.ChannelSELayer: {
        "fc1.weight": (3, 12),
        "fc1.bias": (3,),
        "fc2.weight": (12, 3),
        "fc2.bias": (12,),
    },
    ours.SpatialSELayer: {"conv.weight": (1, 12, 1, 1), "conv.bias": (1,)},
    ours.SpatialSELayer3D: {"conv.weight": (1, 12, 1, 1, 1), "conv.bias": (1,)},
    ours.SCSEModule: {
        "cSE.1.weight": (3, 12, 1, 1),
        "cSE.1.bias": (3,),
        "cSE.3.weight": (12, 3, 1, 1),
        "cSE.3.bias": (12,),
        "sSE.0.weight": (1, 12, 1, 1),
        "sSE.0.bias": (1,),
    },
}
KEYS[ours.ChannelSELayer3D] = KEYS[ours.ChannelSELayer]
for _whole, _channel, _spatial in (
    (ours.ChannelSpatialSELayer, ours.ChannelSELayer, ours.SpatialSELayer),
    (ours.ChannelSpatialSELayer3D, ours.ChannelSELayer3D, ours.SpatialSELayer3D),
):
    KEYS[_whole] = {f"cSE.{key}": shape for key, shape in KEYS[_channel].items()}
    KEYS[_whole] |= {f"sSE.{key}": shape for key, shape in KEYS[_spatial].items()}


def _build(cls, channels=12, reduction=4, **options):
    spatial = (ours.SpatialSELayer, ours.SpatialSELayer3D)
    return cls(channels, **options) if cls in spatial else cls(channels, reduction, **options)


@pytest.mark.parametrize("cls", KEYS)
def test_state_dict_keys_and_shapes(cls):
    state = _build(cls).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == KEYS[cls]


@pytest.mark.parametrize("cls", KEYS)
def test_every_parameter_gets_a_gradient(cls):
    layer = _build(cls)
    layer(make_case((2, 12, *(5, 3, 4)[: 3 if "3D" in cls.__name__ else 2])).x).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


PAIRS = {
    "channel 2d": lambda: (ours.ChannelSELayer(12, 4), Channel(12, 4), 2),
    "channel 3d": lambda: (ours.ChannelSELayer3D(12, 4), Channel(12, 4), 3),
    "spatial 2d": lambda: (ours.SpatialSELayer(12), Spatial(12, 2), 2),
    "spatial 3d": lambda: (ours.SpatialSELayer3D(12), Spatial(12, 3), 3),
    "article": lambda: (
        ours.ChannelSpatialSELayer(12),
        Both(12, 2, 2, torch.add),
        2,
    ),
    "ai-med 2d": lambda: (
        ours.ChannelSpatialSELayer(12, combine="max"),
        Both(12, 2, 2, torch.maximum),
        2,
    ),
    "pytorch-3dunet": lambda: (
        ours.ChannelSpatialSELayer3D(12),
        Both(12, 2, 3, torch.maximum),
        3,
    ),
    "smp": lambda: (ours.SCSEModule(32), Smp(32, 16), 2),
}


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, "channels_last"), ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_takes_the_place_of_a_published_layer(pair, memory_format):
    layer, published, axes = PAIRS[pair]()
    layer.load_state_dict(published.state_dict(), strict=True)
    published.load_state_dict(layer.state_dict(), strict=True)
    channels = 32 if pair == "smp" else 12
    case = make_case((2, channels, *(9, 7, 5)[:axes]))
    if memory_format == "channels_last":
        memory_format = (torch.channels_last, torch.channels_last_3d)[axes - 2]
    results = []
    for module in (layer, published):
        x = case.x.contiguous(memory_format=memory_format).requires_grad_()
        y = module(x)
        y.backward(case.dy)
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("layer, axes", ((ours.SpatialSELayer, 2), (ours.SpatialSELayer3D, 3)))
@pytest.mark.parametrize("shots", (1, 5))
def test_few_shot_weights(layer, axes, shots):
    layer, published = layer(12), Spatial(12, axes)
    case = make_case((2, 12, *(9, 7, 5)[:axes]))
    weights = torch.randn(shots, 12, *(1,) * axes, requires_grad=True)
    results = []
    for module in (layer, published):
        x, w = case.x.clone().requires_grad_(), weights.detach().clone().requires_grad_()
        y = module(x, w)
        y.backward(case.dy)
        results.append((y.detach(), x.grad, w.grad))
        assert module.conv.weight.grad is None and module.conv.bias.grad is None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())
    torch.testing.assert_close(layer(case.x, weights=weights), results[0][0])


@pytest.mark.parametrize("combine", ("add", "max", "mul", "concat"))
@pytest.mark.parametrize("axes", (1, 2, 3))
def test_combine(combine, axes):
    layer = ours.ChannelSpatialSELayer(12, 3, combine=combine)
    x = make_case((2, 12, *(9, 7, 5)[:axes])).x
    fc1, fc2, conv = layer.cSE.fc1, layer.cSE.fc2, layer.sSE.conv
    parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias, conv.weight, conv.bias)
    expected = formulas(combine, x.double(), *(p.double() for p in parameters))
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_defaults():
    assert ours.ChannelSELayer(12).fc1.out_features == 6
    assert ours.ChannelSpatialSELayer(12).cSE.fc1.out_features == 6
    assert ours.ChannelSpatialSELayer(12).combine == "add"
    assert ours.ChannelSpatialSELayer3D(12).combine == "max"
    assert ours.SCSEModule(64).cSE[1].out_channels == 4
    assert ours.ChannelSELayer(7, reduction_ratio=2).fc1.out_features == 3


def test_double_precision_module_and_mixed_precision():
    x = make_case((2, 12, 5, 7)).x
    assert ours.ChannelSpatialSELayer(12).double()(x.double()).dtype == torch.float64
    layer = ours.ChannelSpatialSELayer(12)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_without_biases():
    """A converted module may have no biases."""
    layer = ours.ChannelSpatialSELayer(12)
    layer.cSE.fc1.bias = layer.cSE.fc2.bias = layer.sSE.conv.bias = None
    x = make_case((2, 12, 5, 7)).x
    parameters = (layer.cSE.fc1.weight, None, layer.cSE.fc2.weight, None, layer.sSE.conv.weight)
    expected = formulas("add", x, *parameters, None)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("cls", KEYS)
def test_device_and_dtype(cls):
    layer = _build(cls, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == KEYS[cls]
    with torch.device("meta"):
        assert {p.device.type for p in _build(cls).parameters()} == {"meta"}


@pytest.mark.parametrize("cls", KEYS)
def test_repr(cls):
    text = repr(_build(cls))
    assert text.startswith(cls.__name__)
    if cls in (ours.ChannelSELayer, ours.ChannelSELayer3D):
        assert "num_channels=12" in text and "reduction_ratio=4" in text
    if cls in (ours.ChannelSpatialSELayer, ours.ChannelSpatialSELayer3D):
        assert "combine=" in text and "reduction_ratio=4" in text


@pytest.mark.parametrize(
    "cls, argument",
    [
        (ours.ChannelSELayer, "reduction_ratio"),
        (ours.ChannelSELayer3D, "reduction_ratio"),
        (ours.ChannelSpatialSELayer, "reduction_ratio"),
        (ours.ChannelSpatialSELayer3D, "reduction_ratio"),
        (ours.SCSEModule, "reduction"),
    ],
)
@pytest.mark.parametrize("reduction", (0, -1, 13))
def test_reduction_leaves_a_hidden_channel(cls, argument, reduction):
    with pytest.raises(ValueError, match=rf"{argument} must .*12.* got {reduction}"):
        cls(12, reduction)
    assert cls(12, **{argument: 12})(torch.ones(1, 12, 2, 2)).shape == (1, 12, 2, 2)
