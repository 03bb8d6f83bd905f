"""Loading PTX and launching kernels."""

import time
from collections import Counter

import numpy as np

from .arrays import Struct
from .caches import POLICY_NAMES, L1Filter, L2Cache
from .counters import AccessSite, Counters, Report, reads_global
from .devices import H100
from .engine import Machine
from .errors import GpuLabError
from .latency import Latency
from .memory import GlobalMemory, HostBuffer
from .overlap import Overlap
from .parser import PtxParser
from .program import Program
from .resources import try_resources


def _triple(value):
    value = (value,) if isinstance(value, (int, np.integer)) else tuple(int(v) for v in value)
    return tuple(value) + (1,) * (3 - len(value))


def is_array(value):
    return (isinstance(value, np.ndarray) and value.ndim > 0) or hasattr(value, "data_ptr")


class Module:
    """A parsed PTX module.  Module variables (``__device__``) keep their values."""

    def __init__(self, ptx):
        self.ptx = ptx
        parsed = PtxParser(ptx)
        self.kernels, self.target = parsed.kernels, parsed.target
        self.variables = parsed.variables
        self._programs, self._layouts, self._resources = {}, {}, None
        self.globals = {}
        for v in self.variables.values():
            if v.space in ("global", "const"):
                storage = np.zeros(max(v.nbytes, 1), np.uint8)
                storage[: len(v.init)] = np.frombuffer(v.init, np.uint8)
                self.globals[v.name] = storage

    def program(self, name):
        if name not in self._programs:
            if name not in self.kernels:
                raise GpuLabError(f"no kernel {name!r}; the module has {sorted(self.kernels)}")
            self._programs[name] = Program(self.kernels[name])
        return self._programs[name]

    def resources(self, name):
        """What ptxas reports for a kernel (Resources), or None when ptxas is not available."""
        if self._resources is None:
            self._resources = try_resources(self.ptx, self.target)
        return self._resources.get(name)

    def static_shared(self, name):
        """Bytes of shared memory that a kernel's code declares."""
        return self._shared_layout(name)[1]

    def registers(self, name):
        """Registers per thread reported by ptxas, or 0 when ptxas is not available."""
        found = self.resources(name)
        return found.registers if found else 0

    def launch(
        self,
        kernel_name,
        grid,
        block,
        args,
        shared_bytes=0,
        cluster=None,
        device=H100,
        resident_ctas=None,
        seed=0,
        checks=True,
        l2=None,
        registers=None,
        deadlock_rounds=2000,
        shared_init=True,
        names=None,
        overlap=None,
        latency=False,
    ):
        """Run a kernel to completion and return a Report.

        ``args``: numpy arrays or torch CPU tensors for pointers (results are written back), Python
        or numpy numbers for scalars, ``bytes`` for structs passed by value, None for a null
        pointer.  ``resident_ctas`` limits the CTAs that run at the same time; by default it is SMs
        x occupancy of ``device``.  Without ``cluster`` every CTA is a cluster of its own.
        ``seed=None`` gives the plain in-order schedule, a number a random interleaving of
        communicating CTAs.  ``l2`` carries cache contents from one launch to the next; without it
        the launch starts cold and dirty data is written back at the end.  ``checks=False`` switches
        the race and initialisation checkers off (bounds are always checked); ``shared_init=False``
        only allows reads of never-written shared memory.  ``names`` of the arguments, for messages.
        ``overlap``: the Reports of earlier launches (of arrays: all of it) that may still be
        running until ``griddepcontrol.wait``, as in a launch with programmatic stream
        serialization; ``[]`` for a launch that only has to be known to later ones.  ``latency``:
        also compute the critical path."""
        started = time.perf_counter()
        program = self.program(kernel_name)
        kernel = program.kernel
        grid, block = _triple(grid), _triple(block)
        cluster = cluster or kernel.reqcluster
        explicit, cluster = cluster is not None, _triple(cluster or 1)
        self._check_shape(kernel, grid, block, cluster, device)
        own_l2 = l2 is None
        l2 = L2Cache(device.l2_bytes) if own_l2 else l2
        before, policies = l2.snapshot(), l2.policies.copy()

        symbols, static = self._shared_layout(kernel_name)
        total_shared = static + shared_bytes
        if total_shared > device.shared_per_cta:
            raise GpuLabError(
                f"{total_shared} bytes of shared memory; {device.name} allows "
                f"{device.shared_per_cta}"
            )
        symbols = dict(symbols)
        gmem, params = self._bind(program, args, symbols, l2, names)
        threads = int(np.prod(block))
        if registers is None:
            registers = self.registers(kernel_name) if resident_ctas is None else 0
        per_sm = device.ctas_per_sm(threads, registers, total_shared)
        if resident_ctas is None:
            if per_sm == 0:
                raise GpuLabError(
                    f"{kernel_name} does not fit on one SM of {device.name}: {threads} threads, "
                    f"{registers} registers, {total_shared} bytes of shared memory"
                )
            resident_ctas = per_sm * device.sms
        size = int(np.prod(cluster))
        ctas = int(np.prod(grid))
        slots = min(ctas, max(size, resident_ctas // size * size))

        counters = Counters(program, min(device.sms, slots))
        resident_per_sm = -(-slots // device.sms)
        l1 = L1Filter(
            counters.sms, max(device.l1_bytes - resident_per_sm * (total_shared + 1024), 16384)
        )
        machine = Machine(
            program,
            counters,
            grid,
            block,
            cluster,
            slots,
            gmem,
            l1,
            l2,
            params,
            symbols,
            total_shared,
            device,
            seed,
            checks,
            deadlock_rounds,
            shared_init,
            explicit,
        )
        if overlap is not None:
            machine.overlap = Overlap(slots, gmem, overlap)
        if latency:
            machine.latency = Latency(machine)
        try:
            machine.run()
        except GpuLabError as error:
            error.args = (f"{error}\n  in kernel {kernel_name}",)
            raise
        finally:
            gmem.write_back()
        if own_l2:
            l2.flush()
        report = Report(
            kernel_name, device, grid, block, cluster, ctas, slots, per_sm, total_shared, registers
        )
        if self._resources and kernel_name in self._resources:
            found = self._resources[kernel_name]
            report.spill_bytes = found.spill_stores + found.spill_loads
        _fill(report, machine, counters, l2, before, own_l2)
        report.l2_policies = {
            name: tuple(int(v) for v in row)
            for name, row in zip(POLICY_NAMES, l2.policies - policies, strict=False)
            if row.any()
        }
        if latency:
            report.latency_cycles = machine.latency.cycles
        if overlap is not None:
            report.footprint = machine.overlap.finish(kernel_name)
        report.wall_seconds = time.perf_counter() - started
        return report

    @staticmethod
    def _check_shape(kernel, grid, block, cluster, device):
        if any(g % c for g, c in zip(grid, cluster, strict=False)):
            raise GpuLabError(f"grid {grid} is not a multiple of the cluster {cluster}")
        if int(np.prod(block)) > 1024 or min(grid + block) < 1:
            raise GpuLabError(f"invalid launch: grid {grid}, block {block}")
        if kernel.reqntid and kernel.reqntid != block:
            raise GpuLabError(f"kernel {kernel.name} requires block {kernel.reqntid}, got {block}")
        if kernel.maxntid and np.prod(block) > np.prod(kernel.maxntid):
            raise GpuLabError(
                f"kernel {kernel.name} allows at most {kernel.maxntid} threads, got {block}"
            )
        if np.prod(cluster) > 1 and device.arch < 90:
            raise GpuLabError(f"{device.name} has no thread block clusters")

    def _shared_layout(self, name):
        """Addresses of a kernel's shared variables, and their end; dynamic (extern) ones start
        after the static ones."""
        if name not in self._layouts:
            kernel = self.kernels[name]
            symbols, end = {v.name: v.address for v in kernel.shared}, kernel.static_shared
            used = {name for ins in kernel.instrs for name in _names(ins)}
            module_shared = [v for v in self.variables.values() if v.space == "shared"]
            for v in module_shared:
                if v.nbytes and v.name in used:
                    start = -(-end // v.align) * v.align
                    symbols[v.name], end = start, start + v.nbytes
            dynamic = [v for v in module_shared + kernel.shared if not v.nbytes]
            align = max((v.align for v in dynamic), default=1)
            end = -(-end // align) * align
            for v in dynamic:
                symbols[v.name] = end
            for v in kernel.local:
                symbols[v.name] = v.address
            self._layouts[name] = symbols, end
        return self._layouts[name]

    def _bind(self, program, args, symbols, l2, names):
        kernel = program.kernel
        if len(args) != len(kernel.params):
            raise GpuLabError(
                f"{kernel.name} takes {len(kernel.params)} arguments, got {len(args)}"
            )
        buffers = {}
        for i, a in enumerate(args):
            name = names[i] if names else f"arg{i}"
            if is_array(a):
                buffers[i] = HostBuffer(a, name)
            elif isinstance(a, Struct):
                buffers |= {(i, at): HostBuffer(b, name) for at, b in a.pointers.items()}
        for name, storage in self.globals.items():
            buffers[name] = HostBuffer(storage, name)
        if program.uses_envreg:
            workspace = np.zeros(64, np.uint8)
            buffers["%grid_workspace"] = HostBuffer(workspace, "grid workspace")
        gmem = GlobalMemory(list(buffers.values()), l2.space)
        for name, b in buffers.items():
            if isinstance(name, str):
                symbols[name] = gmem.address_of(b)
        params = np.zeros(max(kernel.param_bytes, 1), np.uint8)
        for i, (p, a) in enumerate(zip(kernel.params, args, strict=False)):
            if isinstance(a, Struct):
                a, pointers = bytearray(a.raw), a.pointers
                for at in pointers:
                    a[at : at + 8] = gmem.address_of(buffers[i, at]).to_bytes(8, "little")
            raw = _param_bytes(p, gmem.address_of(buffers[i]) if i in buffers else a)
            params[p.offset : p.offset + p.nbytes] = np.frombuffer(raw, np.uint8)
            symbols[p.name] = p.offset
        return gmem, params


def _names(ins):
    from .parser import Mem, Sym

    for o in ins.operands:
        if isinstance(o, Mem):
            o = o.base
        if isinstance(o, Sym):
            yield o.name


def _param_bytes(param, value):
    n = param.nbytes
    if value is None:
        value = 0
    if isinstance(value, (bytes, bytearray, np.void)):
        raw = bytes(value)
    elif isinstance(value, (np.generic, np.ndarray)):
        raw = value.tobytes()
        if len(raw) != n and value.dtype.kind in "iub":
            raw = (int(value) & (1 << 8 * n) - 1).to_bytes(n, "little")
    elif isinstance(value, float):
        raw = np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[n]).tobytes()
    else:
        raw = (int(value) & (1 << 8 * n) - 1).to_bytes(n, "little")
    if len(raw) != n:
        raise GpuLabError(f"parameter {param.name} has {n} bytes, the argument {len(raw)}")
    return raw


def _fill(report, machine, c, l2, before, own_l2):
    program = machine.program
    warps = np.zeros(len(program.instrs), np.int64)
    threads = np.zeros(len(program.instrs), np.int64)
    for b in program.blocks:
        warps[b.start : b.end] = c.block_warps[b.index]
        threads[b.start : b.end] = c.block_threads[b.index]
    report.warp_instructions, report.thread_instructions = int(warps.sum()), int(threads.sum())
    kinds = Counter()
    for pc in np.flatnonzero(warps):
        ins, kind, executed = program.instrs[pc], program.kinds[pc], int(warps[pc])
        kinds[kind] += executed
        report.instruction_profile.append((executed, ins))
        if not c.lanes[pc]:
            continue
        per_lane = int(c.bytes[ins.pc] // c.lanes[ins.pc])
        lanes, nbytes, sectors = int(c.lanes[ins.pc]), int(c.bytes[ins.pc]), int(c.sectors[ins.pc])
        if sectors and kind != "atomic":
            is_load = reads_global(ins)
            side = "load" if is_load else "store"
            setattr(
                report, f"global_{side}_bytes", getattr(report, f"global_{side}_bytes") + nbytes
            )
            setattr(
                report,
                f"global_{side}_sectors",
                getattr(report, f"global_{side}_sectors") + sectors,
            )
            (report.load_widths if is_load else report.store_widths)[per_lane] += lanes
            report.sites.append(
                AccessSite(ins.where(), side, int(c.requests[ins.pc]), nbytes, sectors, per_lane)
            )
        elif kind == "atomic":
            report.atomic_requests += int(c.requests[ins.pc])
            report.atomic_lane_ops += lanes
        if c.wavefronts[ins.pc]:
            report.shared_requests += int(c.requests[ins.pc])
            report.shared_wavefronts += int(c.wavefronts[ins.pc])
            report.shared_ideal_wavefronts += int(c.ideal_wavefronts[ins.pc])
            report.shared_max_ways = max(report.shared_max_ways, int(c.max_ways[ins.pc]))
    report.instructions = kinds
    report.sm_issued, report.sm_wavefronts = int(c.sm_issued.max()), int(c.sm_wavefronts.max())
    busiest = int(np.argmax(c.sm_read + c.sm_written))
    report.sm_read_bytes, report.sm_written_bytes = (
        int(c.sm_read[busiest]),
        int(c.sm_written[busiest]),
    )
    if machine.atomic_words is not None:
        report.atomic_max_same_address = int(machine.atomic_words.max())
    report.l1_hit_sectors = machine.l1.hits
    after = l2.snapshot()
    (
        report.l2_read_sectors,
        report.l2_read_hits,
        report.l2_write_sectors,
        report.dram_read_bytes,
        report.dram_write_bytes,
    ) = (a - b for a, b in zip(after, before, strict=False))
    report.l2_dirty_bytes = 0 if own_l2 else l2.dirty_bytes
