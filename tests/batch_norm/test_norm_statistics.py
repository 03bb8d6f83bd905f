"""Running statistics change as torch's BatchNorm changes them, once a call, whatever follows."""

import copy

import pytest
import torch
from budget import spread
from torch import nn

import scse_kernels
from scse_kernels import BatchNormReLUSCSE

NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = ((3, 6, 35), (3, 6, 7, 5), (2, 6, 5, 3, 4))
OPTIONS = {
    "default": {},
    "momentum": {"momentum": 0.37},
    "average over all batches": {"momentum": None},
    "not affine": {"affine": False},
    "not tracked": {"track_running_stats": False},
    "eps": {"eps": 0.1},
}


def _block(axes, channels=6):
    layer = (
        scse_kernels.ChannelSpatialSELayer3D if axes == 3 else scse_kernels.ChannelSpatialSELayer
    )
    return layer(channels, combine="add")


def _pair(shape, **options):
    """Sequential(BatchNorm, ReLU, block) and its fused twin, with the same random state."""
    norm = NORMS[len(shape)](shape[1], **options)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in norm.parameters():
            t.copy_(torch.randn(t.shape, generator=g))
        if norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(shape[1], generator=g))
            norm.running_var.copy_(torch.rand(shape[1], generator=g) + 0.5)
    plain = nn.Sequential(norm, nn.ReLU(), _block(len(shape) - 2))
    fused = BatchNormReLUSCSE(NORMS[len(shape)](shape[1], **options), _block(len(shape) - 2))
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain, fused


def _inputs(shape, count=3):
    g = torch.Generator().manual_seed(1)
    return [spread(shape, g).float() for _ in range(count)]


def _assert_same_state(plain, fused):
    expected, got = plain.state_dict(), fused.state_dict()
    assert list(expected) == list(got)
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, msg=lambda m, name=name: f"{name}: {m}")


def _step(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_as_torch_does(shape, options):
    plain, fused = _pair(shape, **OPTIONS[options])
    for x in _inputs(shape):
        for a, b in zip(_step(plain, x), _step(fused, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        _assert_same_state(plain, fused)
    plain.eval(), fused.eval()
    for x in _inputs(shape):
        for a, b in zip(_step(plain, x), _step(fused, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        _assert_same_state(plain, fused)


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_in_every_gradient_mode(mode):
    plain, fused = _pair(SHAPES[1])
    for x in _inputs(SHAPES[1]):
        with mode():
            torch.testing.assert_close(fused(x), plain(x))
        _assert_same_state(plain, fused)


def test_frozen_batch_norm_in_a_model_in_training():
    plain, fused = _pair(SHAPES[1])
    before = copy.deepcopy(fused.state_dict())
    for module in (plain, fused):
        module.train()
        module.get_submodule("0").eval()
    for x in _inputs(SHAPES[1]):
        for a, b in zip(_step(plain, x), _step(fused, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    for name, t in before.items():
        assert torch.equal(fused.state_dict()[name], t), f"{name} was changed"


def test_backward_twice_updates_once():
    plain, fused = _pair(SHAPES[1])
    (x,) = _inputs(SHAPES[1], 1)
    plain(x)
    y = fused(x.requires_grad_()).sum()
    y.backward(retain_graph=True)
    y.backward()
    _assert_same_state(plain, fused)


def test_a_training_step_between_an_evaluation_and_its_backward():
    """The running statistics that a call used are its own."""
    _, fused = _pair(SHAPES[1])
    first, second = _inputs(SHAPES[1], 2)
    right = _step(fused.eval(), first)[1]
    x = first.clone().requires_grad_()
    y = fused(x)
    fused.train()(second)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, right)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_under_autocast(dtype):
    plain, fused = _pair(SHAPES[1])
    for x in _inputs(SHAPES[1]):
        x = x.to(dtype)
        with torch.autocast("cpu", dtype):
            y, right = fused(x), plain(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, right, rtol=0.05, atol=0.05)
        _assert_same_state(plain, fused)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_modules_of_half_types(dtype):
    plain, fused = _pair(SHAPES[1])
    wide = copy.deepcopy(plain)
    fused.to(dtype)
    for x in _inputs(SHAPES[1]):
        x = x.to(dtype)
        assert fused(x).dtype == dtype
        wide(x.float())
    for name in ("0.running_mean", "0.running_var"):
        got = fused.state_dict()[name]
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), wide.state_dict()[name], rtol=0.03, atol=0.03)


def test_a_batch_of_no_samples_leaves_them_alone():
    plain, fused = _pair(SHAPES[1])
    x = torch.empty(0, *SHAPES[1][1:])
    for a, b in zip(_step(plain, x), _step(fused, x), strict=True):
        torch.testing.assert_close(b, a)
    _assert_same_state(plain, fused)


@pytest.mark.parametrize("shape", ((1, 6, 1, 1), (1, 6, 1)))
def test_one_value_to_a_channel(shape):
    plain, fused = _pair(shape)
    for module in (plain, fused):
        with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel"):
            module(torch.ones(shape))
    _assert_same_state(plain, fused)
    torch.testing.assert_close(fused.eval()(torch.ones(shape)), plain.eval()(torch.ones(shape)))


def test_the_axes_that_batch_norm_takes():
    _, fused = _pair(SHAPES[1])
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(torch.ones(SHAPES[0]))


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_a_large_mean_is_right_to_a_rounding(layout):
    """Of one strip and of several; a plain sum in float32 would be off by many."""
    for shape in ((1, 17, 31, 33), (2, 17, 67, 71)):
        g = torch.Generator().manual_seed(0)
        x = (torch.randn(shape, generator=g) + 1000).contiguous(memory_format=layout)
        fused = BatchNormReLUSCSE(nn.BatchNorm2d(17, momentum=1.0), _block(2, 17))
        fused(x)
        var, mean = torch.var_mean(x.double(), (0, 2, 3))
        norm = fused.get_submodule("0")
        rounding = torch.finfo(torch.float32).eps / 2
        assert (norm.running_mean.double() - mean).abs().max() <= 0.6 * rounding * 1024
        torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=0)
