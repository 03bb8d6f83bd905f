"""The fake runtime answers as CUDA's would: what a driver refuses is refused here."""

import ctypes
import dataclasses
import struct
from ctypes import Structure, byref, c_int32, c_size_t, c_uint32, c_void_p
from types import SimpleNamespace

import fakecuda
import gpulab
import numpy as np
import pytest
import torch
from budget import call, make_case
from fakecuda import running_on
from fakecuda.driver import (
    INVALID_CONFIGURATION,
    INVALID_DEVICE,
    INVALID_RESOURCE_HANDLE,
    INVALID_VALUE,
    LAUNCH_FAILURE,
    MAX_DYNAMIC_SHARED,
    NO_KERNEL_IMAGE,
    NOT_SUPPORTED,
    Memory,
    stream_of,
)
from gpulab import A100, H100

KIB = 1024
EXCITE = "excite<float, true>"


def forward(gpu, case):
    with running_on(gpu) as lab:
        call(case.variant, case.x, *case.parameters, backend="cuda")
    return lab


OLD = A100.scaled(name="before all that the build has code for", arch=75)


class _Attribute(Structure):
    _fields_ = (("id", c_int32), ("pad", c_int32), ("value", c_uint32 * 16))


class _Config(Structure):
    _fields_ = (
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared", c_size_t),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("count", c_uint32),
    )


class Host:
    """What host code does, one step at a time, on a device like `gpu`."""

    def __init__(self, gpu, kernel):
        self.library = fakecuda.connect().library
        functions = fakecuda.connect().functions.items()
        self.function = next(a for a, f in functions if f.readable == kernel)
        self.device = next(n for n, g in reversed(fakecuda.connect().gpus.items()) if g == gpu)
        self.library.cudaSetDevice(self.device)

    def set(self, attribute, value):
        return self.library.cudaFuncSetAttribute(c_void_p(self.function), attribute, value)

    def config(self, grid=(1, 1, 1), block=(32, 1, 1), shared=0, overlap=False):
        self.attribute = _Attribute(6, 0, (c_uint32 * 16)(1))
        return _Config(
            (c_uint32 * 3)(*grid),
            (c_uint32 * 3)(*block),
            shared,
            stream_of(self.device),
            ctypes.addressof(self.attribute),
            int(overlap),
        )

    def launch(self, stream=None, **config):
        config = self.config(**config)
        if stream is not None:
            config.stream = stream
        # For as many and as large parameters as any kernel has: small numbers, and no pointers.
        values = (c_uint32 * 128)(*[1] * 128)
        arguments = (c_void_p * 64)(*[ctypes.addressof(values)] * 64)
        return self.library.cudaLaunchKernelExC(byref(config), c_void_p(self.function), arguments)

    def last(self):
        return self.library.cudaGetLastError()

    def peek(self):
        return self.library.cudaPeekAtLastError()


@pytest.fixture
def host():
    """host(gpu, kernel) -> Host. What the emulator finds wrong is in host.lab.fault.

    Kernels have none of the attributes that host code may have set before: they are put back.
    """
    stack, attributes = [], fakecuda.connect().attributes
    before = dict(attributes)
    attributes.clear()

    def make(gpu, kernel):
        lab = running_on(gpu)
        stack.append((lab, lab.__enter__()))
        made = Host(gpu, kernel)
        made.lab = stack[-1][1]
        return made

    yield make
    for manager, lab in stack:
        fakecuda.connect().library.cudaSetDevice(0)
        fakecuda.connect().library.fakecuda_reset()
        lab.fault = None
        manager.__exit__(None, None, None)
    attributes.clear()
    attributes.update(before)


REDUCE = "reduce_planes<float, 4, 0>"


def test_grids(host):
    h = host(H100, EXCITE)
    for grid in ((0, 1, 1), (2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (1, 0, 1)):
        assert h.launch(grid=grid) == INVALID_CONFIGURATION


def test_blocks_and_launch_bounds(host):
    h = host(H100, EXCITE)  # compiled for 512 threads
    for block in ((513, 1, 1), (0, 1, 1), (32, 32, 1), (1, 1, 65)):
        assert h.launch(block=block) == INVALID_CONFIGURATION
    assert "compiled for 512 threads" in h.lab.refused[0]


def test_shared_memory_is_asked_for(host):
    h = host(H100, REDUCE)
    static = 16 * KIB  # at most
    assert h.launch(shared=48 * KIB) == INVALID_VALUE
    assert h.set(MAX_DYNAMIC_SHARED, 228 * KIB) == INVALID_VALUE
    assert h.set(MAX_DYNAMIC_SHARED, 227 * KIB) == INVALID_VALUE  # it has static memory, too
    assert h.set(MAX_DYNAMIC_SHARED, 100 * KIB) == 0
    assert h.launch(shared=101 * KIB) == INVALID_VALUE
    assert h.launch(shared=48 * KIB - static + 1) != INVALID_VALUE


def test_a_smaller_device_has_less_shared_memory(host):
    h = host(A100, REDUCE)
    assert h.set(MAX_DYNAMIC_SHARED, 163 * KIB) == INVALID_VALUE
    assert h.set(MAX_DYNAMIC_SHARED, 140 * KIB) == 0


def test_code_for_other_devices(host):
    h = host(OLD, EXCITE)
    assert h.launch() == NO_KERNEL_IMAGE
    assert "has no code for sm_75" in h.lab.refused[0]
    attributes = (ctypes.c_uint8 * 512)()
    ask = h.library.cudaFuncGetAttributes
    assert ask(attributes, c_void_p(h.function)) == NO_KERNEL_IMAGE


def test_the_newest_code_that_a_device_can_run(kernels):
    function = next(f for f in kernels.functions.values() if f.readable == EXCITE)
    chosen = {arch: function.image(arch).architecture for arch in (80, 86, 89, 90, 100, 120)}
    assert chosen == {80: 80, 86: 80, 89: 80, 90: 90, 100: 90, 120: 90}


def test_overlap_of_code_that_does_not_wait(host):
    h = host(H100, REDUCE)
    assert h.launch(overlap=True) == LAUNCH_FAILURE
    assert isinstance(h.lab.fault, gpulab.OverlapError)
    assert "no griddepcontrol.wait" in str(h.lab.fault)


def test_overlap_where_there_is_none(host):
    assert host(A100, EXCITE).launch(overlap=True) == NOT_SUPPORTED


def test_another_devices_stream(host):
    h = host(H100, EXCITE)
    assert h.launch(stream=stream_of(h.device + 1)) == INVALID_RESOURCE_HANDLE
    h.library.cudaSetDevice(0)
    assert h.launch() == INVALID_DEVICE


def test_an_error_stays_until_it_is_read(host):
    h = host(H100, EXCITE)
    assert h.peek() == h.last() == 0
    assert h.launch(grid=(0, 1, 1)) == INVALID_CONFIGURATION
    assert h.set(MAX_DYNAMIC_SHARED, KIB) == 0  # what succeeds doesn't clear it
    assert [h.peek(), h.peek(), h.last(), h.last()] == [INVALID_CONFIGURATION] * 3 + [0]


def test_a_fault_breaks_the_device(host):
    h = host(H100, EXCITE)
    assert h.launch() == LAUNCH_FAILURE  # it reads where nothing is
    assert isinstance(h.lab.fault, gpulab.KernelFault)
    assert [h.last(), h.last(), h.peek()] == [LAUNCH_FAILURE] * 3
    assert h.set(MAX_DYNAMIC_SHARED, KIB) == LAUNCH_FAILURE


def test_operators_say_what_was_refused():
    with pytest.raises(RuntimeError, match=r"no kernel image is available|has no code for"):
        forward(OLD, make_case((1, 16, 6, 8)))
    forward(H100, make_case((1, 16, 6, 8)))  # and the next call is none the worse


@pytest.fixture
def x_as(monkeypatch):
    """x_as(case, **changes): the emulator is told something else about the memory of x."""

    def tamper(case, **changes):
        memory = fakecuda.connect().memory
        add, begin = memory.add, case.x.data_ptr()

        def changed(m):
            how = {name: change(m) for name, change in changes.items()}
            add(dataclasses.replace(m, **how) if m.begin == begin else m)

        monkeypatch.setattr(memory, "add", changed)

    return tamper


def test_bounds_are_those_of_the_tensor(x_as):
    case = make_case((1, 16, 6, 8))
    x_as(case, end=lambda m: m.end - 16)
    with pytest.raises(gpulab.OutOfBounds, match=r"(?s)0 bytes past the end of.*\.cuh:\d+"):
        forward(H100, case)


def test_memory_that_nobody_wrote_must_not_be_read(x_as):
    case = make_case((1, 16, 6, 8))
    x_as(case, fresh=lambda m: True)
    forward(H100, case)
    case.x.view(torch.uint8)[..., -4:] = gpulab.poison.POISON
    with pytest.raises(gpulab.UninitialisedRead, match=r"\.cuh:\d+"):
        forward(H100, case)


def test_what_operators_allocate_is_poisoned():
    case = make_case((1, 16, 6, 8), dtype=torch.float16)
    with running_on(H100, dry=True):
        y = call(case.variant, case.x, *case.parameters, backend="cuda")
    assert y.view(torch.uint8).eq(gpulab.poison.POISON).all()


def test_structures_by_value_may_hold_pointers(kernels, monkeypatch):
    """A parameter of 24 bytes: a number, a pointer into a tensor, and one past its end."""
    memory = fakecuda.connect().memory
    floats = np.arange(8, dtype=np.float32)
    begin = floats.ctypes.data
    memory.add(Memory(begin, begin + 32, begin, 32, 4, False))
    raw = struct.pack("=QQQ", 7, begin + 12, begin + 32)
    held = ctypes.create_string_buffer(raw)
    parameter = SimpleNamespace(nbytes=24)
    argument = kernels._argument(parameter, ctypes.addressof(held))
    memory.clear()
    assert argument.raw == raw and list(argument.pointers) == [8]
    assert argument.pointers[8].view(np.float32).tolist() == floats[3:].tolist()
