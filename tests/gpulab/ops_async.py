"""sm_90 asynchronous copies: mbarrier, cp.async.bulk, st.async, cp.async.mbarrier.arrive."""

import numpy as np

from .async_copies import BulkStore, Landing, Mbarrier
from .errors import AsyncError, MisalignedAccess, OutOfBounds
from .operands import OPS, elements, op, reader, unsupported, writer
from .ops_memory import (
    BASE,
    active,
    address,
    join,
    l2_access,
    policy_operand,
    shared_flat,
    spread,
    static_policy,
)
from .overlap import READS, WRITES
from .parser import TYPE_BYTES, Mem, Sink

U64 = np.uint64
PENDING_BITS = 24  # of an arrival token: phase + 1, then the pending count


def barrier_flats(g, addr, ins, plain=False):
    """Shared-memory indices of the active lanes' mbarriers; generic addresses are accepted."""
    m = g.m
    flat = shared_flat(g, spread(addr, g.n), 8, ins)
    if m.checks:
        m.shared_races.write(
            flat, 8, active(g, g.warps()), ins, np.ones(flat.size, bool), atomic=not plain
        )
    return flat


def per_barrier(flat):
    """Yields (mbarrier index, selection of the lanes that use it)."""
    for f in np.unique(flat):
        yield int(f), flat == f


def lane_values(g, source, default=None):
    if source is None:
        return np.full(g.n if g.mask is None else int(g.mask.sum()), default, np.int64)
    return active(g, spread(source(g), g.n)).astype(np.int64)


@op("mbarrier")
def build_mbarrier(ins):
    mods, operands = ins.mods, list(ins.operands)
    kind = next(
        (
            m
            for m in mods
            if m
            in (
                "init",
                "inval",
                "arrive",
                "arrive_drop",
                "test_wait",
                "try_wait",
                "expect_tx",
                "complete_tx",
                "pending_count",
            )
        ),
        None,
    )
    if kind == "pending_count":
        d, state = writer(operands[0], ins), reader(operands[1], "b64", ins)
        return lambda g: d(g, state(g) & U64((1 << PENDING_BITS) - 1))
    if kind is None:
        raise unsupported(ins)
    dst = None
    if not isinstance(operands[0], Mem):
        first = operands.pop(0)
        dst = None if isinstance(first, Sink) else writer(first, ins)
    addr = address(operands[0], ins)
    extra = (
        reader(operands[1], "b32", ins)
        if len(operands) > 1 and kind not in ("test_wait", "try_wait")
        else None
    )
    if kind in ("test_wait", "try_wait"):
        return _wait(ins, dst, addr, operands[1])

    def setup(g):
        flat, counts = barrier_flats(g, addr(g), ins, plain=True), lane_values(g, extra, 0)
        for f, count in zip(flat.tolist(), counts.tolist(), strict=False):
            if kind == "inval":
                g.m.asynchronous.barrier(f, ins)
                del g.m.asynchronous.barriers[f]
            elif not 0 < count < 1 << 20:
                raise AsyncError(f"mbarrier count {count} is outside 1 .. 2^20 - 1", ins)
            else:
                g.m.asynchronous.barriers[f] = Mbarrier(count)

    def transactions(g):
        flat, nbytes = barrier_flats(g, addr(g), ins), lane_values(g, extra)
        for f, n in zip(flat.tolist(), nbytes.tolist(), strict=False):
            g.m.asynchronous.expect(f, n if kind == "expect_tx" else -n, ins)
            if kind == "complete_tx":
                g.m.asynchronous.settle(g.m.asynchronous.barrier(f, ins))

    def arrive(g):
        state = g.m.asynchronous
        flat, values = barrier_flats(g, addr(g), ins), lane_values(g, extra, 1)
        tokens = np.zeros(flat.size, U64)
        for f, sel in per_barrier(flat):
            b = state.barrier(f, ins)
            tokens[sel] = (b.phase + 1) << PENDING_BITS | b.pending
            total = int(values[sel].sum())
            if "expect_tx" in mods:
                state.expect(f, total, ins)
                total = int(sel.sum())
            if kind == "arrive_drop":
                b.expected -= total
            if g.m.latency is not None:
                b.time = max(b.time, g.m.latency.signal(g, sel))
            state.arrive(f, total, ins)
        if "cluster" in mods:
            g.m.global_races.release(active(g, g.warp_ids()))
        if dst:
            out = np.zeros(g.n, U64)
            out[slice(None) if g.mask is None else g.mask] = tokens
            dst(g, out)

    return {
        "init": setup,
        "inval": setup,
        "expect_tx": transactions,
        "complete_tx": transactions,
    }.get(kind, arrive)


def _wait(ins, dst, addr, operand):
    by_parity = "parity" in ins.mods
    wanted = reader(operand, "b32" if by_parity else "b64", ins)

    def run(g):
        m = g.m
        flat, want = barrier_flats(g, addr(g), ins), active(g, spread(wanted(g), g.n))
        warps, done = active(g, g.warps()), np.zeros(flat.size, bool)
        for f, sel in per_barrier(flat):
            b = m.asynchronous.poll(f, ins)
            if by_parity:
                done[sel] = (b.phase & 1) != (want[sel] & 1)
            else:
                done[sel] = b.phase + 1 > (want[sel] >> U64(PENDING_BITS)).astype(np.int64)
            if done[sel].any():
                if m.latency is not None:
                    m.latency.wait(g, sel & done, b.completed_time)
                m.shared_races.acquire(warps[sel & done], b.completed_at)
                m.global_races.ordered(m.warp_ids(warps[sel & done]))
        if "cluster" in ins.mods and done.any():
            m.global_races.acquire(active(g, g.warp_ids())[done])
        out = np.zeros(g.n, bool)
        out[slice(None) if g.mask is None else g.mask] = done
        dst(g, out)

    return run


# ---- bulk copies ------------------------------------------------------------------
def global_span(g, start, nbytes, lane, ins):
    """Region of a contiguous stretch of global memory, after the checks."""
    m = g.m
    if start % 16 or nbytes % 16 or nbytes <= 0:
        raise MisalignedAccess(
            f"bulk copy of {nbytes} bytes at address {start:#x} by {g.describe_lane(lane)}: "
            "address "
            "and size must be multiples of 16",
            ins,
        )
    ends = np.array([start, start + nbytes - 1], U64)
    region = m.gmem.check(ends, 1, ins, lambda i: g.describe_lane(lane))
    if region is None:
        raise OutOfBounds(
            f"bulk copy of {nbytes} bytes at {start:#x} runs from one allocation into another", ins
        )
    return region


def shared_span(g, addr, nbytes, ins):
    """Start indices of the active lanes' stretches of shared memory."""
    flat = shared_flat(g, addr, 16, ins)
    room = g.m.shared_bytes - flat % g.m.shared_stride
    if (nbytes > room).any():
        lane = int(np.flatnonzero(nbytes > room)[0])
        raise OutOfBounds(
            f"bulk copy of {int(nbytes[lane])} bytes at shared address "
            f"{int(flat[lane] % g.m.shared_stride):#x}, beyond the CTA's {g.m.shared_bytes} bytes, "
            "by "
            f"{g.describe_lane(lane)}",
            ins,
        )
    return flat


def count_bulk(g, offset, nbytes, ins, write, policy):
    m, pc = g.m, ins.pc
    sectors = np.arange(offset >> 5, (offset + nbytes + 31) >> 5)
    m.counters.requests[pc] += 1
    m.counters.lanes[pc] += 1
    m.counters.bytes[pc] += nbytes
    m.counters.sectors[pc] += sectors.size
    l2_access(m, m.gmem.home(sectors), write, policy)


def bulk_time(g, lane, offset=None, nbytes=0):
    """When the data arrives (latency=True): of global memory at ``offset``, or of another CTA."""
    m = g.m
    if m.latency is None:
        return 0
    sectors = (
        None if offset is None else m.gmem.home(np.arange(offset >> 5, (offset + nbytes + 31) >> 5))
    )
    return m.latency.bulk_time(g, lane, sectors)


def cells(offset, nbytes):
    return np.arange(offset, offset + nbytes, 16)


def note_access(g, kind, offset, nbytes, lane, ins):
    if g.m.overlap is not None:
        g.m.overlap.access(kind, g, cells(offset, nbytes), 16, ins, lane)


_plain_cp, _plain_st = OPS["cp"], OPS["st"]


@op("cp")
def build_cp(ins):
    mods = ins.mods
    if mods[:3] == ("async", "mbarrier", "arrive"):
        return _copy_arrive(ins)
    if mods[:2] != ("async", "bulk"):
        return _plain_cp(ins)
    if "commit_group" in mods:
        return lambda g: g.m.asynchronous.commit(active(g, g.idx).tolist())
    if "wait_group" in mods:
        keep, read_only = ins.operands[0].value, "read" in mods
        return lambda g: g.m.asynchronous.wait(active(g, g.idx).tolist(), keep, read_only)
    if "tensor" in mods or "reduce" in mods:
        raise unsupported(ins)
    if "prefetch" in mods:
        return _bulk_prefetch(ins)
    spaces = [m for m in mods if m.split("::")[0] in ("global", "shared")]
    if len(spaces) != 2:
        raise unsupported(ins)
    if spaces[0] == "global":
        return _bulk_store(ins)
    return _bulk_load(ins, spaces[1] == "global")


def _copy_arrive(ins):
    """cp.async.mbarrier.arrive: an arrival once the thread's earlier cp.async have landed."""
    addr, noinc = address(ins.operands[0], ins), "noinc" in ins.mods

    def run(g):
        m = g.m
        flat, lanes = barrier_flats(g, addr(g), ins), active(g, g.idx)
        for f, sel in per_barrier(flat):
            b = m.asynchronous.barrier(f, ins)
            if not noinc:
                b.pending += int(sel.sum())
            b.deferred.append((lanes[sel], m.copy_number))
        m.progressed = True

    return run


def _bulk_prefetch(ins):
    src, size = address(ins.operands[0], ins), reader(ins.operands[1], "b32", ins)

    def run(g):
        for lane, (a, n) in enumerate(
            zip(
                active(g, spread(src(g), g.n)).tolist(), lane_values(g, size).tolist(), strict=False
            )
        ):
            global_span(g, a, n, lane, ins)
            g.m.l2.prefetch(
                g.m.gmem.home(np.arange((a - int(BASE)) >> 5, (a - int(BASE) + n + 31) >> 5))
            )

    return run


def _bulk_load(ins, from_global):
    hint, fixed = policy_operand(ins), static_policy(ins)
    operands = ins.operands[:-1] if hint else ins.operands
    dst, src, barrier = (address(operands[i], ins) for i in (0, 1, 3))
    size = reader(operands[2], "b32", ins)
    multicast = reader(operands[4], "b16", ins) if "multicast::cluster" in ins.mods else None

    def run(g):
        m = g.m
        nbytes = lane_values(g, size)
        to, at = shared_span(g, dst(g), nbytes, ins), barrier_flats(g, barrier(g), ins)
        masks = lane_values(g, multicast, 0)
        warps, warp_ids = active(g, g.warps()), active(g, g.warp_ids())
        sources = (
            active(g, spread(src(g), g.n)) if from_global else shared_span(g, src(g), nbytes, ins)
        )
        for lane in range(to.size):
            n = int(nbytes[lane])
            if from_global:
                start = int(sources[lane])
                data = _read_global(g, start, n, lane, warp_ids[lane : lane + 1], ins)
                time = bulk_time(g, lane, start - int(BASE), n)
                count_bulk(g, start - int(BASE), n, ins, False, hint(g) if hint else fixed)
            else:
                start = int(sources[lane])
                if m.checks:
                    m.asynchronous.check_source(start, n, int(warps[lane]), ins)
                data, time = m.shared_view(1, 1)[start : start + n].copy(), bulk_time(g, lane)
            targets = [(int(to[lane]), int(at[lane]))]
            if multicast:
                first = int(warps[lane]) // m.warps_per_cta // m.cluster_size * m.cluster_size
                ranks = [r for r in range(m.cluster_size) if int(masks[lane]) >> r & 1]
                targets = [
                    tuple((first + r) * m.shared_stride + f % m.shared_stride for f in targets[0])
                    for r in ranks
                ]
            for place, f in targets:
                if from_global:
                    m.counters.moved_bytes(place // m.shared_stride, n, write=False)
                landing = Landing(np.array([place]), data[None], ins, time)
                m.asynchronous.hide(landing, warps[lane : lane + 1])
                m.asynchronous.start(f, landing, ins)

    return run


def _read_global(g, start, n, lane, warp, ins):
    m, offset = g.m, start - int(BASE)
    region = global_span(g, start, n, lane, ins)
    if m.checks:

        def who(i):
            return g.describe_lane(lane)

        chunks = cells(offset, n)
        if region.init is not None:
            m.gmem.check_initialised(chunks.astype(U64) + BASE, 16, ins, who, region)
        m.global_races.load(chunks, 16, np.repeat(warp, chunks.size), ins, who)
    note_access(g, READS, offset, n, lane, ins)
    return m.gmem.data[offset : offset + n].copy()


def _bulk_store(ins):
    hint, fixed = policy_operand(ins), static_policy(ins)
    dst, src = address(ins.operands[0], ins), address(ins.operands[1], ins)
    size = reader(ins.operands[2], "b32", ins)

    def run(g):
        m = g.m
        nbytes = lane_values(g, size)
        flat = shared_span(g, src(g), nbytes, ins)
        starts, warps = active(g, spread(dst(g), g.n)).tolist(), active(g, g.warps())
        lanes, warp_ids = active(g, g.idx), active(g, g.warp_ids())
        for i, start in enumerate(starts):
            n, offset = int(nbytes[i]), start - int(BASE)
            region = global_span(g, start, n, i, ins)
            note_access(g, WRITES, offset, n, i, ins)
            if m.checks:
                m.asynchronous.check_source(int(flat[i]), n, int(warps[i]), ins)
            count_bulk(g, offset, n, ins, True, hint(g) if hint else fixed)
            m.counters.moved_bytes(int(lanes[i]) // m.cta_lanes, n, write=True)
            before = m.shared_view(1, 1)[int(flat[i]) : int(flat[i]) + n].copy()
            write = _global_write(m, offset, n, region, warp_ids[i])
            store = BulkStore(int(flat[i]), n, before, write, ins)
            if m.latency is not None:
                started = m.latency.signal(g, i)
                store.read_time, store.time = (
                    started + m.device.shared_cycles,
                    started + m.device.l2_cycles,
                )
            m.asynchronous.add(int(lanes[i]), store)

    return run


def _global_write(m, offset, n, region, warp):
    def write(data):
        m.gmem.data[offset : offset + n] = data
        chunks = cells(offset, n)
        m.gmem.mark_written(chunks.astype(U64) + BASE, 16, region)
        m.progressed = m.memory_changed = True
        if m.checks:
            m.global_races.store(chunks, 16, np.full(chunks.size, warp))

    return write


@op("st")
def build_st(ins):
    if "async" not in ins.mods:
        return _plain_st(ins)
    values = elements(ins.operands[1])
    e, k = TYPE_BYTES[ins.type], len(values)
    addr, barrier = address(ins.operands[0], ins), address(ins.operands[2], ins)
    readers = [reader(v, {4: "b32", 8: "b64"}[e], ins) for v in values]

    def run(g):
        m = g.m
        flat, at = shared_flat(g, addr(g), e * k, ins), barrier_flats(g, barrier(g), ins)
        rows = np.ascontiguousarray(join([r(g) for r in readers], g.n, g.mask))
        rows = rows.view(np.uint8).reshape(flat.size, -1)
        warps = active(g, g.warps())
        for f, sel in per_barrier(at):
            time = m.latency.signal(g, sel) + m.device.dsmem_cycles if m.latency is not None else 0
            landing = Landing(flat[sel], rows[sel], ins, time)
            m.asynchronous.hide(landing, warps[sel])
            m.asynchronous.start(f, landing, ins)

    return run
