"""Random problems of BatchNorm + ReLU + scSE, with the budget of scSE itself. The answer is
BatchNorm's formula, a ReLU and the article's formulas in float64. Errors are measured by those of
torch's BatchNorm and ReLU in front of the plain module."""

from dataclasses import dataclass, replace
from typing import ClassVar

import budget
import torch
from torch import Tensor
from torch.nn import functional as F

from scse_kernels import bn_relu_scse
from scse_kernels.batch_norm import ops

#: The backends that can be tested.
WITH_KERNELS = ("eager", *ops.BACKENDS)
NAMES = ("u", "bn_weight", "bn_bias", *budget.NAMES[1:])
EPS = 1e-3


@dataclass(frozen=True)
class NormCase(budget.Case):
    """u (as `x`), the parameters (None: absent), dy, and the running statistics: None where the
    call is in training and tracks none."""

    running: tuple[Tensor, Tensor] | None = None
    training: bool = True
    names: ClassVar[tuple[str, ...]] = NAMES

    def in_float64(self):
        running = self.running and tuple(t.double() for t in self.running)
        return replace(super().in_float64(), running=running)

    def call(self, variant, *, backend="auto", **arguments):
        mean, var = self.running or (None, None)
        device = arguments["u"].device
        if mean is not None:  # of its own, since training changes them
            mean, var = mean.to(device, copy=True), var.to(device, copy=True)
        return bn_relu_scse(
            **arguments, running_mean=mean, running_var=var, training=self.training, eps=EPS,
            combine=variant if variant in budget.COMBINES else "add", backend=backend,
        )  # fmt: skip

    def formulas(self, variant, *, u, bn_weight, bn_bias, **parameters):
        axes = (0, *range(2, u.dim()))
        mean, var = self.running or (None, None)
        if self.training:
            mean = u.mean(axes)
            var = ((u - _over(mean, u)) ** 2).mean(axes)
        v = (u - _over(mean, u)) / (_over(var, u) + EPS).sqrt()
        if bn_weight is not None:
            v = v * _over(bn_weight, u)
        if bn_bias is not None:
            v = v + _over(bn_bias, u)
        return budget.formulas(variant, v.clamp(min=0), **parameters)

    def plain_module(self, variant, *, u, bn_weight, bn_bias, **parameters):
        # BatchNorm's own tensors are float32 beside half maps, as autocast has them
        dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        mean, var = self.running or (None, None)
        given = (None if t is None else t.to(dtype) for t in (mean, var, bn_weight, bn_bias))
        mean, var, weight, bias = given
        if self.training:
            mean = var = None
        z = F.relu(F.batch_norm(u, mean, var, weight, bias, self.training, 0.0, EPS))
        return budget.plain_module(variant, z, **parameters)


def _over(t, u):
    """t [C] beside u."""
    return t.reshape(-1, *(1,) * (u.dim() - 2))


def make_case(
    shape, variant="add", dtype=torch.float32, reduction=2, training=True, affine=True, mean=0.0,
    parameter_dtype=None, seed=0, **options,
) -> NormCase:  # fmt: skip
    """Random tensors. `mean`: of each channel, in its standard deviations, besides a random one.

    Values near the ReLU's edge are moved away from it. A rounding would decide on which side they
    fall, and with that their whole gradient.
    """
    case = budget.make_case(
        shape, variant, torch.float64, reduction, parameter_dtype=parameter_dtype or dtype,
        seed=seed, **options,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed + shape[1])
    channels = shape[1]
    weight = torch.randn(channels, generator=g).double()
    bias = 0.5 * torch.randn(channels, generator=g).double()
    axes = (0, *range(2, len(shape)))
    std = case.x.std(axes, correction=0) if case.x[:, 0].numel() > 1 else torch.ones(channels)
    u = case.x + mean * _over(std, case.x)
    running = (u.mean(axes) + 0.3 * std, (std**2) * (0.5 + torch.rand(channels, generator=g)))
    if not affine:
        weight = bias = None
    parameter_dtype = parameter_dtype or dtype
    norm = tuple(None if t is None else t.to(parameter_dtype) for t in (weight, bias))
    result = NormCase(
        variant, u.to(dtype), (*norm, *case.parameters), case.dy.to(dtype),
        running=tuple(t.to(parameter_dtype) for t in running), training=training,
    )  # fmt: skip
    for _ in range(3):  # each time the statistics move a little
        result = replace(result, x=_off_the_edge(result).to(dtype))
    return result


def _off_the_edge(case):
    wide = case.in_float64()
    u, (weight, bias, *_) = wide.x, wide.parameters
    axes = (0, *range(2, u.dim()))
    mean, var = wide.running
    if case.training:
        var, mean = torch.var_mean(u, axes, correction=0)
    std = (var + EPS).sqrt()
    rounding = torch.finfo(torch.float64 if case.x.dtype == torch.float64 else torch.float32).eps
    margin = _over(32 * rounding * (mean.abs() + u.abs().amax(axes) + std), u)
    edge = mean  # where v is 0
    if weight is not None:
        edge = mean - std * bias / weight
        margin = margin + _over(32 * rounding * (bias / weight).abs() * std, u)
    distance = u - _over(edge, u)
    return torch.where(distance.abs() < margin, u + 2 * margin, u)
