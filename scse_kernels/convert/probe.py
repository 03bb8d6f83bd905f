"""Whether a block computes one of the functions that the kernels know: it is run, and watched.

A stand-in of the block's class, in float64 and with random parameters, must compute what a function
of the reference computes, gradients included: with maps of many sizes, in training and evaluation,
in other dtypes, without gradients and under autocast. The stand-in shares nothing with the block
that can change. While it runs the first time, every operation is looked at: it must be one of those
that scSE is made of, none that looks at values or takes a part of the map. So what agrees here
agrees elsewhere too, as far as the code of the block allows (source.py reads that).
"""

import contextlib
import copy
import io
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..backends import use_backend
from . import shapes, source
from .function import SLOPED, Function, possible
from .shapes import Reading, Unfit

#: What a block may hold besides: named where the probe disagrees, since it is hardly the reason.
_USUAL = {"ReLU", "Sigmoid", "Identity", "Sequential", "Flatten", "Linear", "Conv1d", "Conv2d"}
_USUAL |= {"Conv3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "ModuleList"}

_HOOKS_OF_ALL_MODULES = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)

#: Maps by number of spatial axes. The smallest come first, then one position and one sample, then
#: maps larger than common windows, with odd and different sizes.
_SMALL = {2: (3, 2), 3: (3, 2, 5), 1: (5,)}
_LARGE = {2: ((41, 29), (3, 307)), 3: ((11, 13, 9), (2, 3, 61)), 1: ((307,), (1031,))}
#: Elements of a large map beyond which a narrower one is taken.
_MOST_ELEMENTS = 1 << 20


class Found(NamedTuple):
    """What a block computes, and for which calls the probe saw it."""

    function: Function
    reading: Reading
    #: (axes of x, least number of samples, least number of positions)
    calls: tuple[tuple[int, int, int], ...]
    under_autocast: bool
    source: source.Reading


def probe(block: nn.Module) -> Found:
    """What the block computes. Raises `Unfit`, with the reason, if it is none of the functions."""
    modules = [module for _, module in block.named_modules(remove_duplicate=False)]
    code = source.read(modules)
    if not code.has_gate:
        raise Unfit("it has no gate")
    with _apart():
        return _Probe(block, code).run()


class _Probe:
    def __init__(self, block: nn.Module, code: source.Reading) -> None:
        self.block, self.code = block, code
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.twin = _stand_in(block, code.names, self.generator)
        self.parametrised = shapes.parametrised(self.twin)
        self.layers = shapes.plain_layers(self.parametrised)
        self.parameters = list(self.twin.parameters())

    def run(self) -> Found:
        self.channels, rank, failure = self._find_channels()
        if rank is None:
            raise self._unfit(f"it doesn't run on a random feature map: {failure}")
        operations = self._look(_SMALL[rank])
        self.loose = operations.loose
        used = self._used(_SMALL[rank])
        if not used:
            raise self._unfit("it computes something else: no gradient reaches its parameters")
        candidates = list(shapes.readings({p: self.layers[p] for p in used if p in self.layers}))
        candidates = [c for c in candidates if c.channels == self.channels]
        if not candidates or any(path not in self.layers for path in used):
            raise Unfit(shapes.why_none(self.parametrised, used))
        why_not = operations.why_not()
        if why_not is not None:
            raise self._unfit(why_not)
        for function, reading in self._similar(_SMALL[rank], candidates, operations):
            calls = self._agreeing_calls(function, reading)
            if calls:
                x = self._map(_SMALL[rank]).detach()
                under_autocast = self._check_dtypes(function, reading, x)
                return Found(function, reading, calls, under_autocast, self.code)
        gate = self._shape_of_gate(_SMALL[rank])
        raise Unfit(gate) if gate else self._unfit("it computes something else")

    def _find_channels(self) -> tuple[int, int | None, str]:
        """How many channels, and the number of spatial axes, of a map on which the twin runs."""
        failure = ""
        for channels in shapes.channels(self.layers):
            self.channels = channels
            for rank, sizes in _SMALL.items():
                try:
                    self._call(self._map(sizes))
                except Unfit:
                    raise
                except Exception as error:  # whatever somebody's forward may raise
                    failure = failure or _line(error)
                    continue
                return channels, rank, failure
        return 0, None, failure

    def _map(self, sizes: tuple[int, ...], samples: int | None = None) -> Tensor:
        # No two sizes are equal, so that one axis can't be taken for another.
        if samples is None:
            samples = 4 if self.channels != 4 else 6
        return _feature_map((samples, self.channels, *sizes), self.generator)

    def _call(self, x: Tensor, watchers: Sequence[Any] = ()) -> Tensor:
        """The twin's answer, with these modes on. Raises `Unfit` if the call left anything
        behind."""
        before = self._state() if watchers else []
        # Not a leaf: a leaf can't be changed in place, other tensors can.
        given = x.clone()
        version = given._version
        written = io.StringIO()
        with (
            contextlib.redirect_stdout(written),
            contextlib.redirect_stderr(written),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            with contextlib.ExitStack() as modes:
                for watcher in watchers:
                    modes.enter_context(watcher)
                y = self.twin(given)
        if not isinstance(y, Tensor):
            raise Unfit(f"it returns a {type(y).__name__}")
        if given._version != version:
            raise Unfit("its forward changes x, in-place")
        if written.getvalue():
            raise Unfit("its forward prints")
        if any(not w.filename.startswith(_HOME_OF_TORCH) for w in warned):
            raise Unfit("its forward warns")
        if watchers:
            for was, now, what in zip(before, self._state(), _STATE, strict=True):
                if was != now:
                    raise self._unfit(what)
        return y

    def _state(self) -> list[Any]:
        """What a forward must leave as it was."""
        tensors = [*self.twin.parameters(), *self.twin.buffers()]
        draws = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
        if "numpy" in sys.modules:
            _, keys, *others = sys.modules["numpy"].random.get_state()
            draws.append((keys.tobytes(), others))
        return [
            draws,
            [(tensor._version, tensor.detach().sum().item()) for tensor in tensors],
            [(id(p), p.requires_grad) for p in self.parameters],
            [_everything(module) for module in self.twin.modules()],
        ]

    def _gradients(self, y: Tensor, x: Tensor, parameters: list[Tensor], dy: Tensor):
        grads = torch.autograd.grad(y, [x, *parameters], dy, allow_unused=True)
        return [
            torch.zeros_like(t) if g is None else g
            for t, g in zip([x, *parameters], grads, strict=True)
        ]

    def _used(self, sizes: tuple[int, ...]) -> list[str]:
        """Paths of the modules whose parameters take part."""
        y = self._call(self._map(sizes))
        used = []
        if y.requires_grad:
            grads = torch.autograd.grad(y.sum(), self.parameters, allow_unused=True)
            ids = {id(p) for p, g in zip(self.parameters, grads, strict=True) if g is not None}
            for path, module in self.parametrised.items():
                if any(id(p) in ids for p in module._parameters.values()):
                    used.append(path)
        return used

    def _look(self, sizes: tuple[int, ...]) -> "_Operations":
        """The operations of a forward in training and of one in evaluation."""
        operations = _Operations()
        for training in (True, False):
            x = self._map(sizes)
            self.twin.train(training)
            sizes_of_x = _Sizes(x.shape)
            self._call(x, (operations, sizes_of_x))
            if "numel" in self.code.names and not sizes_of_x.counted:
                sizes_of_x.compared.found = "it uses numel of a size"
            if found := sizes_of_x.compared.found:
                raise Unfit(f"its forward looks at the size of x: {found}")
        self.twin.train()
        return operations

    def _layers(self, reading: Reading) -> list[Tensor | None]:
        """w1, b1, w2, b2, ws, bs."""
        found = (p if p is None else self.twin.get_submodule(p) for p in reading.layers)
        pairs = ((None, None) if layer is None else (layer.weight, layer.bias) for layer in found)
        return [parameter for pair in pairs for parameter in pair]

    def _similar(self, sizes, readings, operations) -> Iterator[tuple[Function, Reading]]:
        """Functions that agree with the twin's output for one map, lazily."""
        x = self._map(sizes).detach()
        y = self._call(x).detach()
        for reading in readings:
            layers = [p if p is None else p.detach() for p in self._layers(reading)]
            for function in possible(reading.excitation, operations.slopes):
                if _close(_reference(function, x, layers), y, self.loose):
                    yield function, reading

    def _agreeing_calls(self, function, reading) -> tuple[tuple[int, int, int], ...]:
        """For which numbers of axes, of samples and of positions the twin agrees."""
        calls = []
        for rank, small in _SMALL.items():
            if self._agrees(function, reading, small, gradients=True) is not True:
                continue
            if any(self._agrees(function, reading, s) is not True for s in self._large(rank)):
                raise Unfit("it computes something else on larger maps")
            rows = [(1, *small[1:]), (*small[:-1], 1)] if rank > 1 else []
            if any(self._agrees(function, reading, s) is not True for s in rows):
                raise Unfit("it computes something else on maps of one row")
            alone = self._agrees(function, reading, small, samples=1)
            one_position = self._agrees(function, reading, (1,) * rank)
            calls.append((rank + 2, 2 - (alone is True), 2 - (one_position is True)))
        return tuple(calls)

    def _large(self, rank: int) -> Iterator[tuple[int, ...]]:
        for sizes in _LARGE[rank]:
            if 2 * self.channels * torch.Size(sizes).numel() > _MOST_ELEMENTS:
                sizes = (*(1 for _ in sizes[1:]), max(sizes))
            yield sizes

    def _agrees(self, function, reading, sizes, samples=None, gradients=False) -> bool | None:
        """Whether the twin computes the function on a map of this size; None if it raises."""
        if samples is None and not gradients:
            samples = 2
        # The largest maps once: what a forward does in evaluation alone was seen by `_look`.
        for training in (True, False) if torch.Size(sizes).numel() < 100 else (True,):
            x = self._map(sizes, samples)
            self.twin.train(training)
            try:
                with contextlib.nullcontext() if gradients else torch.no_grad():
                    theirs = self._call(x)
            except Unfit:
                raise
            except Exception:
                return None
            layers = self._layers(reading)
            with contextlib.nullcontext() if gradients else torch.no_grad():
                ours = _reference(function, x, layers)
            if not _close(ours, theirs, self.loose):
                return False
            if gradients:
                parameters = [p for p in layers if p is not None]
                dy = _normal(ours.shape, self.generator)
                if not theirs.requires_grad or not all(
                    _close(a, b, self.loose)
                    for a, b in zip(
                        self._gradients(ours, x, parameters, dy),
                        self._gradients(theirs, x, parameters, dy),
                        strict=True,
                    )
                ):
                    return False
        return True

    def _check_dtypes(self, function, reading, x) -> bool:
        """Refuse a twin that computes something else in another dtype. Returns whether it does what
        the function does under autocast. The twin is in another dtype afterwards."""

        def differs(dtype, autocast):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                try:
                    theirs = self._call(x.to(dtype))
                except Unfit:
                    raise
                except Exception:
                    return autocast  # operations that this device lacks in a dtype say nothing
            layers = [p if p is None else p.detach().double() for p in self._layers(reading)]
            ours = _reference(function, x.to(dtype).double(), layers)
            error = (theirs.double() - ours).abs().max() if theirs.shape == ours.shape else 1e9
            return theirs.dtype != dtype or not error <= 0.06 * ours.abs().max()

        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            self.twin.to(dtype)
            if differs(dtype, autocast=False):
                raise self._unfit(f"it computes something else in {dtype}")
        self.twin.to(torch.float32)
        return not differs(torch.float32, autocast=True)

    def _shape_of_gate(self, sizes) -> str | None:
        """Whether what it returns is no map but a gate, in words."""
        x = self._map(sizes)
        n, c = x.shape[:2]
        shape = tuple(self._call(x).shape)
        ones = (1,) * len(sizes)
        if shape in ((n, c), (n, c, *ones), (n, 1, *sizes)) and shape != tuple(x.shape):
            return f"it returns a gate {list(shape)} for x {list(x.shape)}, not the product"
        return None

    def _unfit(self, what: str) -> Unfit:
        """The error for a block that computes something else; it names the parts that may be
        why."""
        parts = [
            f"{path} is a {type(module).__name__}"
            for path, module in self.block.named_modules()
            if path and not module._modules and type(module).__name__ not in _USUAL
        ]
        return Unfit(": ".join(filter(None, (what, ", ".join(parts)))))


#: What scSE is made of, however it is written, without the underscore of in-place variants.
_OPERATIONS = {"mean", "sum", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"}
_OPERATIONS |= {"avg_pool1d", "avg_pool2d", "avg_pool3d", "convolution", "addmm", "mm", "bmm", "mv"}
_OPERATIONS |= {"baddbmm", "addmv", "dot", "linear", "sigmoid", "relu", "leaky_relu", "elu", "silu"}
_OPERATIONS |= {"gelu", "hardsigmoid", "hardtanh", "clamp", "clamp_min", "threshold", "maximum"}
_OPERATIONS |= {"amax", "max", "mul", "add", "sub", "rsub", "neg", "div", "exp", "reciprocal"}
_OPERATIONS |= {"sqrt", "pow", "tanh", "erf", "cat", "stack", "view", "_unsafe_view", "reshape"}
_OPERATIONS |= {"expand", "permute", "t", "transpose", "unsqueeze", "squeeze", "select", "split"}
_OPERATIONS |= {"split_with_sizes", "chunk", "unbind", "repeat", "clone", "copy", "_to_copy"}
_OPERATIONS |= {"alias", "detach", "contiguous", "as_strided", "_reshape_alias", "zeros_like"}
_OPERATIONS |= {
    "ones_like",
    "full_like",
    "empty_like",
    "new_ones",
    "new_zeros",
    "new_empty",
    "fill",
}
_OPERATIONS |= {
    "ones",
    "zeros",
    "full",
    "empty",
    "scalar_tensor",
    "lift_fresh",
    "zero",
    "expand_copy",
}
_OPERATIONS |= {"upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "slice"}
_OPERATIONS |= {
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_linear1d",
    "matmul",
    "tile",
}
_OPERATIONS |= {"adaptive_avg_pool2d", "adaptive_avg_pool3d", "threshold"}


class _Operations(TorchDispatchMode):
    """Records the operations of a forward, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: list[str] = []
        #: slopes of the activations that have one
        self.slopes: dict[str, list[float]] = {}
        #: whether part of it is computed in float32
        self.loose = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported, which takes seconds

    def why_not(self) -> str | None:
        if "_local_scalar_dense" in self.unknown:
            return "its forward looks at the values of a tensor"
        if self.unknown:
            return f"its forward uses {', '.join(dict.fromkeys(self.unknown))}"
        return None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        name = name if name.startswith("__") else name.removesuffix("_")
        if name not in _OPERATIONS or self._is_partial(name, args, result):
            self.unknown.append(name)
        if name in SLOPED:
            slope = float(args[1]) if len(args) > 1 else {"leaky_relu": 0.01, "elu": 1.0}[name]
            self.slopes.setdefault(name, []).append(slope)
        elif name == "hardsigmoid":
            self.loose = True  # torch has a sixth as a float32 there
        elif name == "_to_copy":
            self.loose |= (kwargs or {}).get("dtype") not in (None, torch.float64)
        return result

    @staticmethod
    def _is_partial(name, args, result) -> bool:
        """Whether an operation looks at single positions or at values."""
        if "pool" in name:  # over everything, or else over windows
            return isinstance(result, Tensor) and any(size != 1 for size in result.shape[-1:])
        if name in ("clamp", "clamp_min", "hardtanh", "threshold"):  # parts of activations only
            return tuple(args[1:]) not in _BOUNDS
        if name.startswith("upsample"):  # of a gate for all positions, or else of a map
            return any(size != 1 for size in args[0].shape[2:])
        return False


#: Bounds of clamp: those of ReLU, those of hard sigmoid written in parts, and none.
_BOUNDS = {(0,), (0, None), (0, 6), (0, 1), (0, 0), (0.0, 6.0)}


class _Compared:
    found: str | None = None


class _Size(int):
    """A size that notes what it is compared with."""

    compared: _Compared
    derived: bool  # computed from a size


def _comparing(name: str):
    compare = getattr(int, name)

    def method(self, other=0):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Sizes of one and of zero are tried by the probe.
        if caller.partition(".")[0] not in ("torch", "einops", __name__.partition(".")[0]) and (
            isinstance(other, (float, _Size))
            or (isinstance(other, int) and (other > 1 or self.derived))
        ):
            self.compared.found = f"it compares {int.__repr__(self)} with {other}"
        return compare(self) if name == "__bool__" else compare(self, other)

    return method


def _computing(name: str):
    compute = getattr(int, name)

    def method(self, *others):
        result = compute(self, *others)
        return _noted(result, self.compared, True) if type(result) is int else result

    return method


for _name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__"):
    setattr(_Size, _name, _comparing(_name))
for _operator in ("add", "sub", "mul", "floordiv", "mod", "pow"):
    for _name in (f"__{_operator}__", f"__r{_operator}__"):
        setattr(_Size, _name, _computing(_name))


def _looking_up(name: str):
    look_up = getattr(int, name)

    def method(self):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] not in ("torch", "einops"):
            self.compared.found = f"it looks {int.__repr__(self)} up, or converts it"
        return look_up(self)

    return method


for _name in ("__hash__", "__int__", "__float__"):
    setattr(_Size, _name, _looking_up(_name))


def _noted(size: int, compared: _Compared, derived: bool = False) -> _Size:
    result = _Size(size)
    result.compared, result.derived = compared, derived
    return result


_PARTS = {"split", "chunk", "narrow", "unfold", "tensor_split", "split_with_sizes", "unbind"}
_PARTS |= {"hsplit", "vsplit", "dsplit", "index_select", "take_along_dim", "gather", "pad"}


class _Sizes(TorchFunctionMode):
    """Gives the sizes of x, channels apart, as numbers that note what they are compared with, and
    notes when a part of x is taken."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.compared = tuple(shape), _Compared()
        self.counted = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor) and self._is_like_x(args[0]):
            if function is Tensor.__getitem__:
                keys = args[1] if isinstance(args[1], tuple) else (args[1],)
                if any(isinstance(k, slice) and (k.start or k.stop is not None) for k in keys):
                    self.compared.found = "it takes a slice"
            if function in (Tensor.shape.__get__, Tensor.size):
                if isinstance(result, torch.Size):
                    sizes = list(result)
                    for axis in (0, *range(2, len(sizes))):
                        sizes[axis] = _noted(sizes[axis], self.compared)
                    return torch.Size(sizes)
                if isinstance(result, int) and (len(args) < 2 or args[1] != 1):
                    return _noted(result, self.compared)
            if function in (Tensor.numel, Tensor.nelement):
                self.counted = True
                return _noted(result, self.compared)
            if function.__name__ in _PARTS:
                self.compared.found = f"it uses {function.__name__}"
            if function is Tensor.__len__:
                self.compared.found = "it takes its length"
        return result

    def _is_like_x(self, tensor: Tensor) -> bool:
        # Here the mode is off: with it on, its own look at a shape would come back here.
        shape = tuple(tensor.shape)
        return len(shape) == len(self.shape) and (shape[0], *shape[2:]) == (
            self.shape[0],
            *self.shape[2:],
        )


@contextlib.contextmanager
def _apart():
    """Nothing from outside takes part: autocast, hooks and modes are off, gradients are on, our
    functions use the eager backend. Afterwards the random generators are as before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with contextlib.ExitStack() as stack:
        modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
        for mode in modes:
            stack.callback(_push_mode, mode)
        if torch._C._len_torch_dispatch_stack():  # otherwise it imports a lot for nothing
            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(use_backend("eager"))
        python, numpy = random.getstate(), sys.modules.get("numpy")
        stack.callback(random.setstate, python)
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for hooks in _HOOKS_OF_ALL_MODULES:
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        yield


_HOME_OF_TORCH = torch.__path__[0]
#: What a changed part of _Probe._state means.
_STATE = (
    "it draws random numbers",
    "its forward changes a parameter or a buffer",
    "its forward changes a parameter",
    "its forward changes an attribute",
)


def _stand_in(block: nn.Module, names: frozenset[str], generator: torch.Generator) -> nn.Module:
    """A module of the same class, with copies of the same attributes but without hooks, in float64
    on the CPU. Its parameters and buffers are random: weights of zero or saturated gates would hide
    what a block computes, and half precision would blur it."""
    memo: dict[int, Any] = {}
    originals = list(block.modules())
    twins = [object.__new__(type(module)) for module in originals]
    for module, twin in zip(originals, twins, strict=True):
        memo[id(module)] = twin
        twin.__dict__ = vars(nn.Module())
        for own, kept in ((module._parameters, _as_parameter), (module._buffers, _as_buffer)):
            for tensor in own.values():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = kept(tensor, generator)
    kept = vars(nn.Module()).keys() | {"_compiled_call_impl"}
    for module, twin in zip(originals, twins, strict=True):
        for registry in ("_parameters", "_buffers", "_modules"):
            mine = getattr(twin, registry)
            for name, value in vars(module)[registry].items():
                mine[name] = None if value is None else memo[id(value)]
        for name, value in vars(module).items():
            if name not in kept:
                try:
                    vars(twin)[name] = copy.deepcopy(value, memo)
                except Exception as error:
                    if name in names:
                        raise Unfit(f"{name} can't be copied: {_line(error)}") from None
    return twins[0]


def _as_parameter(like: Tensor, generator: torch.Generator) -> Tensor:
    return nn.Parameter(_random(like, generator))


def _as_buffer(like: Tensor, generator: torch.Generator) -> Tensor:
    return _random(like, generator)


def _everything(module: nn.Module) -> list[Any]:
    """The attributes of a module, in a form that shows any change."""
    return [(name, _deep(value)) for name, value in vars(module).items()]


def _deep(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [id(value), *map(_deep, value)]
    if isinstance(value, dict):
        return [id(value), *((_deep(k), _deep(v)) for k, v in value.items())]
    if isinstance(value, (set, frozenset)):
        return [id(value), sorted(map(repr, value))]
    return id(value)


def _reference(function: Function, x: Tensor, layers: list[Tensor | None]) -> Tensor:
    try:
        return function(x, *layers, backend="eager")
    except (TypeError, ValueError, RuntimeError) as error:
        raise Unfit(str(error)) from None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values in the shape of `like`. A weight is scaled so that its sums have a variance of
    one."""
    values = _normal(like.shape, generator)
    return values / max(like[:1].numel() if like.dim() > 1 else 16, 1) ** 0.5


def _feature_map(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """[N, C, *S]. Sums that are linear in x get both signs, and in half of the samples they are far
    from zero: so no activation passes for another. Zeros in x make ties."""
    half = max(shape[0] // 2, 1)
    x = _normal((half, *shape[1:]), generator)
    x += _normal(shape[1:2], generator).reshape(-1, *(1,) * (len(shape) - 2))
    x = torch.where(x.abs() < 0.2, 0.0, x)
    x[1:] *= 30
    return torch.cat([x, -x])[: shape[0]].requires_grad_()


def _close(ours: Tensor, theirs: Tensor, loose: bool) -> bool:
    """Whether they differ by roundings alone: float64's, or float32's where a part is computed in
    float32. False for NaN."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    size, error = theirs.abs(), (ours - theirs).abs()
    tolerance = 1e-5 if loose else 1e-9
    return bool((error <= tolerance * (size + 0.1 * size.max())).all())
