"""What the tests of plans call, by one interface: scSE, and BatchNorm + ReLU + scSE."""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import budget
import norm_budget
import torch
from gpu import recorder
from torch import Tensor

from scse_kernels import bn_relu_scse, ops
from scse_kernels.batch_norm import ops as norm_ops

SHAPE = (2, 32, 6, 8)


def sliced(t: Tensor) -> Tensor:
    """With rows of which every second one is used, samples apart."""
    return torch.empty((2, 64, 6, 8), dtype=t.dtype)[:, ::2].copy_(t)


def expanded(t: Tensor) -> Tensor:
    return t[:1, :1, :1, :1].expand(t.shape)


class Operator:
    """Calls of one operator through Triton; what is launched goes to a `recorder.Driver`."""

    names: tuple[str, ...]  # of the map and of the parameters
    forward: int  # launches of a call, in training
    backward: int
    seen: tuple[str, ...]  # the operators that a call of forward and backward is
    tables = ops  # where forward and backward are looked up when somebody must see operators
    make_case: Callable

    @property
    def launches(self) -> int:
        return self.forward + self.backward

    def call(self, case, x: Tensor | None = None, **options) -> Tensor:
        """y; x in place of the case's."""
        raise NotImplementedError

    def both(self, case, needs: tuple[int, ...] | None = None, **options) -> None:
        """Forward and backward of a case; needs: places of what gets a gradient (None: all)."""
        leaves = [case.x, *case.parameters]
        for i, leaf in enumerate(leaves):
            if leaf is not None:
                leaf.requires_grad_(needs is None or i in needs)
        y = self.call(case, **options)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        torch.autograd.grad(y, wanted, case.dy)

    def tensors(self, case) -> dict[str, Tensor | None]:
        return dict(zip((*self.names, "dy"), (case.x, *case.parameters, case.dy), strict=True))

    def shown(self, case, log: list) -> list:
        """Launches without what differs from call to call."""
        names = {t.data_ptr(): name for name, t in self.tensors(case).items() if t is not None}
        return recorder.shown(names, log)

    def check(self, gpu: recorder.Driver, case, **options) -> list:
        """Asserts that a call and the next one launch what Triton's own way does."""
        seen = []
        for way in (contextlib.nullcontext, contextlib.nullcontext, recorder.a_profiler):
            gpu.log.clear()
            with way():
                self.both(case, **options)
            seen.append(self.shown(case, gpu.log))
        assert seen[0] == seen[1] == seen[2]
        return seen[0]

    def changed(self, name: str, change: Callable[[Tensor], Tensor | None]):
        """The first case with one of its tensors changed."""
        case = self.make_case(SHAPE)
        if name in (self.names[0], "dy"):
            field = "dy" if name == "dy" else "x"
            return replace(case, **{field: change(getattr(case, field))})
        parameters = list(case.parameters)
        at = self.names.index(name) - 1
        parameters[at] = change(parameters[at])
        return replace(case, parameters=tuple(parameters))

    def kinds(self) -> dict[str, tuple]:
        """What differs from the first -> the case, and options of `both`."""
        make, x = self.make_case, self.names[0]
        half = {"dtype": torch.float16, "parameter_dtype": torch.float32}
        cases = {
            "first": make(SHAPE),
            "samples": make((1, *SHAPE[1:])),
            "positions": make((*SHAPE[:2], 6, 9)),
            "axes": make((2, 32, 48)),
            "channels": make((2, 33, 6, 8)),
            "hidden": make(SHAPE, reduction=4),
            "dtype": make(SHAPE, dtype=torch.float16),
            "double": make(SHAPE, dtype=torch.float64),
            "dtype of maps": make(SHAPE, **half),
            "channels_last": make(SHAPE).in_channels_last(),
            f"{x} in slices": self.changed(x, sliced),
            "dy in slices": self.changed("dy", sliced),
            "dy expanded": self.changed("dy", expanded),
            **{variant: make(SHAPE, variant) for variant in ("max", "concat", "cse", "sse")},
        }
        for name in self.tensors(make(SHAPE)):
            cases[f"{name} moved"] = self.changed(name, lambda t: recorder.moved(t, 1))
            if name not in (x, "dy"):
                cases[f"{name} half"] = self.changed(name, Tensor.half)
        kinds = {name: (case, {}) for name, case in cases.items()}
        for at, name in enumerate(self.names):
            if name in (x, "w1", "ws", "bn_weight"):
                kinds[f"d{name} alone"] = make(SHAPE), {"needs": (at,)}
        return kinds


class _Scse(Operator):
    names = ("x", "w1", "b1", "w2", "b2", "ws", "bs")
    forward, backward = 3, 3
    seen = ("scse_kernels.triton_forward.default", "scse_kernels.triton_backward.default")
    make_case = staticmethod(budget.make_case)

    def call(self, case, x=None, **options):
        x = case.x if x is None else x
        return budget.call(case.variant, x, *case.parameters, backend="triton", **options)

    def kinds(self):
        first = self.make_case(SHAPE)
        return super().kinds() | {
            "half": (self.make_case(SHAPE, dtype=torch.bfloat16), {}),
            "w1 strided": (self.changed("w1", lambda w: w.t().contiguous().t()), {}),
            **{f"no {b}": (self.changed(b, lambda b: None), {}) for b in ("b1", "b2", "bs")},
            "activation": (first, {"activation": "silu"}),
            "slope": (first, {"activation": "elu", "slope": 0.5}),
            "another slope": (first, {"activation": "elu", "slope": 0.25}),
            "gate": (first, {"gate": "hard_sigmoid"}),
        }


class _Norm(Operator):
    names = ("u", "bn_weight", "bn_bias", "w1", "b1", "w2", "b2", "ws", "bs")
    forward, backward = 5, 4
    evaluation = 3  # launches forward in evaluation
    seen = ("scse_kernels.triton_bn_forward.default", "scse_kernels.triton_bn_backward.default")
    tables = norm_ops
    make_case = staticmethod(norm_budget.make_case)

    def arguments(self, case, u=None, momentum=0.1, eps=1e-3) -> dict:
        """Those of bn_relu_scse; its running statistics are the case's own."""
        mean, var = case.running or (None, None)
        combine = case.variant if case.variant in ("max", "mul", "concat") else "add"
        x = case.x if u is None else u
        named = dict(zip(self.names, (x, *case.parameters), strict=True))
        named |= {"running_mean": mean, "running_var": var, "training": case.training}
        return named | {"momentum": momentum, "eps": eps, "combine": combine, "backend": "triton"}

    def call(self, case, x=None, **options):
        return bn_relu_scse(**self.arguments(case, x, **options))

    def tensors(self, case):
        running = case.running or (None, None)
        names = zip(("running_mean", "running_var"), running, strict=True)
        return super().tensors(case) | dict(names)

    def changed(self, name, change):
        if name not in ("running_mean", "running_var"):
            return super().changed(name, change)
        case = self.make_case(SHAPE)
        at = name == "running_var"
        running = tuple(change(t) if i == at else t for i, t in enumerate(case.running))
        return replace(case, running=running)

    def kinds(self):
        first = self.make_case(SHAPE)
        return super().kinds() | {
            "not affine": (self.make_case(SHAPE, affine=False), {}),
            "evaluation": (self.make_case(SHAPE, training=False), {}),
            "not tracked": (replace(first, running=None), {}),
            "eps": (first, {"eps": 1e-2}),
            "momentum": (first, {"momentum": 0.3}),
        }


SCSE, NORM = _Scse(), _Norm()
