"""Stand-ins for what host code asks of a CUDA driver, answered from a device preset.

``Patches`` replaces module attributes and puts them back; they are process-wide, so other
threads (autograd's, for one) see them too.
"""

import contextlib
from types import SimpleNamespace

from . import poison

_MISSING = object()


class Patches:
    def __init__(self):
        self._saved = []

    def set(self, owner, name, value):
        self._saved.append((owner, name, owner.__dict__.get(name, _MISSING)))
        setattr(owner, name, value)

    def restore(self):
        for owner, name, value in reversed(self._saved):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._saved.clear()


class NoDevice(contextlib.ContextDecorator):
    """Stands for torch.cuda.device, device_of, stream and _DeviceGuard."""

    def __init__(self, *args, **kwargs):
        self.idx, self.prev_idx = 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


class Stream:
    cuda_stream = stream_id = device_index = 0

    def __init__(self, *args, **kwargs):
        pass

    def query(self):
        return True

    def synchronize(self, *args):
        pass

    wait_stream = wait_event = record_event = synchronize


def triton_properties(device):
    """What ``driver.active.utils.get_device_properties`` returns."""
    bus_bits = 5120
    return {
        "max_shared_mem": device.shared_per_cta,
        "max_num_regs": device.registers_per_sm,
        "multiprocessor_count": device.sms,
        "warpSize": 32,
        "sm_clock_rate": device.clock_mhz * 1000,
        "mem_clock_rate": int(device.dram_gbps * 1e6 * 8 / (2 * bus_bits)),
        "mem_bus_width": bus_bits,
    }


def torch_properties(device):
    """What ``torch.cuda.get_device_properties`` returns."""
    p = triton_properties(device)
    return SimpleNamespace(
        name=device.name,
        major=device.arch // 10,
        minor=device.arch % 10,
        total_memory=80 << 30,
        multi_processor_count=device.sms,
        L2_cache_size=device.l2_bytes,
        warp_size=32,
        max_threads_per_multi_processor=device.max_threads_per_sm,
        max_threads_per_block=1024,
        regs_per_multiprocessor=device.registers_per_sm,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=device.shared_per_cta,
        shared_memory_per_multiprocessor=device.shared_per_sm,
        clock_rate=p["sm_clock_rate"],
        memory_clock_rate=p["mem_clock_rate"],
        memory_bus_width=p["mem_bus_width"],
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
    )


def patch_torch_cuda(patches, device, pretend):
    """``pretend`` also makes is_available() and every tensor's is_cuda true, device_count() 1."""
    import torch

    cuda = torch.cuda
    stream, properties = Stream(), torch_properties(device)
    answers = {
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_name": device.name,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "set_device": None,
        "set_stream": None,
        "synchronize": None,
        "empty_cache": None,
        "is_current_stream_capturing": False,
    }
    if pretend:
        answers.update(is_available=True, device_count=1)
        patches.set(torch.Tensor, "is_cuda", property(lambda self: True))
    for name, value in answers.items():
        patches.set(cuda, name, lambda *args, _value=value, **kwargs: _value)
    for name in ("device", "device_of", "stream", "StreamContext", "_DeviceGuard"):
        patches.set(cuda, name, NoDevice)
    patches.set(cuda, "Stream", Stream)
    patches.set(torch._C, "_cuda_getCurrentRawStream", lambda *args: 0)


def patch_empty(patches):
    """Make torch's uninitialised allocations tracked (see poison.py)."""
    import torch

    def wrap(original):
        def allocate(*args, **kwargs):
            tensor = original(*args, **kwargs)
            if (
                type(tensor) is torch.Tensor
                and kwargs.get("out") is None
                and tensor.device.type == "cpu"
                and tensor.layout == torch.strided
            ):
                # A tensor may have no storage of its own, e.g. under vmap.
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    poison.track(tensor)
            return tensor

        allocate.__wrapped__ = original
        return allocate

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            patches.set(owner, name, wrap(getattr(owner, name)))
