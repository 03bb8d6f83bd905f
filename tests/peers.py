"""The libraries' squeeze & excitation blocks: their layers, the names of these, and what they
compute.

Written for these tests after the libraries' structure; `real` gives the libraries' own classes.
"""

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


class Channel(nn.Module):
    """The article's, ai-med's and pytorch-3dunet's channel layer."""

    def __init__(self, channels, reduction):
        super().__init__()
        self.reduction_ratio = reduction
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)
        self.relu = nn.ReLU()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        descriptor = x.mean(tuple(range(2, x.dim())))
        gate = self.sigmoid(self.fc2(self.relu(self.fc1(descriptor))))
        return x * gate[(...,) + (None,) * (x.dim() - 2)]


class Spatial(nn.Module):
    """Their spatial layer, with the few-shot option of ai-med's."""

    def __init__(self, channels, axes):
        super().__init__()
        self.conv = CONVS[axes - 1](channels, 1, 1)
        self.sigmoid = nn.Sigmoid()
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]

    def forward(self, x, weights=None):
        if weights is None:
            return x * self.sigmoid(self.conv(x))
        return x * self.sigmoid(self.convolve(x, weights.mean(0, keepdim=True)))


class Both(nn.Module):
    def __init__(self, channels, reduction, axes, combine):
        super().__init__()
        self.cSE = Channel(channels, reduction)
        self.sSE = Spatial(channels, axes)
        self.combine = combine

    def forward(self, x):
        return self.combine(self.cSE(x), self.sSE(x))


class Smp(nn.Module):
    """segmentation_models.pytorch's and segmentation-models-pytorch-3d's."""

    def __init__(self, channels, reduction, axes=2):
        super().__init__()
        conv = CONVS[axes - 1]
        self.cSE = nn.Sequential(
            POOLS[axes - 1](1),
            conv(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            conv(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(conv(channels, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


class OldSmp(Smp):
    """The former's 0.0.2: a gate for each channel at each position."""

    def __init__(self, channels, reduction):
        super().__init__(channels, reduction)
        self.sSE[0] = nn.Conv2d(channels, channels, 1)


class MonaiSE(nn.Module):
    """MONAI's channel layer, and with `add_residual` its residual one."""

    def __init__(self, axes, channels, r, first="ReLU", second="Sigmoid", add_residual=False):
        super().__init__()
        self.add_residual = add_residual
        self.avg_pool = POOLS[axes - 1](1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // r),
            getattr(nn, first)(),
            nn.Linear(channels // r, channels),
            getattr(nn, second)(),
        )

    def forward(self, x):
        gate = self.fc(self.avg_pool(x).flatten(1))
        y = x * gate.reshape(gate.shape + (1,) * (x.dim() - 2))
        if self.add_residual:
            y += x
        return y


class TorchvisionSE(nn.Module):
    def __init__(self, channels, hidden, activation=nn.ReLU, scale_activation=nn.Sigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class TimmSE(nn.Module):
    """timm's SEModule."""

    def __init__(self, channels, hidden, act=nn.ReLU, norm=None, gate=nn.Sigmoid, bias=True):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.bn = norm(hidden) if norm else nn.Identity()
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=bias)
        self.gate = gate()

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(pooled)))))


class TimmSqueezeExcite(nn.Module):
    """That of timm's EfficientNets."""

    def __init__(self, channels, hidden, act=nn.ReLU, gate=nn.Sigmoid):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.act1 = act()
        self.conv_expand = nn.Conv2d(hidden, channels, 1)
        self.gate = gate()

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(pooled))))


#: name: (makes the block, its channels, the spatial axes it takes, what it computes)
COPIES = {
    "channel": (lambda: Channel(12, 4), 12, 2, "cse"),
    "channel 3d": (lambda: Channel(12, 4), 12, 3, "cse"),
    "spatial": (lambda: Spatial(12, 2), 12, 2, "sse"),
    "spatial 3d": (lambda: Spatial(12, 3), 12, 3, "sse"),
    "article": (lambda: Both(12, 2, 2, torch.add), 12, 2, "scse, add"),
    "ai-med": (lambda: Both(12, 2, 2, torch.max), 12, 2, "scse, max"),
    "pytorch-3dunet, hidden = C": (lambda: Both(12, 1, 3, torch.max), 12, 3, "scse, max"),
    "product": (lambda: Both(12, 2, 2, torch.mul), 12, 2, "scse, mul"),
    "concatenation": (
        lambda: Both(12, 2, 3, lambda *maps: torch.cat(maps, 1)),
        12,
        3,
        "scse, concat",
    ),
    "one channel": (lambda: Both(1, 1, 2, torch.max), 1, 2, "scse, max"),
    "four channels": (lambda: Both(4, 4, 2, torch.max), 4, 2, "scse, max"),
    "smp": (lambda: Smp(32, 16), 32, 2, "scse, add"),
    "smp 3d": (lambda: Smp(32, 16, 3), 32, 3, "scse, add"),
    "MONAI 1d": (lambda: MonaiSE(1, 12, 2), 12, 1, "cse"),
    "MONAI": (lambda: MonaiSE(3, 12, 2), 12, 3, "cse"),
    "MONAI residual": (lambda: MonaiSE(2, 12, 2, add_residual=True), 12, 2, "cse + x"),
    "torchvision": (lambda: TorchvisionSE(12, 3), 12, 2, "cse"),
    "torchvision EfficientNet": (lambda: TorchvisionSE(12, 3, nn.SiLU), 12, 2, "cse, silu"),
    "torchvision MobileNetV3": (
        lambda: TorchvisionSE(12, 3, scale_activation=nn.Hardsigmoid),
        12,
        2,
        "cse, hard_sigmoid",
    ),
    "timm": (lambda: TimmSE(12, 3), 12, 2, "cse"),
    "timm, without bias": (lambda: TimmSE(12, 3, bias=False), 12, 2, "cse"),
    "timm EfficientNet": (lambda: TimmSqueezeExcite(12, 3), 12, 2, "cse"),
}


@functools.cache
def real(name):
    """The module `name` of an installed package, or a skipped test."""
    package, *below = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            # The package's __init__ may want torchvision, which its blocks don't need.
            folder = Path(spec.submodule_search_locations[0])
            for part in ("", *below[:-1]):
                folder = folder / part
                package = f"{package}.{part}".rstrip(".")
                sys.modules[package] = types.ModuleType(package)
                sys.modules[package].__path__ = [str(folder)]
            return importlib.import_module(name)


_UNET3D = "pytorch3dunet.unet3d.se"
_SMP = "segmentation_models_pytorch.base.modules"
_SMP3D = "segmentation_models_pytorch_3d.base.modules"
_MONAI = "monai.networks.blocks.squeeze_and_excitation"
_TIMM = "timm.layers.squeeze_excite"
_TORCHVISION = "torchvision.ops.misc"
_BOTH = {"acti_type_1": "relu", "acti_type_2": "sigmoid"}

#: The same of the libraries' own classes.
REAL = {
    "pytorch3dunet cSE": (lambda: real(_UNET3D).ChannelSELayer3D(12), 12, 3, "cse"),
    "pytorch3dunet sSE": (lambda: real(_UNET3D).SpatialSELayer3D(12), 12, 3, "sse"),
    "pytorch3dunet": (lambda: real(_UNET3D).ChannelSpatialSELayer3D(12, 1), 12, 3, "scse, max"),
    "smp's": (lambda: real(_SMP).SCSEModule(32), 32, 2, "scse, add"),
    "smp 3d's": (lambda: real(_SMP3D).SCSEModule(32), 32, 3, "scse, add"),
    "MONAI's 1d": (lambda: real(_MONAI).ChannelSELayer(1, 12), 12, 1, "cse"),
    "MONAI's 2d": (lambda: real(_MONAI).ChannelSELayer(2, 12), 12, 2, "cse"),
    "MONAI's 3d": (lambda: real(_MONAI).ChannelSELayer(3, 12), 12, 3, "cse"),
    "MONAI's residual": (lambda: real(_MONAI).ResidualSELayer(3, 12, **_BOTH), 12, 3, "cse + x"),
    "torchvision's": (lambda: real(_TORCHVISION).SqueezeExcitation(12, 3), 12, 2, "cse"),
    "timm's": (lambda: real(_TIMM).SEModule(32), 32, 2, "cse"),
    "timm's, hard gate": (
        lambda: real(_TIMM).SEModule(32, gate_layer="hard_sigmoid"),
        32,
        2,
        "cse, hard_sigmoid",
    ),
    "torchvision's, SiLU": (
        lambda: real(_TORCHVISION).SqueezeExcitation(12, 3, nn.SiLU),
        12,
        2,
        "cse, silu",
    ),
    "timm's, without bias": (lambda: real(_TIMM).SEModule(32, bias=False), 32, 2, "cse"),
}

#: Of the libraries' own, those that compute something else: (makes the block, why not).
REAL_OTHERS = {
    "MONAI's residual": (lambda: real(_MONAI).ResidualSELayer(3, 12), "no gate"),
    "MONAI's residual, ReLU twice": (
        lambda: real(_MONAI).ResidualSELayer(3, 12, acti_type_1="relu"),
        "no gate",
    ),
    "timm's, with norm": (
        lambda: real(_TIMM).SEModule(32, norm_layer=nn.BatchNorm2d),
        "bn is a BatchNorm2d",
    ),
    "timm's, maximum": (lambda: real(_TIMM).SEModule(32, add_maxpool=True), "something else"),
    "timm's, effective": (lambda: real(_TIMM).EffectiveSEModule(32), "its layers are not those"),
}
