"""Warp-level instructions: shuffles, votes, reductions and matrix fragments."""

import numpy as np

from . import numerics as nx
from .operands import NP_TYPE, elements, op, reader, unsupported, writer
from .ops_memory import address, load_shared, spread, store_shared
from .parser import Imm, Pair

U32 = np.uint32
LANES = np.arange(32)
BITS = (U32(1) << np.arange(32, dtype=U32)).astype(np.uint64)


def shuffle_source(mode, b, c):
    """(source lane, in-range predicate) for lane numbers 0..31 or per-lane b and c."""
    return _shuffle(mode, LANES, b, c)


def _shuffle(mode, lane, b, c):
    bval, cval, seg = b & 31, c & 31, (c >> 8) & 31
    top = (lane & seg) | (cval & ~seg & 31)
    if mode == "up":
        j = lane - bval
        ok = j >= top
    elif mode == "down":
        j = lane + bval
        ok = j <= top
    elif mode == "bfly":
        j = lane ^ bval
        ok = j <= top
    elif mode == "idx":
        j = (lane & seg) | (bval & ~seg & 31)
        ok = j <= top
    else:
        raise ValueError(mode)
    return np.where(ok, j, lane), ok


@op("shfl")
def build_shfl(ins):
    dst = ins.operands[0]
    d = writer(dst.first if isinstance(dst, Pair) else dst, ins)
    p = writer(dst.second, ins) if isinstance(dst, Pair) else None
    mode = next((m for m in ins.mods if m in ("up", "down", "bfly", "idx")), None)
    if mode is None:
        raise unsupported(ins)
    a, b, c = (reader(o, "b32", ins) for o in ins.operands[1:4])
    if isinstance(ins.operands[2], Imm) and isinstance(ins.operands[3], Imm):
        fixed = shuffle_source(mode, ins.operands[2].value, ins.operands[3].value)
    else:
        fixed = None

    def run(g):
        x = spread(a(g), g.n)
        if fixed is not None and g.full_warps:
            source, ok = fixed
            d(g, x.reshape(-1, 32)[:, source].reshape(-1))
            if p:
                p(g, np.tile(ok, g.n // 32))
            return
        bv, cv = b(g).astype(np.int64), c(g).astype(np.int64)
        lane = g.lanes()
        source, ok = _shuffle(mode, lane, bv, cv)
        if g.full_warps:
            at = (np.arange(g.n) & ~31) + source
        else:
            at = g.position_of(source)
            at = np.where(at < 0, np.arange(g.n), at)  # inactive source: undefined, keep own
        d(g, x[at])
        if p:
            p(g, spread(ok, g.n))

    return run


def ballots(g, pred, members):
    """Per warp: bits of present lanes that are members, and of those with a true predicate."""
    there = spread(((members >> g.lanes().astype(U32)) & U32(1)).astype(bool), g.n)
    present = g.warp_rows(there, None, False) @ BITS
    true = g.warp_rows(spread(pred, g.n) & there, None, False) @ BITS
    return present.astype(U32), true.astype(U32)


@op("vote")
def build_vote(ins):
    d = writer(ins.operands[0], ins)
    pred = reader(ins.operands[1], "pred", ins)
    members = (
        reader(ins.operands[2], "b32", ins)
        if len(ins.operands) > 2
        else (lambda g: np.array([0xFFFFFFFF], U32))
    )
    kind = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))

    def run(g):
        present, true = ballots(g, pred(g), members(g))
        value = {
            "ballot": lambda: true,
            "any": lambda: true != 0,
            "all": lambda: true == present,
            "uni": lambda: (true == present) | (true == 0),
        }[kind]()
        d(g, g.per_lane(value))

    return run


@op("bar", "barrier")
def build_warp_barrier(ins):
    """bar.warp.sync: the scheduler has already gathered the warp (CTA barriers end their block)."""
    return lambda g: None


@op("activemask")
def build_activemask(ins):
    d = writer(ins.operands[0], ins)
    return lambda g: d(g, g.per_lane(ballots(g, np.ones(1, bool), np.array([0xFFFFFFFF], U32))[0]))


@op("elect")
def build_elect(ins):
    dst = ins.operands[0]
    if not isinstance(dst, Pair):
        raise unsupported(ins)
    d, p, members = (
        writer(dst.first, ins),
        writer(dst.second, ins),
        reader(ins.operands[1], "b32", ins),
    )

    def run(g):
        present, _ = ballots(g, np.ones(1, bool), members(g))
        lowest = np.bitwise_count((present & (~present + U32(1))) - U32(1)).astype(U32)
        leader = g.per_lane(lowest)
        d(g, leader)
        p(g, g.lanes() == leader)

    return run


@op("match")
def build_match(ins):
    dst = ins.operands[0]
    all_kind = "all" in ins.mods
    d = writer(dst.first if isinstance(dst, Pair) else dst, ins)
    p = writer(dst.second, ins) if isinstance(dst, Pair) else None
    a = reader(ins.operands[1], ins.type, ins)

    def run(g):
        x = g.warp_rows(spread(a(g), g.n), None, 0)
        there = g.warp_rows(np.ones(g.n, bool), None, False)
        same = (x[:, :, None] == x[:, None, :]) & there[:, None, :]
        bits = (same @ BITS).astype(U32)
        if all_kind:
            everyone = (there @ BITS).astype(U32)[:, None]
            ok = bits == everyone
            bits = np.where(ok, bits, U32(0))
            if p:
                p(g, g.from_rows(ok))
        d(g, g.from_rows(bits))

    return run


@op("redux")
def build_redux(ins):
    t = ins.type
    name = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor"))
    dtype = NP_TYPE[t]
    if t == "f32":
        identity = {"min": np.inf, "max": -np.inf}[name]
        fn = {"min": np.fmin, "max": np.fmax}[name]
    else:
        info = np.iinfo(dtype)
        identity = {
            "add": 0,
            "min": info.max,
            "max": info.min,
            "and": (1 << 32) - 1,
            "or": 0,
            "xor": 0,
        }[name]
        fn = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[name]
    d, a = writer(ins.operands[0], ins), reader(ins.operands[1], t, ins)

    def run(g):
        rows = g.warp_rows(spread(a(g), g.n), None, identity)
        d(g, g.per_lane(fn.reduce(rows, axis=1).astype(dtype)))

    return run


# ---- matrix fragments ------------------------------------------------------------------
@op("ldmatrix")
def build_ldmatrix(ins):
    if "m8n8" not in ins.mods or "b16" not in ins.mods:
        raise unsupported(ins)
    dst = [writer(o, ins) for o in elements(ins.operands[0])]
    addr, trans = address(ins.operands[1], ins), "trans" in ins.mods
    count = len(dst)

    def run(g):
        if not g.full_warps or g.mask is not None:
            raise unsupported(ins, "with a partly active warp")
        full = spread(addr(g), g.n)
        g.mask = np.tile(8 * count > LANES, g.n // 32)  # only these lanes give row addresses
        rows = load_shared(g, full, 8, 2, ins)
        g.mask = None
        data = np.stack(rows, axis=1).view(np.uint16).reshape(-1, count, 8, 8)
        for i, d in enumerate(dst):
            mat = data[:, i].swapaxes(1, 2) if trans else data[:, i]
            d(g, np.ascontiguousarray(mat).view(U32).reshape(-1))

    return run


@op("stmatrix")
def build_stmatrix(ins):
    """The inverse of ldmatrix: lane 8 * i + r gives the address of row r of matrix i."""
    values = elements(ins.operands[1])
    count = {"x1": 1, "x2": 2, "x4": 4}.get(
        next((m for m in ins.mods if m in ("x1", "x2", "x4")), None)
    )
    if "m8n8" not in ins.mods or "b16" not in ins.mods or count != len(values):
        raise unsupported(ins)
    addr, trans = address(ins.operands[0], ins), "trans" in ins.mods
    sources = [reader(v, "b32", ins) for v in values]

    def run(g):
        if not g.full_warps or g.mask is not None:
            raise unsupported(ins, "with a partly active warp")
        rows = np.zeros((g.n // 32, 4, 8, 2), np.uint64)
        for i, source in enumerate(sources):
            matrix = np.ascontiguousarray(spread(source(g), g.n)).view(np.uint16).reshape(-1, 8, 8)
            if trans:
                matrix = np.ascontiguousarray(matrix.swapaxes(1, 2))
            rows[:, i] = matrix.view(np.uint64)
        rows = rows.reshape(-1, 2)
        g.mask = np.tile(8 * count > LANES, g.n // 32)
        store_shared(g, spread(addr(g), g.n), [rows[:, 0], rows[:, 1]], 8, 2, ins)
        g.mask = None

    return run


GROUP, TIG = LANES >> 2, LANES & 3


def _fragment(shape, kind, element):
    """Index arrays [register element][lane] -> (row, column) of A, B and C fragments."""
    m, _n, k = shape
    per = 1 if element in ("tf32", "f64") else 2  # elements per register
    if kind == "c":
        return [(GROUP + 8 * (i // 2), 2 * TIG + i % 2) for i in range(m // 4)]
    out = []
    if kind == "a":
        for half in range(k // (4 * per)):
            for row in range(m // 8):
                for i in range(per):
                    out.append((GROUP + 8 * row, per * TIG + i + 4 * per * half))
    else:
        for half in range(k // (4 * per)):
            for i in range(per):
                out.append((per * TIG + i + 4 * per * half, GROUP))
    return out


@op("mma")
def build_mma(ins):
    shape = {
        "m16n8k16": (16, 8, 16),
        "m16n8k8": (16, 8, 8),
        "m16n8k4": (16, 8, 4),
        "m8n8k4": (8, 8, 4),
    }.get(next((m for m in ins.mods if m.startswith(("m16n8", "m8n8"))), None))
    dt, at, bt, ct = ins.types
    double = set(ins.types) == {"f64"}
    narrow = at == bt and at in ("f16", "bf16", "tf32") and dt in ("f32", "f16")
    if shape is None or not (double or (narrow and shape[0] == 16)):
        raise unsupported(ins)
    register = "b64" if double else "b32"
    readers = [[reader(o, register, ins) for o in elements(x)] for x in ins.operands[1:4]]
    dst = [writer(o, ins) for o in elements(ins.operands[0])]
    maps = {kind: _fragment(shape, kind, at) for kind in "abc"}
    sizes = {"a": (shape[0], shape[2]), "b": (shape[2], 8), "c": (shape[0], 8)}

    def unpack(g, regs, element):
        out = []
        for r in regs:
            x = np.ascontiguousarray(spread(r(g), g.n))
            if element == "f64":
                out.append(x.view(np.float64))
            elif element in ("f32", "tf32"):
                x = (x & U32(0xFFFFE000)) if element == "tf32" else x  # tf32 ignores the low bits
                out.append(x.view(np.float32))
            else:
                halves = x.view(np.float16 if element == "f16" else np.uint16).reshape(-1, 2)
                out += [
                    halves[:, i] if element == "f16" else nx.bf16_to_f32(halves[:, i])
                    for i in range(2)
                ]
        return out

    def matrix(g, kind, regs, element):
        out = np.zeros((g.n // 32,) + sizes[kind])
        for (row, col), value in zip(maps[kind], unpack(g, regs, element), strict=False):
            out[:, row, col] = value.reshape(-1, 32)
        return out

    def run(g):
        if not g.full_warps or g.mask is not None:
            raise unsupported(ins, "with a partly active warp")
        a, b, c = (
            matrix(g, k, r, t) for k, r, t in zip("abc", readers, (at, bt, ct), strict=False)
        )
        if double:
            r = c
            for k in range(shape[2]):
                r = r + a[:, :, k, None] * b[:, None, k]
        else:
            r = (a @ b + c).astype(np.float32)  # products and sums in float64, one rounding
        values = [r[:, row, col].reshape(-1) for row, col in maps["c"]]
        if dt == "f16":
            values = [
                np.stack([values[i], values[i + 1]], axis=1)
                .astype(np.float16)
                .view(U32)
                .reshape(-1)
                for i in (0, 2)
            ]
        for d, v in zip(dst, values, strict=False):
            d(g, v)

    return run
