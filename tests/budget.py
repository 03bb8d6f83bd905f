"""Random scSE problems, their answer in float64, and how far from it an answer may be.

The answer comes from the formulas of the article, written here a second time: so the package's own
reference is tested like every other backend. An error, of the output or of any gradient, may be as
large as the sum of

- four times the error of the plain module that people have today, computed in x's dtype;
- what moving x and dy by four random roundings of that dtype changes in the answer;
- four roundings of the largest magnitude.

For y and dx each sample's each channel has a budget of its own, since their magnitudes differ by
decades; a parameter's gradient has one.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scse_kernels

COMBINES = ("add", "max", "mul", "concat")
#: the branches that are present and how they are combined
VARIANTS = ("cse", "sse", *COMBINES)
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "elu", "none")
GATES = ("sigmoid", "hard_sigmoid")
NAMES = ("x", "w1", "b1", "w2", "b2", "ws", "bs")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ROUNDINGS = 4
DRAWS = 3


@dataclass(frozen=True)
class Case:
    """x, the parameters (None: absent) and dy of one call, on the CPU.

    `names` are those of x and the parameters; `call` is the package's function, `formulas` and
    `plain_module` are what it is held to.
    """

    variant: str
    x: Tensor
    parameters: tuple[Tensor | None, ...]
    dy: Tensor
    #: activation, slope, gate and residual, where they aren't the usual ones
    excitation: dict = field(default_factory=dict)
    names: ClassVar[tuple[str, ...]] = NAMES

    def call(self, variant, **arguments) -> Tensor:
        return call(variant, **arguments)

    def formulas(self, variant, **arguments) -> Tensor:
        return formulas(variant, **arguments)

    def plain_module(self, variant, **arguments) -> Tensor:
        return plain_module(variant, **arguments)

    def in_float64(self) -> "Case":
        parameters = tuple(None if p is None else p.double() for p in self.parameters)
        return replace(self, x=self.x.double(), parameters=parameters, dy=self.dy.double())

    def arranged(self, x=None, dy=None) -> "Case":
        """The same values in other strides (functions Tensor -> Tensor)."""
        return replace(self, x=x(self.x) if x else self.x, dy=dy(self.dy) if dy else self.dy)

    def in_channels_last(self, really: bool = True) -> "Case":
        """The same values, with x and dy in channels_last (or not, as they are)."""
        return self.arranged(channels_last, channels_last) if really else self

    def in_layout(self, layout: str) -> "Case":
        """The same values, with x and dy "contiguous", as they are, or "channels_last"."""
        return self.in_channels_last(layout == "channels_last")


def channels_last(t: Tensor) -> Tensor:
    """A map in channels_last or channels_last_3d; with one spatial axis contiguous."""
    memory_format = CHANNELS_LAST.get(t.dim(), torch.contiguous_format)
    return t.contiguous(memory_format=memory_format)


def with_layouts(shapes) -> list:
    """Parameters of a test: each (shape, reduction) in every layout that maps of its axes have."""
    return [
        pytest.param(shape, reduction, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
        for shape, reduction in shapes
        for layout in ("contiguous", "channels_last")
        if layout == "contiguous" or len(shape) > 3
    ]


def spread(shape, generator, decades=2.5, largest=3.0) -> Tensor:
    """Random float64 values; each sample's each channel has a magnitude and a mean of its own."""
    per_channel = (*shape[:2], *(1 for _ in shape[2:]))
    magnitude = largest * 10 ** (-decades * torch.rand(per_channel, generator=generator).double())
    mean = torch.randn(per_channel, generator=generator).double().clamp(-2, 2)
    return magnitude * (0.7 * torch.randn(shape, generator=generator).double() + 0.5 * mean)


def make_parameters(
    channels,
    reduction,
    variant="add",
    dtype=torch.float32,
    biases=True,
    trailing=0,
    generator=None,
) -> tuple[Tensor | None, ...]:
    """w1, b1, w2, b2, ws, bs; `trailing` axes of size one follow the weights' own."""
    hidden = max(1, channels // reduction)
    g = generator or torch.Generator().manual_seed(channels)

    def normal(*shape, scale, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=g)).to(dtype)

    ones = (1,) * trailing
    w1 = normal(hidden, channels, *ones, scale=2 * channels**-0.5)
    b1 = normal(hidden, scale=0.5, mean=0.3)
    w2 = normal(channels, hidden, *ones, scale=1.5 * hidden**-0.5)
    b2 = normal(channels, scale=0.5)
    ws = normal(*((1, channels, *ones) if trailing else (channels,)), scale=channels**-0.5)
    bs = normal(1, scale=0.5)
    if not biases:
        b1 = b2 = bs = None
    if variant == "cse":
        ws = bs = None
    if variant == "sse":
        w1 = b1 = w2 = b2 = None
    return w1, b1, w2, b2, ws, bs


def make_case(
    shape,
    variant="add",
    dtype=torch.float32,
    reduction=2,
    biases=True,
    trailing=0,
    parameter_dtype=None,
    seed=0,
    **excitation,
) -> Case:
    g = torch.Generator().manual_seed(
        seed + sum(p * s for p, s in zip((7, 5, 3, 2, 1), shape, strict=False))
    )
    y_shape = (shape[0], shape[1] * (1 + (variant == "concat")), *shape[2:])
    return Case(
        variant,
        spread(shape, g).to(dtype),
        make_parameters(
            shape[1], reduction, variant, parameter_dtype or dtype, biases, trailing, generator=g
        ),
        spread(y_shape, g, largest=1.0).to(dtype),
        excitation,
    )


def call(variant, x, w1, b1, w2, b2, ws, bs, backend="auto", **excitation) -> Tensor:
    """The package's function for `variant`."""
    options = {"backend": backend, **excitation}
    if variant == "cse":
        return scse_kernels.cse(x, w1, b1, w2, b2, **options)
    if variant == "sse":
        return scse_kernels.sse(x, ws, bs, **options)
    return scse_kernels.scse(x, w1, b1, w2, b2, ws, bs, combine=variant, **options)


def _combined(variant, by_channel, by_position):
    match variant:
        case "cse":
            return by_channel
        case "sse":
            return by_position
        case "add":
            return by_channel + by_position
        case "max":
            return torch.maximum(by_channel, by_position)
        case "mul":
            return by_channel * by_position
        case "concat":
            return torch.cat([by_channel, by_position], 1)


def _activated(v, activation, slope) -> Tensor:
    """The hidden layer's activation, from its definition."""
    below = v.clamp(max=0)
    match activation:
        case "relu":
            return v.clamp(min=0)
        case "leaky_relu":
            return v.clamp(min=0) + (0.01 if slope is None else slope) * below
        case "silu":
            return v * torch.sigmoid(v)
        case "gelu":
            return v * (1 + torch.erf(v / 2**0.5)) / 2
        case "gelu_tanh":
            return v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))) / 2
        case "elu":
            return v.clamp(min=0) + (1.0 if slope is None else slope) * (below.exp() - 1)
        case "none":
            return v


def _gate(v, gate) -> Tensor:
    return torch.sigmoid(v) if gate == "sigmoid" else ((v + 3) / 6).clamp(0, 1)


def formulas(
    variant, x, w1, b1, w2, b2, ws, bs, activation="relu", slope=None, gate="sigmoid",
    residual=False,
) -> Tensor:  # fmt: skip
    """scSE as the article writes it, in the dtype of its arguments."""
    flat = x.reshape(*x.shape[:2], -1)
    by_channel = by_position = None
    if w1 is not None:
        pooled = flat.sum(2) / flat.shape[2]
        hidden = (w1.reshape(w1.shape[:2]) * pooled[:, None]).sum(2)
        hidden = _activated(hidden if b1 is None else hidden + b1, activation, slope)
        excited = (w2.reshape(w2.shape[:2]) * hidden[:, None]).sum(2)
        c = _gate(excited if b2 is None else excited + b2, gate)
        by_channel = (flat * c[:, :, None]).reshape(x.shape)
    if ws is not None:
        squeezed = (flat * ws.reshape(1, -1, 1)).sum(1, keepdim=True)
        s = _gate(squeezed if bs is None else squeezed + bs, gate)
        by_position = (flat * s).reshape(x.shape)
    y = _combined(variant, by_channel, by_position)
    return y + x if residual else y


def _plain_activation(v, activation, slope) -> Tensor:
    match activation:
        case "leaky_relu":
            return F.leaky_relu(v, 0.01 if slope is None else slope)
        case "gelu_tanh":
            return F.gelu(v, approximate="tanh")
        case "elu":
            return F.elu(v, 1.0 if slope is None else slope)
        case "none":
            return v
    return getattr(F, activation)(v)


def plain_module(
    variant, x, w1, b1, w2, b2, ws, bs, activation="relu", slope=None, gate="sigmoid",
    residual=False,
) -> Tensor:  # fmt: skip
    """What an eager module does today: pooling, linear layers, a 1x1 convolution, products."""
    w1, b1, w2, b2, ws, bs = (
        None if p is None else p.to(x.dtype) for p in (w1, b1, w2, b2, ws, bs)
    )
    axes = x.dim() - 2
    close = torch.sigmoid if gate == "sigmoid" else F.hardsigmoid
    by_channel = by_position = None
    if w1 is not None:
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[axes - 1]
        hidden = F.linear(pool(x, 1).flatten(1), w1.flatten(1), b1)
        hidden = _plain_activation(hidden, activation, slope)
        c = close(F.linear(hidden, w2.flatten(1), b2))
        by_channel = x * c.reshape(*c.shape, *(1,) * axes)
    if ws is not None:
        conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        squeezed = conv(x, ws.reshape(1, -1, *(1,) * axes), None if bs is None else bs.flatten())
        by_position = x * close(squeezed)
    y = _combined(variant, by_channel, by_position)
    return y + x if residual else y


def moved(t: Tensor, device: str) -> Tensor:
    """t on the device with the same strides and offset, and with all that lies around it."""
    around = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return around.to(device).as_strided(t.size(), t.stride(), t.storage_offset())


def output_and_gradients(function, case: Case, device="cpu") -> dict[str, Tensor]:
    """y and d<name> for each argument that is there; asserts that no argument was changed."""
    arguments = {
        name: None if t is None else moved(t.detach(), device).requires_grad_()
        for name, t in zip(case.names, (case.x, *case.parameters), strict=True)
    }
    dy = moved(case.dy, device)
    present = {name: t for name, t in arguments.items() if t is not None}
    given = {"dy": dy, **present}
    before = {name: t.detach().clone() for name, t in given.items()}
    y = function(case.variant, **arguments, **case.excitation)
    gradients = torch.autograd.grad(y, list(present.values()), dy)
    for name, t in given.items():
        assert same_bits(t.detach(), before[name]), f"{name} was changed"
    results = {"y": y.detach()}
    results.update({f"d{name}": g for name, g in zip(present, gradients, strict=True)})
    return results


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, dtype and shape, a NaN being equal to itself."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.25).cpu(), b.nan_to_num(7.25).cpu())


def answer(case: Case) -> dict[str, Tensor]:
    """The float64 answer."""
    return output_and_gradients(case.formulas, case.in_float64())


def _largest(name: str, t: Tensor) -> Tensor:
    """Largest magnitude, [N, C, 1, ...] for a feature map and one number for a parameter."""
    axes = tuple(range(2, t.dim())) if name in ("y", "dx", "du") else tuple(range(t.dim()))
    return t.abs().amax(axes, keepdim=True) if axes else t.abs()


def allowances(case: Case, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """The largest error allowed in y and in each gradient."""
    # as contiguous tensors: for odd strides a library may take a slow path with other errors
    case = case.arranged(torch.Tensor.contiguous, torch.Tensor.contiguous)
    dtype = case.x.dtype
    rounding = torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(0)

    def move(t):
        sign = torch.randint(0, 2, t.shape, generator=generator).double() * 2 - 1
        return (t.double() * (1 + ROUNDINGS * rounding * sign)).to(dtype)

    plain = {name: torch.zeros_like(_largest(name, t)) for name, t in truth.items()}
    moved = dict(plain)
    for draw in range(DRAWS + 1):
        # the plain module's error depends on luck: so it is taken on the moved inputs too
        near = case.arranged(move, move) if draw else case
        near_truth = answer(near) if draw else truth
        near_plain = output_and_gradients(near.plain_module, near)
        for name, t in near_truth.items():
            error = _largest(name, near_plain[name].double() - t)
            plain[name] = torch.maximum(plain[name], error)
            moved[name] = torch.maximum(moved[name], _largest(name, t - truth[name]))

    # a gate below the smallest normal number may count as that number: what this makes of x and dy
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = case.x.double(), case.dy.double()
    floor = torch.finfo(accumulated).tiny * (1 + x.abs().max()) ** 3 * (1 + dy.abs().max())
    floor = floor * x.numel()
    budget = {}
    for name, t in truth.items():
        finfo = torch.finfo(near_plain[name].dtype)
        # below the smallest normal number roundings stop getting smaller
        largest = _largest(name, t).clamp(min=finfo.tiny)
        # a gradient in a coarser dtype than x's is rounded once to that
        roundings = (ROUNDINGS * rounding + finfo.eps / 2) * largest
        budget[name] = 4 * plain[name] + moved[name] + roundings + floor
        assert budget[name].isfinite().all(), f"the plain module's {name} is not finite"
    return budget


def errors(case: Case, got: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of y and of each gradient, in units of what is allowed; asserts that they
    have the right names, dtypes and shapes."""
    truth = answer(case)
    budget = allowances(case, truth)
    assert got.keys() == truth.keys()
    assert got["y"].dtype == got[f"d{case.names[0]}"].dtype == case.x.dtype
    for name, t in zip(case.names[1:], case.parameters, strict=True):
        if t is not None:
            assert got[f"d{name}"].dtype == t.dtype, f"d{name} has {got[f'd{name}'].dtype}"
    found = {}
    for name, expected in truth.items():
        assert got[name].shape == expected.shape, f"{name} has shape {tuple(got[name].shape)}"
        error = _largest(name, got[name].cpu().double() - expected)
        ratio = (error / budget[name]).nan_to_num(0.0 if expected.eq(0).all() else torch.inf)
        ratio[error == 0] = 0
        found[name] = ratio.max().item()
    return found


def judge(case: Case, got: dict[str, Tensor]) -> float:
    """Assert that y and the gradients of `case` are within budget; returns the largest error, in
    units of what is allowed for it."""
    found = errors(case, got)
    for name, error in found.items():
        assert error <= 1, f"{name}: error is {error:.3g} times what is allowed"
    return max(found.values())


def check(case: Case, target) -> dict[str, Tensor]:
    """Assert that a backend's y and gradients are within budget; returns them."""
    got = output_and_gradients(partial(case.call, backend=target.backend), case, target.device)
    judge(case, got)
    return got


def check_infinite_weight(case: Case, target) -> None:
    """Assert that an infinite element of ws does what it does in float64.

    It opens the spatial gate wherever its channel is positive, and here that is everywhere. Beyond
    the map zero times infinity would be NaN, which must not come into the sums.
    """
    case.x[:, 0] = case.x[:, 0].abs() + 0.1
    case.parameters[4].view(-1)[0] = torch.inf
    got = output_and_gradients(partial(case.call, backend=target.backend), case, target.device)
    for name, right in answer(case).items():
        finite = right.isfinite()
        actual = got[name].cpu().double()
        assert torch.equal(actual.isfinite(), finite), f"{name} is not finite where it should be"
        torch.testing.assert_close(actual[finite], right[finite], rtol=1e-3, atol=1e-4)
