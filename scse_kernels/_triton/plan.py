"""A plan for each kind of call, made once: all of a call that is known before it comes.

Triton's own way to launch a kernel binds and inspects each argument every time. That takes the host
longer than the GPU needs for a small map. Here the first call of a kind writes its launches into a
`Plan` and goes Triton's way, which compiles the kernels. Later calls put addresses into a list and
hand them to the compiled kernels.

The kind is all that a plan, or a compiled kernel, depends on: sizes, strides and dtypes; which
tensors are missing; which addresses are multiples of 16 bytes (Triton compiles other code for
those); the device; and the settings that are read at each call.
"""

import inspect
import os
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..reference import accumulation_dtype
from . import NEWEST, OLDEST, heuristics, tuning, version

#: Kernels run in Triton's interpreter. It has no driver, and its calls take milliseconds.
_INTERPRETED = knobs.runtime.interpret

#: A piece of scratch begins at a multiple of so many elements, so at one of 128 bytes.
_LINE = 32
#: So many plans are kept at most: images of ever new sizes would make ever more. Beyond that all
#: are made anew.
_MOST = 4096


class Pointer(NamedTuple):
    """Stands for a tensor where launches are written down: the one at `place` among the tensors
    that are "given", the pieces of "scratch" or the tensors of "zeros". Or it stands for one of a
    call's "numbers".
    """

    kind: str
    place: int


class Launch(NamedTuple):
    """A kernel, its arguments in order, with pointers for tensors, and options such as
    num_warps."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    options: dict


class Prepared(NamedTuple):
    """What is left to do for a call. `launches`: launchers, and what they take. The last of that
    picks a kernel's arguments from a list of tensors, scratch, zeros, numbers and `constants`."""

    launches: list[tuple]
    constants: list
    offsets: list[int]  # bytes from the begin of scratch to each piece
    memory: int  # elements of scratch in all
    hooks: list[list]  # of each kernel; a hook wants to see its arguments
    kernels: list  # kept: a kernel without an owner is unloaded


class Plan:
    """The launches of a call, written down with pointers in the place of tensors."""

    def __init__(
        self, tensors: tuple[Tensor | None, ...], sums: torch.dtype, numbers: int = 0
    ) -> None:
        #: A pointer for each tensor, None for what is missing.
        self.given = [None if t is None else Pointer("given", i) for i, t in enumerate(tensors)]
        #: For floats that differ from call to call within a kind.
        self.numbers = [Pointer("numbers", i) for i in range(numbers)]
        self.launches: list[Launch] = []
        #: The table of timings. Kept, since its identity is part of the kind.
        self.table = tuning.table(tensors[0].device)
        self._overlap = heuristics.overlap(tensors[0])
        self._sums, self._sizes, self._zeros = sums, [], []
        self._prepared: Prepared | None = None

    def scratch_if(self, needed: bool, *shape: int) -> Pointer | None:
        """`scratch`, or None."""
        return self.scratch(*shape) if needed else None

    def scratch(self, *shape: int) -> Pointer:
        """Memory for sums, not initialised."""
        size = 1
        for length in shape:
            size *= length
        self._sizes.append(size)
        return Pointer("scratch", len(self._sizes) - 1)

    def zeros(self, size: int) -> Pointer:
        """int32 zeros, new ones for each call: counters of a kernel of one launch.

        Filling them is a second, tiny piece of work for the device. A buffer that each launch
        leaves as zeros would save it. But all graphs captured on a stream would share that buffer,
        their replays may overlap, and it would live on in their memory pool.
        """
        self._zeros.append(size)
        return Pointer("zeros", len(self._zeros) - 1)

    def launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], *arguments, **more) -> None:
        """What `kernel[grid](*arguments, **more)` would do, later. A kernel with the argument
        OVERLAP is told whether launches overlap. All but a call's first may start while the one
        before ends; what comes before the first isn't ours."""
        signature = inspect.signature(kernel.fn)
        if "OVERLAP" in signature.parameters:
            more["OVERLAP"] = self._overlap
            if self._overlap and self.launches:
                more["launch_pdl"] = True
        named = {name: more.pop(name) for name in list(more) if name in signature.parameters}
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        self.launches.append(Launch(kernel, grid, tuple(bound.arguments.values()), more))

    def run(
        self,
        tensors: tuple[Tensor | None, ...],
        addresses: list[int] | None,
        numbers: tuple[float, ...],
    ) -> None:
        """Launches all. `addresses`: of the tensors, or None where the kernels take tensors."""
        prepared = self._prepared
        if prepared is None or _watched() or any(prepared.hooks):
            kernels = self._launch_each(tensors, numbers)
            if prepared is None and all(map(_is_known, kernels)) and not _watched():
                self._prepared = self._prepare(kernels)  # at once: other threads look at it
            return
        x = tensors[0]
        zeros = [x.new_zeros((size,), dtype=torch.int32) for size in self._zeros]
        if addresses is None:
            values = [*tensors, *self._pieces(x), *zeros, *numbers, *prepared.constants]
        else:
            memory = x.new_empty((prepared.memory,), dtype=self._sums)
            begin = memory.data_ptr()
            values = [
                *addresses, *[begin + offset for offset in prepared.offsets],
                *[z.data_ptr() for z in zeros], *numbers, *prepared.constants,
            ]  # fmt: skip
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        for launch, grid_x, grid_y, grid_z, function, metadata, arguments in prepared.launches:
            launch(
                grid_x, grid_y, grid_z, stream, function, metadata,
                None, None, None, *arguments(values),
            )  # fmt: skip

    def _pieces(self, x: Tensor) -> list[Tensor]:
        """Scratch as tensors of their own."""
        return [x.new_empty((size,), dtype=self._sums) for size in self._sizes]

    def _launch_each(self, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> list:
        """Launches all in Triton's own way; the compiled kernels."""
        x = tensors[0]
        zeros = [x.new_zeros((size,), dtype=torch.int32) for size in self._zeros]
        values = {
            "given": tensors, "scratch": self._pieces(x), "zeros": zeros, "numbers": numbers,
        }  # fmt: skip
        kernels = []
        for kernel, grid, arguments, options in self.launches:
            filled = (values[a.kind][a.place] if type(a) is Pointer else a for a in arguments)
            kernels.append(kernel[grid](*filled, **options))
        return kernels

    def _prepare(self, kernels: list) -> Prepared:
        places = {"given": 0, "scratch": len(self.given)}
        places["zeros"] = places["scratch"] + len(self._sizes)
        places["numbers"] = places["zeros"] + len(self._zeros)
        first_constant = places["numbers"] + len(self.numbers)
        constants, launches = [], []
        for kernel, (_, grid, arguments, _) in zip(kernels, self.launches, strict=True):
            chosen = []
            for argument in arguments:
                if type(argument) is Pointer:
                    chosen.append(places[argument.kind] + argument.place)
                else:
                    chosen.append(first_constant + len(constants))
                    constants.append(argument)
            launcher = kernel.run  # before its function: this loads the kernel
            grid = (*grid, 1, 1)[:3]
            launches.append(
                (launcher, *grid, kernel.function, kernel.packed_metadata, itemgetter(*chosen))
            )
        offsets, size = [], 0
        for piece in self._sizes:
            offsets.append(size * self._sums.itemsize)
            size += -(-piece // _LINE) * _LINE
        hooks = [launch.kernel.pre_run_hooks for launch in self.launches]
        return Prepared(launches, constants, offsets, size, hooks, kernels)


def _is_known(kernel) -> bool:
    """Whether Triton's `kernel[grid](...)` gave a compiled kernel with a launcher that takes the
    known arguments: those of the versions that were tried."""
    launcher = getattr(kernel, "run", None)
    return (
        OLDEST <= version(triton.__version__) <= NEWEST
        and launcher is not None
        and type(launcher) is getattr(driver.active, "launcher_cls", None)
    )


def _watched() -> bool:
    """Whether Triton's profilers or debuggers want to know of launches, or to change what is
    compiled. Then launches go Triton's own way."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.add_stages_inspection_hook
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


#: The driver, and the plans that were made with it. Another driver means another kind of device,
#: such as one that stands in for a GPU.
_kept: tuple[object, dict[tuple, Plan]] = (None, {})


def forget() -> None:
    """Has all plans made anew, after the table of timings was changed."""
    global _kept
    _kept = (None, {})


def takes_addresses(device: int) -> bool:
    """Whether launchers for the device get addresses. A stand-in for a GPU works on tensors of the
    host; it gets the tensors, to check their bounds."""
    return device >= 0


def run_plan(
    make: Callable,
    choices: tuple,
    maps: tuple[Tensor, ...],
    parameters: list[Tensor | None],
    others: tuple[Tensor | None, ...],
    numbers: tuple[float, ...] = (),
) -> None:
    """Launches what `make(plan, choices, *maps, *parameters, *others)` writes down.

    choices: all that matters besides the tensors. maps: x first. parameters: contiguous, of shapes
    that the maps and the choices say. others: results and what the forward saved, contiguous too,
    of dtypes that those of the maps and the parameters say. numbers: floats, as many for all calls
    of a kind, whatever their values.
    """
    global _kept
    x = maps[0]
    tensors = (*maps, *parameters, *others)
    if _INTERPRETED:
        _made(make, choices, tensors, numbers).run(tensors, None, numbers)
        return
    active = driver.active
    device = x.get_device()
    if device >= 0 and device != active.get_current_device():
        with torch.cuda.device(device):
            run_plan(make, choices, maps, parameters, others, numbers)
        return
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    bits = 0
    for address in addresses:
        bits |= address
    key = (
        make, choices, device, os.environ.get("SCSE_TRITON_LAUNCHES"),
        os.environ.get("SCSE_TRITON_OVERLAP"), id(tuning.table(x.device)),
        bits & 15 and tuple(address & 15 == 0 for address in addresses),
        *[(m.shape, m.stride(), m.dtype) for m in maps],
        *[p if p is None else p.dtype for p in parameters],
        *[t is None for t in others],
    )  # fmt: skip
    if _kept[0] is not active or len(_kept[1]) > _MOST:
        _kept = (active, {})
    plans = _kept[1]
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = _made(make, choices, tensors, numbers)
    plan.run(tensors, addresses if takes_addresses(device) else None, numbers)


def _made(
    make: Callable,
    choices: tuple,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
) -> Plan:
    plan = Plan(tensors, accumulation_dtype(tensors[0].dtype), len(numbers))
    make(plan, choices, *tensors)
    return plan
