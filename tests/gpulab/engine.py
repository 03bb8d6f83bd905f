"""The SIMT machine: groups of threads at the same PC, scheduling, barriers and CTA dispatch.

Threads of all resident CTAs live in one flat array of lanes (slot * padded CTA size +
thread).  The scheduler repeatedly takes all ready threads with the smallest
(epoch, pc) and runs one basic block for them with vectorised numpy.  Taking the
smallest pc first makes diverged threads reconverge; the epoch, advanced by every
pass through a polling loop, keeps spinning threads from starving the others.
"""

import numpy as np

from .async_copies import AsyncCopies
from .errors import Deadlock, KernelFault
from .memory import GLOBAL_BASE
from .operands import reader, unsupported, writer
from .program import operand_value
from .races import GlobalRaces, SharedRaces

U32, U64 = np.uint32, np.uint64
MAX_GROUP = 1 << 16  # lanes executed at once; larger groups run in pieces (cache locality)
NOT_ARRIVED = -1  # a lane's phase of the cluster barrier
LONG_LOOP = 4096  # ordinary loop iterations that count as one epoch


def _select(watch, keep):
    lanes, addr, value, size = watch
    return lanes[keep], addr[keep], value[keep], size


class Group:
    """Threads executing one basic block together, with a cache of their registers.

    Cached values may be views of each other (``mov`` shares its source), so none may be a view of
    stored registers that ``flush`` overwrites in place."""

    __slots__ = (
        "_carry",
        "_ctas",
        "_lanes",
        "_slots",
        "_sm",
        "_warp_index",
        "_warp_of",
        "_whole",
        "cache",
        "dirty",
        "full",
        "full_warps",
        "idx",
        "m",
        "mask",
        "n",
        "n_warps",
        "overwritten",
        "sel",
    )

    def __init__(self, m, idx, overwritten=frozenset()):
        self.m, self.idx, self.n = m, idx, idx.size
        self.overwritten = overwritten  # slots that will be flushed
        first, last = int(idx[0]), int(idx[-1])
        self.full = self.n == m.lanes_total
        contiguous = last - first + 1 == self.n
        self.sel = slice(first, last + 1) if contiguous else idx
        self.cache, self.dirty, self.mask = {}, set(), None
        if contiguous:
            self.full_warps = first % 32 == 0 and self.n % 32 == 0
        else:
            heads = idx[::32]
            self.full_warps = (
                self.n % 32 == 0
                and not (heads & 31).any()
                and bool((idx[31::32] - heads == 31).all())
            )
        self._warp_of = self._warp_index = self._lanes = self._slots = self._ctas = self._whole = (
            None
        )
        self._carry = self._sm = None
        if self.full_warps:
            self.n_warps = self.n // 32
        else:
            warp = idx >> 5
            new = np.concatenate([[True], warp[1:] != warp[:-1]])
            self._warp_index = np.cumsum(new) - 1
            self.n_warps = int(self._warp_index[-1]) + 1

    # ---- registers --------------------------------------------------------
    def get(self, slot):
        value = self.cache.get(slot)
        if value is None:
            stored = self.m.regs[slot]
            if stored is None:
                value = np.zeros(1, self.m.reg_dtypes[slot])  # never written: undefined
            elif stored.size == 1:
                value = stored
            elif self.full:
                self.m.owned[slot] = False  # may become aliased
                value = stored
            else:
                value = stored[self.sel]
                if slot in self.overwritten and value.base is not None:
                    value = value.copy()
            self.cache[slot] = value
        return value

    def set(self, slot, value):
        if self.mask is not None:
            value = np.where(self.mask, value, self.get(slot))
        self.cache[slot] = value
        self.dirty.add(slot)

    def flush(self, live):
        m = self.m
        for slot in self.dirty:
            if slot not in live:
                continue
            value = self.cache[slot]
            if self.full:
                if not value.flags.c_contiguous:
                    value = np.ascontiguousarray(value)
                m.regs[slot], m.owned[slot] = value, False
                continue
            stored = m.regs[slot]
            if stored is None:
                stored = np.zeros(m.lanes_total, m.reg_dtypes[slot])
            elif stored.size == 1:
                stored = np.full(m.lanes_total, stored[0])
            elif not m.owned[slot]:
                stored = stored.copy()
            m.regs[slot], m.owned[slot] = stored, True
            stored[self.sel] = value

    def carry(self):
        return self._carry if self._carry is not None else np.zeros(1, bool)

    def set_carry(self, value):
        self._carry = value

    # ---- geometry ---------------------------------------------------------
    def lanes(self):
        if self._lanes is None:
            self._lanes = self.idx & 31
        return self._lanes

    def slots(self):
        if self._slots is None:
            self._slots = self.idx // self.m.cta_lanes
        return self._slots

    def cta_ids(self):
        if self._ctas is None:
            self._ctas = self.m.slot_cta[self.slots()]
        return self._ctas

    def warps(self):
        if self._warp_of is None:
            self._warp_of = self.idx >> 5
        return self._warp_of

    def warp_ids(self):
        return self.m.warp_ids(self.warps())

    def warp_index(self):
        if self._warp_index is None:
            self._warp_index = np.repeat(np.arange(self.n_warps), 32)
        return self._warp_index

    def row_warps(self):
        """Warp number of each warp row."""
        if self.full_warps:
            return self.idx[::32] >> 5
        return self.idx[np.flatnonzero(np.diff(self.warp_index(), prepend=-1))] >> 5

    def row_sm(self):
        """SM of each warp row (CTAs are dealt to the SMs in turn)."""
        if self._sm is None:
            self._sm = self.row_warps() // self.m.warps_per_cta % self.m.device.sms
        return self._sm

    def whole_ctas(self):
        """True if the group consists of complete CTAs (of full warps)."""
        if self._whole is None:
            size = self.m.cta_lanes
            heads = self.idx[::size]
            self._whole = (
                self.full_warps
                and self.n % size == 0
                and not (heads % size).any()
                and bool((self.idx[size - 1 :: size] - heads == size - 1).all())
            )
        return self._whole

    def warp_rows(self, values, mask, absent):
        """Per-lane values as (warps, 32); ``absent`` where a lane is not in the group or masked
        off."""
        if self.full_warps:
            rows = values.reshape(-1, 32)
            return rows if mask is None else np.where(mask.reshape(-1, 32), rows, absent)
        rows = np.full((self.n_warps, 32), absent, values.dtype)
        rows[self.warp_index(), self.lanes()] = (
            values if mask is None else np.where(mask, values, absent)
        )
        return rows

    def from_rows(self, rows):
        if self.full_warps:
            return np.ascontiguousarray(rows).reshape(-1)
        return rows[self.warp_index(), self.lanes()]

    def per_lane(self, per_warp):
        return np.repeat(per_warp, 32) if self.full_warps else per_warp[self.warp_index()]

    def position_of(self, lane):
        """Position in this group of lane ``lane`` of each lane's warp; -1 when absent."""
        table = np.full((self.n_warps, 32), -1, np.int64)
        table[self.warp_index(), self.lanes()] = np.arange(self.n)
        return table[self.warp_index(), lane]

    # ---- special registers ----------------------------------------------------
    def sreg(self, name):
        value = self.cache.get(name)
        if value is None:
            value = self.cache[name] = self.m.special(self, name)
        return value

    def describe_lane(self, active_lane, everyone=False):
        idx = self.idx if self.mask is None or everyone else self.idx[self.mask]
        lane = int(idx[active_lane])
        t = lane % self.m.cta_lanes
        thread = tuple(int(self.m.tid[d][t]) for d in range(3))
        return f"thread {thread} of {self.m.cta_name(lane // self.m.cta_lanes)}"


class PendingCopy:
    """cp.async data that has been read but does not reach shared memory before the wait."""

    def __init__(self, idx, flat, data, size, groups, number, times):
        self.idx, self.flat, self.data, self.size, self.groups, self.number = (
            idx,
            flat,
            data,
            size,
            groups,
            number,
        )
        self.times = times  # when they are complete (latency=True)


class Poll:
    """What each thread last saw at one polling instruction."""

    def __init__(self, lanes, size):
        self.size = size
        self.addr, self.value = np.zeros(lanes, U64), np.zeros(lanes, U64)
        self.epoch = np.full(lanes, -1, np.int64)
        self.stale = np.zeros(lanes, bool)  # saw the same as the time before


class Sleep:
    """Threads that have polled in vain twice; they resume when a watched word changes."""

    def __init__(self, lanes, pc, watch):
        self.lanes, self.pc, self.watch = (
            lanes,
            pc,
            watch,
        )  # watch: [(lanes, addresses, values, size)]


class Machine:
    """One launch."""

    def __init__(
        self,
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
        shared_bytes,
        device,
        seed,
        checks,
        deadlock_rounds,
        shared_init=True,
        explicit_cluster=False,
    ):
        self.program, self.counters, self.gmem, self.l1, self.l2 = program, counters, gmem, l1, l2
        self.params, self.symbols, self.device, self.checks = params, symbols, device, checks
        self.grid, self.block, self.cluster = grid, block, cluster
        self.deadlock_rounds, self.explicit_cluster = deadlock_rounds, explicit_cluster
        self.rng = np.random.default_rng(seed) if seed is not None else None
        self.cluster_size = int(np.prod(cluster))
        self.total_ctas = int(np.prod(grid))
        self.threads = int(np.prod(block))
        self.warps_per_cta = -(-self.threads // 32)
        self.cta_lanes = 32 * self.warps_per_cta
        self.slots = slots
        self.lanes_total = slots * self.cta_lanes
        t = np.arange(self.cta_lanes)
        self.tid = (t % block[0], t // block[0] % block[1], t // (block[0] * block[1]))
        kernel = program.kernel
        self.reg_dtypes = [r.dtype if r.dtype is not None else U64 for r in kernel.registers]
        self.regs = [None] * len(kernel.registers)
        self.owned = [False] * len(kernel.registers)
        self.alive = np.zeros(self.lanes_total, bool)
        self.alive_count = np.zeros(slots, np.int64)
        self.slot_cta = np.full(slots, -1, np.int64)
        self.slot_xyz = np.zeros((3, slots), U32)
        self.shared_bytes = shared_bytes
        self.shared_stride = -(-max(shared_bytes, 16) // 128) * 128
        self.smem = np.zeros(slots * self.shared_stride, np.uint8)
        self._shared_views, self._local_views, self._local = {}, {}, None
        self.shared_races = SharedRaces(self, program.shared_granule, shared_init)
        self.global_races = GlobalRaces(self, program.global_granule)
        self.copy_group = np.zeros(self.lanes_total, np.int64)
        self.copies, self.copy_number = [], 0
        self.asynchronous = AsyncCopies(self)
        self.atomic_words = None
        self.overlap = None  # Overlap, for launches that may run while earlier ones do
        self.latency = None  # Latency, with latency=True
        self.prints = 0
        # scheduling state
        self.ready = {}  # (epoch, pc) -> [(lanes, ordinary loop count)]
        self.parked = {}  # pc -> lanes waiting for the rest of their warp
        self.waiting = {}  # CTA barrier id -> [(lanes, pc, barrier.red destination)]
        self.arrived, self.expected, self.votes = {}, {}, {}
        clusters = slots // self.cluster_size
        self.cluster_phase = np.zeros(clusters, np.int64)
        self.cluster_arrived = np.zeros(clusters, np.int64)
        self.lane_phase = np.full(self.lanes_total, -1, np.int64)  # phase the lane has arrived in
        self.cluster_waiting = []  # (lanes, pc)
        self.next_cta = 0
        self.epoch = 0
        self.progressed, self.progress_epoch = True, 0  # see the deadlock test in run()
        self._seen = {}  # pc -> Poll
        self.asleep, self.memory_changed = [], False
        self._flags = np.zeros(self.lanes_total, bool)
        self._order = self._dispatch_order()

    # ---- names ---------------------------------------------------------------
    def warp_ids(self, warps):
        """Numbers through the whole grid, of warps of the slots."""
        slot, warp = np.divmod(warps, self.warps_per_cta)
        return self.slot_cta[slot] * self.warps_per_cta + warp

    def cta_coords(self, linear):
        gx, gy, _ = self.grid
        return (linear % gx, linear // gx % gy, linear // (gx * gy))

    def cta_name(self, slot):
        return f"CTA {self.cta_coords(int(self.slot_cta[slot]))}"

    def symbol(self, name, ins):
        value = self.symbols.get(name)
        if value is None:
            raise unsupported(ins, f"symbol {name}")
        return np.array([value], U64)

    # ---- memory views ------------------------------------------------------------
    def shared_view(self, nbytes, count):
        v = self._shared_views.get((nbytes, count))
        if v is None:
            v = self.smem.view(f"u{nbytes}")
            v = self._shared_views[nbytes, count] = v.reshape(-1, count) if count > 1 else v
        return v

    def local_view(self, nbytes, count):
        if self._local is None:
            self._local = np.zeros(
                self.lanes_total * max(16, self.program.kernel.local_bytes), np.uint8
            )
        v = self._local_views.get((nbytes, count))
        if v is None:
            v = self._local.view(f"u{nbytes}")
            v = self._local_views[nbytes, count] = v.reshape(-1, count) if count > 1 else v
        return v

    def special(self, g, name):
        base, _, axis = name.partition(".")
        d = "xyz".find(axis) if axis else 0
        if base == "tid":
            return self.tid[d][g.idx % self.cta_lanes].astype(U32)
        if base == "ntid":
            return np.array([self.block[d]], U32)
        if base == "ctaid":
            return self.slot_xyz[d][g.slots()]
        if base == "nctaid":
            return np.array([self.grid[d]], U32)
        if base == "laneid":
            return g.lanes().astype(U32)
        if base == "warpid":
            return (g.idx % self.cta_lanes >> 5).astype(U32)
        if base == "nwarpid":
            return np.array([self.device.max_threads_per_sm // 32], U32)
        if base.startswith("lanemask_"):
            lane = g.lanes().astype(U64)
            one = U64(1) << lane
            return {
                "eq": one,
                "lt": one - U64(1),
                "le": one * U64(2) - U64(1),
                "gt": ~(one * U64(2) - U64(1)),
                "ge": ~(one - U64(1)),
            }[base[9:]].astype(U32)
        if base == "cluster_ctaid":
            return self.slot_xyz[d][g.slots()] % U32(self.cluster[d])
        if base == "cluster_nctaid":
            return np.array([self.cluster[d]], U32)
        if base == "clusterid":
            return self.slot_xyz[d][g.slots()] // U32(self.cluster[d])
        if base == "nclusterid":
            return np.array([self.grid[d] // self.cluster[d]], U32)
        if base == "cluster_ctarank":
            return (g.slots() % self.cluster_size).astype(U32)
        if base == "cluster_nctarank":
            return np.array([self.cluster_size], U32)
        if base == "is_explicit_cluster":
            return np.array([self.explicit_cluster])
        if base == "smid":
            return (g.slots() % self.device.sms).astype(U32)
        if base == "nsmid":
            return np.array([self.device.sms], U32)
        if base in ("clock", "clock64", "globaltimer", "globaltimer_lo"):
            return np.array(
                [self.counters.steps], U64 if base in ("clock64", "globaltimer") else U32
            )
        if base in ("dynamic_smem_size", "total_smem_size", "aggr_smem_size"):
            static = self.program.kernel.static_shared if base == "dynamic_smem_size" else 0
            return np.array([self.shared_bytes - static], U32)
        if base in ("envreg1", "envreg2"):  # cooperative-groups grid workspace
            address = self.symbols.get("%grid_workspace", 0)
            return np.array([address >> 32 if base == "envreg1" else address & 0xFFFFFFFF], U32)
        if base in ("gridid", "clock_hi", "globaltimer_hi") or base.startswith(("envreg", "pm")):
            return np.zeros(1, U32)
        raise KeyError(name)

    # ---- CTA dispatch ---------------------------------------------------------------
    def _dispatch_order(self):
        """Linear CTA ids in launch order: clusters in grid order, ranks inside a cluster."""
        gx, gy, gz = self.grid
        if self.cluster_size == 1:
            return np.arange(self.total_ctas)
        cx, cy, cz = self.cluster
        ids = np.arange(self.total_ctas).reshape(gz // cz, cz, gy // cy, cy, gx // cx, cx)
        return ids.transpose(0, 2, 4, 1, 3, 5).reshape(-1)

    def _free_slots(self):
        free = (self.alive_count == 0).reshape(-1, self.cluster_size).all(axis=1)
        return (
            np.flatnonzero(free)[:, None] * self.cluster_size + np.arange(self.cluster_size)
        ).reshape(-1)

    def dispatch(self):
        """Start CTAs in the free slots; returns whether any was started."""
        slots = self._free_slots()[: self.total_ctas - self.next_cta]
        if not slots.size:
            return False
        ids = self._order[self.next_cta : self.next_cta + slots.size]
        self.next_cta += slots.size
        self.slot_cta[slots] = ids
        for d, c in enumerate(self.cta_coords(ids)):
            self.slot_xyz[d][slots] = c
        self.alive_count[slots] = self.threads
        clusters = np.unique(slots // self.cluster_size)
        self.cluster_phase[clusters] = 0
        self.cluster_arrived[clusters] = 0
        thread = np.arange(self.threads)
        lanes = (slots[:, None] * self.cta_lanes + thread).reshape(-1)
        self.alive[lanes] = True
        self.lane_phase[lanes] = -1
        self.copy_group[lanes] = 0
        if self.overlap is not None:
            self.overlap.start(slots)
        if self.latency is not None:
            self.latency.begin(slots)
        runs = np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1)
        for run in runs:
            start, end = int(run[0]), int(run[-1]) + 1
            self.smem[start * self.shared_stride : end * self.shared_stride] = 0xCB
            self.shared_races.reset(start, end)
        if self.rng is None or not self.program.communicates:
            self.push(self.epoch, 0, lanes)
        else:  # CTAs start at random offsets: different interleavings
            self.push_jittered(self.epoch, 0, lanes, self.rng.integers(0, 4, self.slots))
        self.progressed = True
        return True

    # ---- scheduling ---------------------------------------------------------------------
    def push(self, epoch, pc, lanes, age=0):
        if lanes.size:
            self.ready.setdefault((epoch, pc), []).append((lanes, age))

    def push_jittered(self, epoch, pc, lanes, delay_of_slot):
        delay = delay_of_slot[lanes // self.cta_lanes]
        for d in np.unique(delay):
            self.push(epoch + int(d), pc, lanes[delay == d])

    def merge(self, pieces):
        if len(pieces) == 1:
            return pieces[0]
        lanes = np.concatenate(pieces)
        if lanes.size < 2048:
            lanes.sort()
            return lanes
        self._flags[lanes] = True
        lanes = np.flatnonzero(self._flags)
        self._flags[lanes] = False
        return lanes

    def run(self):
        with np.errstate(all="ignore"):
            self.dispatch()
            dispatched_epoch = self.epoch
            while True:
                if self.asleep and self.memory_changed:
                    self._wake()
                if not self.ready:
                    if self.next_cta < self.total_ctas and self.dispatch():
                        continue
                    if self.asleep:  # another round for everyone: loops may give up by themselves
                        for s in self.asleep:
                            self.push(self.epoch + 1, s.pc, s.lanes)
                        self.asleep = []
                        continue
                    if self.alive.any():
                        self._deadlock("every thread waits at a barrier that cannot complete")
                    return
                key = min(self.ready)
                epoch, pc = key
                if epoch > self.epoch:
                    self.epoch = epoch
                if self.next_cta < self.total_ctas and (
                    epoch > dispatched_epoch or 4 * self._free_count() >= self.slots
                ):
                    dispatched_epoch = epoch
                    if self.dispatch():
                        continue
                # progress: a CTA starts, a thread exits, global memory changes, or a poll sees
                # something new
                if self.progressed:
                    self.progressed, self.progress_epoch = False, epoch
                elif epoch > self.progress_epoch + self.deadlock_rounds:
                    self._deadlock(
                        f"{self.deadlock_rounds} rounds of polling without any change in memory"
                    )
                entries = self.ready.pop(key)
                age = max(a for _, a in entries)
                lanes = self.merge([waiting for waiting, _ in entries] + self.parked.pop(pc, []))
                block = self.program.block_at.get(pc)
                if block is None:  # ran off the end of the kernel
                    self.exit(lanes)
                    continue
                for part in self._pieces(lanes):
                    self.run_block(block, part, epoch, age)

    def _free_count(self):
        return int((self.alive_count == 0).sum())

    def _pieces(self, lanes):
        if lanes.size <= MAX_GROUP:
            return [lanes]
        per_piece = (
            max(1, MAX_GROUP // (self.cta_lanes * self.cluster_size))
            * self.cta_lanes
            * self.cluster_size
        )
        cuts = np.searchsorted(lanes, np.arange(per_piece, self.lanes_total, per_piece))
        return [p for p in np.split(lanes, cuts) if p.size]

    def run_block(self, block, lanes, epoch, age):
        self.now = epoch
        g = Group(self, lanes, block.overwritten)
        if block.converge is not None and not g.full_warps:
            g = self._converge(g, block)
            if g is None:
                return
        self.counters.ran(g, block)
        if self.latency is not None:
            self.latency.run(block, g)
        else:
            for run in block.code:
                run(g)
        self._terminate(g, block, epoch, age)

    def _converge(self, g, block):
        """Keep the warps whose named lanes have all arrived; park the others."""
        ins = block.converge
        members = np.array([0xFFFFFFFF], U32)
        if (ins.op in ("shfl", "vote", "match", "redux") and "sync" in ins.mods) or ins.op in (
            "bar",
            "barrier",
            "elect",
        ):
            members = operand_value(ins.operands[-1], g, ins)
        bits = U64(1) << np.arange(32, dtype=U64)
        warps = g.warps()
        present = g.warp_rows(np.ones(g.n, bool), None, False) @ bits
        first = np.flatnonzero(np.concatenate([[True], warps[1:] != warps[:-1]]))
        alive = self.alive.reshape(-1, 32)[warps[first]] @ bits
        need = np.broadcast_to(members, g.n)[first].astype(U64) & alive
        complete = (need & ~present) == 0
        if complete.all():
            return g
        keep = complete[g.warp_index()]
        self.parked.setdefault(block.start, []).append(g.idx[~keep])
        return Group(self, g.idx[keep], block.overwritten) if keep.any() else None

    def _terminate(self, g, block, epoch, age):
        last = block.last
        if last is None:
            g.flush(block.overwritten)
            self.push(epoch, block.end, g.idx, age)
            return
        taken = None
        if block.guard is not None:
            p = g.get(block.guard[0])
            taken = ~p if block.guard[1] else p
            if taken.size == 1:
                taken = None if taken[0] else np.zeros(g.n, bool)
            elif taken.all():
                taken = None
        if last.op == "bra":
            g.flush(block.overwritten)
            go = g.idx if taken is None else g.idx[taken]
            if last.target <= last.pc:
                self._back_edge(block, epoch, last.target, go, age)
            else:
                self.push(epoch, last.target, go, age)
            if taken is not None:
                self.push(epoch, block.end, g.idx[~taken], age)
        elif last.op in ("ret", "exit"):
            if taken is None:
                self.exit(g.idx)
            else:
                g.flush(block.overwritten)
                self.push(epoch, block.end, g.idx[~taken], age)
                if taken.any():
                    self.exit(g.idx[taken])
        elif last.op in ("bar", "barrier"):
            if taken is not None:
                g.flush(block.overwritten)
                self.push(epoch, block.end, g.idx[~taken], age)
                if not taken.any():
                    return
                raise_in = Group(self, g.idx[taken])
                self._barrier(raise_in, last, block.end, epoch)
                return
            g.flush(block.overwritten)
            self._barrier(g, last, block.end, epoch)
        else:
            raise unsupported(last)

    def _back_edge(self, block, epoch, target, lanes, age):
        if not lanes.size:
            return
        if not block.spin:
            if age < LONG_LOOP:
                self.push(epoch, target, lanes, age + 1)
            else:
                self.push(epoch + 1, target, lanes)
            return
        if self.latency is not None:
            self.latency.poll_again(block, lanes)
        lanes = self._sleep(block, target, lanes, epoch)
        if not lanes.size:
            return
        if self.rng is None:
            self.push(epoch + 1, target, lanes)
        else:  # a polling CTA may be delayed for a few rounds
            delay = np.where(
                self.rng.random(self.slots) < 0.25, self.rng.integers(1, 4, self.slots), 0
            )
            self.push_jittered(epoch + 1, target, lanes, delay)

    def _sleep(self, block, pc, lanes, epoch):
        """Put the CTAs to sleep whose polls saw nothing new in this iteration; returns the other
        lanes."""
        polled, stale = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int64)
        watch = []
        for poll_pc in block.polls:
            seen = self._seen.get(poll_pc)
            if seen is None:
                continue
            polling = lanes[seen.epoch[lanes] == epoch]
            slot = polling // self.cta_lanes
            polled += np.bincount(slot, minlength=self.slots)
            stale += np.bincount(slot[seen.stale[polling]], minlength=self.slots)
            watch.append((polling, seen.addr[polling], seen.value[polling], seen.size))
        idle = (polled > 0) & (stale == polled)
        if not idle.any():
            return lanes
        sel = idle[lanes // self.cta_lanes]
        self.asleep.append(
            Sleep(lanes[sel], pc, [_select(w, idle[w[0] // self.cta_lanes]) for w in watch])
        )
        self.memory_changed = True  # look at the memory before anything else runs
        return lanes[~sel]

    def _wake(self):
        """Resume the sleeping CTAs for which a polled word has changed."""
        self.memory_changed = False
        left = []
        for s in self.asleep:
            changed = np.zeros(self.slots, bool)
            for lanes, addr, value, size in s.watch:
                now = self.gmem.view(size)[(addr - U64(GLOBAL_BASE)).astype(np.int64) // size]
                changed[lanes[now != value] // self.cta_lanes] = True
            if changed.any():
                go = changed[s.lanes // self.cta_lanes]
                if self.rng is None:
                    self.push(self.epoch, s.pc, s.lanes[go])
                else:
                    self.push_jittered(
                        self.epoch, s.pc, s.lanes[go], self.rng.integers(0, 3, self.slots)
                    )
                s.watch = [_select(w, ~changed[w[0] // self.cta_lanes]) for w in s.watch]
                s.lanes = s.lanes[~go]
            if s.lanes.size:
                left.append(s)
        self.asleep = left

    def exit(self, lanes):
        self.progressed = True
        if self.latency is not None:
            self.latency.exit(lanes)
        slot = lanes // self.cta_lanes
        self.alive[lanes] = False
        self.alive_count -= np.bincount(slot, minlength=self.slots)
        self.asynchronous.exit(lanes)
        if self.cluster_size > 1 and self.checks:
            here = np.unique(slot)
            self.shared_races.exit(here[self.alive_count[here] == 0])
        for key in list(self.waiting):
            if self.waiting[key]:
                self._try_release(key, self.epoch)
        cluster = slot // self.cluster_size
        had = self.lane_phase[lanes] == self.cluster_phase[cluster]
        if had.any():
            self.cluster_arrived -= np.bincount(cluster[had], minlength=self.cluster_arrived.size)
        if self.cluster_waiting or self.cluster_arrived.any():
            self._cluster_complete(self.epoch)
        if self.copies:
            self.copies = [c for c in self.copies if self.alive[c.idx].any()]

    # ---- barriers -------------------------------------------------------------------------
    def _barrier(self, g, ins, pc, epoch):
        if "cluster" in ins.mods:
            self._cluster_barrier(g, ins, pc, epoch)
            return
        red = "red" in ins.mods
        operands = list(ins.operands)
        dst = operands.pop(0) if red else None
        pred = operands.pop() if red else None
        ids = operand_value(operands[0], g, ins)
        count = operand_value(operands[1], g, ins) if len(operands) > 1 else np.zeros(1, U32)
        for key in np.unique(ids):
            sel = np.broadcast_to(ids == key, g.n)
            lanes, key = g.idx[sel], int(key)
            slot = lanes // self.cta_lanes
            if key not in self.arrived:
                self.arrived[key] = np.zeros(self.slots, np.int64)
                self.expected[key] = np.zeros(self.slots, np.int64)
                self.votes[key] = np.zeros(self.slots, np.int64)
                self.waiting[key] = []
            if self.latency is not None:
                self.latency.arrive(key, lanes)
            self.arrived[key] += np.bincount(slot, minlength=self.slots)
            self.expected[key][slot] = np.broadcast_to(count, g.n)[sel]
            if red:
                p = np.broadcast_to(reader(pred, "pred", ins)(g), g.n)[sel]
                self.votes[key] += np.bincount(slot[p], minlength=self.slots)
            if "arrive" in ins.mods:
                self.push(epoch, pc, lanes)
            else:
                self.waiting[key].append((lanes, pc, (dst, ins) if red else None))
            self._try_release(key, epoch)

    def _try_release(self, key, epoch):
        arrived, expected = self.arrived[key], self.expected[key]
        needed = np.where(expected > 0, expected, self.alive_count)
        done = (arrived > 0) & (arrived >= needed)
        if not done.any():
            return
        left, released = [], []
        for lanes, pc, red in self.waiting[key]:
            go = done[lanes // self.cta_lanes]
            if not go.all():
                left.append((lanes[~go], pc, red))
                lanes = lanes[go]
            if not lanes.size:
                continue
            released.append(lanes)
            if self.latency is not None:
                self.latency.release(key, lanes)
            if red:
                self._barrier_result(key, lanes, *red)
            if self.rng is not None and self.program.communicates:
                # what a CTA has announced, others may see long before it goes on
                self.push_jittered(epoch, pc, lanes, self.rng.integers(0, 4, self.slots))
            else:
                self.push(epoch, pc, lanes)
        self.waiting[key] = left
        if released:
            warps = np.unique(np.concatenate(released) >> 5)
            self.shared_races.barrier(warps)
            self.global_races.barrier(self.warp_ids(warps))
        if self.latency is not None:
            self.latency.barriers[key][done] = 0
        arrived[done] = 0
        expected[done] = 0
        self.votes[key][done] = 0

    def _barrier_result(self, key, lanes, dst, ins):
        slot = lanes // self.cta_lanes
        votes, arrived = self.votes[key][slot], self.arrived[key][slot]
        value = {
            "popc": lambda: votes.astype(U32),
            "and": lambda: votes == arrived,
            "or": lambda: votes > 0,
        }[next(m for m in ins.mods if m in ("popc", "and", "or"))]()
        g = Group(self, lanes)
        writer(dst, ins)(g, value)
        g.flush(g.dirty)

    def _cluster_barrier(self, g, ins, pc, epoch):
        slot = g.slots()
        cluster = slot // self.cluster_size
        phase = self.cluster_phase[cluster]
        if "arrive" in ins.mods:
            self.lane_phase[g.idx] = phase
            self.cluster_arrived += np.bincount(cluster, minlength=self.cluster_arrived.size)
            if self.latency is not None:
                self.latency.cluster_arrive(g.idx)
            if "relaxed" not in ins.mods:
                self.global_races.release(g.warp_ids())
            self.push(epoch, pc, g.idx)
            self._cluster_complete(epoch)
            return
        absent = np.flatnonzero(self.lane_phase[g.idx] == NOT_ARRIVED)
        if absent.size:
            who = g.describe_lane(int(absent[0]))
            raise KernelFault(f"barrier.cluster.wait of {who}, which has not arrived", ins)
        ready = self.lane_phase[g.idx] < phase
        self._pass_cluster(g.idx[ready], pc, epoch)
        if not ready.all():
            self.cluster_waiting.append((g.idx[~ready], pc))

    def _pass_cluster(self, lanes, pc, epoch):
        if lanes.size:
            if self.latency is not None:
                self.latency.cluster_pass(lanes)
            self.lane_phase[lanes] = NOT_ARRIVED
            self.shared_races.barrier(lanes >> 5, cluster=True)
            self.global_races.acquire(self.warp_ids(np.unique(lanes >> 5)))
            self.push(epoch, pc, lanes)

    def _cluster_complete(self, epoch):
        alive = self.alive_count.reshape(-1, self.cluster_size).sum(axis=1)
        done = (self.cluster_arrived > 0) & (self.cluster_arrived >= alive)
        if not done.any():
            return
        self.cluster_phase[done] += 1
        self.cluster_arrived[done] = 0
        if self.latency is not None:
            self.latency.cluster_complete(done)
        left = []
        for lanes, pc in self.cluster_waiting:
            cluster = lanes // self.cta_lanes // self.cluster_size
            go = self.lane_phase[lanes] < self.cluster_phase[cluster]
            self._pass_cluster(lanes[go], pc, epoch)
            if not go.all():
                left.append((lanes[~go], pc))
        self.cluster_waiting = left

    # ---- asynchronous copies ---------------------------------------------------------------
    def start_copy(self, g, lanes, flat, data, size):
        times = self.latency.copy_times(g) if self.latency is not None else lanes
        self.copies.append(
            PendingCopy(lanes, flat, data, size, self.copy_group[lanes], self.copy_number, times)
        )
        self.copy_number += 1
        view = self.shared_view(1, 1)
        view[flat[:, None] + np.arange(size)] = 0xCB  # garbage until the wait
        if self.checks:
            self.shared_races.forget(flat, size)

    def finish_copies(self, sel, keep, everything, ins, before=None):
        """cp.async.wait_group keep: land all but the newest ``keep`` committed groups of these
        threads (with ``before``: only copies started earlier than that number)."""
        left = []
        self._flags[sel] = True
        for c in self.copies:
            mine = self._flags[c.idx]
            limit = self.copy_group[c.idx] - keep
            go = mine if everything else mine & (c.groups < limit)
            if not go.any() or (before is not None and c.number >= before):
                left.append(c)
                continue
            flat, data = c.flat[go], c.data[go]
            if self.latency is not None:
                self.latency.land(c.idx[go], c.times[go])
            if self.checks:
                self.shared_races.write(flat, c.size, c.idx[go] >> 5, ins, np.ones(flat.size, bool))
            self.shared_view(1, 1)[flat[:, None] + np.arange(c.size)] = data
            if not go.all():
                stay = ~go
                left.append(
                    PendingCopy(
                        c.idx[stay],
                        c.flat[stay],
                        c.data[stay],
                        c.size,
                        c.groups[stay],
                        c.number,
                        c.times[stay],
                    )
                )
        self._flags[sel] = False
        self.copies = left

    # ---- atomics ------------------------------------------------------------------------------
    def atomic_order(self, warps):
        """A random order of the warps for simultaneous atomics (None: in lane order)."""
        if self.rng is None or warps.size < 2:
            return None
        first, last = int(warps[0]), int(warps[-1])
        if first == last:
            return None
        rank = self.rng.permutation(last - first + 1)
        return np.argsort(rank[warps - first], kind="stable")

    def count_atomic(self, offset):
        if self.atomic_words is None:
            self.atomic_words = np.zeros(self.gmem.size // 4 + 1, np.int32)
        np.add.at(self.atomic_words, offset >> 2, 1)

    def observe(self, pc, lanes, addr, columns, size):
        """A polling read: progress if a thread sees another address or value than last time."""
        value = columns[0].astype(U64)
        for c in columns[1:]:
            value = value * U64(1000003) + c
        if pc not in self._seen:
            self._seen[pc] = Poll(self.lanes_total, size)
        seen = self._seen[pc]
        same = (seen.addr[lanes] == addr) & (seen.value[lanes] == value)
        if not same.all():
            self.progressed = True
        seen.stale[lanes] = same & (len(columns) == 1)
        seen.addr[lanes], seen.value[lanes], seen.epoch[lanes] = addr, value, self.now

    def count_printf(self, g, ins):
        self.prints += g.n if g.mask is None else int(g.mask.sum())

    # ---- deadlock report
    # --------------------------------------------------------------------------
    def _deadlock(self, why):
        places = {}
        for (_, pc), entries in self.ready.items():
            for lanes, _ in entries:
                places.setdefault(("spins", pc), []).append(lanes)
        for s in self.asleep:
            places.setdefault(("spins", s.pc), []).append(s.lanes)
        for pc, pieces in self.parked.items():
            places.setdefault(("waits for its warp", pc), []).extend(pieces)
        for key, entries in self.waiting.items():
            for lanes, pc, _ in entries:
                places.setdefault((f"waits at barrier {key}", pc - 1), []).append(lanes)
        for lanes, pc in self.cluster_waiting:
            places.setdefault(("waits at the cluster barrier", pc - 1), []).append(lanes)
        rows = []
        instrs = self.program.instrs
        by_cta = {}
        for (what, pc), pieces in places.items():
            lanes = np.concatenate(pieces)
            for cta, n in zip(
                *np.unique(self.slot_cta[lanes // self.cta_lanes], return_counts=True), strict=False
            ):
                by_cta.setdefault(int(cta), []).append((what, pc, int(n)))
        for cta in sorted(by_cta)[:16]:
            for what, pc, n in by_cta[cta]:
                where = instrs[min(pc, len(instrs) - 1)].where()
                rows.append(f"  CTA {self.cta_coords(cta)}: {n} thread(s), {what}: {where}")
        if len(by_cta) > 16:
            rows.append(f"  ... and {len(by_cta) - 16} more CTAs")
        for flat, b in list(self.asynchronous.barriers.items())[:8]:
            if b.pending != b.expected or b.tx:
                rows.append(
                    f"  mbarrier at shared address {flat % self.shared_stride:#x} of "
                    f"{self.cta_name(flat // self.shared_stride)}, {b.describe()}"
                )
        left = self.total_ctas - self.next_cta
        if left:
            rows.append(
                f"  {left} of {self.total_ctas} CTAs were never started: all {self.slots} resident "
                "slots are taken"
            )
        raise Deadlock(f"deadlock: {why}\n" + "\n".join(rows))
