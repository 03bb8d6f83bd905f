"""Blocks as people write them, each of which computes exactly scSE, cSE or sSE.

Written for these tests after structures that are common in public code: what the layers are called,
how they are pooled, who multiplies, and what is wrapped in what. Every entry of BLOCKS is (makes
the block, spatial axes, what it computes), with C channels.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

C, CR = 12, 3


def _mlp(hidden=CR, bias=True, gate=True):
    layers = [nn.Linear(C, hidden, bias=bias), nn.ReLU(inplace=True), nn.Linear(hidden, C, bias)]
    return nn.Sequential(*layers, *([nn.Sigmoid()] if gate else []))


def _convs(hidden=CR, conv=nn.Conv2d, bias=True, pool=nn.AdaptiveAvgPool2d):
    return nn.Sequential(
        pool(1),
        conv(C, hidden, 1, bias=bias),
        nn.ReLU(inplace=True),
        conv(hidden, C, 1, bias=bias),
        nn.Sigmoid(),
    )


class ViewAndMlp(nn.Module):
    def __init__(self, hidden=CR, bias=True):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = _mlp(hidden, bias)

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ShapeUnpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.excitation = _mlp()

    def forward(self, x):
        n, c = x.shape[0], x.shape[1]
        squeezed = x.view(n, c, -1).mean(dim=-1)
        return self.excitation(squeezed).reshape(n, c, *[1] * (x.dim() - 2)) * x


class Reduce(nn.Module):
    """The names of a well-known detection code, with functional activations."""

    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(C, CR, kernel_size=1)
        self.expand = nn.Conv2d(CR, C, kernel_size=1)

    def forward(self, inputs):
        s = F.adaptive_avg_pool2d(inputs, output_size=1)
        s = F.relu(self.reduce(s), inplace=True)
        return inputs * torch.sigmoid(self.expand(s))


class FullPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(C, CR)
        self.up = nn.Linear(CR, C)

    def forward(self, x):
        z = F.avg_pool2d(x, kernel_size=x.size()[2:])
        z = z.permute(0, 2, 3, 1)
        z = torch.sigmoid(self.up(F.relu(self.down(z))))
        return x * z.permute(0, 3, 1, 2)


class SqueezedPool(nn.Module):
    """squeeze() without axes."""

    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(C, CR), nn.Linear(CR, C)

    def forward(self, x):
        gate = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        gate = self.linear_2(F.relu(self.linear_1(gate))).sigmoid()
        return torch.mul(x, gate[:, :, None, None])


class SqueezesAll(nn.Module):
    """squeeze() without axes fails for one sample; others are exact."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(C, CR), nn.Linear(CR, C)

    def forward(self, x):
        pooled = nn.AdaptiveAvgPool2d(1)(x).squeeze()
        gate = torch.sigmoid(self.b(F.relu(self.a(pooled))))
        return x * gate.view(x.size(0), -1, 1, 1)


class Conv1dSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv1d(C, CR, 1)
        self.excite = nn.Conv1d(CR, C, 1)

    def forward(self, x):
        pooled = x.flatten(2).mean(-1, keepdim=True)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))
        return x * gate.unsqueeze(-1)


class TimeSeriesSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.seq = _mlp()

    def forward(self, x):
        return x * self.seq(self.pool(x)[..., 0])[..., None]


class VolumeSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze_excite = _convs(conv=nn.Conv3d, pool=nn.AdaptiveAvgPool3d)

    def forward(self, x):
        return x.mul(self.squeeze_excite(x))


class MeanTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(C, CR, 1, bias=False)
        self.conv2 = nn.Conv2d(CR, C, 1, bias=False)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        z = x.mean(-1, keepdim=True).mean(-2, keepdim=True)
        return self.sigmoid(self.conv2(self.relu(self.conv1(z)))) * x


class SumOverArea(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = _mlp()

    def forward(self, x):
        h, w = x.shape[-2:]
        return x * self.block(x.sum((2, 3)) / (h * w)).unsqueeze(-1).unsqueeze(-1)


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = _mlp()

    def forward(self, x):
        gate = self.net(torch.einsum("bchw->bc", x) / math.prod(x.shape[2:]))
        return torch.einsum("bchw,bc->bchw", x, gate)


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = _convs()

    def forward(self, x):
        return x * self.gate(x).repeat(1, 1, x.shape[2], x.shape[3])


class Interpolated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = _convs()

    def forward(self, x):
        return x * F.interpolate(self.gate(x), size=x.shape[2:], mode="nearest")


class Transposed(nn.Module):
    """Channels last and linear layers, as in code that came from another framework."""

    def __init__(self):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(C, CR), nn.Linear(CR, C)])

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        gate = x.mean((1, 2), keepdim=True)
        for i, layer in enumerate(self.dense):
            gate = layer(gate)
            gate = torch.relu(gate) if i == 0 else torch.sigmoid(gate)
        return (x * gate).permute(0, 3, 1, 2)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = ViewAndMlp()

    def forward(self, x):
        return x + self.se(x)


class OnePlusGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.att = _convs()

    def forward(self, x):
        return x * (1 + self.att(x))


class ChannelGate(nn.Module):
    """Returns the gate."""

    def __init__(self):
        super().__init__()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.f1, self.f2 = nn.Conv2d(C, CR, 1), nn.Conv2d(CR, C, 1)

    def forward(self, x):
        return torch.sigmoid(self.f2(F.relu(self.f1(self.gap(x)))))


class SpatialGate(nn.Module):
    """Returns the gate."""

    def __init__(self, bias=True):
        super().__init__()
        self.squeeze = nn.Conv2d(C, 1, 1, bias=bias)

    def forward(self, x):
        return self.squeeze(x).sigmoid()


class GatesOfChildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.satt, self.catt = SpatialGate(bias=False), ChannelGate()

    def forward(self, x):
        return x * self.satt(x) + x * self.catt(x)


class SumOfGates(nn.Module):
    def __init__(self):
        super().__init__()
        self.spatial_gate, self.channel_gate = SpatialGate(), ChannelGate()

    def forward(self, x):
        return x * torch.add(self.spatial_gate(x), self.channel_gate(x))


class SpatialAttention2d(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.squeeze = nn.Conv2d(C, 1, kernel_size=1, bias=bias)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        z = self.squeeze(x)
        z = self.sigmoid(z)
        return x * z


class GAB(nn.Module):
    def __init__(self):
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(C, CR, kernel_size=1, stride=1)
        self.conv2 = nn.Conv2d(CR, C, kernel_size=1, stride=1)
        self.relu, self.sigmoid = nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x):
        att = self.global_avgpool(x)
        att = self.relu(self.conv1(att))
        att = self.sigmoid(self.conv2(att))
        return x * att


class SCse(nn.Module):
    def __init__(self):
        super().__init__()
        self.satt, self.catt = SpatialAttention2d(), GAB()

    def forward(self, x):
        return self.satt(x) + self.catt(x)


class TwoBranches(nn.Module):
    """Both branches under names of its own, combined by a method."""

    def __init__(self, combine="add"):
        super().__init__()
        self.channel_excitation = _mlp()
        self.spatial_se = nn.Conv2d(C, 1, 1, stride=1, padding=0, bias=False)
        self.combine = combine

    def _merge(self, a, b):
        if self.combine == "add":
            return torch.add(a, b)
        if self.combine == "max":
            return torch.max(a, b)
        if self.combine == "mul":
            return a * b
        return torch.cat((a, b), dim=1)

    def forward(self, x):
        bahs, chs, _, _ = x.size()
        chn_se = F.adaptive_avg_pool2d(x, (1, 1)).view(bahs, chs)
        chn_se = torch.mul(x, self.channel_excitation(chn_se).view(bahs, chs, 1, 1))
        spa_se = torch.mul(x, torch.sigmoid(self.spatial_se(x)))
        return self._merge(chn_se, spa_se)


class StackedMax(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"channel": GAB(), "spatial": SpatialAttention2d()})

    def forward(self, x):
        return torch.maximum(*(part(x) for part in self.parts.values()))


class SumOfList(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([GAB(), SpatialAttention2d(bias=True)])

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


class Scale(nn.Module):
    """Multiplies two things, for code that builds a graph of modules."""

    def forward(self, a, b):
        return a * b


class WithHelpers(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.body = Scale(), _convs()

    def forward(self, x):
        return self.scale(x, self.body(x))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(C, CR),
            nn.ReLU(),
            nn.Linear(CR, C),
            nn.Sigmoid(),
            nn.Unflatten(1, (C, 1, 1)),
        )

    def forward(self, x):
        return self.se(x) * x


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(C, CR), nn.Linear(CR, C), nn.Dropout(p=0.0)

    def forward(self, x):
        gate = self.drop(F.relu(self.fc1(x.mean((-2, -1)))))
        return x * torch.sigmoid(self.fc2(gate))[..., None, None]


class UnusedLayer(nn.Module):
    """A layer that forward doesn't call, left from an experiment."""

    def __init__(self):
        super().__init__()
        self.old = nn.Conv2d(C, C, 3, padding=1)
        self.norm = nn.BatchNorm2d(C)
        self.w0, self.w1 = nn.Conv2d(C, CR, 1), nn.Conv2d(CR, C, 1)

    def forward(self, x):
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.w1(torch.relu(self.w0(gate))))


class PoolTypes(nn.Module):
    """A list of poolings, of which there is one."""

    def __init__(self, pool_types=("avg",)):
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(C, CR), nn.ReLU(), nn.Linear(CR, C))
        self.pool_types = list(pool_types)

    def forward(self, x):
        total = None
        for kind in self.pool_types:
            if kind == "avg":
                pooled = F.avg_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3)))
            elif kind == "max":
                pooled = F.max_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3)))
            out = self.mlp(pooled)
            total = out if total is None else total + out
        return x * torch.sigmoid(total).unsqueeze(2).unsqueeze(3).expand_as(x)


class Checked(nn.Module):
    """Checks of its input, as careful people write them."""

    def __init__(self):
        super().__init__()
        self.channels = C
        self.se = _convs()

    def forward(self, x):
        if x.dim() != 4:
            raise ValueError(f"expected 4 axes, got {x.dim()}")
        assert x.size(1) == self.channels, "channels"
        return x * self.se(x)


class Typed(nn.Module):
    """Gates in the dtype of x."""

    def __init__(self):
        super().__init__()
        self.se = _mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.se(x.mean(dim=(2, 3)).to(self.se[0].weight.dtype))
        return x * gate.type_as(x).view(*gate.shape, 1, 1)


class Parent(nn.Module):
    def forward(self, x):
        return x * self.gate(x)


class Inherited(Parent):
    """The forward is the parent's, a method the child's."""

    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Conv2d(C, CR, 1), nn.Conv2d(CR, C, 1)

    def gate(self, x):
        return torch.sigmoid(self.q(F.relu(self.p(x.mean((2, 3), keepdim=True)))))


class OldStyleSuper(Parent):
    """super(self.__class__, self), which must not find the converted class."""

    def __init__(self):
        super(self.__class__, self).__init__()
        self.gate = _convs()

    def forward(self, x):
        return super(self.__class__, self).forward(x)


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.Sigmoid()
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, CR, 1), nn.ReLU(), nn.Conv2d(CR, C, 1), self.act
        )
        self.spatial = nn.Sequential(nn.Conv2d(C, 1, 1), self.act)

    def forward(self, x):
        return self.channel(x) * x + self.spatial(x) * x


class Factored(nn.Module):
    def __init__(self):
        super().__init__()
        self.cse, self.sse = _convs(), nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return (self.cse(x) + self.sse(x)) * x


class PlusX(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.add(self.block(x), x)


class MaximumOfSums(nn.Module):
    """scSE, with x added as a residual connection."""

    def __init__(self):
        super().__init__()
        self.cse, self.sse = _convs(), nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x + torch.max(self.cse(x) * x, self.sse(x) * x)


class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(C, CR), nn.Linear(CR, C)

    def forward(self, x):
        z = F.linear(x.mean((2, 3)), self.one.weight, self.one.bias)
        z = F.linear(z.clamp(min=0), self.two.weight, self.two.bias)
        return x * (1 / (1 + torch.exp(-z)))[:, :, None, None]


class Activated(nn.Module):
    """Of other networks: another activation, another gate, given as modules or functions."""

    def __init__(self, activation, gate=torch.sigmoid):
        super().__init__()
        self.conv_reduce, self.conv_expand = nn.Conv2d(C, CR, 1), nn.Conv2d(CR, C, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x):
        hidden = self.activation(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.conv_expand(hidden))


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class HardSigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


def hard_sigmoid(x, inplace=False):
    if inplace:
        return x.add_(3.0).clamp_(0.0, 6.0).div_(6.0)
    return F.relu6(x + 3.0) / 6.0


class HardGate(nn.Module):
    """The gate is a function of the module."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(C, CR, 1), nn.Conv2d(CR, C, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x_se = self.act1(self.a(self.avg_pool(x)))
        return x * hard_sigmoid(self.b(x_se))


class WithActivations(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(C, CR), activation, nn.Linear(CR, C))
        self.conv = nn.Conv3d(C, 1, 1)

    def forward(self, x):
        gate = torch.sigmoid(self.mlp(x.mean((2, 3, 4))))[..., None, None, None]
        return torch.max(x * gate, x * torch.sigmoid(self.conv(x)))


class Timm(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, hidden, 1), nn.Conv2d(hidden, C, 1)

    def forward(self, x):
        if torch.jit.is_scripting():
            return x
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


BLOCKS = {
    "view and mlp": (ViewAndMlp, 2, "cse"),
    "without biases": (lambda: ViewAndMlp(bias=False), 2, "cse"),
    "as wide as x": (lambda: ViewAndMlp(C), 2, "cse"),
    "wider than x": (lambda: ViewAndMlp(2 * C), 2, "cse"),
    "one hidden channel": (lambda: ViewAndMlp(1), 2, "cse"),
    "shape unpacked": (ShapeUnpacked, 2, "cse"),
    "shape unpacked, 1-D": (ShapeUnpacked, 1, "cse"),
    "shape unpacked, 3-D": (ShapeUnpacked, 3, "cse"),
    "reduce and expand": (Reduce, 2, "cse"),
    "avg_pool2d of the whole": (FullPool, 2, "cse"),
    "squeezed": (SqueezedPool, 2, "cse"),
    "squeezed entirely": (SqueezesAll, 2, "cse"),
    "Conv1d": (Conv1dSE, 2, "cse"),
    "time series": (TimeSeriesSE, 1, "cse"),
    "volume": (VolumeSE, 3, "cse"),
    "two means": (MeanTwice, 2, "cse"),
    "sum over the area": (SumOverArea, 2, "cse"),
    "einsum": (Einsum, 2, "cse"),
    "repeated gate": (Repeated, 2, "cse"),
    "interpolated gate": (Interpolated, 2, "cse"),
    "transposed": (Transposed, 2, "cse"),
    "x + cse(x)": (Residual, 2, "cse + x"),
    "x * (1 + gate)": (OnePlusGate, 2, "cse + x"),
    "spatial": (SpatialAttention2d, 2, "sse"),
    "GAB": (GAB, 2, "cse"),
    "gates of children": (GatesOfChildren, 2, "scse, add"),
    "sum of gates": (SumOfGates, 2, "scse, add"),
    "sum of children": (SCse, 2, "scse, add"),
    "a method, add": (TwoBranches, 2, "scse, add"),
    "a method, max": (lambda: TwoBranches("max"), 2, "scse, max"),
    "a method, mul": (lambda: TwoBranches("mul"), 2, "scse, mul"),
    "a method, cat": (lambda: TwoBranches("cat"), 2, "scse, concat"),
    "children in a ModuleDict": (StackedMax, 2, "scse, max"),
    "children in a ModuleList": (SumOfList, 2, "scse, add"),
    "a module that multiplies": (WithHelpers, 2, "cse"),
    "flatten and unflatten": (Flattened, 2, "cse"),
    "dropout with p = 0": (WithDropout, 2, "cse"),
    "unused layers": (UnusedLayer, 2, "cse"),
    "a list of poolings": (PoolTypes, 2, "cse"),
    "checks of x": (Checked, 2, "cse"),
    "type_as": (Typed, 2, "cse"),
    "inherited forward": (Inherited, 2, "cse"),
    "super(self.__class__, self)": (OldStyleSuper, 2, "cse"),
    "shared activation": (SharedActivation, 2, "scse, add"),
    "gates added": (Factored, 2, "scse, add"),
    "x + scse(x)": (MaximumOfSums, 2, "scse, max + x"),
    "scse(x) + x, add": (lambda: PlusX(TwoBranches("add")), 2, "scse, add + x"),
    "scse(x) + x, mul": (lambda: PlusX(TwoBranches("mul")), 2, "scse, mul + x"),
    "sse(x) + x": (lambda: PlusX(SpatialAttention2d()), 2, "sse + x"),
    "functional": (FunctionalLinear, 2, "cse"),
    "SiLU": (lambda: Activated(nn.SiLU(inplace=True)), 2, "cse, silu"),
    "Swish of its own": (lambda: Activated(Swish()), 2, "cse, silu"),
    "F.silu": (lambda: Activated(F.silu), 2, "cse, silu"),
    "GELU": (lambda: Activated(nn.GELU()), 2, "cse, gelu"),
    "GELU, tanh": (lambda: Activated(nn.GELU("tanh")), 2, "cse, gelu_tanh"),
    "ELU": (lambda: Activated(nn.ELU(0.7)), 2, "cse, elu(0.7)"),
    "LeakyReLU": (lambda: Activated(nn.LeakyReLU(0.2)), 2, "cse, leaky_relu(0.2)"),
    "no activation": (lambda: Activated(nn.Identity()), 2, "cse, no activation"),
    "Hardsigmoid": (lambda: Activated(nn.ReLU(), nn.Hardsigmoid()), 2, "cse, hard_sigmoid"),
    "hard sigmoid of its own": (
        lambda: Activated(nn.SiLU(), HardSigmoid()),
        2,
        "cse, silu, hard_sigmoid",
    ),
    "a function for the gate": (HardGate, 2, "cse, hard_sigmoid"),
    "scSE with LeakyReLU": (
        lambda: WithActivations(nn.LeakyReLU()),
        3,
        "scse, max, leaky_relu(0.01)",
    ),
    "is_scripting": (lambda: Timm(CR), 2, "cse"),
}
