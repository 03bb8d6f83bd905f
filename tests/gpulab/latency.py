"""Critical path of a launch: when each register of each warp is ready, if only latencies counted.

Rules.  An instruction starts when its operands are ready; its result is ready after the latency of
its class (``Device.*_cycles``).  A warp issues one instruction per cycle, and each in its turn, but
ptxas may reorder: between two boundaries - iterations of a loop, barriers, fences, waits - any
order that the operands allow, so what follows a boundary starts after everything before it has
started.  A branch waits for its predicate.  Moves and parameter loads are free, stores do not
block.  Throughput is unlimited: no bank conflicts, no queues, no competition of warps.

Loads: the level that the cache models say, but not before the data has arrived that an earlier load
has requested. A barrier opens some cycles after its last arrival.  Copies (cp.async, bulk) are
complete their source's latency after issue, which only the wait for them sees.  A CTA starts when
the one before it in its slot has ended.

Threads that wait for another CTA: a strong load, or an atomic whose result is used and that is not
marked relaxed, starts no earlier than the latest strong store or atomic on its word, in the order
of the emulation.  In a loop that does nothing but wait (``_polling_loops``), a poll that is not the
thread's first look at the word starts no earlier than the first write since the last look, and
polling in vain costs nothing.

The lanes of a warp share their times, so diverged paths follow one another.
"""

import numpy as np

from .counters import UNCHARGED, classify
from .parser import Imm, Mem, Reg
from .program import STRONG, is_barrier

ACCESSES = {"ld", "ldu", "st", "red", "cp", "ldmatrix", "stmatrix"}


def _cost(ins, d):
    """Cycles to the result; 0 where the memory model sets it."""
    kind = classify(ins)
    if kind == "int" and ins.op in ("div", "rem"):
        return d.sfu_cycles
    if kind in ("fp32", "fp16", "fp64", "int", "convert", "vote", "other"):
        return d.alu_cycles
    return {
        "sfu": d.sfu_cycles,
        "mma": d.mma_cycles,
        "shuffle": d.shuffle_cycles,
        "ld_shared": d.shared_cycles,
        "atomic_shared": d.shared_cycles,
        "ld_local": d.l1_cycles,
        "barrier": d.shared_cycles,
    }.get(kind, 0)


def _is_ordered(ins):
    """Whether it starts after all instructions before it and before all after it."""
    if ins.op == "cp":
        return bool({"wait_group", "wait_all"} & set(ins.mods))
    return ins.op in ("membar", "fence", "bar", "barrier", "mbarrier") or (
        ins.op == "griddepcontrol" and "wait" in ins.mods
    )


class Step:
    """What the model needs to know of one instruction."""

    def __init__(self, ins, device):
        self.reads = tuple({r.slot for r in ins.reads()})
        self.writes = tuple({r.slot for r in ins.writes()})
        self.cost = _cost(ins, device)
        self.free = classify(ins) in UNCHARGED
        self.ordered = _is_ordered(ins)


class Path:
    """The same of one basic block."""

    def __init__(self, block, program, loops, device):
        body = program.instrs[block.start : block.end - (block.last is not None)]
        self.steps = [Step(ins, device) for ins in body]
        self.exit_reads = (
            tuple({r.slot for r in block.last.reads()}) if block.last is not None else ()
        )
        after = program.successors(block)
        self.boundary = (block.last is not None and is_barrier(block.last)) or any(
            s.start <= block.start or loops[s.index] != loops[block.index] for s in after
        )
        self.polls = None  # head of the polling loop that ends here, registers set in it


def _loops(program):
    """Per block: the loops (backward branches) it is in."""
    ends = [
        (b.last.target, b.last.pc)
        for b in program.blocks
        if b.last is not None and b.last.op == "bra" and b.last.target <= b.last.pc
    ]
    return [
        frozenset(e for e in ends if e[0] <= b.start and b.end - 1 <= e[1]) for b in program.blocks
    ]


def _polling_loops(program):
    """Loops that do nothing but wait: their only accesses are strong loads and atomics that may
    leave memory as it is, all of unchanging addresses, and waits for mbarriers.  Yields (last
    block, first block, instructions)."""
    for block in program.blocks:
        if not block.spin:
            continue
        body = program.instrs[block.last.target : block.last.pc]
        written = {r.slot for ins in body for r in ins.writes()}
        if all(_waits(ins, written) for ins in body):
            yield block, program.block_at[block.last.target], body


def _waits(ins, written):
    if ins.op == "mbarrier":
        return bool({"test_wait", "try_wait"} & set(ins.mods))
    if ins.op == "atom":
        idle = {"cas", "exch"} & set(ins.mods) or any(
            isinstance(o, Imm) and o.value == 0 for o in ins.operands
        )
        return bool(idle) and _fixed(ins, written)
    if ins.op == "ld":
        return "param" in ins.mods or (bool(STRONG & set(ins.mods)) and _fixed(ins, written))
    return ins.op not in ACCESSES and not is_barrier(ins)


def _fixed(ins, written):
    bases = [o.base for o in ins.operands if isinstance(o, Mem)]
    return all(not isinstance(b, Reg) or b.slot not in written for b in bases)


class Latency:
    """Times of one launch, in cycles.  While a block runs, arrays have one entry per warp of the
    group."""

    def __init__(self, machine):
        self.m, d = machine, machine.device
        program, slots = machine.program, machine.slots
        self.device = d
        warps = slots * machine.warps_per_cta
        self.clock = np.zeros(warps, np.int64)  # when the next instruction may start
        self.pending = np.zeros(warps, np.int64)  # when all that went before have started
        self.ready = [None] * len(program.kernel.registers)
        self.landed = np.zeros(warps, np.int64)  # the copies that the warp has waited for
        self.slot_time = np.zeros(slots, np.int64)  # end of the slot's latest CTA
        self.barriers = {}  # CTA barrier id -> latest arrival per slot
        clusters = slots // machine.cluster_size
        self.cluster_arrival, self.cluster_done = (
            np.zeros(clusters, np.int64),
            np.zeros(clusters, np.int64),
        )
        self.l2_arrival = np.zeros(
            0, np.int64
        )  # per sector: when its data reaches the first that asked for it
        self.l1_arrival = np.zeros(machine.l1.table.size, np.int64)
        self.written = None  # per 4-byte word: latest strong store or atomic
        self.watched = np.full(
            machine.lanes_total, -1, np.int64
        )  # the word that each thread has looked at last
        self.changed = np.full(
            machine.lanes_total, -1, np.int64
        )  # time of the first write to it since, or -1
        self.watchers = np.zeros(0, np.int64)  # threads that have looked at some word
        loops = _loops(program)
        self.paths = [Path(b, program, loops, d) for b in program.blocks]
        self.heads = {}  # first block of a polling loop -> time there, per warp
        self.polling = set()  # instructions in such loops
        for last, first, body in _polling_loops(program):
            self.paths[last.index].polls = (
                first.index,
                {r.slot for ins in body for r in ins.writes()},
            )
            self.heads[first.index] = np.zeros(warps, np.int64)
            self.polling |= {ins.pc for ins in body}
        self.start = self.done = None  # of the instruction that runs

    @property
    def cycles(self):
        return int(self.slot_time.max())

    # ---- a block -------------------------------------------------------------------
    def run(self, block, g):
        path, sel = self.paths[block.index], self._selection(g)
        begin = base = self.clock[sel].copy()
        if block.index in self.heads:
            self.heads[block.index][sel] = base
        last, times, changed = base - 1, {}, set()
        for step, execute in zip(path.steps, block.code, strict=False):
            self.start, self.done = self._operands(step.reads, base, times, sel), None
            if step.ordered:
                self.start = np.maximum(np.maximum(self.start, last), self.pending[sel])
            execute(g)
            start = np.maximum(self.start, self.landed[sel]) if step.ordered else self.start
            done = start + step.cost if self.done is None else self.done
            if not step.free:
                last = np.maximum(last, start)
            if step.ordered:
                base = start + 1
            for slot in step.writes:
                old = None if g.full_warps else self._time(slot, times, sel)
                times[slot] = done if old is None else np.maximum(done, old)
                changed.add(slot)
        self._leave(block, path, begin, base, last, times, sel)
        for slot in changed & block.overwritten:
            if self.ready[slot] is None:
                self.ready[slot] = np.zeros(self.clock.size, np.int64)
            self.ready[slot][sel] = times[slot]

    def _leave(self, block, path, begin, base, last, times, sel):
        end = self._operands(path.exit_reads, base, times, sel)
        last = np.maximum(last, end) if block.last is not None else last
        pending = np.maximum(self.pending[sel], last + 1)
        issued = self.m.counters.block_issued[block.index]
        clock = np.maximum(begin + issued, end)
        self.clock[sel] = np.maximum(clock, pending) if path.boundary else clock
        self.pending[sel] = pending

    @staticmethod
    def _selection(g):
        if isinstance(g.sel, slice):
            return slice(g.sel.start >> 5, (g.sel.stop + 31) >> 5)
        return g.row_warps()

    def _time(self, slot, times, sel):
        if slot in times:
            return times[slot]
        return None if self.ready[slot] is None else self.ready[slot][sel]

    def _operands(self, slots, base, times, sel):
        for slot in slots:
            t = self._time(slot, times, sel)
            if t is not None:
                base = np.maximum(base, t)
        return base

    # ---- loads and atomics ---------------------------------------------------------------
    def lane_rows(self, g):
        """Warp row of each active lane."""
        rows = g.warp_index()
        return rows if g.mask is None else rows[g.mask]

    def result(self, row, time):
        """The instruction's result for these warp rows (ascending, repeated), besides what other
        lanes load."""
        done = self.start.copy() if self.done is None else self.done
        if row.size:
            first = np.flatnonzero(np.diff(row, prepend=-1))
            rows = row[first]
            done[rows] = np.maximum(done[rows], np.maximum.reduceat(time, first))
        self.done = done

    def global_load(self, sectors, row, sm, missed):
        """``missed``: mask of the sectors that go to the L2; None: none looks into the L1."""
        start = self.start[row]
        if missed is None:
            self.result(row, self.from_l2(sectors, start))
            return
        l1, time = self.m.l1, np.empty(sectors.size, np.int64)
        at = sm * l1.entries + sectors % l1.entries
        time[missed] = self.from_l2(sectors[missed], start[missed])
        kept = missed & (l1.table[at] == sectors)
        self.l1_arrival[at[kept]] = time[kept]
        hit = ~missed
        s = start[hit]
        time[hit] = np.clip(
            self.l1_arrival[at[hit]], s + self.device.l1_cycles, s + self.device.dram_cycles
        )
        self.result(row, time)

    def from_l2(self, sectors, start):
        """When data requested at ``start`` arrives.  What is on its way already comes with the
        first request."""
        d = self.device
        if not sectors.size:
            return start
        top = int(sectors.max()) + 1
        if top > self.l2_arrival.size:
            self.l2_arrival = np.concatenate([self.l2_arrival, np.zeros(top, np.int64)])
        time, present = start + d.dram_cycles, self.m.l2.present(sectors)
        self.l2_arrival[sectors[~present]] = time[~present]
        return np.where(present, np.clip(self.l2_arrival[sectors], start + d.l2_cycles, time), time)

    def shared_load(self, g, flat):
        """Shared memory, the CTA's own or another one's of its cluster."""
        m, row = self.m, self.lane_rows(g)
        slot = g.slots() if g.mask is None else g.slots()[g.mask]
        far = flat // m.shared_stride != slot
        self.result(
            row,
            self.start[row] + np.where(far, self.device.dsmem_cycles, self.device.shared_cycles),
        )

    def local_load(self, g):
        row = self.lane_rows(g)
        self.result(row, self.start[row] + self.device.l1_cycles)

    def observe(self, g, offset, ins):
        """The instruction reads what other CTAs write: it starts after the write that it may wait
        for."""
        words, polls = offset >> 2, ins.pc in self.polling
        if self.written is None or (ins.op == "atom" and "relaxed" in ins.mods and not polls):
            return
        time, lanes = self.written[words], self._lanes(g)
        if polls:
            time = np.where(self.watched[lanes] == words, self.changed[lanes], time)
        start = self.start.copy()
        np.maximum.at(start, self.lane_rows(g), time)
        self.start = start

    def look(self, g, offset):
        """The threads have seen the values of these words."""
        lanes = self._lanes(g)
        if (self.watched[lanes] < 0).any():
            self.watchers = np.union1d(self.watchers, lanes)
        self.watched[lanes], self.changed[lanes] = offset >> 2, -1

    def publish(self, g, offset):
        """Strong stores and atomics."""
        if self.written is None:
            self.written = np.zeros(self.m.gmem.size // 4 + 1, np.int64)
        words, start = offset >> 2, self.start[self.lane_rows(g)]
        np.maximum.at(self.written, words, start)
        waiting = self.watchers[self.changed[self.watchers] < 0]
        waiting = waiting[np.isin(self.watched[waiting], words)]
        if waiting.size:
            different, of = np.unique(words, return_inverse=True)
            latest = np.zeros(different.size, np.int64)
            np.maximum.at(latest, of, start)
            self.changed[waiting] = latest[np.searchsorted(different, self.watched[waiting])]

    @staticmethod
    def _lanes(g):
        return g.idx if g.mask is None else g.idx[g.mask]

    # ---- copies ------------------------------------------------------------------------------
    def copy_times(self, g):
        """Per active lane: when the asynchronous copy that it has just started is complete."""
        return (self.start if self.done is None else self.done)[self.lane_rows(g)]

    def bulk_time(self, g, lane, sectors=None):
        """The same of a bulk copy by the lane-th active lane, from these sectors of global memory
        (None: from shared memory to another CTA)."""
        start = self.start[self.lane_rows(g)[lane]]
        if sectors is None:
            return int(start) + self.device.dsmem_cycles
        return int(self.from_l2(sectors, np.full(sectors.size, start)).max())

    def land(self, lanes, times):
        """These threads have waited for copies."""
        np.maximum.at(self.landed, lanes >> 5, times)

    def signal(self, g, sel):
        """Time of the latest of the selected active lanes."""
        return int(self.start[self.lane_rows(g)[sel]].max())

    def wait(self, g, sel, time):
        """The selected active lanes go on no earlier than this."""
        start, rows = self.start.copy(), self.lane_rows(g)[sel]
        start[rows] = np.maximum(start[rows], time)
        self.start = start

    # ---- barriers, polling, CTAs -----------------------------------------------------------------
    @staticmethod
    def _warps(lanes):
        warps = lanes >> 5
        return warps[np.flatnonzero(np.diff(warps, prepend=-1))]

    def arrive(self, key, lanes):
        if key not in self.barriers:
            self.barriers[key] = np.zeros(self.m.slots, np.int64)
        warps = self._warps(lanes)
        np.maximum.at(self.barriers[key], warps // self.m.warps_per_cta, self.clock[warps])

    def release(self, key, lanes):
        warps = self._warps(lanes)
        opened = self.barriers[key][warps // self.m.warps_per_cta] + self.device.barrier_cycles
        self.clock[warps] = np.maximum(self.clock[warps], opened)

    def cluster_arrive(self, lanes):
        warps = self._warps(lanes)
        np.maximum.at(
            self.cluster_arrival,
            warps // self.m.warps_per_cta // self.m.cluster_size,
            self.clock[warps],
        )

    def cluster_complete(self, clusters):
        self.cluster_done[clusters] = (
            self.cluster_arrival[clusters] + self.device.cluster_barrier_cycles
        )
        self.cluster_arrival[clusters] = 0

    def cluster_pass(self, lanes):
        warps = self._warps(lanes)
        opened = self.cluster_done[warps // self.m.warps_per_cta // self.m.cluster_size]
        self.clock[warps] = np.maximum(self.clock[warps], opened)

    def poll_again(self, block, lanes):
        """Back to the head of a polling loop: as if this iteration had not been."""
        if self.paths[block.index].polls is None:
            return
        first, registers = self.paths[block.index].polls
        warps = self._warps(lanes)
        time = self.heads[first][warps]
        self.clock[warps] = self.pending[warps] = time
        for slot in registers:
            if self.ready[slot] is not None:
                self.ready[slot][warps] = np.minimum(self.ready[slot][warps], time)

    def begin(self, slots):
        """CTAs start in these slots, each cluster's together."""
        size, per_cta = self.m.cluster_size, self.m.warps_per_cta
        time = np.repeat(self.slot_time[slots].reshape(-1, size).max(axis=1), size)
        warps = (slots[:, None] * per_cta + np.arange(per_cta)).reshape(-1)
        self.clock[warps] = self.pending[warps] = np.repeat(time, per_cta)
        for ready in self.ready:
            if ready is not None:
                ready[warps] = 0
        for arrivals in self.barriers.values():
            arrivals[slots] = 0
        self.watched.reshape(self.m.slots, -1)[slots] = -1
        self.watchers = self.watchers[self.watched[self.watchers] >= 0]
        clusters = np.unique(slots // size)
        self.cluster_arrival[clusters] = self.cluster_done[clusters] = 0

    def exit(self, lanes):
        warps = self._warps(lanes)
        np.maximum.at(
            self.slot_time,
            warps // self.m.warps_per_cta,
            np.maximum(self.clock[warps], self.pending[warps]),
        )
