"""convert and revert: fused squeeze & excitation inside models that already exist.

Structure proposes which modules are blocks, by the shapes of their layers (shapes.py). Their code
is read for what else it looks at (source.py), and a stand-in is run (probe.py): it must compute
what one of the functions of function.py computes. Then the block's class is swapped (swap.py), and
the report says so (report.py). With example inputs the model is run (example.py), and a BatchNorm
and a ReLU that only a block reads are computed by the block (prologue.py, deferred.py). Checkpoints
move between libraries by checkpoints.py.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import modules
from . import example, prologue, shapes, swap
from .probe import probe
from .report import Entry, Report, would_be_missed
from .shapes import Unfit

# Where pickles of earlier versions look for them.
from .swap import Fused, _new, _Recipe  # noqa: F401

__all__ = ["Entry", "Report", "convert", "revert"]


def convert(model: nn.Module, example_inputs: tuple[Any, ...] | Tensor | None = None) -> Report:
    """Make the squeeze & excitation blocks inside `model` fused, in place.

    A block is converted if it has the layers of scSE, cSE or sSE, and a stand-in of its class
    computes one of these functions. Parameters, buffers, children, hooks, dtype, device, mode and
    the names in the state_dict stay as they are; the blocks stay the same objects, and instances of
    their classes.

    Some calls still run the block's original forward: those that the stand-in was not tried with
    (another number of axes, other arguments, a subclass of Tensor), and all calls while a child has
    hooks or was replaced, or while an attribute that the forward reads has another value.

    `example_inputs` are the arguments of a call of the model. Copies of the model are run on them,
    in training and in evaluation. Some blocks take the output of a ReLU that takes the output of a
    BatchNorm, and nothing else reads these two. Such a block then computes all three, if the model
    keeps its outputs, gradients and buffers. BatchNorm's and the caller's classes are swapped as
    well. A call that goes another way computes them one by one. So does a call under torch.compile,
    or while any of them has hooks.

    Args:
        model: any network.
        example_inputs: a tuple of positional arguments, or one tensor; None: blocks alone.

    Returns:
        A report of the blocks that were converted, and of those left alone with the reason.

    Raises:
        TypeError: model is not a Module, or example_inputs neither a tuple nor a Tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert(): model must be a Module, not {type(model).__name__}")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (tuple, type(None))):
        raise TypeError(
            "convert(): example_inputs must be a tuple of arguments or a Tensor,"
            f" not {type(example_inputs).__name__}"
        )
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    plan = _Plan(paths)
    entries = tuple(plan.visit(model))
    alone: dict[nn.Module, str] = {}
    swapped: list[tuple[nn.Module, type]] = []
    try:
        _swap(plan.classes.items(), swapped)
        if example_inputs is not None:
            _swap([(m, m._original) for m in model.modules() if _is_around(m)], swapped)
            classes, alone = example.run(model, example_inputs)
            _swap(classes, swapped)
    except BaseException:
        for module, cls in reversed(swapped):
            swap.set_class(module, cls)
        raise
    return Report(tuple(_with_what_is_before(model, entries, alone)))


def _swap(classes: Iterable[tuple[nn.Module, type]], swapped: list) -> None:
    """Give modules other classes; `swapped` gets those that they had."""
    for module, cls in classes:
        swapped.append((module, type(module)))
        swap.set_class(module, cls)


def _is_around(module: nn.Module) -> bool:
    """Whether it was converted for a block's sake."""
    return prologue.is_owner(module) or prologue.is_norm(module)


def _with_what_is_before(
    model: nn.Module, entries: tuple[Entry, ...], alone: dict[nn.Module, str]
) -> Iterator[Entry]:
    """The entries, each with the BatchNorm that its block computes too, or why it computes none."""
    joined = prologue.joined(model)
    for entry in entries:
        if entry.status != "left alone":
            block = model.get_submodule(entry.paths[0])
            if block in joined:
                entry = dataclasses.replace(entry, detail=f"batch norm, relu, {entry.detail}")
            elif block in alone:
                entry = dataclasses.replace(entry, alone=alone[block])
        yield entry


def revert(model: nn.Module) -> None:
    """Undo `convert` in place: all modules get their own classes back, with parameters as they are.

    Raises:
        RuntimeError: something changed a converted module's class after `convert` did.
    """
    converted = [
        (path, m) for path, m in model.named_modules() if swap.is_fused(m) or _is_around(m)
    ]
    for path, module in converted:
        if "_original" not in vars(type(module)):
            raise RuntimeError(
                f"revert(): the class of {path or 'the model'} was changed after convert(), to"
                f" {type(module).__name__}; undo that first"
            )
    for _, module in converted:
        swap.set_class(module, module._original)


class _Plan:
    """Which blocks get which class, before any is changed."""

    def __init__(self, paths: dict[nn.Module, list[str]]) -> None:
        self.paths = paths
        self.classes: dict[nn.Module, type] = {}
        self.seen: set[nn.Module] = set()

    def visit(self, module: nn.Module) -> Iterator[Entry]:
        """Plan what is in `module`, the outermost blocks first."""
        if module in self.seen:
            return
        self.seen.add(module)
        if swap.is_fused(module):
            yield self._entry(module, "already fused", str(module._recipe.function))
            return
        if type(module).__module__ == modules.__name__:
            yield self._entry(module, "already fused", "a layer of scse_kernels")
            return
        layers = shapes.parametrised(module)
        try:
            if any(inner in self.classes for inner in module.modules()):
                raise Unfit("it holds a block that is shared with others")
            block, recipe = _outermost(module, layers)
        except Unfit as reason:
            yield from self._left_alone(module, layers, reason)
        else:
            self.seen.update(block.modules())
            self.classes[block] = swap.fused_class(type(block), recipe)
            yield self._entry(block, "converted", str(recipe.function))

    def _left_alone(
        self, module: nn.Module, layers: dict[str, nn.Module], reason: Unfit
    ) -> Iterator[Entry]:
        """What is inside; and the module itself, if a reader would ask about it."""
        inside = [entry for child in module.children() for entry in self.visit(child)]
        whole = shapes.is_block(layers) or (
            len(layers) <= 4 and not any(entry.status == "converted" for entry in inside)
        )
        if would_be_missed(module, layers) and (
            not inside or (whole and not _is_wrapper(module, layers))
        ):
            yield self._entry(module, "left alone", str(reason))
            inside = [entry for entry in inside if entry.status != "left alone"]
        yield from inside

    def _entry(self, module: nn.Module, status: str, detail: str) -> Entry:
        name = getattr(module, "original_name", type(module).__name__)
        return Entry(tuple(self.paths[module]), name, status, detail)


def _outermost(module: nn.Module, layers: dict[str, nn.Module]) -> tuple[nn.Module, swap.Recipe]:
    """The block that `module` is, or that it merely wraps, with its recipe; raises `Unfit`."""
    recipe = _recipe(module, layers)
    for child in module.children():
        inner = shapes.parametrised(child)
        if set(inner.values()) == set(layers.values()):
            try:
                block, own = _outermost(child, inner)
            except Unfit:
                continue
            if own.function == recipe.function:
                return block, own
    return module, recipe


def _is_wrapper(module: nn.Module, layers: dict[str, nn.Module]) -> bool:
    """Whether a child that a reader would call a block holds all the layers."""
    for child in module.children():
        inner = shapes.parametrised(child)
        if set(inner.values()) == set(layers.values()) and would_be_missed(child, inner):
            return True
    return False


def _recipe(block: nn.Module, layers: dict[str, nn.Module]) -> swap.Recipe:
    """How to compute what `block` computes; raises `Unfit` with the reason if it can't be done."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in block.modules()):
        raise Unfit("it was compiled by torch.jit")
    if "forward" in block.__dict__:
        raise Unfit("its forward was replaced on this object")
    if not shapes.is_small(layers):
        kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers.values()))
        raise Unfit(f"it holds {len(layers)} layers: {kinds}" if layers else "it has no layers")
    for path, module in block.named_modules(remove_duplicate=False):
        if any(map(is_lazy, module._parameters.values())):
            raise Unfit(f"{path} is a {type(module).__name__}")
        if path and swap.is_hooked(module):
            raise Unfit(f"{path} has hooks, which would not run")
    if not shapes.channels(shapes.plain_layers(layers)):
        raise Unfit(shapes.why_none(layers))
    return swap.recipe(block, probe(block))
