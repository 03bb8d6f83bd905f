"""BatchNorm and ReLU in front of a block: which modules take part, and during which calls.

Like a block (swap.py), a BatchNorm gets a subclass of its own class, and so does the *owner*: the
innermost module whose forward calls both it and the block. Nothing else of them changes. While the
owner's forward runs, the BatchNorm returns a `Deferred`. When the forward ends, whatever is still
deferred is computed. Called from anywhere else, the BatchNorm works as before.
"""

import functools
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, compiler, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_map_only

from .. import backends
from ..batch_norm import ops
from . import swap
from .deferred import Call, Deferred, context

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HALF = (torch.float16, torch.bfloat16)

#: Names of the children on the way down to a module.
Path = tuple[str, ...]


class Pair(NamedTuple):
    """A BatchNorm and the block that computes it: where they are below their owner."""

    norm: Path
    block: Path
    #: the other modules that take or return a deferred tensor, which their hooks would see
    between: tuple[Path, ...]


class Owner:
    """What owners inherit from, before their own class."""

    _original: type[nn.Module]
    _pairs: tuple[Pair, ...]

    def __init_subclass__(cls, **kwargs):
        """As for blocks."""

    def forward(self, *args, **kwargs):
        if compiler.is_compiling() or backends.taken_apart_by() or _hooks_of_all_modules():
            return super().forward(*args, **kwargs)
        frame = _Frame(self)
        frames = _frames()
        frames.append(frame)
        try:
            result = super().forward(*args, **kwargs)
        finally:
            frames.remove(frame)
        return frame.leave(result)

    def __reduce_ex__(self, protocol):
        return _owner, (swap.as_original(self), tuple(map(tuple, self._pairs)))

    __prepare_scriptable__ = swap.refuse_to_be_scripted


class Norm:
    """What BatchNorms inherit from, before their own class."""

    _original: type[nn.Module]

    def __init_subclass__(cls, **kwargs):
        """As for blocks."""

    def forward(self, *args, **kwargs):
        if not compiler.is_compiling() and len(args) == 1 and not kwargs:
            for frame in reversed(_frames()):
                if self in frame.norms and (call := frame.call(self, *args)):
                    return Deferred.of(call)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _norm, (swap.as_original(self),)

    __prepare_scriptable__ = swap.refuse_to_be_scripted


class _Frame:
    """One run of an owner's forward."""

    def __init__(self, owner: nn.Module) -> None:
        self.norms = {
            norm
            for pair in owner._pairs
            if (norm := _at(owner, pair.norm)) is not None and _is_whole(owner, pair, norm)
        }
        self.contexts: dict[torch.device, tuple] = {}
        #: calls that must still be computed; and the tensors that stand for them, while they live
        self.waiting: set[Call] = set()
        self.maps: list[list[weakref.ref[Deferred]]] = []
        # Only contexts on these devices matter, and a model has few.
        for norm in self.norms:
            for tensor in (*norm._parameters.values(), *norm._buffers.values()):
                if tensor is not None and tensor.device not in self.contexts:
                    self.contexts[tensor.device] = context(tensor.device)

    def call(self, norm: nn.Module, u: Tensor) -> Call | None:
        """The call of a BatchNorm to be computed later; None if it is to be computed at once."""
        if type(u) is not Tensor or not _fits(norm, u):
            return None
        around = context(u.device)
        # In a region of torch.utils.checkpoint, say, that may end before the block.
        if self.contexts.setdefault(u.device, around) != around:
            return None
        call = Call(norm, u, super(Norm, norm).forward, around, self.waiting)
        self.maps.append(call.maps)
        return call

    def leave(self, result):
        """Compute what is left. Returns the result, with values in place of the tensors that stood
        for them."""
        for call in tuple(self.waiting):
            call.compute()
        left = [m for maps in self.maps for m in (ref() for ref in maps) if m is not None]
        if left:
            for m in left:
                m.call.compute()
            result = tree_map_only(Deferred, lambda m: m.value, result)
        return result


class _Local(threading.local):
    def __init__(self):
        self.frames: list[_Frame] = []


_local = _Local()


def _frames() -> list[_Frame]:
    return _local.frames


def _hooks_of_all_modules() -> bool:
    return bool(nn_module._has_any_global_hook())


def _at(module: nn.Module, path: Path) -> nn.Module | None:
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def _is_whole(owner: nn.Module, pair: Pair, norm: nn.Module) -> bool:
    """Whether BatchNorm and block are what they were, and no hook sees what goes between them."""
    block = _at(owner, pair.block)
    if not isinstance(norm, Norm) or block is None or not swap.is_fused(block):
        return False
    modules = (norm, block, *(_at(owner, path) for path in pair.between))
    return not any(m is None or swap.is_hooked(m) for m in modules)


def _fits(norm: nn.Module, u: Tensor) -> bool:
    """Whether `bn_relu_scse` can compute it: torch's BatchNorm would raise no error, and a backend
    has kernels for it."""
    norm._check_input_dim(u)
    if u.dim() < 3 or u.layout is not torch.strided or u.is_nested or u.numel() == 0:
        return False
    if u.shape[1] != norm.num_features or (norm.training and u.numel() == u.shape[1]):
        return False
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if t is not None and (
            t.device != u.device
            or not (t.dtype == u.dtype or (t.dtype == torch.float32 and u.dtype in _HALF))
        ):
            return False
    try:
        return backends.choose("bn_relu_scse", "auto", u, ops.BACKENDS) in ops.BACKENDS
    except RuntimeError:  # one was chosen that has no kernels for this
        return False


def is_owner(module: nn.Module) -> bool:
    """Whether a module was made an owner. By name, as `swap.is_fused`."""
    return swap.inherits(module, __name__, "Owner")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that hands on."""
    return swap.inherits(module, __name__, "Norm")


def join(owner: nn.Module, pairs: tuple[Pair, ...]) -> list[tuple[nn.Module, type]]:
    """Modules and the classes that they are to get, so that the pairs below `owner` are fused."""
    norms = dict.fromkeys(_at(owner, pair.norm) for pair in pairs)
    return [(owner, _owner_class(type(owner), pairs)), *((n, _norm_class(type(n))) for n in norms)]


def joined(model: nn.Module) -> set[nn.Module]:
    """The blocks in the model that compute a BatchNorm and a ReLU as well."""
    return {
        _at(owner, pair.block)
        for owner in model.modules()
        if is_owner(owner)
        for pair in owner._pairs
    }


def _owner_class(original: type[nn.Module], pairs: tuple[Pair, ...]) -> type:
    @functools.wraps(original.forward)  # tools look at its signature
    def forward(self, *args, **kwargs):
        return Owner.forward(self, *args, **kwargs)

    return swap.subclass(original, Owner, pairs, {"_pairs": pairs, "forward": forward})


def _norm_class(original: type[nn.Module]) -> type:
    return swap.subclass(original, Norm, None, {})


def _owner(module: nn.Module, pairs: tuple) -> nn.Module:
    """Make an owner of a module that was copied or loaded."""
    if isinstance(module, nn.Module) and not is_owner(module):
        swap.set_class(module, _owner_class(type(module), tuple(Pair(*pair) for pair in pairs)))
    return module


def _norm(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Module) and not is_norm(module):
        swap.set_class(module, _norm_class(type(module)))
    return module
