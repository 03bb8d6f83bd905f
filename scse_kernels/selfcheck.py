"""Whether a backend computes what the reference defines: `python -m scse_kernels` asks."""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, batch_norm, functional, ops, reference
from .batch_norm import ops as norm_ops
from .batch_norm import reference as norm_reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Odd sizes leave a remainder in every vector and strip. One, two and three spatial axes.
SHAPES = ((3, 19, 201), (2, 67, 33, 31), (2, 24, 7, 9, 11))
# GPUs get these as well: kernels access them 16 bytes at a time, those above mostly element by
# element.
WIDE_SHAPES = ((4, 64, 32, 32), (2, 512, 14, 14))
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NORM, EPS = "bn_relu_scse", 1e-5
OPERATIONS = ("cse", "sse", *ops.COMBINE, NORM)
ARGUMENTS = ("x", "w1", "b1", "w2", "b2", "ws", "bs")


class Case(NamedTuple):
    """One comparison: an operation ("cse", "sse", how scse combines, or NORM with the sum) on one
    kind of input."""

    operation: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    channels_last: bool

    def __str__(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.operation} {list(self.shape)}{layout}"


class Worst(NamedTuple):
    """The largest error found, in units of its tolerance (so more than one is too much)."""

    error: float
    where: str


class Family(NamedTuple):
    """Kernels that can be asked for: a backend and what of it the environment chooses."""

    name: str
    backend: str
    environment: dict[str, str]


def families(backend: str, device: torch.device) -> list[Family]:
    """The families of kernels that a backend, which can be used there, has on `device`."""
    if device.type == "cuda" and backend == "cuda":
        # Code for 8.0 has no overlap.
        newer = torch.ops.scse_kernels.cuda_architecture(device.index) >= 90
        return [
            Family("cuda", backend, {"SCSE_CUDA_OVERLAP": "1"}),
            Family("cuda, no overlap", backend, {"SCSE_CUDA_OVERLAP": "0"}),
        ][: 2 if newer else 1]
    if device.type == "cuda" and backend == "triton":
        return [
            Family("triton", backend, {"SCSE_TRITON_LAUNCHES": "3"}),
            Family("triton, one launch", backend, {"SCSE_TRITON_LAUNCHES": "1"}),
        ]
    return [Family(backend, backend, {})]


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Has these environment variables set meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cases(dtype: torch.dtype, device: torch.device, backend: str) -> Iterator[Case]:
    """Every operation that the backend has, on each kind of map. Triton must compile its kernels
    first, for about a second each. So Triton gets one operation for each map, in turn, and each
    dtype begins with another one."""
    operations = OPERATIONS if backend in ("eager", *norm_ops.BACKENDS) else OPERATIONS[:-1]
    maps = [
        (shape, channels_last)
        for shape in (*SHAPES, *(WIDE_SHAPES if device.type == "cuda" else ()))
        for channels_last in (False, True)[: 1 + (len(shape) in CHANNELS_LAST)]
    ]
    for number, (shape, channels_last) in enumerate(maps, DTYPES.index(dtype)):
        turn = number % len(operations)
        for operation in (operations[turn],) if backend == "triton" else operations:
            yield Case(operation, dtype, shape, channels_last)


def inputs(case: Case) -> tuple[dict[str, Tensor | None], Tensor]:
    """The arguments of scse() by name, None for an absent branch, and dy, all on the CPU.

    x has zeros, as after a ReLU: there the two products of "max" tie.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, c, *spatial = case.shape
    hidden = c // 2
    x = normal(*case.shape)
    x = torch.where(x.abs() < 0.2, 0.0, x)
    # Layers' usual scale, 1 / sqrt(fan in), keeps the gates away from 0 and 1.
    channel = (normal(hidden, c) * c**-0.5, normal(hidden), normal(c, hidden) * hidden**-0.5)
    tensors = (x, *channel, normal(c), normal(c) * c**-0.5, normal(1))
    absent = {"cse": ("ws", "bs"), "sse": ("w1", "b1", "w2", "b2")}.get(case.operation, ())
    named = {
        name: None if name in absent else tensor.to(case.dtype)
        for name, tensor in zip(ARGUMENTS, tensors, strict=True)
    }
    if case.operation == NORM:
        # What BatchNorm makes of x stays away from 0: there a rounding would open or close a ReLU.
        weight, bias = normal(c) * 0.1 + 1, normal(c)
        per_channel = (1, c, *(1,) * len(spatial))
        v = x * weight.view(per_channel) + bias.view(per_channel)
        v = torch.where(v.abs() < 0.2, v + v.sign() * 0.2, v)
        named["x"] = ((v - bias.view(per_channel)) / weight.view(per_channel)).to(case.dtype)
        named |= {"bn_weight": weight.to(case.dtype), "bn_bias": bias.to(case.dtype)}
    dy = normal(n, 2 * c if case.operation == "concat" else c, *spatial).to(case.dtype)
    if case.channels_last:
        memory_format = CHANNELS_LAST[x.dim()]
        named["x"] = named["x"].contiguous(memory_format=memory_format)
        dy = dy.contiguous(memory_format=memory_format)
    return named, dy


def _norm(function, **keywords):
    """bn_relu_scse of named arguments, in training and without running statistics."""

    def called(x, bn_weight, bn_bias, **parameters):
        return function(x, bn_weight, bn_bias, None, None, *parameters.values(), **keywords)

    return called


def with_gradients(function, named: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """y = function(**named) under "y", and under "d<name>" the gradient of each argument there."""
    leaves = {k: t.detach().requires_grad_() for k, t in named.items() if t is not None}
    y = function(**{**named, **leaves})
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}}


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    """What the reference computes in float64 from the same, already rounded, inputs."""
    named, dy = inputs(case)
    named = {name: None if t is None else t.double() for name, t in named.items()}
    if case.operation == NORM:
        return with_gradients(_norm(norm_reference.bn_relu_scse, eps=EPS), named, dy.double())
    combine = case.operation if case.operation in ops.COMBINE else "add"
    return with_gradients(lambda **a: reference.scse(**a, combine=combine), named, dy.double())


def computed(case: Case, backend: str, device: torch.device) -> dict[str, Tensor]:
    """What the backend computes, by way of the public functions."""

    def function(**named):
        if case.operation == NORM:
            keywords = {"training": True, "eps": EPS, "backend": backend}
            return _norm(batch_norm.bn_relu_scse, **keywords)(**named)
        if case.operation in ops.COMBINE:
            return functional.scse(**named, combine=case.operation, backend=backend)
        branch = {name: t for name, t in named.items() if t is not None or name == "x"}
        return getattr(functional, case.operation)(**branch, backend=backend)

    named, dy = inputs(case)
    named = {name: None if t is None else t.to(device) for name, t in named.items()}
    return with_gradients(function, named, dy.to(device))


def tolerance(want: Tensor, case: Case) -> float:
    """How far a result may be from `want`.

    Backends form sums in float32 (float64 for float64) and round the result once to case.dtype. So
    a few roundings of that dtype are allowed, of the largest magnitude. A gradient may be a sum of
    n terms of either sign. Then it is about sqrt(n) times smaller than the sum of their magnitudes,
    and the roundings of the sum weigh that much more.
    """
    rounding = torch.finfo(case.dtype).eps
    rounding_of_sums = torch.finfo(reference.accumulation_dtype(case.dtype)).eps
    few = 4 * rounding + 4 * math.sqrt(math.prod(case.shape)) * rounding_of_sums
    return few * want.abs().max().item()


def error(got: Tensor, want: Tensor, case: Case) -> float:
    """The largest error of `got` in tolerances; infinite where it isn't even comparable."""
    if got.shape != want.shape or got.dtype != case.dtype:
        return math.inf
    largest = (got.cpu().double() - want).abs().max().item()
    return math.inf if math.isnan(largest) else largest / tolerance(want, case)


def worst(family: Family, device: torch.device, dtype: torch.dtype) -> Worst:
    """Compares kernels with the reference."""
    found = None
    for case in cases(dtype, device, family.backend):
        try:
            with environment(family.environment):
                got = computed(case, family.backend, device)
        except Exception as raised:  # a broken backend may fail in any way, and is to be reported
            return Worst(math.inf, f"{case}: {type(raised).__name__}: {raised}")
        for name, want in expected(case).items():
            here = Worst(error(got[name], want, case), f"{name} of {case}")
            found = max(found or here, here, key=lambda w: w.error)
    return found


class Row(NamedTuple):
    """How one family of kernels compares with the reference, on one device and in one dtype."""

    family: str
    device: str
    dtype: str
    verdict: str  # "ok" or "WRONG"
    error: str
    where: str


def compared(family: Family, device: torch.device, dtype: torch.dtype) -> Row:
    names = family.name, str(device), str(dtype).removeprefix("torch.")
    found = worst(family, device, dtype)
    return Row(*names, "ok" if found.error <= 1 else "WRONG", f"{found.error:.2g}", found.where)


def check(pairs: list[tuple[str, torch.device]]) -> Iterator[Row]:
    """Compares every family of these usable backends, in each dtype that it takes."""
    for backend, device in pairs:
        for family in families(backend, device):
            for dtype in DTYPES:
                if not backends.why_not(backend, device, dtype):
                    yield compared(family, device, dtype)
