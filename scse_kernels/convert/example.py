"""Which BatchNorm and ReLU stand before which block: a copy of the model is run, and watched.

Every BatchNorm of the copy returns a `Deferred`, so that each function that reads its output, or
the ReLU's, is seen. Copies of the model as it is and as it would be are then compared: outputs,
gradients and buffers, in training and in evaluation.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map_only

from ..backends import use_backend
from . import prologue, swap
from .deferred import Call, Deferred, context
from .probe import _apart, _line
from .prologue import Pair, Path
from .shapes import Unfit

#: How far two copies may be apart: in float64; in float32, where a rounding may push a ReLU to its
#: other side; and where half precision takes part.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-2, None: 0.1}


class Result(NamedTuple):
    """What the example showed."""

    #: modules and the classes that they are to get
    classes: list[tuple[nn.Module, type]]
    #: block -> why nothing before it is computed with it
    alone: dict[nn.Module, str]


def run(model: nn.Module, example_inputs: tuple) -> Result:
    """Find the pairs of a converted model, and make sure that they may be fused. Neither the model
    nor the inputs are changed."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    blocks = [module for module in model.modules() if swap.is_fused(module)]
    if not blocks:
        return Result([], {})
    with _apart(), use_backend("auto"):
        try:
            owners, alone, in_half = _find(model, blocks, example_inputs)
            if owners:
                _compare(model, owners, example_inputs, in_half)
        except Unfit as reason:
            return Result([], dict.fromkeys(blocks, str(reason)))
    modules = list(model.modules())
    classes = [
        change for index, pairs in owners.items() for change in prologue.join(modules[index], pairs)
    ]
    return Result(classes, alone)


def _copy(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # somebody's __deepcopy__ may raise anything
        raise Unfit(f"the model can't be copied: {_line(error)}") from None
    if [type(m) for m in twin.modules()] != [type(m) for m in model.modules()]:
        raise Unfit("a copy of the model is another one")
    return twin


def _modes(model: nn.Module) -> list[list[bool]]:
    """Training, evaluation; and the modules' own modes, where these are mixed."""
    flags = [module.training for module in model.modules()]
    modes = [[True] * len(flags), [False] * len(flags)]
    return modes if flags in modes else [*modes, flags]


def _set_modes(model: nn.Module, flags: list[bool]) -> None:
    for module, training in zip(model.modules(), flags, strict=True):
        module.training = training


def _inputs(example_inputs: tuple, dtype: torch.dtype | None = None) -> tuple:
    """Copies of the inputs: the model may change them, and they have gradients."""

    def own(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype or tensor.dtype).requires_grad_()
        return tensor

    return tree_map_only(Tensor, own, example_inputs)


def _call(model: nn.Module, inputs: tuple) -> Any:
    torch.manual_seed(0)  # the same dropout each time
    # Nothing that is changed in place may be a leaf.
    return model(*tree_map_only(Tensor, lambda t: t * 1 if t.requires_grad else t, inputs))


class _Visit:
    """A module that is being called, and what surrounds the call."""

    def __init__(self, module: nn.Module, around: tuple) -> None:
        self.module, self.context = module, around


class _Known(Call):
    """A call of a BatchNorm that was computed: z is what it returned."""

    def __init__(self, norm, u, z, around, stack):
        super().__init__(norm, u, None, around, set())
        self.z, self.stack = z, stack
        self.passed: set[nn.Module] = set()
        self.taker: nn.Module | None = None
        self.owner: nn.Module | None = None

    def compute(self):
        self.waiting.discard(self)
        for m in (ref() for ref in self.maps):
            if m is not None and m.value is None:
                m.value = torch.relu(self.z) if m.rectified else self.z


class _Watch:
    """Hooks on all modules of a copy: who returns and who takes what a BatchNorm computed."""

    def __init__(self, twin: nn.Module, blocks: set[nn.Module], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        self.stack: list[_Visit] = []
        self.calls: list[_Known] = []
        #: for each call of a block what it took, or why it can't
        self.taken: dict[nn.Module, list[_Known | str]] = {block: [] for block in blocks}
        for module in twin.modules():
            module.register_forward_pre_hook(self.enter, with_kwargs=True)
            module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict):
        given = [m for m in tree_leaves((args, kwargs)) if type(m) is Deferred]
        if module in self.blocks:
            self.taken[module].append(self.take(module, args))
            args = tree_map_only(Deferred, _value, args)
        for m in given:
            m.call.passed.add(module)
        self.stack.append(_Visit(module, context(self.device)))
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple, result: Any):
        if self.stack:  # unless `enter` itself raised
            self.stack.pop()
        for m in tree_leaves(result):
            if type(m) is Deferred:
                m.call.passed.add(module)
        if type(module) in prologue.KINDS and isinstance(result, Tensor) and len(args) == 1:
            call = _Known(module, args[0], result, context(self.device), list(self.stack))
            self.calls.append(call)
            if type(args[0]) is Tensor and type(result) is Tensor:
                return Deferred.of(call)
            call.readers.append("a subclass of Tensor")
        return None

    def take(self, block: nn.Module, args: tuple) -> "_Known | str":
        if len(args) != 1 or type(args[0]) is not Deferred:
            return "what it gets is not what a ReLU returned for a BatchNorm"
        m = args[0]
        call = m.call
        if not m.rectified:
            return "no ReLU is between the BatchNorm and it"
        if call.readers:
            return f"{_name(call)} reads what comes before it, too"
        if call.taker is not None:
            return "another block reads what comes before it, too"
        if call.u._version != call.version:
            return "the BatchNorm's input is changed in place"
        common = [a for a, b in zip(call.stack, self.stack, strict=False) if a is b]
        around = context(self.device)
        if not common or {call.context, common[-1].context} != {around}:
            return "torch.utils.checkpoint, autocast or no_grad begins or ends before it"
        call.taker, call.owner = block, common[-1].module
        return call


def _value(m: Deferred) -> Tensor:
    m.call.compute()
    return m.value


def _name(call: Call) -> str:
    """The name of the first module that read what a BatchNorm computed."""
    function = call.readers[0]
    return str(resolve_name(function) or getattr(function, "__name__", function))


def _find(
    model: nn.Module, blocks: list[nn.Module], example_inputs: tuple
) -> tuple[dict[int, tuple[Pair, ...]], dict[nn.Module, str], bool]:
    """The pairs of each owner, by its index among the modules; why other blocks have none; and
    whether autocast was on anywhere."""
    twin = _copy(model)
    twins = dict(zip(model.modules(), twin.modules(), strict=True))
    originals = {theirs: ours for ours, theirs in twins.items()}
    device = next((t.device for t in tree_leaves(example_inputs) if isinstance(t, Tensor)), None)
    if device is None:
        raise Unfit("there is no tensor in example_inputs")
    watch = _Watch(twin, {twins[block] for block in blocks}, device)
    for flags in _modes(model):
        _set_modes(twin, flags)
        try:
            result = _call(twin, _inputs(example_inputs))
        except Exception as error:  # somebody's forward may raise anything
            raise Unfit(_does_not_run(flags, error)) from None
        for m in tree_leaves(result):
            if type(m) is Deferred:
                m.read("who calls the model")
    index = {module: i for i, module in enumerate(model.modules())}
    names = {module: path for path, module in model.named_modules()}
    found: dict[int, list[Pair]] = {}
    alone = {}
    for block in blocks:
        try:
            owner, pair = _pair(watch, twins[block], originals, names)
        except Unfit as reason:
            alone[block] = str(reason)
        else:
            found.setdefault(index[owner], []).append(pair)
    in_half = any(call.context[2] for call in watch.calls)
    return {i: tuple(pairs) for i, pairs in found.items()}, alone, in_half


def _does_not_run(flags: list[bool], error: Exception) -> str:
    mode = "training" if all(flags) else "evaluation"
    return f"the model doesn't run on example_inputs in {mode}: {_line(error)}"


def _pair(watch: _Watch, block: nn.Module, originals, names) -> tuple[nn.Module, Pair]:
    """The owner and the pair of a block, all of the model itself; raises `Unfit`."""
    taken = watch.taken[block]
    for call in taken:
        if isinstance(call, str):
            raise Unfit(call)
    if not taken:
        raise Unfit("the example doesn't reach it")
    if not block._recipe.function.follows_batch_norm:
        raise Unfit("there is no kernel for BatchNorm, ReLU and what it computes")
    norm, owner = taken[0].norm, taken[0].owner
    if any(call.norm is not norm or call.owner is not owner for call in taken):
        raise Unfit("it is called after one BatchNorm and after another")
    for call in watch.calls:
        if call.norm is norm:
            if call.readers:
                raise Unfit(f"{_name(call)} reads what comes before it, too")
            if call.taker is not block:
                raise Unfit(f"{names[originals[norm]]} is called for others, too")
    norm, block_, owner = (originals[module] for module in (norm, block, owner))
    passed = {originals[module] for call in taken for module in call.passed} - {norm, block_}
    below = {module: path for path, module in owner.named_modules()}
    if any(module not in below for module in (norm, block_, *passed)):
        raise Unfit(f"not all of it is below {names[owner] or 'the model'}, which calls it")
    for module in (norm, block_, *passed):
        if swap.is_hooked(module):
            raise Unfit(f"{names[module]} has hooks, which would not see a map")
    if "forward" in vars(owner) or isinstance(owner, torch.jit.ScriptModule):
        raise Unfit(f"the forward of {names[owner] or 'the model'} is not its class's own")

    def path(module: nn.Module) -> Path:
        return tuple(below[module].split("."))

    between = tuple(sorted(path(module) for module in passed))
    return owner, Pair(path(norm), path(block_), between)


def _compare(
    model: nn.Module, owners: dict[int, tuple[Pair, ...]], example_inputs: tuple, in_half: bool
) -> None:
    """Raise `Unfit` unless the model with these pairs computes what it computes without."""
    for dtype in (torch.float64, None):
        try:
            before = _results(_copy(model), model, example_inputs, dtype)
        except Unfit:
            raise
        except Exception as error:
            if dtype is None:
                raise Unfit(f"the model doesn't run on example_inputs: {_line(error)}") from None
            continue  # it may be one that has a dtype of its own in its code
        twin = _copy(model)
        modules = list(twin.modules())
        for index, pairs in owners.items():
            for module, cls in prologue.join(modules[index], pairs):
                swap.set_class(module, cls)
        try:
            after = _results(twin, model, example_inputs, dtype)
            agree = _agree(before, after, in_half)
        except Exception as error:
            raise Unfit(f"with its BatchNorm the model raises {_line(error)}") from None
        if not agree:
            raise Unfit("with its BatchNorm the model computes something else")
        return


def _results(
    twin: nn.Module, model: nn.Module, example_inputs: tuple, dtype: torch.dtype | None
) -> dict[str, list[Tensor]]:
    """Outputs, gradients and buffers of one step in each mode. `twin` is changed by them."""
    if dtype is not None:
        twin.to(dtype)
    outputs, gradients = [], []
    for flags in _modes(model):
        _set_modes(twin, flags)
        twin.zero_grad()
        inputs = _inputs(example_inputs, dtype)
        tensors = [t for t in tree_leaves(_call(twin, inputs)) if isinstance(t, Tensor)]
        if not tensors:
            raise Unfit("there is no tensor in what the model returns")
        outputs += [t.detach() for t in tensors]
        generator = torch.Generator().manual_seed(0)
        losses = [
            (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t))
            .sum()
            .double()
            for t in tensors
            if t.requires_grad
        ]
        if losses:
            sum(losses).backward()
            wanted = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
            gradients += [t.grad for t in (*twin.parameters(), *wanted) if t.grad is not None]
    return {"outputs": outputs, "gradients": gradients, "buffers": list(twin.buffers())}


def _agree(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]], in_half: bool) -> bool:
    return all(_close(before[what], after[what], in_half) for what in before)


def _close(theirs: list[Tensor], ours: list[Tensor], in_half: bool) -> bool:
    """Whether all agree. Errors are measured by the largest tensor: a gradient may be zero but for
    roundings, as that of a bias before a BatchNorm is, and then its own size means nothing."""
    if [(t.shape, t.dtype) for t in theirs] != [(t.shape, t.dtype) for t in ours]:
        return False
    floats = [(a, b) for a, b in zip(theirs, ours, strict=True) if a.is_floating_point()]
    scale = max((a.abs().max().item() for a, _ in floats if a.numel()), default=0.0)
    for a, b in zip(theirs, ours, strict=True):
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        tolerance = _TOLERANCES[None] if in_half else _TOLERANCES.get(a.dtype, _TOLERANCES[None])
        if not (a - b).abs().max().item() <= tolerance * (a.abs().max().item() + scale):
            return False  # for NaN, too
    return True
