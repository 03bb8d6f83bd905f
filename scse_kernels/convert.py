"""convert and revert: fused squeeze & excitation inside models that already exist.

A block is converted by changing its class, as `torch.nn.utils.parametrize` does, to a subclass of
its own whose `forward` is fused. The object stays: with its parameters, children, hooks, names and
mode, in all the places that share it, and as the root of a model.

Structure proposes which blocks to convert (layouts.py), a probe decides: a stand-in with the
block's class and random parameters must compute what the fused function computes, gradients
included. So neither an overridden `forward` nor an unusual activation can slip through.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backends, layouts, modules
from .functional import COMBINE, cse, scse, sse
from .layouts import Layout, Unfit

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: What a block may hold besides: named where the probe disagrees, since it is hardly the reason.
_USUAL = {"ReLU", "Sigmoid", "Identity", "Sequential", "Flatten"}
_USUAL |= {f"AdaptiveAvgPool{axes}d" for axes in (1, 2, 3)} | {layer.__name__ for layer in _LAYERS}
#: Classes whose authors would expect to read about them in the report.
_NAMES = re.compile(r"Excit|(?<![A-Z])(SC|C|S)?SE(?![a-z])")

_HOOKS_OF_ALL_MODULES = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)


@dataclass(frozen=True)
class Entry:
    """One block of the model.

    Attributes:
        paths: where it is in the model ("" for the model itself); several if it is shared.
        module: the name of its class.
        status: "converted", "already fused" or "left alone".
        detail: what it computes, such as "scse, max", or why it was left alone.
    """

    paths: tuple[str, ...]
    module: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What `convert` did; prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def converted(self) -> list[Entry]:
        """The blocks that this call converted."""
        return [entry for entry in self.entries if entry.status == "converted"]

    @property
    def left_alone(self) -> list[Entry]:
        """The blocks that look like squeeze & excitation but were left as they are."""
        return [entry for entry in self.entries if entry.status == "left alone"]

    def __str__(self) -> str:
        if not self.entries:
            return "no squeeze & excitation block was found"
        rows = [("path", "class", "result")]
        for entry in self.entries:
            path = entry.paths[0] or "(the model itself)"
            if len(entry.paths) > 1:
                path += f" (shared, {len(entry.paths)} places)"
            rows.append((path, entry.module, f"{entry.status}: {entry.detail}"))
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
        without = backends.missing_kernels() if len(self.left_alone) < len(self.entries) else None
        return "\n".join([*lines, without] if without else lines)


def convert(model: nn.Module) -> Report:
    """Make the squeeze & excitation blocks of known libraries inside `model` fused, in place.

    Recognised are the layouts of `layouts.LAYOUTS`, with ReLU and sigmoid. Parameters, buffers,
    children, hooks, dtype, device, mode and the names in the state_dict stay as they are; the
    blocks stay the same objects, and instances of their classes.

    Hooks on a block's own children, or another layer in a child's place, make that block run as
    the original does for as long as they are there.

    Returns:
        A report of the blocks that were converted, and of those left alone with the reason.

    Raises:
        TypeError: model is not a Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert(): model must be a Module, not {type(model).__name__}")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return Report(tuple(_convert(model, paths, set())))


def revert(model: nn.Module) -> None:
    """Undo `convert` in place: the blocks get their own classes back, with parameters as they are.

    Raises:
        RuntimeError: something changed a converted block's class after `convert` did.
    """
    converted = [(path, m) for path, m in model.named_modules() if _is_fused(m)]
    for path, module in converted:
        if "_recipe" not in vars(type(module)):
            raise RuntimeError(
                f"revert(): the class of {path or 'the model'} was changed after convert(), to"
                f" {type(module).__name__}; undo that first"
            )
    for _, module in converted:
        module.__class__ = module._original


class _Recipe(NamedTuple):
    """How to find a block's layers, and what to compute with them."""

    computes: str
    #: (index of the parent, name, class) of every module below the block, which itself is 0
    tree: tuple[tuple[int, str, type], ...]
    #: indices of the squeezing, the exciting and the spatial layer
    layers: tuple[int | None, int | None, int | None]


class _Fused:
    """What converted blocks inherit from, before their own class."""

    _original: type[nn.Module]
    _recipe: _Recipe

    def forward(self, *args, **kwargs):
        # Anything but one tensor, such as few-shot weights, is the original's business.
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            below = _untouched(self, self._recipe.tree)
            if below is not None:
                layers = [None if i is None else below[i] for i in self._recipe.layers]
                return _compute(self._recipe.computes, args[0], *_parameters(layers))
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, (self._original, self._recipe), *state)


def _is_fused(module: nn.Module) -> bool:
    """By name: after a reload of this module, `_Fused` is another class than that of blocks which
    were converted before."""
    return any((c.__module__, c.__name__) == (__name__, "_Fused") for c in type(module).__mro__)


@functools.cache
def _fused_class(original: type[nn.Module], recipe: _Recipe) -> type:
    namespace = {"_original": original, "_recipe": recipe, "__module__": __name__}
    return type(original)(f"Fused{original.__name__}", (_Fused, original), namespace)


def _new(original: type[nn.Module], recipe: _Recipe) -> nn.Module:
    """An empty converted block, for copy and pickle to fill."""
    return object.__new__(_fused_class(original, recipe))


def _compute(computes, x, w1, b1, w2, b2, ws, bs):
    if computes == "sse":
        return sse(x, ws, bs)
    if computes == "cse":
        return cse(x, w1, b1, w2, b2)
    if computes == "cse + x":
        return cse(x, w1, b1, w2, b2) + x
    return scse(x, w1, b1, w2, b2, ws, bs, combine=computes.removeprefix("scse, "))


def _possible(layout: Layout) -> tuple[str, ...]:
    """What a block of this layout may compute."""
    if layout.spatial is None:
        return ("cse", "cse + x")
    if layout.squeezing is None:
        return ("sse",)
    return tuple(f"scse, {combine}" for combine in COMBINE)


def _parameters(layers):
    """w1, b1, w2, b2, ws, bs."""
    pairs = ((None, None) if layer is None else (layer.weight, layer.bias) for layer in layers)
    return [parameter for pair in pairs for parameter in pair]


def _hooked(module):
    """Whether calling the module runs more than its class's forward."""
    return (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def _untouched(block, tree):
    """The block and the modules below it, or None if one was replaced or must itself be called."""
    below = [block]
    for parent, name, kind in tree:
        module = below[parent]._modules.get(name)
        if type(module) is not kind or _hooked(module):
            return None
        below.append(module)
    return below


def _convert(module, paths, seen) -> Iterator[Entry]:
    """Convert what is in `module`, the outermost blocks first."""
    if module in seen:
        return
    seen.add(module)
    name = type(module).__name__
    where = tuple(paths[module])
    if _is_fused(module):
        yield Entry(where, name, "already fused", module._recipe.computes)
        return
    if type(module).__module__ == modules.__name__:
        yield Entry(where, name, "already fused", "a layer of scse_kernels")
        return

    # Only what its author would call squeeze & excitation deserves a word if it can't be converted.
    names = [cls.__name__ for cls in type(module).__mro__]
    layout, why_not = None, "its structure is not one that is known"
    if isinstance(module, torch.jit.ScriptModule):
        names, why_not = [module.original_name], "it was compiled by torch.jit"
    else:
        layout = layouts.find(module)
    expected = any(map(_NAMES.search, names)) and any(True for _ in module.parameters())
    if layout is not None:
        try:
            recipe = _recipe(module, layout)
        except Unfit as reason:
            why_not = str(reason)
            expected = expected or any("igmoid" in type(m).__name__ for m in module.modules())
        else:
            module.__class__ = _fused_class(type(module), recipe)
            yield Entry(where, name, "converted", recipe.computes)
            return
    inside = [entry for child in module.children() for entry in _convert(child, paths, seen)]
    if expected and (layout is not None or not inside):
        yield Entry(where, names[0], "left alone", why_not)
    yield from inside


def _recipe(block: nn.Module, layout: Layout) -> _Recipe:
    """How to compute what `block` computes; raises `Unfit` with the reason if it can't be done."""
    if "forward" in block.__dict__:
        raise Unfit("its forward was replaced on this object")
    layers = {path: block.get_submodule(path) for path in layout[1:] if path is not None}
    for path, layer in layers.items():
        if type(layer) not in _LAYERS:
            raise Unfit(f"{path} is a {type(layer).__name__}")
    index, tree = {"": 0}, []
    for path, module in block.named_modules(remove_duplicate=False):
        if path:
            parent, _, name = path.rpartition(".")
            index[path] = len(index)
            tree.append((index[parent], name, type(module)))
            if _hooked(module):
                raise Unfit(f"{path} has hooks, which would not run")
    for path, layer in layers.items():
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            if type(parameter) not in (nn.Parameter, type(None)):
                raise Unfit(f"{path}.{name} is a {type(parameter).__name__}")
    layouts.check_shapes(layout, {path: layer.weight.shape for path, layer in layers.items()})
    computes = _probe(block, layout)
    return _Recipe(computes, tuple(tree), tuple(path and index[path] for path in layout[1:]))


def _probe(block: nn.Module, layout: Layout) -> str:
    """What the block computes, found by running a stand-in for it; raises `Unfit` otherwise."""
    possible, failure = None, None
    with _apart():
        generator = torch.Generator("cpu").manual_seed(0)
        twin = _stand_in(block, generator)
        layers = [None if path is None else twin.get_submodule(path) for path in layout[1:]]
        parameters = [p for p in _parameters(layers) if p is not None]
        buffers = [buffer.clone() for buffer in twin.buffers()]
        channels = (layers[0] or layers[2]).weight.shape[1]
        # How many axes a block takes isn't to be seen from linear layers. No two sizes are equal,
        # so that it can't take one axis for another.
        samples = 4 if channels != 4 else 6
        for sizes in ((3, 2), (3, 2, 5), (5,)):
            for training in (True, False):
                x = _feature_map((samples, channels, *sizes), generator)
                state = torch.get_rng_state()
                try:
                    y = twin.train(training)(x)
                    if not isinstance(y, Tensor):
                        raise TypeError(f"it returns a {type(y).__name__}")
                    dy = _normal(y.shape, generator)
                    theirs = [y, *_gradients(y, [x, *parameters], dy)]
                except Exception as error:  # whatever somebody's forward may raise
                    failure = failure or f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                if not torch.equal(torch.get_rng_state(), state):
                    raise _unlike(block, "it draws random numbers")
                if not all(map(torch.equal, twin.buffers(), buffers)):
                    raise _unlike(block, "its forward changes a buffer")
                agreeing = []
                for computes in _possible(layout) if possible is None else possible:
                    try:
                        y = _compute(computes, x, *_parameters(layers))
                    except (TypeError, ValueError, RuntimeError) as error:
                        raise Unfit(str(error)) from None
                    if y.shape == dy.shape:
                        ours = [y, *_gradients(y, [x, *parameters], dy)]
                        if all(map(_close, ours, theirs)):
                            agreeing.append(computes)
                possible = agreeing
    if possible:
        return possible[0]
    if possible is None:
        raise _unlike(block, f"it doesn't run on a random feature map: {failure}")
    raise _unlike(block, "it computes something else")


def _unlike(block: nn.Module, what: str) -> Unfit:
    """What tells the block from squeeze & excitation, and the parts that may be the reason."""
    unusual = [
        f"{path} is a {type(module).__name__}"
        for path, module in block.named_modules()
        if path and not module._modules and type(module).__name__ not in _USUAL
    ]
    return Unfit(": ".join(filter(None, (what, ", ".join(unusual)))))


@contextlib.contextmanager
def _apart():
    """Gradients on, hooks on all modules off, random generators and the backend put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        contextlib.ExitStack() as afterwards,
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        backends.use_backend("eager"),  # whatever was chosen for real calls, on a CPU in float64
    ):
        for hooks in _HOOKS_OF_ALL_MODULES:
            afterwards.callback(hooks.update, dict(hooks))
            hooks.clear()
        yield


def _stand_in(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module of the same class with the same attributes, but without hooks, in float64 on the
    CPU, with random parameters and buffers: weights of zero or saturated gates would hide what a
    block computes, and half precision would blur it."""
    twin = object.__new__(type(module))
    # What nn.Module itself keeps, hooks among it, is that of a new module.
    twin.__dict__ = {**vars(module), **vars(nn.Module()), "_compiled_call_impl": None}
    for name, parameter in module._parameters.items():
        random = None if parameter is None else nn.Parameter(_random(parameter, generator))
        twin._parameters[name] = random
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else _random(buffer, generator)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _stand_in(child, generator)
    return twin


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values of like's shape; a weight's sums over the inputs have a variance of one."""
    values = _normal(like.shape, generator)
    return values / max(like[:1].numel() if like.dim() > 1 else 16, 1) ** 0.5


def _feature_map(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[N, C, *S], N even. What is linear in x, before biases, has both signs, and is far from zero
    in half of the samples, so that no activation passes for another; zeros make ties."""
    x = _normal((shape[0] // 2, *shape[1:]), generator)
    x += _normal(shape[1:2], generator).reshape(-1, *(1,) * (len(shape) - 2))
    x = torch.where(x.abs() < 0.2, 0.0, x)
    x[1:] *= 30
    return torch.cat([x, -x]).requires_grad_()


def _gradients(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(y, inputs, dy.to(y.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    # Wide enough for a forward that computes part of it in float32; False for NaN.
    size, error = theirs.abs(), (ours - theirs).abs()
    close = (error <= 1e-5 * size + 1e-6 * size.max()).all()
    return ours.dtype == theirs.dtype and bool(close)
