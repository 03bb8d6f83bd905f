"""The other side of the fake runtime: refuses what a driver would refuse, and has the emulator
execute the rest."""

import contextlib
import ctypes
import re
import subprocess
from collections.abc import Iterator
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import gpulab
import numpy as np
import torch
from gpulab.memory import DeviceArray

from scse_kernels import backends, ops

from . import build
from .images import Image, images

# cudaError_t
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9
INVALID_DEVICE, NO_KERNEL_IMAGE, INVALID_RESOURCE_HANDLE = 101, 209, 400
LAUNCH_FAILURE, NOT_SUPPORTED = 719, 801

DEFAULT_SHARED = 48 * 1024
MAX_DYNAMIC_SHARED = 8  # of cudaFuncAttribute

# --- the layouts of driver.h ---


class _Launch(Structure):
    _fields_ = (
        ("function", c_void_p),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("overlap", c_int32),
        ("unknown_attribute", c_int32),
        ("shared", c_uint64),
        ("stream", c_void_p),
        ("arguments", POINTER(c_void_p)),
    )


class _Memory(Structure):
    _fields_ = (
        ("begin", c_size_t),
        ("end", c_size_t),
        ("storage", c_size_t),
        ("storage_bytes", c_uint64),
        ("itemsize", c_int32),
        ("fresh", c_int32),
    )


class _FunctionAttributes(Structure):
    _fields_ = tuple(
        (name, c_int32)
        for name in ("architecture", "static_shared", "most_dynamic_shared", "most_threads")
    )


class _Function(Structure):
    _fields_ = (("function", c_void_p), ("name", c_char_p), ("fatbin", c_void_p))


class _Driver(Structure):
    _fields_ = (
        ("launch", CFUNCTYPE(c_int32, POINTER(_Launch))),
        ("set_function_attribute", CFUNCTYPE(c_int32, c_void_p, c_int32, c_int32)),
        ("function_attributes", CFUNCTYPE(c_int32, c_void_p, POINTER(_FunctionAttributes))),
        ("memory", CFUNCTYPE(c_int32, POINTER(_Memory))),
        ("new_call", CFUNCTYPE(c_int32)),
    )


# --- memory ---


@dataclass(frozen=True)
class Memory:
    """What a tensor extends over, in bytes of this process, which is also the device's memory."""

    begin: int
    end: int
    storage: int
    storage_bytes: int
    itemsize: int
    fresh: bool

    def window(self, pointer: int) -> np.ndarray:
        """From a pointer to the end, as an array whose base is the whole allocation: there the
        emulator looks for alignment. Of fresh memory it sees what was never written."""
        root = np.frombuffer(
            (ctypes.c_uint8 * self.storage_bytes).from_address(self.storage), np.uint8
        )
        window = root[pointer - self.storage : self.end - self.storage]
        if window.size % self.itemsize == 0:
            window = window.view(f"u{self.itemsize}")
        return window.view(DeviceArray) if self.fresh else window


class MemoryMap:
    """The tensors whose pointers host code has asked for in the current call."""

    def __init__(self):
        self._known: list[Memory] = []

    def clear(self):
        self._known.clear()

    def add(self, memory: Memory):
        again = [m for m in self._known if (m.begin, m.end) == (memory.begin, memory.end)]
        if not again:  # what is fresh when it is allocated stays so
            self._known.append(memory)

    def window(self, address: int) -> np.ndarray | None:
        """The memory that an address points into, None if it is no pointer."""
        inside = [m for m in self._known if m.begin <= address < m.end]
        # Slices of one tensor may lie in one another's gaps.
        exact = [m for m in inside if m.begin == address]
        return (exact or inside)[-1].window(address) if inside else None


# --- functions ---


@dataclass(frozen=True)
class Function:
    """A kernel, as nvcc's host code has registered it."""

    name: str  # mangled
    readable: str
    fatbin: int

    def image(self, architecture: int) -> Image:
        """Its code for a device: PTX of that architecture or of the newest before it."""
        fitting = [i for i in images(self.fatbin) if i.architecture <= architecture]
        if not fitting:
            raise Refused(NO_KERNEL_IMAGE, f"{self.readable} has no code for sm_{architecture}")
        return fitting[-1]


class Refused(Exception):
    """What the runtime answers with an error code."""

    def __init__(self, code, why):
        super().__init__(why)
        self.code, self.why = code, why


@dataclass
class Lab:
    """What `running_on` yields. Passes and summaries: as of gpulab.intercept."""

    gpu: gpulab.Device
    seed: int | None
    resident: int | None
    l2: gpulab.L2Cache
    count: bool  # registers too, and how many blocks they leave room for
    dry: bool
    latency: bool  # each launch's critical path too
    reports: list[gpulab.Report] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)  # readable names
    overlapped: list[str] = field(default_factory=list)  # those that had leave to start early
    refused: list[str] = field(default_factory=list)
    fault: BaseException | None = None
    previous: object = None  # the footprint of the launch before

    @property
    def dram_read_bytes(self):
        return sum(r.dram_read_bytes for r in self.reports)

    @property
    def dram_write_bytes(self):
        return sum(r.dram_write_bytes for r in self.reports) + self.l2.dirty_bytes


class Driver:
    """The one that the library in this process is connected to."""

    def __init__(self):
        self.library = ctypes.CDLL(str(build.library()), ctypes.RTLD_LOCAL)
        functions = POINTER(_Function)()
        self.library.fakecuda_functions.restype = c_size_t
        count = self.library.fakecuda_functions(ctypes.byref(functions))
        names = [functions[i].name.decode() for i in range(count)]
        readable = subprocess.check_output(["c++filt", *names], text=True).splitlines()
        self.functions = {
            functions[i].function: Function(name, _short(text), functions[i].fatbin)
            for i, (name, text) in enumerate(zip(names, readable, strict=True))
        }
        self.gpus: dict[int, gpulab.Device] = {}  # by the numbers that host code knows them by
        self.attributes: dict[tuple, int] = {}  # (device, function, attribute) -> value
        self.memory = MemoryMap()
        self.lab: Lab | None = None
        answers = {
            "launch": self._launch,
            "set_function_attribute": self._set_function_attribute,
            "function_attributes": self._function_attributes,
            "memory": lambda m: self.memory.add(
                Memory(*(int(getattr(m[0], name)) for name, _ in _Memory._fields_))
            ),
            "new_call": self.memory.clear,
        }
        types = dict(_Driver._fields_)
        self._table = _Driver(**{n: types[n](self._answering(f)) for n, f in answers.items()})
        self.library.fakecuda_connect(ctypes.byref(self._table))
        self.library.fakecuda_devices(MOST_DEVICES)

    def _answering(self, function):
        """A function that returns a cudaError_t. Whatever goes wrong in the emulator has broken the
        device; the lab keeps what it was."""

        def answer(*arguments):
            try:
                function(*arguments)
            except Refused as refused:
                if self.lab is not None:
                    self.lab.refused.append(refused.why)
                return refused.code
            except BaseException as fault:
                if self.lab is not None:
                    self.lab.fault = fault
                return LAUNCH_FAILURE
            return SUCCESS

        return answer

    # --- questions ---

    def _function(self, address):
        if address not in self.functions:
            raise Refused(NOT_SUPPORTED, f"no kernel is registered at {address:#x}")
        return self.functions[address]

    def _here(self):
        """The current device's number, and the device."""
        number = ctypes.c_int()
        self.library.cudaGetDevice(ctypes.byref(number))
        if number.value not in self.gpus:
            raise Refused(INVALID_DEVICE, f"the current device is {number.value}, which has no use")
        return number.value, self.gpus[number.value]

    def _attribute(self, function, attribute, default):
        return self.attributes.get((self._here()[0], function, attribute), default)

    def _function_attributes(self, address, out):
        function, (_, gpu) = self._function(address), self._here()
        image = function.image(gpu.arch)
        out[0].architecture = image.architecture
        module = image.module(function.name)
        out[0].static_shared = static = module.static_shared(function.name)
        out[0].most_dynamic_shared = self._attribute(
            address, MAX_DYNAMIC_SHARED, DEFAULT_SHARED - static
        )
        out[0].most_threads = _most_threads(module.kernels[function.name])

    def _set_function_attribute(self, address, attribute, value):
        function, (number, gpu) = self._function(address), self._here()
        if attribute != MAX_DYNAMIC_SHARED:
            raise NotImplementedError(f"function attribute {attribute} (cudaFuncAttribute)")
        static = function.image(gpu.arch).module(function.name).static_shared(function.name)
        if not 0 <= static + value <= gpu.shared_per_cta:
            raise Refused(
                INVALID_VALUE,
                f"{function.readable}: {static} + {value} bytes of shared memory are more than"
                f" the {gpu.shared_per_cta} that a block may have",
            )
        self.attributes[number, address, attribute] = value

    # --- launches ---

    def _check_shared(self, launch, gpu):
        function = self._function(launch.function)
        module = function.image(gpu.arch).module(function.name)
        static = module.static_shared(function.name)
        most = self._attribute(launch.function, MAX_DYNAMIC_SHARED, DEFAULT_SHARED - static)
        if launch.shared > most:
            raise Refused(
                INVALID_VALUE,
                f"{function.readable}: {launch.shared} bytes of dynamic and {static} of static"
                f" shared memory, where {most} of dynamic were asked for",
            )

    def _check_shape(self, launch, kernel, readable):
        grid, block = tuple(launch.grid), tuple(launch.block)
        if not all(1 <= g <= most for g, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
            raise Refused(INVALID_CONFIGURATION, f"{readable}: grid {grid}")
        most = _most_threads(kernel)
        if (
            not all(1 <= b <= limit for b, limit in zip(block, (1024, 1024, 64), strict=True))
            or np.prod(block) > most
        ):
            raise Refused(
                INVALID_CONFIGURATION, f"{readable}: block {block}, compiled for {most} threads"
            )

    def _launch(self, launch):
        launch, (number, gpu) = launch[0], self._here()
        function, lab = self._function(launch.function), self.lab
        name, readable = function.name, function.readable
        if launch.stream not in (None, stream_of(number)):
            raise Refused(
                INVALID_RESOURCE_HANDLE,
                f"{readable}: the stream is not of the current device, {number}",
            )
        if launch.unknown_attribute >= 0:
            raise NotImplementedError(
                f"launch attribute {launch.unknown_attribute} (cudaLaunchAttributeID)"
            )
        image = function.image(gpu.arch)
        lab.launched.append(readable)
        if lab.dry:
            return
        module = image.module(name)
        kernel = module.kernels[name]
        self._check_shape(launch, kernel, readable)
        self._check_shared(launch, gpu)
        if launch.overlap:
            if gpu.arch < 90:
                raise Refused(NOT_SUPPORTED, f"{readable}: {gpu.name} lets no launch overlap")
            if not any(i.op == "griddepcontrol" and "wait" in i.mods for i in kernel.instrs):
                raise gpulab.OverlapError(
                    f"{readable} may start before the launch before it has ended, and its code has"
                    " no griddepcontrol.wait"
                )
            lab.overlapped.append(readable)
        report = module.launch(
            name,
            tuple(launch.grid),
            tuple(launch.block),
            [
                self._argument(parameter, launch.arguments[i])
                for i, parameter in enumerate(kernel.params)
            ],
            shared_bytes=launch.shared,
            device=gpu,
            resident_ctas=lab.resident,
            seed=lab.seed,
            l2=lab.l2,
            registers=None if lab.count else 0,
            overlap=[lab.previous] if launch.overlap and lab.previous else [],
            latency=lab.latency,
        )
        report.kernel = readable
        lab.previous, report.footprint = report.footprint, None
        lab.previous.arrays = ()  # tensors may be freed, and their memory used again, as on a GPU
        lab.reports.append(report)

    def _argument(self, parameter, address):
        """A kernel's parameter as the emulator takes it. What in it, at multiples of 8 bytes,
        points into known memory is a pointer: no other number is an address of this process."""
        raw = ctypes.string_at(address, parameter.nbytes)
        pointers = {}
        for offset in range(0, parameter.nbytes - 7, 8):
            window = self.memory.window(int.from_bytes(raw[offset : offset + 8], "little"))
            if window is not None:
                pointers[offset] = window
        return gpulab.Struct(raw, pointers)


def stream_of(device: int) -> int:
    return 0x1000 + device


def _most_threads(kernel) -> int:
    return int(np.prod(kernel.reqntid or kernel.maxntid or (1024,)))


def _short(readable: str) -> str:
    """A demangled name without result, namespace, parameters and casts:
    apply<float, 4, 0, true>."""
    name = readable.replace("(anonymous namespace)::", "").replace("void ", "")
    name = re.sub(r"\((?:bool|[\w:]+::\w+)\)(?=\w)", "", name).replace("scse::cuda::", "")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


# --- running the operators ---

#: Host code looks things up once for each device, and functions' attributes are set for a device
#: once and for all. So that no call lives on what another has done, each gets a device of another
#: number, as far as they go: they are an int8_t. Number 0 is the current device at first, and
#: nothing may happen there.
MOST_DEVICES, MOST_OF_A_KIND = 127, 20


@cache
def connect() -> Driver:
    """The driver of this process. Builds the library if it must, which takes minutes.

    Raises:
        NoCompiler: there is no nvcc.
    """
    _define_operators()
    return Driver()


_library = torch.library.Library("scse_kernels_emulated", "DEF")


def _define_operators():
    """The schemas of the operators for CUDA, under the name that tensors.cpp gives them."""
    for full_name in torch._C._dispatch_get_all_op_names():
        namespace, name = full_name.split("::")
        if namespace == "scse_kernels" and name.startswith("cuda_"):
            schema = str(getattr(torch.ops.scse_kernels, name).default._schema)
            _library.define(schema.split("::", 1)[1])
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _number(gpu: gpulab.Device, dry: bool) -> int:
    known = connect().gpus
    mine = [number for number, other in known.items() if other == gpu]
    new = len(mine) < (1 if dry else MOST_OF_A_KIND)
    number = len(known) + 1 if new else mine[0]
    assert number < MOST_DEVICES, "too many kinds of devices in one process"
    known.pop(number, None)
    known[number] = gpu  # the one used longest ago comes first
    return number


@contextlib.contextmanager
def running_on(
    gpu: gpulab.Device,
    seed: int | None = 0,
    resident=None,
    l2=None,
    count=False,
    dry=False,
    latency=False,
) -> Iterator[Lab]:
    """Backend "cuda" takes CPU tensors, for tensors on a GPU like `gpu`, and its kernels are
    executed by the emulator.

    `seed`, `resident` (blocks at a time), `l2`: as of gpulab.Module.launch. `count`: asks
    ptxas for registers too. `dry`: nothing is executed, only noted. `latency`: as of
    gpulab.Module.launch.

    Raises what the emulator found, in place of the RuntimeError that the operators made of it.
    """
    it = connect()
    assert it.lab is None, "one lab at a time"
    lab = Lab(gpu, seed, resident, l2 or gpulab.L2Cache(gpu.l2_bytes), count, dry, latency)
    emulated = torch.ops.scse_kernels_emulated
    it.library.fakecuda_reset()
    it.library.fakecuda_put_tensors_on(_number(gpu, dry))
    it.lab = lab
    try:
        with (
            mock.patch.dict(ops.FORWARD, cuda=emulated.cuda_forward.default),
            mock.patch.dict(ops.BACKWARD, cuda=emulated.cuda_backward.default),
            mock.patch.object(backends, "why_not", lambda *_: None),
        ):
            yield lab
    except RuntimeError as error:
        if lab.fault is not None and error is not lab.fault:
            raise lab.fault from error
        raise
    finally:
        it.lab = None
        it.memory.clear()
    if lab.fault is not None:  # host code has not looked at the error
        raise lab.fault
    if error := it.library.cudaPeekAtLastError():
        raise AssertionError(f"host code left error {error} behind, for whoever comes next")
