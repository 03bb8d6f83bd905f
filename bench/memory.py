"""How much memory it takes: the measured peak of torch's allocator."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def too_large(needed: int, device: torch.device) -> str | None:
    """None if so many bytes are free, or if it isn't known. Else the number of free bytes."""
    free = _free(device)
    if free is None or needed <= free:
        return None
    return f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:  # not Linux
        return None
    free = int(told["MemAvailable"].split()[0]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":  # a container's
        free = min(free, int(most) - int(used.read_text()))
    return free


def peak(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `call`, already warmed up, has allocated at one time.

    On a GPU from the allocator's statistics, on the CPU from the events that its allocator gives
    to the profiler. Memory that is not taken from torch's allocator is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device) - before
        del result
        return most
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most
