"""How long it takes: all providers in turn, round by round."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

#: Ways to time: on a GPU with L2 as the last call left it, with L2 flushed before each call, and as
#: CUDA graphs, which spare the host and the GPU the launches.
WARM, COLD, GRAPH = "warm L2", "cold L2", "CUDA graph"
#: A sample lasts about this long (seconds): long against the clock, short against the disturbances.
_SAMPLE = {"cpu": 10e-3, "cuda": 1e-3}
#: Bounds of the calls in a sample. A CUDA launch queue holds about a thousand kernels.
_CALLS = (2, 20)
#: The true ratio of two calls is beyond either of its bounds with at most this probability.
_BEYOND = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds per call, round by round, each sample the mean of `calls` calls. `host`: how long the
    host takes to queue the call on a GPU; work that takes less than that waits for it."""

    samples: tuple[float, ...]
    calls: int = 1
    host: float | None = None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """The interquartile range of the rounds."""
        if len(self.samples) == 1:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    @property
    def spread(self) -> float:
        """The interquartile range in units of the median."""
        return self.iqr / self.median


class Ratio(NamedTuple):
    """How many times as long one call takes as another: the median over the rounds, and the bounds
    between which the true one lies in nine of ten measurements."""

    median: float
    low: float
    high: float


def ratio(over: Timing, under: Timing) -> Ratio:
    """Of two calls that took turns. Each round gives one ratio, so that what disturbs the machine
    for longer than a round disturbs both times alike.

    The bounds are the k-th lowest and k-th highest of n rounds. The true median is below the k-th
    lowest if at least n - k + 1 rounds are above it, each with probability 1/2. Below five rounds
    nothing is known.
    """
    ratios = sorted(a / b for a, b in zip(over.samples, under.samples, strict=True))
    n, beyond, outside = len(ratios), 0, 1
    while outside <= _BEYOND * 2**n:
        beyond += 1
        outside += math.comb(n, beyond)
    if not beyond:
        return Ratio(statistics.median(ratios), 0.0, math.inf)
    return Ratio(statistics.median(ratios), ratios[beyond - 1], ratios[n - beyond])


#: The name under which every benchmark times a `fixed_clone` along with its own calls. That clone
#: does the same in every run: how much its time varies is how noisy the machine was.
FIXED = "fixed clone"
#: Its elements, of float32: in the caches of a CPU, beyond those of a GPU.
_FIXED = {"cpu": 1 << 20, "cuda": 1 << 24}


def fixed_clone(device: torch.device) -> Callable[[], object]:
    """A call that clones a map which is the same in every benchmark."""
    return torch.ones(_FIXED[device.type], device=device).clone


class Yardstick:
    """The fixed clone, for a benchmark that has rounds of its own: `sample` it once a round."""

    def __init__(self, device: torch.device) -> None:
        self._clock, self._call = _clock(device, WARM), fixed_clone(device)
        self._repeats = self._clock.prepare(FIXED, self._call)
        self._samples: list[float] = []

    def sample(self) -> None:
        """Time it."""
        self._samples.append(self._clock.sample(FIXED, self._call, self._repeats))

    def timing(self) -> Timing:
        """What it took."""
        return Timing(tuple(self._samples), self._repeats)


def ways(device: torch.device) -> tuple[str, ...]:
    """The ways to time on `device`."""
    return (WARM, COLD, GRAPH) if device.type == "cuda" else (WARM,)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call that replays the kernels of `call`, recorded once as a CUDA graph.

    What `call` allocates lies in the graph's own memory and is written anew by each replay. It must
    not touch `.grad`: AccumulateGrad would run on the stream on which a leaf was first used.
    """
    with torch.cuda.device(device):
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what is set up at first use can't be captured
            for _ in range(3):
                call()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def interleaved(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    way: str = WARM,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time each of `calls`, already warmed up, once a round, in an order that rotates. (For GRAPH
    they are `captured` ones.)

    Whatever disturbs the machine for a while disturbs all of them alike.
    """
    clock = _clock(device, way)
    names = list(calls)
    repeats = {name: clock.prepare(name, calls[name]) for name in names}
    samples = {name: [] for name in names}
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock.sample(name, calls[name], repeats[name]))
        on_round()
    return {
        name: Timing(tuple(samples[name]), repeats[name], clock.host_seconds.get(name))
        for name in names
    }


def _clock(device: torch.device, way: str):
    return _CudaClock(device, way == COLD) if device.type == "cuda" else _CpuClock()


def _repeats(seconds: float, kind: str) -> int:
    low, high = _CALLS
    return min(max(math.ceil(_SAMPLE[kind] / seconds), low), high)


class Flush:
    """A call that leaves nothing in a GPU's L2 of what was there, by reading other memory.

    Written memory would stay there as dirty lines, and the call that is timed next would pay for
    their way to DRAM.
    """

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.memory = torch.ones(size // 4, device=device)
        self.sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        torch.sum(self.memory, 0, out=self.sum)


class _CpuClock:
    host_seconds: ClassVar[dict[str, float]] = {}  # the calls' own time is the host's

    def prepare(self, name, call):
        """How many calls make a sample."""
        return _repeats(min(self.sample(name, call, 1) for _ in range(3)), "cpu")

    def sample(self, name, call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class _CudaClock:
    """CUDA events around calls that the GPU starts on only once the host has queued them all, so
    that no time of the host is in the result."""

    def __init__(self, device, cold):
        self.device = device  # the current one: events and kernels go there
        self.flush = Flush(device) if cold else None
        self.host_seconds = {}

    def prepare(self, name, call):
        self.host_seconds[name] = 0.0
        seconds = min(self.sample(name, call, 1) for _ in range(3))
        return _repeats(seconds, "cuda")

    def sample(self, name, call, repeats):
        # The GPU spins for longer than the host took to queue these calls last time (at most two
        # cycles a nanosecond), and waits again for the next sample if it took longer this time.
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(2e9 * (100e-6 + 1.5 * repeats * self.host_seconds[name])))
        start = time.perf_counter()
        events = [self._timed(call, 1) for _ in range(repeats)] if self.flush else None
        events = events or [self._timed(call, repeats)]
        self.host_seconds[name] = (time.perf_counter() - start) / repeats
        torch.cuda.synchronize(self.device)
        return 1e-3 * sum(begin.elapsed_time(end) for begin, end in events) / repeats

    def _timed(self, call, repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush:
            self.flush()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        return begin, end
