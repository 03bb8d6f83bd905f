"""What a block's forward looks at besides x, read from its code before it is ever run.

A probe sees a block on some inputs only. If it computes something else on others, its code says so.
So this reads the bytecode of every function that the forward may reach. It refuses code that looks
at anything outside of the block, or changes it. It lists the values that the code depends on, and
converted blocks watch these. The functions of torch and einops are trusted.
"""

import builtins
import dis
import enum
import functools
import re
import sys
import types
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .shapes import Unfit

_TRUSTED = {"torch", "einops", "math", "operator", "_operator", "functools", "itertools", "typing"}
_TRUSTED |= {"collections", "numpy", "typing_extensions"}

_BUILTINS = {"abs", "all", "any", "bool", "callable", "dict", "divmod", "enumerate", "filter"}
_BUILTINS |= {"float", "frozenset", "getattr", "hasattr", "int", "isinstance", "issubclass", "iter"}
_BUILTINS |= {"len", "list", "map", "max", "min", "next", "object", "pow", "property", "range"}
_BUILTINS |= {"reversed", "round", "set", "slice", "sorted", "sum", "super", "tuple"}
_BUILTINS |= {"type", "zip", "NotImplemented", "Ellipsis", "__debug__", "__name__"}

#: Names that code must not use: what tells apart calls that the probe can't all make, and what
#: changes something or leaves it behind.
_REFUSED = {"is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "get_device", "is_available"}
_REFUSED |= {"requires_grad", "grad_fn", "is_leaf", "grad", "_version", "is_inference", "names"}
_REFUSED |= {
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "current_stream",
}
_REFUSED |= {"get_autocast_dtype", "is_autocast_cpu_enabled", "get_autocast_gpu_dtype"}
_REFUSED |= {"get_autocast_cpu_dtype", "get_default_dtype", "get_num_threads", "initial_seed"}
_REFUSED |= {"is_tracing", "is_compiling", "is_exporting", "is_in_onnx_export", "get_rng_state"}
_REFUSED |= {"is_initialized", "get_world_size", "get_rank", "all_reduce", "device_count"}
_REFUSED |= {"is_contiguous", "stride", "storage_offset", "data_ptr", "untyped_storage", "storage"}
_REFUSED |= {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose", "are_deterministic"}
_REFUSED |= {"register_hook", "register_buffer", "register_parameter", "register_module"}
_REFUSED |= {"add_module", "register_forward_hook", "register_forward_pre_hook", "__setattr__"}
_REFUSED |= {"__dict__", "__setitem__", "random", "register_full_backward_hook", "save", "load"}
_REFUSED |= {"requires_grad_", "manual_seed", "seed", "set_grad_enabled", "backward", "set_"}
_REFUSED |= {"backends", "distributed", "get_float32_matmul_precision"}
_REFUSED |= {"retain_grad", "train", "eval", "zero_grad", "load_state_dict", "add_scalar"}
_REFUSED |= {"add_image", "register_post_accumulate_grad_hook", "named_parameters"}

_STORES = {"STORE_ATTR": "sets", "DELETE_ATTR": "deletes"}
_GLOBAL_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), enum.Enum)
_CONSTANTS += (torch.dtype, torch.device, torch.memory_format, torch.layout)
_NOTHING = object()
_GATE = re.compile("(?i:sigmoid|softmax|relu6|hardtanh|clamp|clip)|^(exp|tanh)$")


class Reading(NamedTuple):
    """What the forward of a block depends on besides its parameters."""

    #: (index of the module, name, frozen value) of each attribute that it may read
    attributes: tuple[tuple[int, str, Any], ...]
    #: (name of a Python module, name, value) of each global constant that it may read
    constants: tuple[tuple[str, str, Any], ...]
    #: whether it looks at self.__class__
    by_class: bool
    #: every name in its code, and the names of the functions and classes that it may call
    names: frozenset[str]

    @property
    def has_gate(self) -> bool:
        """Whether anything in it may be a gate."""
        return any(_GATE.search(name) for name in self.names)


def read(modules: list[nn.Module]) -> Reading:
    """Read the code of a block, given as itself and the modules below it. Raises `Unfit`, with the
    reason, if the code reads or changes what a fused function would not."""
    reader = _Reader(modules)
    reader.run()
    return Reading(
        tuple(reader.attributes.values()),
        tuple(reader.constants.values()),
        "__class__" in reader.names,
        frozenset(reader.names | reader.called | {type(module).__name__ for module in modules}),
    )


def frozen(value: Any) -> Any:
    """A form of the value that can be compared later: constants and functions as they are, None for
    anything else."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(frozen, value))
    if isinstance(value, dict):
        return ("dict", *((frozen(k), frozen(v)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return ("set", *sorted(map(repr, value)))
    if isinstance(value, (*_CONSTANTS, types.FunctionType, types.BuiltinFunctionType)):
        return value
    return None


def is_torchs(cls: type) -> bool:
    """Whether the class is one of torch's own."""
    return cls.__module__.partition(".")[0] == "torch"


def _is_trusted(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _TRUSTED


class _Reader:
    """A walk over everything that the forward of a block may reach."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.names: set[str] = set()
        self.called: set[str] = set()
        self.attributes: dict = {}
        self.constants: dict = {}
        self.seen: set[int] = set()
        self.functions: deque = deque()
        self.python_modules: list[types.ModuleType] = []
        self.new_names: deque = deque()
        self.user_classes = {type(m) for m in modules if not is_torchs(type(m))}
        for cls in self.user_classes:
            for name in (
                "__call__",
                "__getattr__",
                "__getattribute__",
                "_call_impl",
                "__setattr__",
            ):
                if getattr(cls, name, None) is not getattr(nn.Module, name, None):
                    raise Unfit(f"{cls.__name__} has a {name} of its own")

    def run(self) -> None:
        for index, module in enumerate(self.modules):
            if is_torchs(type(module)):
                self._watch_settings(index, module)
        self._add_name("forward")
        while self.functions or self.new_names:
            if self.functions:
                self._walk(*self.functions.popleft())
            else:
                self._look_up(self.new_names.popleft())

    def _watch_settings(self, index, module):
        # A layer is used by its parameters. Others, such as Dropout, are used by what they were
        # made with.
        if not any(p is not None for p in module._parameters.values()):
            for name, value in vars(module).items():
                if not name.startswith("_") and name not in ("training", "inplace"):
                    self._watch(index, name, value)

    def _add_name(self, name):
        if name not in self.names:
            if name in _REFUSED:
                raise Unfit(f"its forward uses {name}")
            self.names.add(name)
            self.new_names.append(name)

    def _look_up(self, name):
        """Whatever the modules of the block have under this name."""
        for index, module in enumerate(self.modules):
            value = vars(module).get(name, _NOTHING)
            if value is not _NOTHING and name != "training":
                self._admit(value, f"self.{name}")
                self._watch(index, name, value)
        for cls in self.user_classes:
            for base in cls.__mro__:
                if name in vars(base) and not is_torchs(base) and base is not object:
                    value = vars(base)[name]
                    if isinstance(value, (list, dict, set)):
                        raise Unfit(f"its forward uses {base.__name__}.{name}, which can change")
                    self._admit(value, f"{base.__name__}.{name}")
                    if isinstance(value, _CONSTANTS):
                        first = next(i for i, m in enumerate(self.modules) if isinstance(m, base))
                        self._watch(first, name, getattr(self.modules[first], name))
        for module in self.python_modules:
            if name in vars(module):
                self._admit(vars(module)[name], f"{module.__name__}.{name}")

    def _watch(self, index, name, value):
        value = frozen(value)
        if value is not None:
            self.attributes[index, name] = (index, name, value)

    def _admit(self, value, label):
        """Accept a value that the forward may read, and follow it if it is code."""
        if id(value) in self.seen and not isinstance(value, _CONSTANTS):
            return
        self.seen.add(id(value))
        if callable(value) and isinstance(getattr(value, "__name__", None), str):
            self.called.add(value.__name__)
        if isinstance(value, (*_CONSTANTS, nn.Module, Tensor, torch.Size, type(NotImplemented))):
            return
        if isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                self._admit(item, f"{label}[...]")
        elif isinstance(value, dict):
            for item in (*value.keys(), *value.values()):
                self._admit(item, f"{label}[...]")
        elif isinstance(value, (staticmethod, classmethod)):
            self._admit(value.__func__, label)
        elif isinstance(value, property):
            self._admit(value.fget, label)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            for item in (value.func, *value.args, *value.keywords.values()):
                self._admit(item, label)
        elif isinstance(value, types.MethodType):
            if not isinstance(value.__self__, type) and value.__self__ not in self.modules:
                raise Unfit(f"its forward calls {label}, a method of something outside")
            self._admit(value.__func__, label)
        elif isinstance(value, types.FunctionType):
            self._admit_function(value)
        elif isinstance(value, types.ModuleType):
            self._admit_module(value)
        elif isinstance(value, type):
            self._admit_class(value)
        elif isinstance(value, (torch.jit.ScriptFunction, torch._ops.OpOverloadPacket)):
            pass
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType)):
            owner = getattr(value, "__self__", None)
            home = value.__module__ if isinstance(value, types.BuiltinFunctionType) else None
            home = home or getattr(owner, "__module__", None) or type(owner).__module__
            if not _is_trusted(home) and getattr(value, "__name__", "") not in _BUILTINS:
                raise Unfit(f"its forward calls {label}")
        elif not _is_trusted(type(value).__module__):
            raise Unfit(f"its forward uses {label}, a {type(value).__name__}")

    def _admit_function(self, function):
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._admit(wrapped, function.__name__)
        if _is_trusted(function.__module__):
            return
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(default, (list, dict, set)):
                raise Unfit(f"{function.__name__} has a default argument that can change")
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                try:
                    value = cell.cell_contents
                except ValueError:
                    continue
                if isinstance(value, (list, dict, set)):
                    raise Unfit(f"its forward uses the variable {name}, which can change")
                self._admit(value, name)
        self.functions.append((code, function.__globals__))

    def _admit_module(self, module):
        root = module.__name__.partition(".")[0]
        if root in _TRUSTED:
            return
        if root in sys.stdlib_module_names:
            raise Unfit(f"its forward uses the module {module.__name__}")
        # In a module of somebody's own, only what the code names counts.
        self.python_modules.append(module)
        for name in self.names & set(vars(module)):
            self._admit(vars(module)[name], f"{module.__name__}.{name}")

    def _admit_class(self, cls):
        if _is_trusted(cls.__module__) or cls.__module__ == "builtins":
            return
        if issubclass(cls, (BaseException, torch.autograd.Function, enum.Enum)):
            return
        if cls.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
            raise Unfit(f"its forward uses {cls.__module__}.{cls.__name__}")
        for name in ("__init__", "__call__", "forward"):
            if name in vars(cls) and not any(cls in c.__mro__ for c in self.user_classes):
                self._admit(vars(cls)[name], f"{cls.__name__}.{name}")

    def _walk(self, code, scope):
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.functions.append((constant, scope))
            elif (
                # The name of an attribute, for getattr, counts like one in the code.
                isinstance(constant, str)
                and constant.isidentifier()
                and (constant not in _REFUSED or "getattr" in code.co_names)
            ):
                self._add_name(constant)
        instructions = list(dis.get_instructions(code))
        for i, instruction in enumerate(instructions):
            if instruction.argval == "device" and any(
                after.opname in ("COMPARE_OP", "IS_OP", "CONTAINS_OP")
                or (after.opname in ("LOAD_ATTR", "LOAD_METHOD") and after is instructions[i + 1])
                for after in instructions[i + 1 : i + 5]
            ):
                raise Unfit("its forward looks at the device of a tensor")
            name, operation = instruction.argval, instruction.opname
            if operation in _STORES:
                raise Unfit(f"its forward {_STORES[operation]} the attribute {name}")
            if operation == "STORE_DEREF" and name in code.co_freevars:
                raise Unfit(f"its forward sets the variable {name} of a function around it")
            if operation in _GLOBAL_STORES:
                raise Unfit(f"its forward sets the global variable {name}")
            if operation in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                self._read_global(name, scope)
            elif operation == "IMPORT_NAME":
                module = sys.modules.get(name)
                if module is None:
                    raise Unfit(f"its forward imports {name}")
                self._admit_module(module)
            elif operation in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                self._add_name(name)

    def _read_global(self, name, scope):
        if name not in scope:
            value = getattr(builtins, name, _NOTHING)
            if value is _NOTHING:
                return  # a NameError, should it be reached
            if name not in _BUILTINS and not (
                isinstance(value, type) and issubclass(value, BaseException)
            ):
                raise Unfit(f"its forward calls {name}")
            return
        value = scope[name]
        if isinstance(value, (list, dict, set, Tensor, nn.Module)):
            raise Unfit(f"its forward uses the global variable {name}")
        self._admit(value, name)
        if isinstance(value, (*_CONSTANTS, tuple)):
            home = scope.get("__name__")
            if scope_of(home, map(type, self.modules)) is not scope:
                raise Unfit(f"its forward uses the global variable {name}")
            self.constants[home, name] = (home, name, frozen(value))


def scope_of(home: str | None, classes: Iterable[type]) -> dict[str, Any] | None:
    """The globals of the Python module of that name, as functions of its classes see them."""
    for cls in classes:
        for base in cls.__mro__:
            for value in vars(base).values():
                scope = getattr(value, "__globals__", None)
                if scope is not None and scope.get("__name__") == home:
                    return scope
    module = sys.modules.get(home or "")
    return None if module is None else vars(module)
