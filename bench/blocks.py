"""What the recalibration blocks take inside of their network's steps."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from .timing import Timing


class InStep:
    """A step of training in which the network's blocks are timed, by hooks around their forward and
    their backward. What it takes as a whole is of the same step: the share that the blocks have in
    it holds on a busy machine, too.

    Args:
        step: the step, forward and backward.
        blocks: modules of the network that it trains.
    """

    def __init__(
        self, step: Callable[..., object], blocks: Sequence[nn.Module], device: torch.device
    ) -> None:
        self._step, self._blocks, self._device = step, blocks, device
        #: When each step, and each forward or backward of a block in it, began and ended.
        self._steps: list[tuple[object, object, list[tuple[object, object]]]] = []

    def __call__(self, *arguments: object) -> None:
        with self._noting() as inside:
            begin = self._now()
            self._step(*arguments)
            self._steps.append((begin, self._now(), inside))

    @contextlib.contextmanager
    def _noting(self) -> Iterator[list[tuple[object, object]]]:
        inside, begun = [], {}

        def begin(block: nn.Module, *_: object) -> None:
            begun[block] = self._now()

        def end(block: nn.Module, *_: object) -> None:
            inside.append((begun.pop(block), self._now()))

        hooks = []
        for block in self._blocks:
            hooks += [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]
            hooks += [
                block.register_full_backward_pre_hook(begin),
                block.register_full_backward_hook(end),
            ]
        try:
            yield inside
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> object:
        """A point of the device's own time, for it runs behind the host."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: object, end: object) -> float:
        if self._device.type != "cuda":
            return end - begin
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    def summary(self, without: int = 0) -> tuple[Timing, Timing, float]:
        """What a step takes, what the blocks take of it, and their share (the median of the steps'
        shares), `without` the first steps."""
        steps = self._steps[without:]
        whole = [self._between(begin, end) for begin, end, _ in steps]
        parts = [sum(self._between(*ends) for ends in inside) for *_, inside in steps]
        share = statistics.median(part / all_ for part, all_ in zip(parts, whole, strict=True))
        return Timing(tuple(whole)), Timing(tuple(parts)), share

    @property
    def calls(self) -> int:
        """How often blocks are called in a step."""
        return len(self._steps[-1][2]) // 2
