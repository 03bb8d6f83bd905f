"""What a BatchNorm returns where a later block is to compute it: a tensor that waits for its
reader.

If the reader is a converted block, and only a ReLU came between, it computes BatchNorm, ReLU and
itself from BatchNorm's input. Any other reader gets what BatchNorm and ReLU return: they are
computed then, as they would have been when BatchNorm was called.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ..batch_norm.modules import _options, _statistics

_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def context(device: torch.device) -> tuple:
    """The modes that decide how autograd records a call, and in which dtype it computes."""
    kind = device.type
    can = torch.amp.is_autocast_available(kind)  # not on the meta device
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        can and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


@contextlib.contextmanager
def _again(was: tuple, device: torch.device) -> Iterator[None]:
    """Goes back to a context that has been left, as after a region of torch.utils.checkpoint."""
    grad, inference, autocast, saving = was
    with (
        torch.inference_mode(inference),
        torch.set_grad_enabled(grad),
        torch.autocast(device.type, autocast or None, enabled=bool(autocast)),
        torch.autograd.graph.saved_tensors_hooks(*(saving or (_same, _same))),
    ):
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Call:
    """One call of a BatchNorm on u [N, C, *S].

    Args:
        norm: the BatchNorm.
        u: its input.
        forward: computes it, as `norm` itself would.
        context: that of the call.
        waiting: a set that holds it until it is computed.
    """

    def __init__(self, norm: nn.Module, u: Tensor, forward, context: tuple, waiting: set) -> None:
        self.norm, self.u, self.forward, self.context = norm, u, forward, context
        self.waiting = waiting
        waiting.add(self)
        self.version = _version(u)
        #: the tensors that stand for its output, and for the ReLU's
        self.maps: list[weakref.ref[Deferred]] = []
        #: the functions that read them, other than a ReLU
        self.readers: list[Any] = []

    @property
    def done(self) -> bool:
        """Whether the running statistics have moved. They must move only once."""
        return self not in self.waiting

    def is_ready(self) -> bool:
        """Whether a block that is called now may compute it."""
        return not self.done and context(self.u.device) == self.context

    def compute_with(self, function, parameters) -> Tensor:
        """BatchNorm, ReLU and `function` with the block's parameters."""
        self._check_version()
        self.waiting.discard(self)
        norm = self.norm
        statistics = _statistics(norm)
        return function.after_batch_norm(
            self.u, norm.weight, norm.bias, *statistics, *parameters, **_options(norm), eps=norm.eps
        )

    def compute(self) -> None:
        """BatchNorm alone, and ReLU where it was asked for."""
        maps = [m for m in (ref() for ref in self.maps) if m is not None and m.value is None]
        if self.done and not maps:
            return
        self._check_version()
        with contextlib.ExitStack() as stack:
            if context(self.u.device) != self.context:
                stack.enter_context(_again(self.context, self.u.device))
            z = self._repeated() if self.done else self.forward(self.u)
            self.waiting.discard(self)
            for m in maps:
                m.value = torch.relu(z) if m.rectified else z

    def _repeated(self) -> Tensor:
        """What it returned, computed anew. The running statistics stay as they are by now."""
        norm = self.norm
        training = _by_batch(norm)
        statistics = (None, None) if training else (norm.running_mean, norm.running_var)
        return F.batch_norm(self.u, *statistics, norm.weight, norm.bias, training, 0.0, norm.eps)

    def _check_version(self) -> None:
        if _version(self.u) != self.version:
            raise RuntimeError(
                "convert(): a BatchNorm's input was changed in place before a block computed both;"
                " revert(model), or convert it without example_inputs"
            )


def _by_batch(norm: nn.Module) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class Deferred(Tensor):
    """The output of a BatchNorm, or of the ReLU after it. It has no memory. A function of torch
    that reads it gets `value`. Any other reader gets an error, and so does a backward that arrives
    here."""

    call: Call
    rectified: bool
    value: Tensor | None

    @staticmethod
    def of(call: Call, rectified: bool = False) -> "Deferred":
        """A new one for the output of a call, or for its ReLU."""
        u, norm = call.u, call.norm
        needs = call.context[0] and (
            u.requires_grad
            or any(p is not None and p.requires_grad for p in (norm.weight, norm.bias))
        )
        with torch._C.DisableTorchFunctionSubclass():
            self = Tensor._make_wrapper_subclass(
                Deferred,
                u.shape,
                strides=u.stride(),
                dtype=u.dtype,
                device=u.device,
                requires_grad=bool(needs),
            )
            if needs:
                self.register_hook(_refuse)
        self.call, self.rectified, self.value = call, rectified, None
        call.maps.append(weakref.ref(self))
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _RELUS and len(args) == 1 and type(args[0]) is Deferred:
            self = args[0]
            if self.value is None and not self.call.done:
                if kwargs.get("inplace") or function in (torch.relu_, Tensor.relu_):
                    self.rectified = True
                    return self
                return Deferred.of(self.call, rectified=True)
        args, kwargs = tree_map_only(Deferred, lambda m: m.read(function), (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(
            f"convert(): {function} reads a BatchNorm's output without asking for"
            " __torch_function__; revert(model), or convert it without example_inputs"
        )

    def read(self, function: Any) -> Tensor:
        """The tensor that this one stands for, for `function`."""
        self.call.readers.append(function)
        if self.value is None:
            self.call.compute()
        return self.value


def _refuse(_):
    raise RuntimeError(
        "convert(): a gradient arrives at a BatchNorm's output that was never computed, since an"
        " autograd.Function took it; revert(model), or convert it without example_inputs"
    )
