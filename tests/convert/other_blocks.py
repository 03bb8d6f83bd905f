"""Blocks that look like scSE, cSE or sSE, and compute or leave something else.

BLOCKS: (makes the block, a part of the reason why it is left alone).
"""

import os
import random
import time
import warnings

import torch
from exact_blocks import CR, C, ChannelGate, ViewAndMlp, _convs
from torch import nn
from torch.nn import functional as F


class Base(nn.Module):
    """cSE for others to spoil."""

    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(C, CR, 1), nn.Conv2d(CR, C, 1)

    def gate(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))

    def forward(self, x):
        return x * self.gate(x)


class MovingWindow(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv1d(C, CR, 1), nn.Conv1d(CR, C, 1)

    def forward(self, x):
        pooled = F.avg_pool1d(x, 5, stride=1) if x.shape[-1] > 5 else x.mean(-1, keepdim=True)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))
        return x * F.interpolate(gate, size=x.shape[-1])


class Tiles(Base):
    def forward(self, x):
        pooled = F.avg_pool2d(x, 16, ceil_mode=True)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))
        return x * F.interpolate(gate, size=x.shape[2:])


class AdaptiveTiles(Base):
    """Tiles of 64, which all but large maps are smaller than."""

    def forward(self, x):
        h, w = (max(1, size // 64) for size in x.shape[2:])
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, (h, w))))))
        return x * F.interpolate(gate, size=x.shape[2:])


class FirstColumns(Base):
    def forward(self, x):
        return x * self.gate(x[..., :64])


class FirstOfMany(Base):
    def forward(self, x):
        return x * self.gate(x[..., :4096])


class LargeMapsDiffer(Base):
    def forward(self, x):
        if x.shape[2] * x.shape[3] > 10**6:
            return x
        return x * self.gate(x)


class LargeBatchesDiffer(Base):
    def forward(self, x):
        return x if len(x) >= 64 else x * self.gate(x)


class SizeInAttribute(Base):
    def __init__(self):
        super().__init__()
        self.limit = 500

    def forward(self, x):
        return x * self.gate(x) if max(x.shape) < self.limit else x


class KeepsGate(Base):
    def forward(self, x):
        self.attention = self.gate(x)
        return x * self.attention


class KeepsGateInEvaluation(Base):
    def forward(self, x):
        gate = self.gate(x)
        if not self.training:
            self.attention = gate
        return x * gate


class ChildKeeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = KeepsGate()

    def forward(self, x):
        return self.inner(x)


class AppendsGate(Base):
    def __init__(self):
        super().__init__()
        self.maps = []

    def forward(self, x):
        gate = self.gate(x)
        self.maps.append(gate)
        return x * gate


class DictOfGates(Base):
    def __init__(self):
        super().__init__()
        self.maps = {}

    def forward(self, x):
        gate = self.gate(x)
        self.maps["gate"] = gate
        return x * gate


class OfTheClass(Base):
    maps = []  # noqa: RUF012

    def forward(self, x):
        gate = self.gate(x)
        self.maps.append(gate)
        return x * gate


class Meter:
    def __init__(self):
        self.sum = 0.0

    def update(self, value):
        self.sum = self.sum + value.detach().mean()


class Metered(Base):
    def __init__(self):
        super().__init__()
        self.meter = Meter()

    def forward(self, x):
        gate = self.gate(x)
        self.meter.update(gate)
        return x * gate


GATES = []


class Global(Base):
    def forward(self, x):
        gate = self.gate(x)
        GATES.append(gate)
        return x * gate


class Counted(Base):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x * self.gate(x)


class Buffered(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean_gate", torch.zeros(1))

    def forward(self, x):
        gate = self.gate(x)
        self.mean_gate.mul_(0.9).add_(0.1 * gate.detach().mean().to(self.mean_gate.dtype))
        return x * gate


class SetsByName(Base):
    def forward(self, x):
        setattr(self, "last_" + "gate", self.gate(x))
        return x * self.gate(x)


class Prints(Base):
    def forward(self, x):
        print(x.shape)
        return x * self.gate(x)


class Warns(Base):
    def forward(self, x):
        warnings.warn("old", stacklevel=2)
        return x * self.gate(x)


class Noisy(Base):
    def forward(self, x):
        return x * self.gate(x + 0 * torch.randn_like(x))


class PythonRandom(Base):
    def forward(self, x):
        return x * self.gate(x) if random.random() < 2 else x


class Timed(Base):
    def forward(self, x):
        return x * self.gate(x) if time.time() > 0 else x


class Environment(Base):
    def forward(self, x):
        return x * self.gate(x) if "NO_SE" not in os.environ else x


class BranchOnMean(Base):
    def forward(self, x):
        return x * self.gate(x) if x.mean() < 1e6 else x


class BranchOnItem(Base):
    def forward(self, x):
        return x if x.abs().max().item() > 1e9 else x * self.gate(x)


class WhereLarge(Base):
    def forward(self, x):
        return torch.where(x.abs() > 1e9, x, x * self.gate(x))


class Clamped(Base):
    def forward(self, x):
        return x.clamp(-1e4, 1e4) * self.gate(x)


class NanToNum(Base):
    def forward(self, x):
        return torch.nan_to_num(x) * self.gate(x)


class OnCuda(Base):
    def forward(self, x):
        return x if x.is_cuda else x * self.gate(x)


class OnDevice(Base):
    def forward(self, x):
        return x if x.device.type == "cuda" else x * self.gate(x)


class NeedsGradient(Base):
    def forward(self, x):
        return x * self.gate(x) if x.requires_grad or x.grad_fn is None else x


class InTraining(Base):
    def forward(self, x):
        return x * self.gate(x) if torch.is_grad_enabled() else x


class UnderAutocast(Base):
    def forward(self, x):
        return x if torch.is_autocast_enabled() else x * self.gate(x)


class InHalf(Base):
    def forward(self, x):
        return x if x.dtype == torch.float16 else x * self.gate(x)


class OneSampleMore(Base):
    """Exact for all maps, by its values; the gate of half the batch."""

    def forward(self, x):
        a, b = x[: len(x) // 2], x[len(x) // 2 :]
        return torch.cat([a * self.gate(a), b * self.gate(b)])


class InPlace(Base):
    def forward(self, x):
        return x.mul_(self.gate(x))


class InPlaceRelu(Base):
    def forward(self, x):
        return F.relu(x, inplace=True) * self.gate(x)


class AvgAndMax(Base):
    def forward(self, x):
        logits = [self.excite(F.relu(self.squeeze(p(x, 1)))) for p in _POOLS]
        return x * torch.sigmoid(logits[0] + logits[1])


_POOLS = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


class MaxPooled(Base):
    def forward(self, x):
        pooled = F.adaptive_max_pool2d(x, 1)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(C, CR, 1),
            nn.BatchNorm2d(CR),
            nn.ReLU(),
            nn.Conv2d(CR, C, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.body(x)


class SameWeightTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Conv2d(C, C, 1)

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.only(F.relu(self.only(pooled))))


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = _convs()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.gamma * x * self.se(x)


class Epsilon(Base):
    def forward(self, x):
        return x * (self.gate(x) + 1e-6)


class Scaled(Base):
    def forward(self, x):
        return x * self.gate(x) * (1 + 1e-7)


class Softmax(Base):
    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.softmax(self.excite(F.relu(self.squeeze(pooled))), 1)


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.spatial = nn.Conv2d(C, 1, 3, padding=1)

    def forward(self, x):
        return x * torch.sigmoid(self.spatial(x))


class Callback(Base):
    """Calls whatever it was given."""

    def __init__(self):
        super().__init__()
        seen = self.seen_outside = []
        self.callback = lambda gate: seen.append(gate)

    def forward(self, x):
        gate = self.gate(x)
        self.callback(gate)
        return x * gate


class OneSampleReturnsPair(Base):
    def forward(self, x):
        return x * self.gate(x), self.gate(x)


class OddBatches(Base):
    def forward(self, x):
        return x if x.size(0) % 2 else x * self.gate(x)


class LooksUp(Base):
    def forward(self, x):
        return x if {64: True}.get(x.size(2)) else x * self.gate(x)


class CountsPositions(Base):
    def forward(self, x):
        return x if x.shape[2:].numel() > 10**6 else x * self.gate(x)


class Backend(Base):
    def forward(self, x):
        return x if torch.backends.cudnn.benchmark else x * self.gate(x)


class OneRow(Base):
    def forward(self, x):
        return x if x.size(2) == 1 else x * self.gate(x)


class SplitRows(Base):
    def forward(self, x):
        return torch.cat([part * self.gate(part) for part in x.split(2048, 2)], 2)


class DecaysWeights(Base):
    def forward(self, x):
        self.excite.weight.data.mul_(0.9)
        return x * self.gate(x)


class ChangesMode(Base):
    def forward(self, x):
        self.squeeze.eval()
        return x * self.gate(x)


class TagsResult(Base):
    def forward(self, x):
        y = x * self.gate(x)
        y.gate_of = "tagged"
        return y


class OneSampleInEvaluation(Base):
    def forward(self, x):
        return x if not self.training and x.size(0) == 1 else x * self.gate(x)


class OwnCall(Base):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


def _counting():
    count = 0

    class Nonlocal(Base):
        def forward(self, x):
            nonlocal count
            count += 1
            return x * self.gate(x)

    return Nonlocal()


def _wrong_order():
    class Reversed(nn.Module):
        """cat([sse, cse]): the other way around."""

        def __init__(self):
            super().__init__()
            self.c, self.s = ViewAndMlp(), nn.Conv2d(C, 1, 1)

        def forward(self, x):
            return torch.cat([x * torch.sigmoid(self.s(x)), self.c(x)], 1)

    return Reversed()


BLOCKS = {
    "moving window": (MovingWindow, "size of x"),
    "tiles of 16": (Tiles, "upsample|avg_pool2d|larger"),
    "tiles of 64": (AdaptiveTiles, "size of x"),
    "the first columns": (FirstColumns, "slice"),
    "the first of many columns": (FirstOfMany, "slice"),
    "large maps differ": (LargeMapsDiffer, "size of x"),
    "large batches differ": (LargeBatchesDiffer, "size of x"),
    "a size in an attribute": (SizeInAttribute, "size of x"),
    "keeps its gate": (KeepsGate, "sets the attribute attention"),
    "keeps its gate in evaluation": (KeepsGateInEvaluation, "sets the attribute attention"),
    "appends its gate": (AppendsGate, "changes an attribute"),
    "a dict of gates": (DictOfGates, "changes an attribute"),
    "a list of the class": (OfTheClass, "OfTheClass.maps, which can change"),
    "a meter": (Metered, "self.meter, a Meter"),
    "a global list": (Global, "the global variable GATES"),
    "counts calls": (Counted, "sets the attribute calls"),
    "a running mean": (Buffered, "changes a parameter or a buffer"),
    "setattr": (SetsByName, "calls setattr"),
    "prints": (Prints, "calls print"),
    "warns": (Warns, "the module warnings"),
    "noise times zero": (Noisy, "random numbers"),
    "random module": (PythonRandom, "the module random"),
    "time": (Timed, "the module time"),
    "environment": (Environment, "the module os"),
    "branch on the mean": (BranchOnMean, "the values of a tensor"),
    "branch on an item": (BranchOnItem, "uses item"),
    "where": (WhereLarge, "abs"),
    "clamped": (Clamped, "clamp"),
    "nan_to_num": (NanToNum, "nan_to_num"),
    "is_cuda": (OnCuda, "uses is_cuda"),
    "device.type": (OnDevice, "looks at the device"),
    "requires_grad": (NeedsGradient, "uses requires_grad"),
    "is_grad_enabled": (InTraining, "uses is_grad_enabled"),
    "is_autocast_enabled": (UnderAutocast, "uses is_autocast_enabled"),
    "float16": (InHalf, "in torch.float16"),
    "half the batch": (OneSampleMore, "slice"),
    "in place": (InPlace, "in-place"),
    "in-place ReLU of x": (InPlaceRelu, "in-place"),
    "mean and maximum": (AvgAndMax, "max_pool"),
    "maximum": (MaxPooled, "max_pool"),
    "batch norm": (Normalised, "body.2 is a BatchNorm2d"),
    "one weight twice": (SameWeightTwice, None),
    "a learned scale": (Temperature, "gamma"),
    "epsilon": (Epsilon, "something else"),
    "scaled by little": (Scaled, "something else"),
    "softmax": (Softmax, "softmax"),
    "3x3": (Dilated, "1x1"),
    "a callback": (Callback, "can change"),
    "two results": (OneSampleReturnsPair, "returns a tuple"),
    "the other order": (_wrong_order, "something else"),
    "odd batches": (OddBatches, "size of x"),
    "a size looked up": (LooksUp, "size of x"),
    "positions counted": (CountsPositions, "size of x"),
    "a backend's setting": (Backend, "uses backends"),
    "one row": (OneRow, "one row"),
    "rows in parts": (SplitRows, "split"),
    "decays weights": (DecaysWeights, "changes a parameter"),
    "changes the mode": (ChangesMode, "uses eval"),
    "tags its result": (TagsResult, "sets the attribute gate_of"),
    "a call of its own": (OwnCall, "__call__ of its own"),
    "nonlocal": (_counting, "sets the variable count"),
    "a gate": (ChannelGate, "returns a gate"),
}
