"""A driver that stands in for a GPU's. It notes what is launched: kernel and specialisation, grid,
stream, arguments. Nothing is compiled."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from scse_kernels import backends
from scse_kernels._triton import plan

_devices = itertools.count(1000)


class Recorder:
    """A launcher that notes."""

    def __init__(self, name, key, kinds, log):
        self.name, self.key, self.kinds, self.log = name, key, kinds, log

    def __call__(self, x, y, z, stream, function, metadata, of_launch, enter, leave, *arguments):
        assert (function, metadata) == (f"function of {self.name}", f"metadata of {self.name}")
        if enter is not None:
            enter(of_launch)
        assert len(arguments) == len(self.kinds)
        addresses = [
            v if v is None or type(v) is int else v.data_ptr() if kind[0] == "*" else v
            for v, kind in zip(arguments, self.kinds, strict=True)
        ]
        self.log.append((self.name, self.key, (x, y, z), stream, addresses, self.kinds))


class Driver:
    """One H100, and the launches on it."""

    launcher_cls = Recorder

    def __init__(self):
        self.log, self.device, self.compiled = [], next(_devices), 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        assert device == self.device
        return 77


class Kernel:
    """Stands in for a compiled kernel."""

    def __init__(self, name, key, kinds, active):
        self.run = Recorder(name, key, kinds, active.log)
        self.function, self.packed_metadata = f"function of {name}", f"metadata of {name}"

    def launch_metadata(self, grid, stream, *arguments):
        return "of the launch"


@contextlib.contextmanager
def stand_in(on_compile: Callable[..., None] = lambda *compilation: None) -> Iterator[Driver]:
    """The driver; CPU tensors count as a GPU's. on_compile: called with what Triton would compile,
    as `JITFunction._do_compile` is."""

    def compile(function, key, signature, device, *more):
        active = driver.active
        on_compile(function, key, signature, device, *more)
        kernel = Kernel(function.__name__, key, [*signature.values()], active)
        function.device_caches[device][0][key] = kernel
        active.compiled += 1
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        active = Driver()
        patch.setattr(driver, "_active", active)
        patch.setattr(JITFunction, "_do_compile", compile)
        patch.setattr(plan, "takes_addresses", lambda device: True)
        patch.setattr(backends, "why_not", lambda backend, *_: None)
        plan.forget()
        yield active
        plan.forget()


@pytest.fixture(name="gpu")
def recording():
    with stand_in() as active:
        yield active


def forbid_tritons_own_way(monkeypatch):
    """A launch by Triton's binder raises."""

    def run(*_, **__):
        raise AssertionError("Triton's own way")

    monkeypatch.setattr(JITFunction, "run", run)


def watched(*_):
    """A profiler's hook: with it launches go Triton's own way."""


@contextlib.contextmanager
def a_profiler():
    knobs.runtime.launch_enter_hook.add(watched)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(watched)


def shown(names, log):
    """Launches without what differs from call to call: addresses become the names of `names`,
    which maps the first to the second."""

    def one(value, kind):
        if kind[0] != "*":
            return value
        assert type(value) is int, "an address"  # 0: of an empty tensor
        return names.get(value, f"scratch or result, {value % 16}")

    return [
        (name, key, grid, stream, [one(v, k) for v, k in zip(values, kinds, strict=True)])
        for name, key, grid, stream, values, kinds in log
    ]


def moved(tensor, elements):
    """The tensor at an address so many elements behind one of 64 bytes, with its strides."""
    size = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = torch.empty(size + elements, dtype=tensor.dtype)
    there = memory.as_strided(tensor.shape, tensor.stride(), elements)
    return there.copy_(tensor)


def sizes(log):
    """The different launches, by all but their pointers."""
    return {
        (name, key, grid, *(v for v, kind in zip(values, kinds, strict=True) if kind == "i32"))
        for name, key, grid, _, values, kinds in log
    }


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scse_kernels" in str(function):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def at_once(work: Callable[[int], None], number: int) -> None:
    """work(0), work(1) and so on in threads of their own that start together; none may fail."""
    start, failures = threading.Barrier(number), []

    def run(i):
        start.wait()
        try:
            work(i)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
