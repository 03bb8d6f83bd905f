"""How long it takes: all providers in turn, round by round."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: A sample lasts about this long (seconds): long against the clock, short against the disturbances.
_SAMPLE = {"cpu": 10e-3, "cuda": 1e-3}
#: Bounds of the calls in a sample. A CUDA launch queue holds about a thousand kernels.
_CALLS = (2, 20)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the rounds and the interquartile range."""

    median: float
    iqr: float
    rounds: int
    calls: int


def summarize(samples: list[float], calls: int = 1) -> Timing:
    """Median and spread of samples (seconds per call), each of them the mean of `calls` calls."""
    spread = samples if len(samples) > 1 else 2 * samples  # quantiles() wants two
    low, middle, high = statistics.quantiles(spread, n=4, method="inclusive")
    return Timing(middle, high - low, len(samples), calls)


def caches(device: torch.device) -> tuple[str, ...]:
    """The states of the cache that are timed: on a GPU with L2 flushed before each call, too."""
    return ("warm", "cold") if device.type == "cuda" else ("warm",)


def interleaved(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    cache: str = "warm",
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time each of `calls`, already warmed up, once a round, in an order that rotates.

    Whatever disturbs the machine for a while disturbs all of them alike.
    """
    clock = _CudaClock(device, cold=cache == "cold") if device.type == "cuda" else _CpuClock()
    names = list(calls)
    repeats = {name: clock.prepare(calls[name]) for name in names}
    samples = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock.sample(calls[name], repeats[name]))
        on_round()
    return {name: summarize(samples[name], repeats[name]) for name in names}


def _repeats(seconds: float, kind: str) -> int:
    low, high = _CALLS
    return min(max(math.ceil(_SAMPLE[kind] / seconds), low), high)


class _CpuClock:
    def prepare(self, call):
        """How many calls make a sample."""
        return _repeats(min(self.sample(call, 1) for _ in range(3)), "cpu")

    def sample(self, call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class _CudaClock:
    """CUDA events around calls that the GPU starts on only once the host has queued them all, so
    that no time of the host is in the result."""

    def __init__(self, device, cold):
        self.device, self.cold = device, cold
        properties = torch.cuda.get_device_properties(device)
        self.flush = torch.empty(
            2 * properties.L2_cache_size if cold else 0, dtype=torch.uint8, device=device
        )
        self.host_seconds = {}

    def prepare(self, call):
        self.host_seconds[call] = 0.0
        seconds = min(self.sample(call, 1) for _ in range(3))
        return _repeats(seconds, "cuda")

    def sample(self, call, repeats):
        # The GPU spins for longer than the host took to queue these calls last time (at most two
        # cycles a nanosecond), and waits again for the next sample if it took longer this time.
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(2e9 * (100e-6 + 1.5 * repeats * self.host_seconds[call])))
        start = time.perf_counter()
        events = [self._timed(call, 1) for _ in range(repeats)] if self.cold else None
        events = events or [self._timed(call, repeats)]
        self.host_seconds[call] = (time.perf_counter() - start) / repeats
        torch.cuda.synchronize(self.device)
        return 1e-3 * sum(begin.elapsed_time(end) for begin, end in events) / repeats

    def _timed(self, call, repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.cold:
            self.flush.zero_()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        return begin, end
