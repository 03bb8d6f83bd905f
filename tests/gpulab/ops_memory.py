"""Loads, stores, atomics, asynchronous copies, fences and address instructions."""

import numpy as np

from . import numerics as nx
from .caches import FIRST, LAST, NO_ALLOCATE, NORMAL, UNCHANGED
from .errors import MisalignedAccess, OutOfBounds, Trap
from .memory import GLOBAL_BASE
from .operands import NP_TYPE, elements, lanewise, op, reader, unsupported, writer
from .ops_arith import decode, encode
from .overlap import READS, WRITES
from .parser import TYPE_BYTES, UINT, Imm, Mem, Reg, Sym

U32, U64 = np.uint32, np.uint64
BASE = U64(GLOBAL_BASE)
STRONG = {"volatile", "acquire", "relaxed", "release", "acq_rel", "mmio", "cv"}
SPACES = ("global", "shared", "local", "param", "const")
MAX_CLUSTER = 16
ATOMIC_OPS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


def state_space(ins):
    names = [m.split("::")[0] for m in ins.mods]
    return next((s for s in SPACES if s in names), "generic")


def address(mem, ins):
    """Closure g -> uint64 addresses (one per lane or one in all)."""
    if not isinstance(mem, Mem):
        raise unsupported(ins, "address form")
    base, offset = mem.base, U64(mem.offset & (1 << 64) - 1)
    if isinstance(base, Reg):
        slot, narrow = base.slot, base.dtype != np.uint64
        if narrow:
            low = U32(mem.offset & 0xFFFFFFFF)
            return lambda g: (g.get(slot).astype(U32, copy=False) + low).astype(U64)
        return (lambda g: g.get(slot) + offset) if mem.offset else (lambda g: g.get(slot))
    if isinstance(base, Sym):
        name = base.name
        return lambda g: g.m.symbol(name, ins) + offset
    if isinstance(base, Imm):
        value = np.array([(base.value + mem.offset) & (1 << 64) - 1], U64)
        return lambda g: value
    raise unsupported(ins, "address form")


def spread(x, n):
    return x if x.size == n else np.broadcast_to(x, n)


def active(g, x):
    return x if g.mask is None else x[g.mask]


def expand(g, columns):
    """Per-active-lane results back to one value per lane of the group."""
    if g.mask is None:
        return columns
    out = []
    for c in columns:
        full = np.zeros(g.n, c.dtype)
        full[g.mask] = c
        out.append(full)
    return out


def split(rows, k):
    return [rows] if k == 1 else [np.ascontiguousarray(rows[:, j]) for j in range(k)]


def join(columns, n, mask):
    columns = [spread(c, n) if mask is None else spread(c, n)[mask] for c in columns]
    return columns[0] if len(columns) == 1 else np.stack(columns, axis=1)


# ---- eviction priorities ---------------------------------------------------------
L2_POLICIES = {
    "evict_first": FIRST,
    "evict_normal": NORMAL,
    "evict_last": LAST,
    "evict_unchanged": UNCHANGED,
    "no_allocate": NO_ALLOCATE,
}
# A cache-policy operand, in the encoding of CUTLASS's constants (EVICT_FIRST 0x12F0..., EVICT_LAST
# 0x14F0...): bits 56..59 primary priority, 52..55 sixteenths of the lines it applies to less one,
# 48..51 the others' priority.
_POLICY_CODE = {NORMAL: 0, UNCHANGED: 1, FIRST: 2, LAST: 4}
_CODE_POLICY = {code: policy for policy, code in _POLICY_CODE.items()}


def encode_policy(primary, sixteenths=16, secondary=UNCHANGED):
    return (
        1 << 60
        | _POLICY_CODE[primary] << 56
        | (sixteenths - 1) << 52
        | _POLICY_CODE[secondary] << 48
    )


def static_policy(ins):
    """L2 priority named by the qualifiers; ``.cs`` (streaming) counts as evict_first."""
    for m in ins.mods:
        level, _, name = m.partition("::")
        if level == "L2" and name in L2_POLICIES:
            return L2_POLICIES[name]
    return FIRST if "cs" in ins.mods else NORMAL


def policy_operand(ins):
    """Closure g -> cache-policy value of the first active lane, or None without .L2::cache_hint."""
    if "L2::cache_hint" not in ins.mods:
        return None
    source = reader(ins.operands[-1], "b64", ins)

    def read(g):
        value = source(g)
        return int(value[0] if value.size == 1 or g.mask is None else value[g.mask][0])

    return read


def l2_access(m, sectors, write, policy):
    """``policy``: a priority, or a cache-policy value as made by createpolicy."""
    if policy <= NO_ALLOCATE:
        m.l2.access(sectors, write, policy)
        return
    primary, secondary = (_CODE_POLICY.get(policy >> shift & 15, NORMAL) for shift in (56, 48))
    sixteenths = (policy >> 52 & 15) + 1
    if sixteenths == 16 or primary == NORMAL:
        m.l2.access(sectors, write, primary)
        return
    chosen = (
        sectors >> 2
    ) * 0x9E3779B1 >> 12 & 15 < sixteenths  # a fixed pseudo-random share of the lines
    m.l2.access(sectors[chosen], write, primary)
    m.l2.access(sectors[~chosen], write, secondary)


# ---- one access to one state space ---------------------------------------------
def load_global(g, addr, e, k, ins, strong=False, policy=NORMAL):
    m, size = g.m, e * k
    addr = spread(addr, g.n)
    act = active(g, addr)
    region = m.gmem.check(act, size, ins, g.describe_lane)
    offset = (act - BASE).astype(np.int64)
    if m.checks:
        if region is None or region.init is not None:
            m.gmem.check_initialised(act, size, ins, g.describe_lane, region)
        if not strong:
            m.global_races.load(offset, size, active(g, g.warp_ids()), ins, g.describe_lane)
    if m.overlap is not None:
        m.overlap.access(READS, g, offset, size, ins)
    touched, row = m.counters.global_access(
        g, (addr - BASE).astype(np.int64) >> 5, g.mask, size, ins
    )
    touched, sm, missed = m.gmem.home(touched), g.row_sm()[row], None
    if not strong and "cg" not in ins.mods:
        missed = m.l1.misses(sm, touched, "L1::no_allocate" not in ins.mods)
    if m.latency is not None:
        if strong:
            m.latency.observe(g, offset, ins)
            m.latency.look(g, offset)
        m.latency.global_load(touched, row, sm, missed)
    if missed is not None:
        touched, sm = touched[missed], sm[missed]
    m.counters.moved(sm, write=False)
    l2_access(m, touched, False, policy)
    columns = split(m.gmem.view(e, k)[offset // size], k)
    if strong:
        m.observe(ins.pc, active(g, g.idx), act, columns, e)
    return columns


def store_global(g, addr, columns, e, k, ins, strong=False, policy=NORMAL):
    m, size = g.m, e * k
    addr = spread(addr, g.n)
    act = active(g, addr)
    region = m.gmem.check(act, size, ins, g.describe_lane)
    offset = (act - BASE).astype(np.int64)
    if m.overlap is not None:
        m.overlap.access(WRITES, g, offset, size, ins)
    rows = join(columns, g.n, g.mask)
    view, at = m.gmem.view(e, k), offset // size
    if m.program.communicates and not m.progressed:
        m.progressed = bool((view[at] != rows).any())
    else:
        m.progressed = True
    m.memory_changed = True
    view[at] = rows
    m.gmem.mark_written(act, size, region)
    if m.checks and not strong:
        m.global_races.store(offset, size, active(g, g.warp_ids()))
    touched, row = m.counters.global_access(
        g, (addr - BASE).astype(np.int64) >> 5, g.mask, size, ins
    )
    m.counters.moved(g.row_sm()[row], write=True)
    if m.latency is not None and strong:
        m.latency.publish(g, offset)
    l2_access(m, m.gmem.home(touched), True, policy)


def shared_flat(g, addr, size, ins):
    """Indices into the shared memory of all slots, for the active lanes, after the checks."""
    m = g.m
    a = active(g, spread(addr, g.n)).astype(np.int64) & 0xFFFFFFFF
    if size > 1 and int(np.bitwise_or.reduce(a)) & (size - 1):
        bad = int(np.flatnonzero(a & (size - 1))[0])
        raise MisalignedAccess(
            f"{size}-byte access to shared address {int(a[bad]):#x} by {g.describe_lane(bad)}", ins
        )
    slot = active(g, g.slots())
    if int(a.max()) >= 1 << 24:  # from mapa, which also works in the implicit cluster of one CTA
        a, slot = mapped(g, a, slot, ins)
    if int(a.max()) + size > m.shared_bytes:
        bad = int(np.flatnonzero(a + size > m.shared_bytes)[0])
        raise OutOfBounds(
            f"{size}-byte access to shared address {int(a[bad]):#x}, beyond the CTA's "
            f"{m.shared_bytes} bytes, by {g.describe_lane(bad)}",
            ins,
        )
    return slot * m.shared_stride + a


def mapped(g, a, slot, ins):
    """Offsets and slots of addresses that name a CTA of the cluster (bits 24 and up: rank + 1)."""
    m, tag = g.m, a >> 24
    tag = np.where(
        tag <= MAX_CLUSTER, tag, 0
    )  # anything else is not from mapa: left to the bounds check
    if int(tag.max()) > m.cluster_size:
        bad = int(np.argmax(tag))
        raise OutOfBounds(
            f"shared::cluster address of CTA rank {int(tag[bad]) - 1} in a cluster of "
            f"{m.cluster_size}, "
            f"by {g.describe_lane(bad)}",
            ins,
        )
    target = np.where(tag > 0, slot // m.cluster_size * m.cluster_size + tag - 1, slot)
    gone = m.alive_count[target] == 0
    if gone.any():
        lane = int(np.flatnonzero(gone)[0])
        raise OutOfBounds(
            f"{g.describe_lane(lane)} accesses the shared memory of "
            f"{m.cta_name(int(target[lane]))}, "
            "which has already exited",
            ins,
        )
    m.shared_races.remote_access(target[target != slot])
    return np.where(tag > 0, a & 0xFFFFFF, a), target


def load_shared(g, addr, e, k, ins, strong=False, policy=None):
    m, size = g.m, e * k
    flat = shared_flat(g, addr, size, ins)
    if m.checks and not strong:
        m.shared_races.read(flat, size, active(g, g.warps()), ins)
    m.counters.shared_access(g, spread(addr, g.n).astype(np.int64) & 0xFFFFFF, g.mask, size, ins)
    if m.latency is not None:
        m.latency.shared_load(g, flat)
    return split(m.shared_view(e, k)[flat // size], k)


def store_shared(g, addr, columns, e, k, ins, strong=False, policy=None):
    m, size = g.m, e * k
    flat = shared_flat(g, addr, size, ins)
    rows = join(columns, g.n, g.mask)
    view, at = m.shared_view(e, k), flat // size
    if m.checks and not strong:

        def differ(a, b):
            return (a != b) if a.ndim == 1 else (a != b).any(axis=1)

        warps = active(g, g.warps())
        m.shared_races.write(flat, size, warps, ins, differ(view[at], rows))
        view[at] = rows
        lost = differ(view[at], rows)
        if lost.any():
            m.shared_races.same_instruction(flat, size, ~lost, warps, ins)
    else:
        view[at] = rows
        if m.checks:
            m.shared_races.mark(flat, size)
    m.counters.shared_access(g, spread(addr, g.n).astype(np.int64) & 0xFFFFFF, g.mask, size, ins)


def local_flat(g, addr, size, ins):
    m = g.m
    a = active(g, spread(addr, g.n)).astype(np.int64) & 0xFFFFFFFF
    if size > 1 and int(np.bitwise_or.reduce(a)) & (size - 1):
        raise MisalignedAccess(f"{size}-byte access to local memory", ins)
    if int(a.max()) + size > m.program.kernel.local_bytes:
        raise OutOfBounds(
            f"access beyond the thread's {m.program.kernel.local_bytes} bytes of local memory", ins
        )
    return active(g, g.idx) * m.program.kernel.local_bytes + a


def load_local(g, addr, e, k, ins, strong=False, policy=None):
    flat = local_flat(g, addr, e * k, ins)
    if g.m.latency is not None:
        g.m.latency.local_load(g)
    return split(g.m.local_view(e, k)[flat // (e * k)], k)


def store_local(g, addr, columns, e, k, ins, strong=False, policy=None):
    flat = local_flat(g, addr, e * k, ins)
    g.m.local_view(e, k)[flat // (e * k)] = join(columns, g.n, g.mask)


LOADS = {"global": load_global, "shared": load_shared, "local": load_local, "const": load_global}
STORES = {"global": store_global, "shared": store_shared, "local": store_local}


def by_space(g, addr, act):
    """Split generic addresses by window: yields (space, full-lane mask or None)."""
    code = active(g, spread(addr, g.n)) >> U64(56)
    names = {0: "global", 1: "shared", 2: "local"}
    first = int(code[0])
    if (code == code[0]).all():
        yield names.get(first, "global"), g.mask
        return
    full = spread(addr, g.n) >> U64(56)
    for c in np.unique(code):
        sel = full == c
        yield names.get(int(c), "global"), sel if g.mask is None else sel & g.mask


@op("ld", "ldu")
def build_ld(ins):
    space = state_space(ins)
    if space == "param":
        return _ld_param(ins)
    strong = bool(STRONG & set(ins.mods))
    acquires = "acquire" in ins.mods
    dst = elements(ins.operands[0])
    k, t = len(dst), ins.type
    e = min(8, TYPE_BYTES[t])  # b128 registers are pairs
    addr, writers = address(ins.operands[1], ins), [writer(o, ins) for o in dst]
    fixed, hint = static_policy(ins), policy_operand(ins)
    signed = NP_TYPE[t] if t[0] == "s" else None

    def finish(g, columns):
        for d, c in zip(writers, columns, strict=False):
            d(g, c.view(signed) if signed else c)

    if space != "generic":
        load = LOADS[space]

        def run(g):
            if g.mask is not None and not g.mask.any():
                return
            finish(g, expand(g, load(g, addr(g), e, k, ins, strong, hint(g) if hint else fixed)))
            if acquires and space == "global":
                g.m.global_races.acquire(active(g, g.warp_ids()))

        return run

    def run_generic(g):
        a = addr(g)
        outer = g.mask
        out = [np.zeros(g.n, UINT[e]) for _ in range(k)]
        for name, mask in by_space(g, a, None):
            g.mask = mask
            part = LOADS[name](g, a, e, k, ins, strong, hint(g) if hint else fixed)
            for o, p in zip(out, part, strict=False):
                if mask is None:
                    o[:] = p
                else:
                    o[mask] = p
            if acquires and name == "global":
                g.m.global_races.acquire(active(g, g.warp_ids()))
        g.mask = outer
        finish(g, out)

    return run_generic


def _ld_param(ins):
    dst = elements(ins.operands[0])
    e = TYPE_BYTES[ins.type]
    addr, writers = address(ins.operands[1], ins), [writer(o, ins) for o in dst]
    signed = NP_TYPE[ins.type] if ins.type[0] == "s" else None

    base = ins.operands[1].base
    name = base.name if isinstance(base, Sym) else None

    def run(g):
        if name is not None and name not in g.m.symbols:  # return value of a call (printf)
            for d in writers:
                d(g, np.zeros(1, UINT[e]))
            return
        a = addr(g).astype(np.int64)
        for i, d in enumerate(writers):
            at = a + i * e
            if int(at.max()) + e > g.m.params.size:
                raise OutOfBounds("read beyond the kernel parameters", ins)
            raw = g.m.params[at[:, None] + np.arange(e)]
            value = np.ascontiguousarray(raw).view(UINT[e]).reshape(-1)
            d(g, value.view(signed) if signed else value)

    return run


@op("st")
def build_st(ins):
    space = state_space(ins)
    if space == "param":
        return lambda g: None  # only used for calls, see build_call
    strong, releases = bool(STRONG & set(ins.mods)), "release" in ins.mods
    values = elements(ins.operands[1])
    k, e = len(values), min(8, TYPE_BYTES[ins.type])
    bits = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[e]
    addr, readers = address(ins.operands[0], ins), [reader(v, bits, ins) for v in values]
    fixed, hint = static_policy(ins), policy_operand(ins)

    def run(g):
        a, columns = addr(g), [r(g) for r in readers]
        outer = g.mask
        for name, mask in [(space, outer)] if space != "generic" else by_space(g, a, None):
            g.mask = mask
            if releases and name == "global":
                g.m.global_races.release(active(g, g.warp_ids()))
            STORES[name](g, a, columns, e, k, ins, strong, hint(g) if hint else fixed)
        g.mask = outer

    return run


# ---- atomics ---------------------------------------------------------------------
def atomic_function(name, t):
    """fn(old, operand, compare) on unsigned bit patterns of type ``t``."""
    dtype = NP_TYPE[t]
    if name == "exch":
        return lambda old, b, c: b
    if name == "cas":
        return lambda old, b, c: np.where(old == b, c, old)
    if name in ("and", "or", "xor"):
        fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
        return lambda old, b, c: fn(old, b)
    if name == "inc":
        return lambda old, b, c: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1))
    if name == "dec":
        return lambda old, b, c: np.where((old == 0) | (old > b), b, old - old.dtype.type(1))
    if t in ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64"):
        fn = {
            "add": np.add,
            "min": lambda a, b: nx.fmin(a, b, False),
            "max": lambda a, b: nx.fmax(a, b, False),
        }[name]

        def compute(old, b, c):
            r = encode(t, fn(decode(t, old.view(dtype)), decode(t, b.view(dtype))))
            return r.view(old.dtype)

        return compute
    fn = {"add": np.add, "min": np.minimum, "max": np.maximum}[name]
    return lambda old, b, c: fn(old.view(dtype), b.view(dtype)).view(old.dtype)


def apply_atomic(memory, at, fn, b, c, fast_add, want_old):
    """Apply the operation lane after lane (in the given order); returns old values if wanted."""
    if np.unique(at).size == at.size:
        old = memory[at]
        memory[at] = fn(old, b, c)
        return old
    if fast_add is not None and not want_old:
        np.add.at(memory.view(fast_add), at, b.view(fast_add))
        return None
    order = np.argsort(at, kind="stable")
    where = at[order]
    first = np.concatenate([[True], where[1:] != where[:-1]])
    starts = np.flatnonzero(first)
    rank = np.arange(at.size) - np.repeat(starts, np.diff(np.append(starts, at.size)))
    old = np.empty(at.size, memory.dtype)
    by_rank = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[by_rank], np.arange(int(rank.max()) + 2))
    for r in range(bounds.size - 1):  # r-th operation on each address
        lanes = order[by_rank[bounds[r] : bounds[r + 1]]]
        old[lanes] = memory[at[lanes]]
        memory[at[lanes]] = fn(old[lanes], b[lanes], c[lanes] if c is not None else None)
    return old


@op("atom", "red")
def build_atom(ins):
    is_red = ins.op == "red"
    operands = list(ins.operands)
    dst = [] if is_red else elements(operands.pop(0))
    mem, args = operands[0], operands[1:]
    name = next((m for m in ins.mods if m in ATOMIC_OPS), None)
    t = ins.type
    if name is None or t is None or t == "b128" or not isinstance(mem, Mem):
        raise unsupported(ins)
    e = TYPE_BYTES[t]
    bits = {2: "b16", 4: "b32", 8: "b64"}[e]
    k = len(elements(args[0]))
    operand_b = [reader(o, bits, ins) for o in elements(args[0])]
    operand_c = [reader(o, bits, ins) for o in elements(args[1])] if name == "cas" else [None] * k
    addr, writers = address(mem, ins), [writer(o, ins) for o in dst]
    fn = atomic_function(name, t)
    fast_add = (
        NP_TYPE[t] if name == "add" and t in ("f32", "f64", "u32", "s32", "u64", "s64") else None
    )
    want_old = not is_red and not ins.result_unused
    acquires = bool({"acquire", "acq_rel"} & set(ins.mods))
    releases = bool({"release", "acq_rel"} & set(ins.mods))
    space = state_space(ins)

    def one_space(g, a, name, columns_b, columns_c):
        m = g.m
        if name == "shared":
            flat = shared_flat(g, a, e * k, ins)
            if m.checks:
                m.shared_races.write(flat, e * k, active(g, g.warps()), ins, atomic=True)
            m.counters.shared_access(
                g, spread(a, g.n).astype(np.int64) & 0xFFFFFF, g.mask, e * k, ins
            )
            if m.latency is not None:
                m.latency.shared_load(g, flat)
            view, at = m.shared_view(e, 1), flat // e
        else:
            full = spread(a, g.n)
            act = active(g, full)
            region = m.gmem.check(act, e * k, ins, g.describe_lane)
            if m.checks and (region is None or region.init is not None) and name != "exch":
                m.gmem.check_initialised(act, e * k, ins, g.describe_lane, region)
            m.gmem.mark_written(act, e * k, region)
            offset = (act - BASE).astype(np.int64)
            if m.overlap is not None:
                for kind in (READS, WRITES):
                    m.overlap.access(kind, g, offset, e * k, ins)
            touched, row = m.counters.global_access(
                g, (full - BASE).astype(np.int64) >> 5, g.mask, e * k, ins
            )
            m.counters.moved(g.row_sm()[row], write=True)
            touched = m.gmem.home(touched)
            if m.latency is not None:
                if want_old:
                    m.latency.observe(g, offset, ins)
                m.latency.publish(g, offset)
                if want_old:
                    m.latency.look(g, offset)
                m.latency.global_load(touched, row, None, None)
            m.l2.access(touched, False)
            m.l2.access(touched, True)
            m.count_atomic(offset)
            view, at = m.gmem.view(e, 1), offset // e
            if releases:
                m.global_races.release(active(g, g.warp_ids()))
        order = m.atomic_order(active(g, g.warps()))
        out = []
        for j in range(k):
            b = active(g, spread(columns_b[j], g.n))
            c = active(g, spread(columns_c[j], g.n)) if columns_c[j] is not None else None
            where = at + j
            if order is not None:
                where, b, c = where[order], b[order], c[order] if c is not None else None
            before = view[where].copy()
            old = apply_atomic(view, where, fn, b, c, fast_add, want_old)
            if name != "shared" and (view[where] != before).any():
                m.progressed = m.memory_changed = True
            if want_old:
                if order is not None:
                    restored = np.empty_like(old)
                    restored[order] = old
                    old = restored
                out.append(old)
        if out and name != "shared":
            m.observe(ins.pc, active(g, g.idx), act, out, e)
        if name != "shared" and acquires:
            m.global_races.acquire(active(g, g.warp_ids()))
        return out

    def run(g):
        a = addr(g)
        b = [r(g) for r in operand_b]
        c = [r(g) if r else None for r in operand_c]
        outer = g.mask
        result = [np.zeros(g.n, UINT[e]) for _ in range(k)]
        for name_, mask in [(space, outer)] if space != "generic" else by_space(g, a, None):
            g.mask = mask
            part = one_space(g, a, name_, b, c)
            for r, p in zip(result, part, strict=False):
                if mask is None:
                    r[:] = p
                else:
                    r[mask] = p
        g.mask = outer
        if want_old:
            for d, r in zip(writers, result, strict=False):
                d(g, r)

    return run


# ---- asynchronous copies ------------------------------------------------------------
@op("cp")
def build_cp(ins):
    mods = ins.mods
    if mods[:1] != ("async",) or "bulk" in mods or "mbarrier" in mods or "reduce" in mods:
        raise unsupported(ins)
    if "commit_group" in mods:

        def commit(g):
            g.m.copy_group[g.sel] += 1

        return commit
    if "wait_group" in mods or "wait_all" in mods:
        keep = 0 if "wait_all" in mods else ins.operands[0].value

        def wait(g):
            g.m.finish_copies(g.sel, keep, "wait_all" in mods, ins)

        return wait
    dst, src = address(ins.operands[0], ins), address(ins.operands[1], ins)
    size = ins.operands[2].value
    hint, fixed = policy_operand(ins), static_policy(ins)
    operands = ins.operands[:-1] if hint else ins.operands
    source_size = reader(operands[3], "u32", ins) if len(operands) > 3 else None
    if source_size is not None and isinstance(operands[3], Reg) and operands[3].dtype == np.bool_:
        raise unsupported(ins, "ignore-src predicate")

    def run(g):
        n = int(g.mask.sum()) if g.mask is not None else g.n
        flat = shared_flat(g, dst(g), size, ins)
        data = np.zeros((n, size), np.uint8)
        outer, a = g.mask, src(g)
        want = (
            np.full(g.n, size)
            if source_size is None
            else spread(source_size(g), g.n).astype(np.int64)
        )
        for count in np.unique(active(g, want)):
            if count == 0:
                continue
            sel = want == count
            g.mask = (
                None if outer is None and sel.all() else (sel if outer is None else sel & outer)
            )
            unit = int(count & -count)
            parts = []
            for i in range(0, int(count), unit):
                parts.append(
                    load_global(
                        g,
                        a + U64(i),
                        unit if unit <= 8 else 8,
                        max(1, unit // 8),
                        ins,
                        policy=hint(g) if hint else fixed,
                    )
                )
            columns = [np.ascontiguousarray(c) for p in parts for c in p]
            raw = np.concatenate([c.view(np.uint8).reshape(c.size, -1) for c in columns], axis=1)
            rows = np.arange(n) if g.mask is None else np.flatnonzero(active_of(outer, sel))
            data[rows, :count] = raw
        g.mask = outer
        g.m.start_copy(g, active(g, g.idx), flat, data, size)

    return run


def active_of(outer, sel):
    return sel if outer is None else sel[outer]


# ---- fences, hints, addresses, calls ---------------------------------------------------
@op("membar", "fence")
def build_fence(ins):
    if "proxy" in ins.mods and any(m.split("::")[0].startswith("async") for m in ins.mods):
        return lambda g: g.m.shared_races.proxy_fence(np.unique(active(g, g.warps())))
    if "proxy" in ins.mods or "cta" in ins.mods:
        return lambda g: None

    def run(g):
        warps = active(g, g.warp_ids())
        g.m.global_races.acquire(warps)
        g.m.global_races.release(warps)

    return run


@op("prefetch")
def build_prefetch(ins):
    """Of global memory to the L2: the line of 128 bytes around each address. Nothing waits for
    it."""
    if "global" not in ins.mods or "L2" not in {m.split("::")[0] for m in ins.mods}:
        return build_nothing(ins)
    source = address(ins.operands[0], ins)

    def run(g):
        m = g.m
        act = active(g, spread(source(g), g.n))
        m.gmem.check(act, 1, ins, g.describe_lane)
        lines = (act - BASE).astype(np.int64) >> 7
        sectors = (lines[:, None] * 4 + np.arange(4)).reshape(-1)
        inside = sectors < m.gmem.size >> 5
        sectors = m.gmem.home(sectors[inside])
        if m.latency is not None:
            start = np.repeat(m.latency.start[m.latency.lane_rows(g)], 4)
            m.latency.from_l2(sectors, start[inside])
        m.l2.prefetch(sectors)

    return run


@op("prefetchu", "nanosleep", "discard", "applypriority", "pmevent", "setmaxnreg")
def build_nothing(ins):
    return lambda g: None


@op("griddepcontrol")
def build_griddepcontrol(ins):
    def run(g):
        if g.m.overlap is not None:
            (g.m.overlap.wait if "wait" in ins.mods else g.m.overlap.trigger)(active(g, g.slots()))

    return run


@op("createpolicy")
def build_createpolicy(ins):
    """fractional: a share of the lines gets the primary priority.  range: the primary one for every
    address. cvt: not interpreted (evict_normal)."""
    d = writer(ins.operands[0], ins)
    names = [
        L2_POLICIES[m.partition("::")[2]] for m in ins.mods if m.partition("::")[2] in L2_POLICIES
    ]
    primary, secondary = ([*names, UNCHANGED])[:2] if names else (NORMAL, UNCHANGED)
    sixteenths = 16
    if "fractional" in ins.mods and isinstance(ins.operands[-1], Imm):
        value = ins.operands[-1]
        share = (
            np.array([value.value], np.uint32).view(np.float32)[0]
            if value.kind == "f32"
            else value.value
        )
        sixteenths = min(16, max(1, round(16 * float(share))))
    code = np.array([encode_policy(primary, sixteenths, secondary)], U64)
    return lambda g: d(g, code)


@op("mapa")
def build_mapa(ins):
    """Address of the same shared location in CTA ``rank`` of the cluster."""
    t = ins.type

    def compute(a, rank):
        low = a & a.dtype.type(0xFFFFFF)
        high = a & ~a.dtype.type(0xFFFFFFFF) if a.dtype == U64 else a.dtype.type(0)
        return high | low | ((rank.astype(a.dtype) + a.dtype.type(1)) << a.dtype.type(24))

    return lanewise(ins, compute, t, "u32")


@op("getctarank")
def build_getctarank(ins):
    a, d = reader(ins.operands[1], ins.type, ins), writer(ins.operands[0], ins)

    def run(g):
        tag = (a(g) >> a(g).dtype.type(24)) & a(g).dtype.type(0xFF)
        d(g, np.where(tag == 0, g.sreg("cluster_ctarank"), tag.astype(U32) - U32(1)).astype(U32))

    return run


@op("trap", "brkpt")
def build_trap(ins):
    def run(g):
        lane = int(np.flatnonzero(g.mask)[0]) if g.mask is not None else 0
        raise Trap(f"trap executed by {g.describe_lane(lane, everyone=True)}", ins)

    return run


@op("call")
def build_call(ins):
    names = [o.name for o in ins.operands]
    if "vprintf" in names:
        return lambda g: g.m.count_printf(g, ins)
    if "__assertfail" in names:

        def fail(g):
            raise Trap(f"device assertion failed in {g.describe_lane(0)}", ins)

        return fail
    raise unsupported(ins, "calls to device functions; let the compiler inline them")
