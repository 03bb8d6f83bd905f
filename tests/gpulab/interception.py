"""Run unmodified Triton host code on the simulator.

Inside ``with gpulab.intercept() as lab:`` Triton sees a driver that compiles for the target
and whose launches go to ``Module.launch``.  Everything above the driver is Triton's own
code: argument specialisation, options, hooks, heuristics, autotuning, the kernel cache.
"""

import contextlib
import functools
import threading

import numpy as np

from . import host_patches
from .caches import L2Cache
from .devices import A100, H100
from .errors import GpuLabError
from .numerics import f32_to_bf16
from .poison import forget
from .triton_front import module_of

_contexts = []  # the innermost context is the last


def _current():
    if not _contexts:
        raise GpuLabError(
            "this kernel was compiled inside gpulab.intercept and cannot be launched outside of it"
        )
    return _contexts[-1]


class LabDevice(int):
    """Device 0, but another key than a real one in the caches of @triton.jit functions."""

    def __new__(cls, target):
        self = super().__new__(cls, 0)
        self.target = target
        return self

    def __hash__(self):
        return hash(("gpulab", self.target))


class LabDriver:
    """The part of Triton's driver interface that host code and Triton's runtime use."""

    launcher_cls = functools.partial  # see _init_handles

    def __init__(self, lab):
        from triton.backends.compiler import GPUTarget

        self.lab, self.device = lab, LabDevice(lab.target)
        self.target = GPUTarget("cuda", lab.target, 32)
        self.utils = self  # get_device_properties and friends

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_device_capability(self, device=None):
        return self.lab.target // 10, self.lab.target % 10

    def get_device_properties(self, device=None):
        return host_patches.triton_properties(self.lab.device)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_device_interface(self):
        import torch

        return torch.cuda

    def get_benchmarker(self):
        return self.lab.benchmark

    def get_empty_cache_for_benchmark(self):
        import torch

        return torch.zeros(0)

    def clear_cache(self, cache):
        pass

    def set_printf_fifo_size(self, size):
        pass

    def assemble_tensormap_to_arg(self, tensormaps_info, args):
        return args

    def map_python_to_cpp_type(self, kind):
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)


class Interception:
    """What ``intercept`` yields.

    ``reports``: one Report per launch, in order.  ``trials``: those of autotuning runs, which
    use a cold L2 of their own and do not count in the sums.  ``l2``: the L2 model shared by
    the launches.
    """

    def __init__(self, target, device, checks, seed, l2, overlap, latency):
        self.target, self.device, self.checks, self.seed, self.overlap = (
            target,
            device,
            checks,
            seed,
            overlap,
        )
        self.latency = latency
        self._previous = None  # Footprint of the latest launch
        self.l2 = l2 if isinstance(l2, L2Cache) else L2Cache(device.l2_bytes if l2 is None else l2)
        self.reports, self.trials = [], []
        self._tuned, self._trial_l2 = {}, None
        self._dirty_before = self.l2.dirty_bytes
        self.lock = threading.RLock()

    @property
    def launches(self):
        return len(self.reports)

    @property
    def dram_read_bytes(self):
        return sum(r.dram_read_bytes for r in self.reports)

    @property
    def dram_write_bytes(self):
        """Written back so far and still to be written (dirty in the L2 now)."""
        return (
            sum(r.dram_write_bytes for r in self.reports) + self.l2.dirty_bytes - self._dirty_before
        )

    @property
    def dram_bytes(self):
        return self.dram_read_bytes + self.dram_write_bytes

    def benchmark(self, kernel_call, quantiles=None, **kwargs):
        """Autotuning's stopwatch: the roofline bound (ms) of one run with a cold L2."""
        with self.lock:
            outer, self._trial_l2, first = (
                self._trial_l2,
                L2Cache(self.device.l2_bytes),
                len(self.trials),
            )
            try:
                kernel_call()
            finally:
                self._trial_l2 = outer
            ms = sum(r.roofline()["bound_us"] for r in self.trials[first:]) / 1000
        return [ms] * len(quantiles) if quantiles else ms

    def launch(self, compiled, grid, args):
        with self.lock:
            report = self._launch(compiled, grid, args)
        if report is not None:
            (self.reports if self._trial_l2 is None else self.trials).append(report)
        return report

    def _launch(self, compiled, grid, args):
        from triton.runtime.errors import OutOfResources

        meta, device = compiled.metadata, self.device
        if int(np.prod(grid)) == 0:
            return None
        if max(grid[1:]) > 65535 or grid[0] > 2**31 - 1:
            raise GpuLabError(
                f"{meta.name}: grid {grid} exceeds the device limits (2**31 - 1, 65535, 65535)"
            )
        if meta.shared > device.shared_per_cta:
            raise OutOfResources(meta.shared, device.shared_per_cta, "shared memory")
        module = module_of(compiled)
        kernel = module.kernels[meta.name]
        values, names = runtime_arguments(compiled, args)
        ctas = getattr(meta, "num_ctas", 1)
        total = int(np.prod(grid)) * ctas
        scratch = [
            np.zeros(max(16, size * total), np.uint8) if size else None
            for size in (
                getattr(meta, "global_scratch_size", 0),
                getattr(meta, "profile_scratch_size", 0),
            )
        ]
        hidden = len(kernel.params) - len(values)
        if not 0 <= hidden <= 2:
            raise GpuLabError(
                f"{meta.name} takes {len(kernel.params)} PTX parameters, got {len(values)} "
                "arguments"
            )
        block = kernel.reqntid or (32 * meta.num_warps, 1, 1)
        if getattr(meta, "launch_cooperative_grid", False):
            room = device.sms * device.ctas_per_sm(
                int(np.prod(block)), module.registers(meta.name), meta.shared
            )
            if total > room:
                raise GpuLabError(
                    f"{meta.name}: cooperative launch of {total} CTAs, only {room} can be resident"
                )
        overlap = None
        if self.overlap and self.checks and self._trial_l2 is None:
            overlap = (
                [self._previous] if self._previous and getattr(meta, "launch_pdl", False) else []
            )
        report = module.launch(
            meta.name,
            (grid[0] * ctas, grid[1], grid[2]),
            block,
            values + scratch[:hidden],
            shared_bytes=meta.shared,
            cluster=(ctas, 1, 1) if ctas > 1 else None,
            device=device,
            checks=self.checks,
            seed=self.seed,
            l2=self._trial_l2 or self.l2,
            names=names + ["scratch"] * hidden,
            overlap=overlap,
            latency=self.latency,
        )
        if overlap is not None:
            self._previous, report.footprint = report.footprint, None
            # Tensors may be freed, and their memory used again, as on a GPU.
            self._previous.arrays = ()
        return report


def runtime_arguments(compiled, args):
    """The PTX parameters of a launch and their names: constexprs dropped, tuples and tensor
    descriptors flattened."""
    out, names = [], []

    def add(kind, value):
        if isinstance(kind, (tuple, list)):
            for k, v in zip(kind, value, strict=False):
                add(k, v)
        elif kind == "constexpr":
            pass
        elif kind.startswith("tensordesc"):
            if getattr(compiled.metadata, "tensordesc_meta", None):
                raise GpuLabError(
                    f"{compiled.metadata.name}: TMA tensor descriptors are not supported"
                )
            shape, strides = list(value.shape), list(value.strides)
            nan, tf32 = value.padding == "nan", getattr(value, "round_f32_to_tf32", False)
            out.extend([tensor(value.base), *shape, *strides, nan, tf32, *shape, *strides])
        elif kind.startswith("*"):
            out.append(tensor(value))
        elif kind.startswith(("fp", "bf", "f3")):
            out.append(
                f32_to_bf16(np.array([value], np.float32))[0] if kind == "bf16" else float(value)
            )
        else:
            out.append(int(value))

    def tensor(value):
        value = getattr(value, "base", value) if not hasattr(value, "untyped_storage") else value
        if value is None or isinstance(value, np.ndarray):
            return value
        if isinstance(value, int):
            if value:
                raise GpuLabError(
                    f"{compiled.metadata.name}: a raw address was passed; pass the tensor"
                )
            return None
        if value.device.type != "cpu":
            raise GpuLabError(
                f"{compiled.metadata.name}: tensor on {value.device}; gpulab.intercept wants CPU "
                "tensors"
            )
        return value

    for (name, kind), value in zip(compiled.src.signature.items(), args, strict=False):
        add(kind, value)
        names += [name] * (len(out) - len(names))
    return out, names


def _run(
    compiled,
    grid_x,
    grid_y,
    grid_z,
    stream,
    function,
    packed,
    launch_metadata,
    enter_hook,
    exit_hook,
    *args,
):
    """Takes the place of Triton's native launcher."""
    if enter_hook is not None:
        enter_hook(launch_metadata)
    _current().launch(compiled, (int(grid_x), int(grid_y), int(grid_z)), args)
    if exit_hook is not None:
        exit_hook(launch_metadata)


def _init_handles(compiled):
    """Takes the place of CompiledKernel._init_handles, which loads the cubin."""
    if compiled.module is None:
        compiled.module = compiled.function = compiled.name  # no module, which takes memory
        found = module_of(compiled).resources(compiled.metadata.name)
        compiled.n_regs = found.registers if found else 0
        compiled.n_spills = (found.spill_stores + found.spill_loads) // 4 if found else 0
        compiled.n_max_threads = 1024
        compiled._run = functools.partial(_run, compiled)


def _tuner_run(original):
    """Autotuner.run with the context's stopwatch; its choices do not outlive the context."""

    def run(tuner, *args, **kwargs):
        lab = _current()
        with lab.lock:
            own = {
                k: tuner.__dict__[k]
                for k in ("cache", "do_bench", "cache_results")
                if k in tuner.__dict__
            }
            tuner.cache = lab._tuned.setdefault(id(tuner), (tuner, {}))[1]
            tuner.do_bench, tuner.cache_results = lab.benchmark, False
            try:
                return original(tuner, *args, **kwargs)
            finally:
                for name in ("cache", "do_bench", "cache_results"):
                    tuner.__dict__.pop(name, None)
                tuner.__dict__.update(own)

    return run


@contextlib.contextmanager
def intercept(
    target=90,
    device=None,
    checks=True,
    seed=0,
    l2=None,
    poison=True,
    cuda_available=False,
    overlap=True,
    latency=False,
):
    """Make launches of @triton.jit functions on CPU tensors run on the simulator.

    ``target``: sm number to compile for; ``device``: a preset (default H100, A100 below sm_90);
    ``checks``, ``seed``: as for ``Module.launch``; ``l2``: an L2Cache to go on with, or its size in
    bytes; ``poison``: reading a torch.empty tensor that was allocated inside the context and never
    written is an error; ``cuda_available``: torch.cuda.is_available() and tensor.is_cuda say True;
    ``overlap``: check that launches with ``launch_pdl`` wait before they touch what the launch
    before them does; ``latency``: compute every launch's critical path."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    device = device or (H100 if target >= 90 else A100)
    lab = Interception(target, device, checks, seed, l2, overlap, latency)
    patches = host_patches.Patches()
    previous = driver._active
    _contexts.append(lab)
    try:
        driver.set_active(LabDriver(lab))
        patches.set(CompiledKernel, "_init_handles", _init_handles)
        patches.set(Autotuner, "run", _tuner_run(Autotuner.run))
        host_patches.patch_torch_cuda(patches, device, cuda_available)
        if poison:
            host_patches.patch_empty(patches)
        yield lab
    finally:
        patches.restore()
        lab._previous = None
        driver._active = previous
        _contexts.remove(lab)
        if not _contexts:
            forget()
