"""How a block becomes fused: its class is swapped for a subclass of its own, and back.

`torch.nn.utils.parametrize` does the same. The object stays, with its parameters, children, hooks,
names and mode: in all places that share it, and also where it is the whole model.
"""

import abc
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import backends
from . import source
from .deferred import Deferred
from .function import Function
from .probe import Found

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Recipe(NamedTuple):
    """How to find a block's layers, what to compute with them, and when."""

    function: Function
    #: (index of the parent, name, class) of every module below the block, which itself is 0
    tree: tuple[tuple[int, str, type], ...]
    #: indices of the squeezing, the exciting and the spatial layer
    layers: tuple[int | None, int | None, int | None]
    #: (axes of x, least number of samples, least number of positions)
    calls: tuple[tuple[int, int, int], ...]
    under_autocast: bool
    #: (index of the module, name, value) of attributes that the original reads
    attributes: tuple[tuple[int, str, Any], ...]
    #: (name of a Python module, name, value) of constants that the original reads
    constants: tuple[tuple[str, str, Any], ...]
    #: whether the original looks at self.__class__
    by_class: bool


def recipe(block: nn.Module, found: Found) -> Recipe:
    """The recipe of a block that was probed."""
    index, tree = {"": 0}, []
    for path, module in block.named_modules(remove_duplicate=False):
        if path:
            parent, _, name = path.rpartition(".")
            index[path] = len(index)
            tree.append((index[parent], name, type(module)))
    return Recipe(
        found.function,
        tuple(tree),
        tuple(path if path is None else index[path] for path in found.reading.layers),
        found.calls,
        found.under_autocast,
        found.source.attributes,
        found.source.constants,
        found.source.by_class,
    )


class Fused:
    """What converted blocks inherit from, before their own class."""

    _original: type[nn.Module]
    _recipe: Recipe
    #: axes of x -> (least number of samples, least number of positions)
    _calls: dict[int, tuple[int, int]]
    #: (class, its forward) of the modules below
    _forwards: tuple[tuple[type, Any], ...]
    #: (globals of a Python module, name, value)
    _constants: tuple[tuple[dict[str, Any], str, Any], ...]

    def __init_subclass__(cls, **kwargs):
        """Without the original's `__init_subclass__`, which may register classes."""

    def forward(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and type(args[0]) is Deferred:
            y = self._after_batch_norm(args[0])
            if y is not None:
                return y
            args = (args[0].read(type(self).forward),)
        # Calls that the probe did not see agree run the original.
        if len(args) == 1 and not kwargs and type(args[0]) in (Tensor, nn.Parameter, FakeTensor):
            below = _untouched(self)
            if below is not None:
                x, recipe = args[0], self._recipe
                layers = [None if i is None else below[i] for i in recipe.layers]
                if _is_known_call(self, x, next(layer for layer in layers if layer is not None)):
                    return recipe.function(x, *_parameters(layers))
        if self._recipe.by_class:
            return self._as_original(vars(self)).forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _after_batch_norm(self, x: Deferred) -> Tensor | None:
        """Block, ReLU and BatchNorm at once, where x stands for the output of the two. None if they
        must be computed one by one."""
        call, function = x.call, self._recipe.function
        if not x.rectified or not function.follows_batch_norm or not call.is_ready():
            return None
        below = _untouched(self)
        if below is None:
            return None
        layers = [None if i is None else below[i] for i in self._recipe.layers]
        if not _is_known_call(self, call.u, next(layer for layer in layers if layer is not None)):
            return None
        return call.compute_with(function, _parameters(layers))

    def _as_original(self, attributes):
        """An object of the original class with these attributes."""
        twin = object.__new__(self._original)
        twin.__dict__ = attributes
        return twin

    def __reduce_ex__(self, protocol):
        # The original builds the object; then the class is swapped.
        return _converted, (as_original(self), *_plain(self._recipe))

    def __prepare_scriptable__(self):
        refuse_to_be_scripted(self)


def as_original(module: nn.Module) -> nn.Module:
    """An object of the class that the module had, with the same attributes."""
    twin = object.__new__(module._original)
    twin.__dict__ = dict(vars(module))
    return twin


def refuse_to_be_scripted(module: nn.Module) -> None:
    """The `__prepare_scriptable__` of all classes made here."""
    raise RuntimeError(
        f"torch.jit.script can't compile {module._original.__name__} as convert() left it:"
        " revert(model) first"
    )


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a converted block."""
    return inherits(module, __name__, "Fused")


def inherits(module: nn.Module, home: str, name: str) -> bool:
    """Whether a module's class was made by `subclass` of the class of that name. By name, since a
    reload of this Python module makes a new class, and modules that were converted before have the
    old one."""
    return any((c.__module__, c.__name__) == (home, name) for c in type(module).__mro__)


def _plain(recipe: Recipe) -> tuple:
    return (tuple(recipe.function), *recipe[1:])


def _converted(block: nn.Module, function: tuple, *rest: Any) -> nn.Module:
    """Convert a block that was copied or loaded."""
    if isinstance(block, nn.Module) and not is_fused(block):
        set_class(block, fused_class(type(block), Recipe(Function(*function), *rest)))
    return block


#: Classes stay here as long as a block has them.
_classes: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def fused_class(original: type[nn.Module], recipe: Recipe) -> type:
    """The class of converted blocks of a class; the same for the same recipe."""
    kinds = {kind for *_, kind in recipe.tree}
    namespace = {
        "_recipe": recipe,
        "_calls": {axes: least for axes, *least in recipe.calls},
        "_forwards": tuple((kind, kind.forward) for kind in kinds),
        "_constants": tuple(
            (source.scope_of(home, (original, *kinds)) or {}, name, value)
            for home, name, value in recipe.constants
        ),
        "__module__": __name__,
    }
    return subclass(original, Fused, recipe, namespace)


def subclass(original: type[nn.Module], mixin: type, recipe: Any, namespace: dict) -> type:
    """A subclass of `mixin` and of the original class; the same for the same recipe.

    Unless the namespace says otherwise it belongs to the original's Python module: tools ask there
    whether a class is torch's own.
    """
    cls = _classes.get((original, mixin, recipe))
    if cls is None:
        namespace = {"__module__": original.__module__, **namespace, "_original": original}
        # Past a metaclass of the user's, which may register classes as well.
        metaclass = type(original)
        make = abc.ABCMeta if issubclass(metaclass, abc.ABCMeta) else type
        name = f"Fused{original.__name__}"
        cls = make.__new__(metaclass, name, (mixin, original), namespace)
        _classes[original, mixin, recipe] = cls
    return cls


def set_class(module: nn.Module, cls: type) -> None:
    """Change the class of a module, whatever its own __setattr__ does."""
    object.__setattr__(module, "__class__", cls)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def _untouched(block: Fused) -> list[nn.Module] | None:
    """The block and the modules below it. None if one of them was replaced or must itself be
    called, or if a value that the original's code reads has changed."""
    below = [block]
    for parent, name, kind in block._recipe.tree:
        module = below[parent]._modules.get(name)
        if type(module) is not kind or is_hooked(module):
            return None
        below.append(module)
    for kind, forward in block._forwards:
        if kind.forward is not forward:
            return None
    for index, name, value in block._recipe.attributes:
        now = getattr(below[index], name, None)
        if now is not value and source.frozen(now) != value:
            return None
    for scope, name, value in block._constants:
        now = scope.get(name)
        if now is not value and source.frozen(now) != value:
            return None
    return below


def _is_known_call(block: Fused, x: Tensor, layer: nn.Module) -> bool:
    """Whether the probe saw the original agree for maps of this kind."""
    least = block._calls.get(x.dim())
    if least is None or x.dtype not in _DTYPES or x.layout is not torch.strided or x.is_nested:
        return False
    if x.numel() == 0 or x.device.type == "meta" or backends.taken_apart_by():
        return False
    if torch.is_autocast_enabled(x.device.type):
        if not block._recipe.under_autocast:
            return False
    elif x.dtype != layer.weight.dtype:
        return False
    samples, positions = least
    if samples > 1 and x.shape[0] < samples:
        return False
    return positions == 1 or x.shape[2:].numel() >= positions


def _parameters(layers):
    """w1, b1, w2, b2, ws, bs."""
    pairs = ((None, None) if layer is None else (layer.weight, layer.bias) for layer in layers)
    return [parameter for pair in pairs for parameter in pair]


class _Recipe(tuple):
    """The recipe in pickles of earlier versions."""

    def __new__(cls, *fields):
        return super().__new__(cls, fields)


def _new(original: type[nn.Module], recipe: _Recipe) -> nn.Module:
    """An empty block, for a pickle of an earlier version to fill. It is not converted: its recipe
    lacks things that only a new probe can tell."""
    return object.__new__(original)
