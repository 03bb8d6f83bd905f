"""Lane-wise instructions: arithmetic, logic, conversion, comparison and data movement."""

import numpy as np

from . import numerics as nx
from .numerics import F16, F32, F64, U8, U16, U32, U64
from .operands import NP_TYPE, convert, elements, lanewise, op, reader, unsupported, writer
from .parser import TYPE_BYTES, UINT, Imm, Pair, Vec

FLOATS = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2", "f32x2"}
SIGNED = {"s8", "s16", "s32", "s64"}
ROUNDING = {"rn", "rz", "rm", "rp"}

# fmt: off
MODIFIERS = {
    "rni", "rzi", "rmi", "rpi", "rna", "ftz", "noftz", "sat", "satfinite", "relu", "NaN", "xorsign",
    "approx", "full", "lo", "hi", "wide", "cc", "wrap", "clamp", "l", "r", "shiftamt", "eq", "ne",
    "lt", "le", "gt", "ge", "ls", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
    "and", "or", "xor", "finite", "infinite", "number", "notanumber", "normal", "subnormal", "f4e",
    "b4e", "rc8", "ecl", "ecr", "rc16", "to", "global", "shared", "local", "const", "param", "rs",
}
# fmt: on
# Every modifier that this module understands; any other makes the instruction unsupported.
KNOWN_MODIFIERS = set(TYPE_BYTES) | ROUNDING | MODIFIERS
TWO_TYPES = {"cvt", "set", "slct", "dp4a", "add", "sub", "fma"}


def check_form(ins):
    """Refuse modifiers and type combinations that the builders would silently ignore."""
    unknown = [m for m in ins.mods if m.split("::")[0] not in KNOWN_MODIFIERS]
    if unknown:
        raise unsupported(ins, f"modifier {unknown[0]}")
    if len(ins.types) > 1 and ins.op not in TWO_TYPES:
        raise unsupported(ins, "type combination")


def mixed(ins, fn):
    """add, sub, fma with f16 or bf16 factors and an f32 addend and result: one rounding."""
    dt, at = ins.types
    if dt != "f32" or at not in ("f16", "bf16") or set(ins.mods) - {"rn", "f32", at}:
        raise unsupported(ins, "type combination")
    count = len(ins.operands) - 2
    return lanewise(
        ins,
        lambda *xs: fn(*[decode(at, x).astype(F64) for x in xs[:-1]], xs[-1].astype(F64)).astype(
            F32
        ),
        *[at] * count,
        "f32",
    )


# ---- floating point codecs -------------------------------------------------
def _pairs(u, dtype):
    return np.ascontiguousarray(u).view(dtype).reshape(-1, 2)


def decode(t, x):
    """PTX register value -> float array to compute with (2 columns for packed types)."""
    if t == "f16":
        return x.astype(F32)
    if t == "bf16":
        return nx.bf16_to_f32(x)
    if t == "f16x2":
        return _pairs(x, F16).astype(F32)
    if t == "bf16x2":
        return nx.bf16_to_f32(_pairs(x, U16))
    if t == "f32x2":
        return _pairs(x, F32)
    return x


def encode(t, y, mode="rn"):
    """Computed float array (float32 or float64) -> register value."""
    if t == "f32":
        return nx.f64_to_f32(y, mode) if y.dtype == F64 else y
    if t == "f64":
        return y
    if t == "f32x2":
        y = nx.f64_to_f32(y, mode) if y.dtype == F64 else y
        return np.ascontiguousarray(y).view(U64).reshape(-1)
    if t in ("f16", "f16x2"):
        y = nx.to_f16(y, mode)
        return y if t == "f16" else np.ascontiguousarray(y).view(U32).reshape(-1)
    y = nx.f32_to_bf16(nx.f64_to_f32_odd(y) if y.dtype == F64 else y, mode)
    return y if t == "bf16" else np.ascontiguousarray(y).view(U32).reshape(-1)


def float_op(ins, fn, count, wide=False, t=None):
    """A float instruction of ``count`` sources; ``wide`` computes in float64 (one rounding)."""
    t = t or ins.type
    mods = set(ins.mods)
    mode = next(iter(mods & ROUNDING), "rn")
    ftz = "ftz" in mods and t in ("f32", "f16", "f16x2")
    if mode != "rn" and t == "f64":
        raise unsupported(ins, "directed rounding in f64")
    plain = t in ("f32", "f64") and not (wide or ftz or mods & {"sat", "relu"} or mode != "rn")
    if plain:
        return lanewise(ins, fn, *[t] * count)
    widen = (wide or mode != "rn") and t != "f64"

    def compute(*xs):
        xs = [decode(t, x) for x in xs]
        if ftz and t == "f32":
            xs = [nx.flush(x) for x in xs]
        if widen:
            xs = [x.astype(F64) for x in xs]
        y = fn(*xs)
        if "sat" in mods:
            y = np.where(np.isnan(y), y.dtype.type(0), np.clip(y, 0, 1)).astype(y.dtype)
        if "relu" in mods:
            y = np.where(np.isnan(y), y, np.maximum(y, y.dtype.type(0)))
        y = encode(t, y, mode)
        return nx.flush(y) if ftz and t == "f32" else y

    return lanewise(ins, compute, *[t] * count)


# ---- add, sub, mul, fma, mad ------------------------------------------------
def _unsigned(t):
    return {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[TYPE_BYTES[t]]


def _saturate32(fn):
    def compute(a, b):
        return np.clip(fn(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(
            np.int32
        )

    return compute


@op("add", "sub")
def build_add(ins):
    fn = np.add if ins.op == "add" else np.subtract
    t = ins.type
    if len(ins.types) == 2:
        return mixed(ins, fn)
    if t in FLOATS:
        return float_op(ins, fn, 2)
    if "cc" in ins.mods:
        return _carry_out(ins)
    if "sat" in ins.mods:
        return lanewise(ins, _saturate32(fn), "s32", "s32")
    u = _unsigned(t)
    return lanewise(ins, fn, u, u)


@op("addc", "subc")
def build_addc(ins):
    return _carry_out(ins)


def _carry_out(ins):
    """add.cc / addc[.cc] / sub.cc / subc[.cc]: the carry flag lives in a hidden register."""
    t = _unsigned(ins.type)
    a, b = (reader(o, t, ins) for o in ins.operands[1:])
    d = writer(ins.operands[0], ins)
    with_in, subtract, sets = ins.op in ("addc", "subc"), ins.op.startswith("sub"), "cc" in ins.mods

    def run(g):
        x, y = a(g), b(g)
        carry = g.carry() if with_in else np.zeros(1, np.bool_)
        k = carry.astype(x.dtype)
        r = x - y - k if subtract else x + y + k
        out = ((x < y) | (carry & (x == y))) if subtract else ((r < x) | (carry & (r == x)))
        d(g, r)
        if sets:
            g.set_carry(out)

    return run


@op("mul")
def build_mul(ins):
    t = ins.type
    if t in FLOATS:
        return float_op(ins, np.multiply, 2)
    return lanewise(
        ins, _int_mul(ins, t), *[t if "wide" in ins.mods or "hi" in ins.mods else _unsigned(t)] * 2
    )


def _int_mul(ins, t):
    if "lo" in ins.mods:
        return np.multiply
    if "wide" in ins.mods:
        wide = {"u16": U32, "s16": np.int32, "u32": U64, "s32": np.int64}[t]
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if TYPE_BYTES[t] == 8:
        return _mulhi64(t == "s64")
    shift = 8 * TYPE_BYTES[t]
    wide, narrow = {
        "u16": (U32, U16),
        "s16": (np.int32, np.int16),
        "u32": (U64, U32),
        "s32": (np.int64, np.int32),
    }[t]
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(shift)).astype(narrow)


def _mulhi64(signed):
    m = U64(0xFFFFFFFF)

    def compute(a, b):
        x, y = a.view(U64), b.view(U64)
        xl, xh, yl, yh = x & m, x >> U64(32), y & m, y >> U64(32)
        mid = xh * yl + ((xl * yl) >> U64(32))
        mid2 = xl * yh + (mid & m)
        hi = xh * yh + (mid >> U64(32)) + (mid2 >> U64(32))
        if signed:
            hi = hi - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
        return hi

    return compute


@op("mad")
def build_mad(ins):
    t = ins.type
    if t in FLOATS:
        return build_fma(ins)
    if "cc" in ins.mods:
        raise unsupported(ins)
    mul = _int_mul(ins, t)
    if "wide" in ins.mods:
        return lanewise(
            ins,
            lambda a, b, c: (lambda p: p + c.view(p.dtype))(mul(a, b)),
            t,
            t,
            {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[t],
        )
    if "hi" in ins.mods:
        return lanewise(
            ins, lambda a, b, c: (lambda p: p.view(c.dtype) + c)(mul(a, b)), t, t, _unsigned(t)
        )
    u = _unsigned(t)
    return lanewise(ins, lambda a, b, c: a * b + c, u, u, u)


@op("mul24", "mad24")
def build_mul24(ins):
    t, signed, high = ins.type, ins.type == "s32", "hi" in ins.mods

    def product(a, b):
        x, y = a.astype(np.int64) & 0xFFFFFF, b.astype(np.int64) & 0xFFFFFF
        if signed:
            x, y = (x ^ 0x800000) - 0x800000, (y ^ 0x800000) - 0x800000
        p = x * y
        return ((p >> 16) if high else p).astype(U32)

    if ins.op == "mul24":
        return lanewise(ins, product, t, t)
    return lanewise(ins, lambda a, b, c: product(a, b) + c, t, t, "b32")


@op("fma")
def build_fma(ins):
    if len(ins.types) == 2:
        return mixed(ins, lambda a, b, c: a * b + c)
    if ins.type == "f64":
        return lanewise(ins, _fma64, "f64", "f64", "f64")
    if set(ins.mods) <= {"rn", "f32"} | {"approx"}:

        def fma32(a, b, c):
            # the product is exact in float64; the sum is rounded to float64, then to float32
            p = np.multiply(a, b, dtype=F64)
            p += c
            return p.astype(F32)

        def compute(a, b, c):
            if a.size < c.size and b.size < c.size:  # in-place add needs the full size
                return (np.multiply(a, b, dtype=F64) + c).astype(F32)
            return fma32(a, b, c)

        return lanewise(ins, compute, "f32", "f32", "f32")
    return float_op(ins, lambda a, b, c: a * b + c, 3, wide=True)


def _fma64(a, b, c):
    """float64 fma with one rounding, through the long double where that is wider."""
    return (a.astype(np.longdouble) * b + c).astype(F64)


@op("div")
def build_div(ins):
    if ins.type in FLOATS:
        return float_op(ins, np.divide, 2)
    return lanewise(ins, _int_div(ins.type, False), ins.type, ins.type)


@op("rem")
def build_rem(ins):
    return lanewise(ins, _int_div(ins.type, True), ins.type, ins.type)


def _int_div(t, remainder):
    """Truncating division; a zero divisor gives all ones (quotient) or the dividend, as hardware
    does."""

    def compute(a, b):
        dtype = a.dtype
        zero = b == 0
        safe = np.where(zero, dtype.type(1), b)
        q = a // safe
        if t in SIGNED:
            inexact = (q * safe != a) & ((a < 0) != (safe < 0))
            q = q + inexact.astype(dtype)
        if remainder:
            return np.where(zero, a, a - q * safe)
        return np.where(zero, dtype.type(-1) if t in SIGNED else np.iinfo(dtype).max, q).astype(
            dtype
        )

    return compute


# ---- one-source functions ----------------------------------------------------
@op("abs", "neg")
def build_abs_neg(ins):
    t = ins.type
    if t in FLOATS:
        bits = {
            "f16": 0x8000,
            "bf16": 0x8000,
            "f32": 1 << 31,
            "f64": 1 << 63,
            "f16x2": 0x80008000,
            "bf16x2": 0x80008000,
        }[t]
        u = UINT[TYPE_BYTES[t]]
        sign = u(bits)
        if "ftz" in ins.mods and t == "f32":
            return lanewise(
                ins, lambda a: (np.abs if ins.op == "abs" else np.negative)(nx.flush(a)), "f32"
            )
        if ins.op == "abs":
            return lanewise(ins, lambda a: a & ~sign, _unsigned(t))
        return lanewise(ins, lambda a: a ^ sign, _unsigned(t))
    if ins.op == "abs":
        return lanewise(ins, np.abs, t)
    return lanewise(ins, lambda a: (~a) + a.dtype.type(1), _unsigned(t))


@op("min", "max")
def build_minmax(ins):
    t = ins.type
    if t in FLOATS:
        if "xorsign" in ins.mods:
            raise unsupported(ins)
        f = nx.fmin if ins.op == "min" else nx.fmax
        nan = "NaN" in ins.mods
        if len(ins.operands) == 4:
            return float_op(ins, lambda a, b, c: f(f(a, b, nan), c, nan), 3)
        run = float_op(ins, lambda a, b: f(a, b, nan), 2)
        return run
    fn = np.minimum if ins.op == "min" else np.maximum
    if "relu" in ins.mods:
        return lanewise(ins, lambda a, b: np.maximum(fn(a, b), 0), t, t)
    return lanewise(ins, fn, t, t)


def _one(fn):
    return lambda ins: float_op(ins, fn, 1)


op("sqrt")(_one(np.sqrt))
op("rcp")(_one(lambda x: x.dtype.type(1) / x))
op("rsqrt")(_one(lambda x: (1.0 / np.sqrt(x.astype(F64))).astype(x.dtype)))
op("ex2")(_one(np.exp2))
op("lg2")(_one(np.log2))
op("sin")(_one(np.sin))
op("cos")(_one(np.cos))
op("tanh")(_one(np.tanh))


@op("copysign")
def build_copysign(ins):
    return lanewise(ins, lambda a, b: np.copysign(b, a), ins.type, ins.type)


@op("testp")
def build_testp(ins):
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }
    return lanewise(ins, tests[ins.mods[0]], ins.type)


# ---- logic and shifts --------------------------------------------------------
@op("and", "or", "xor")
def build_logic(ins):
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.op]
    return lanewise(ins, fn, ins.type, ins.type)


@op("not")
def build_not(ins):
    return lanewise(ins, np.invert, ins.type)


@op("cnot")
def build_cnot(ins):
    return lanewise(ins, lambda a: (a == 0).astype(a.dtype), ins.type)


@op("lop3")
def build_lop3(ins):
    if "b32" not in ins.mods or isinstance(ins.operands[0], Pair):
        raise unsupported(ins)
    table = ins.operands[4].value

    def compute(a, b, c):
        r = np.zeros(1, U32)
        for i in range(8):
            if table >> i & 1:
                r = r | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return r

    return lanewise(ins, compute, "b32", "b32", "b32")


@op("shl", "shr")
def build_shift(ins):
    t = ins.type if ins.op == "shr" else _unsigned(ins.type)
    bits = 8 * TYPE_BYTES[t]
    dtype = NP_TYPE[t]
    if ins.op == "shr" and t in SIGNED:
        return lanewise(ins, lambda a, n: a >> np.minimum(n, U32(bits - 1)).astype(dtype), t, "u32")
    fn = np.left_shift if ins.op == "shl" else np.right_shift
    amount = ins.operands[2]
    if isinstance(amount, Imm):
        if amount.value >= bits:
            return lanewise(ins, np.zeros_like, t)
        n = dtype(amount.value)
        return lanewise(ins, lambda a: fn(a, n), t)
    return lanewise(
        ins,
        lambda a, n: np.where(
            n < bits, fn(a, np.minimum(n, U32(bits - 1)).astype(dtype)), dtype(0)
        ),
        t,
        "u32",
    )


@op("shf")
def build_funnel(ins):
    left, wrap = "l" in ins.mods, "wrap" in ins.mods

    def compute(a, b, c):
        n = (c & U32(31)) if wrap else np.minimum(c, U32(32))
        both = (b.astype(U64) << U64(32)) | a
        if left:
            return (both << n.astype(U64) >> U64(32)).astype(U32)
        return (both >> n.astype(U64)).astype(U32)

    return lanewise(ins, compute, "b32", "b32", "u32")


@op("bfe")
def build_bfe(ins):
    t = ins.type
    bits, signed, dtype = 8 * TYPE_BYTES[t], t in SIGNED, NP_TYPE[_unsigned(t)]

    def compute(a, pos, length):
        pos, length = (pos & U32(255)).astype(np.int64), (length & U32(255)).astype(np.int64)
        length_in = np.clip(np.minimum(length, bits - pos), 0, bits)  # bits that exist
        shifted = np.where(pos < bits, a >> np.minimum(pos, bits - 1).astype(dtype), dtype(0))
        low = np.where(
            length_in == bits, dtype(0), dtype(1) << np.minimum(length_in, bits - 1).astype(dtype)
        ) - dtype(1)
        r = shifted & low
        if signed:
            top = np.minimum(pos + length - 1, bits - 1)
            sign = (a >> np.clip(top, 0, bits - 1).astype(dtype)) & dtype(1)
            r = np.where((sign == 1) & (length > 0), r | ~low, r)
        return np.where(length == 0, dtype(0), r)

    return lanewise(ins, compute, _unsigned(t), "u32", "u32")


@op("bfi")
def build_bfi(ins):
    t = ins.type
    bits, dtype = 8 * TYPE_BYTES[t], NP_TYPE[t]

    def compute(a, b, pos, length):
        pos, length = (pos & U32(255)).astype(np.int64), (length & U32(255)).astype(np.int64)
        length = np.clip(length, 0, bits)
        low = np.where(
            length == bits, dtype(0), dtype(1) << np.minimum(length, bits - 1).astype(dtype)
        ) - dtype(1)
        shift = np.minimum(pos, bits - 1).astype(dtype)
        mask = np.where(pos < bits, low << shift, dtype(0))
        return (b & ~mask) | ((a << shift) & mask)

    return lanewise(ins, compute, t, t, "u32", "u32")


@op("bfind")
def build_bfind(ins):
    t, shiftamt = ins.type, "shiftamt" in ins.mods
    bits = 8 * TYPE_BYTES[t]

    def compute(a):
        u = np.where(a < 0, ~a, a).view(NP_TYPE[_unsigned(t)])
        top = _bit_length(u) - 1
        if shiftamt:
            top = np.where(top >= 0, bits - 1 - top, top)
        return top.astype(np.int32).view(U32)

    return lanewise(ins, compute, t)


def _bit_length(u):
    u = u.astype(U64)
    n = np.zeros(u.shape, np.int64)
    for s in (32, 16, 8, 4, 2, 1):
        big = u >= (U64(1) << U64(s))
        n += np.where(big, s, 0)
        u = np.where(big, u >> U64(s), u)
    return n + (u > 0)


@op("clz")
def build_clz(ins):
    bits = 8 * TYPE_BYTES[ins.type]
    return lanewise(ins, lambda a: (bits - _bit_length(a)).astype(U32), ins.type)


@op("popc")
def build_popc(ins):
    return lanewise(ins, lambda a: np.bitwise_count(a).astype(U32), ins.type)


@op("brev")
def build_brev(ins):
    def compute(a):
        raw = np.ascontiguousarray(a).view(U8).reshape(-1, a.dtype.itemsize)
        bits = np.unpackbits(raw, axis=1, bitorder="little")[:, ::-1]
        return (
            np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little"))
            .view(a.dtype)
            .reshape(-1)
        )

    return lanewise(ins, compute, ins.type)


@op("prmt")
def build_prmt(ins):
    mode = next((m for m in ins.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)

    def compute(a, b, c):
        n = max(a.size, b.size, c.size)
        a, b, c = (np.broadcast_to(x, n) for x in (a, b, c))
        src = np.empty((n, 8), U8)
        src[:, :4] = np.ascontiguousarray(a).view(U8).reshape(-1, 4)
        src[:, 4:] = np.ascontiguousarray(b).view(U8).reshape(-1, 4)
        out = np.empty((n, 4), U8)
        rows = np.arange(n)
        for i in range(4):
            s = c & U32(3)
            if mode is None:
                sel = (c >> U32(4 * i)) & U32(15)
                byte = src[rows, (sel & U32(7)).astype(np.intp)]
                out[:, i] = np.where(sel & U32(8), np.where(byte & 0x80, U8(255), U8(0)), byte)
                continue
            pick = {
                "f4e": s + i,
                "b4e": (s - U32(i)) & U32(7),
                "rc8": s,
                "ecl": np.maximum(s, U32(i)),
                "ecr": np.minimum(s, U32(i)),
                "rc16": (s & U32(1)) * 2 + (i & 1),
            }[mode]
            out[:, i] = src[rows, pick.astype(np.intp)]
        return out.view(U32).reshape(-1)

    return lanewise(ins, compute, "b32", "b32", "b32")


@op("sad")
def build_sad(ins):
    t = ins.type
    return lanewise(ins, lambda a, b, c: np.where(a > b, a - b, b - a) + c, t, t, t)


@op("dp4a")
def build_dp4a(ins):
    ta, tb = ins.types[0], ins.types[1]
    kinds = {"u32": U8, "s32": np.int8}

    def compute(a, b, c):
        x = np.ascontiguousarray(a).view(kinds[ta]).reshape(-1, 4).astype(np.int32)
        y = np.ascontiguousarray(b).view(kinds[tb]).reshape(-1, 4).astype(np.int32)
        return c + (x * y).sum(axis=1, dtype=np.int32).view(U32)

    return lanewise(ins, compute, "b32", "b32", "b32")


# ---- comparison and selection ------------------------------------------------
_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def comparison(name, is_float):
    if not is_float:
        return _ORDERED[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":  # ordered: false when an operand is NaN
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name.endswith("u") and name[:-1] in _ORDERED:
        fn = _ORDERED[name[:-1]]
        return lambda a, b: fn(a, b) | np.isnan(a) | np.isnan(b)
    return _ORDERED[name]


_BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@op("setp")
def build_setp(ins):
    t = ins.type
    cmp = comparison(ins.mods[0], t in FLOATS)
    combine = next((_BOOL[m] for m in ins.mods[1:] if m in _BOOL), None)
    a, b = reader(ins.operands[1], t, ins), reader(ins.operands[2], t, ins)
    c = reader(ins.operands[3], "pred", ins) if combine else None
    dst = ins.operands[0]
    first = writer(dst.first if isinstance(dst, Pair) else dst, ins)
    second = writer(dst.second, ins) if isinstance(dst, Pair) else None
    packed, ftz = t in ("f16x2", "bf16x2"), "ftz" in ins.mods and t == "f32"
    coded = t in FLOATS and t not in ("f32", "f64")

    def run(g):
        x, y = a(g), b(g)
        if coded:
            x, y = decode(t, x), decode(t, y)
        elif ftz:
            x, y = nx.flush(x), nx.flush(y)
        r = cmp(x, y)
        p, q = (r[:, 0], r[:, 1]) if packed else (r, ~r)
        if combine:
            k = c(g)
            p, q = combine(p, k), combine(q, k)
        first(g, p)
        if second:
            second(g, q)

    return run


@op("set")
def build_set(ins):
    dt, t = ins.types[0], ins.types[1]
    cmp = comparison(ins.mods[0], t in FLOATS)
    if any(m in _BOOL for m in ins.mods):
        raise unsupported(ins)

    def compute(a, b):
        r = cmp(decode(t, a), decode(t, b)) if t in FLOATS else cmp(a, b)
        if t in ("f16x2", "bf16x2"):
            if dt == t:
                return encode(t, r.astype(F32))
            return np.ascontiguousarray(np.where(r, U16(0xFFFF), U16(0))).view(U32).reshape(-1)
        if dt in FLOATS:
            return encode(dt, r.astype(F32))
        return np.where(
            r, NP_TYPE[_unsigned(dt)](-1 & (1 << 8 * TYPE_BYTES[dt]) - 1), NP_TYPE[_unsigned(dt)](0)
        )

    return lanewise(ins, compute, t, t)


@op("selp")
def build_selp(ins):
    t = _unsigned(ins.type)
    return lanewise(ins, lambda a, b, p: np.where(p, a, b), t, t, "pred")


@op("slct")
def build_slct(ins):
    t = _unsigned(ins.types[0])
    return lanewise(ins, lambda a, b, c: np.where(c >= 0, a, b), t, t, ins.types[1])


# ---- moves and conversions ----------------------------------------------------
@op("mov")
def build_mov(ins):
    dst, src = ins.operands
    t = ins.type
    if t == "pred":
        return lanewise(ins, lambda a: a, "pred")
    if t == "b128":  # pack, unpack and copy are all two 64-bit moves
        pairs = list(zip(elements(dst), elements(src), strict=False))
        if len(pairs) != 2:
            raise unsupported(ins)
        moves = [(writer(to, ins), reader(source, "b64", ins)) for to, source in pairs]

        def move_pair(g):
            for (to, _), value in zip(moves, [source(g) for _, source in moves], strict=False):
                to(g, value)

        return move_pair
    total = TYPE_BYTES[t]
    u = _unsigned(t)
    if isinstance(src, Vec):  # pack
        n = len(src.items)
        part = total // n
        parts = [reader(o, {1: "b8", 2: "b16", 4: "b32"}[part], ins) for o in src.items]
        d, wide, shift = writer(dst, ins), UINT[total], 8 * part

        def pack(g):
            r = parts[0](g).astype(wide)
            for i in range(1, n):
                r = r | (parts[i](g).astype(wide) << wide(shift * i))
            d(g, r)

        return pack
    if isinstance(dst, Vec):  # unpack
        n = len(dst.items)
        part = total // n
        a, ds, narrow, wide = (
            reader(src, u, ins),
            [writer(o, ins) for o in dst.items],
            UINT[part],
            UINT[total],
        )

        def unpack(g):
            x = a(g)
            for i, d in enumerate(ds):
                d(g, (x >> wide(8 * part * i) if i else x).astype(narrow))

        return unpack
    return lanewise(ins, lambda a: a, u)


@op("cvta")
def build_cvta(ins):
    """Generic <-> state space addresses (see memory.py for the windows)."""
    from .memory import LOCAL_WINDOW, SHARED_WINDOW

    space = next(
        (
            m.split("::")[0]
            for m in ins.mods
            if m.split("::")[0] in ("shared", "local", "global", "const", "param")
        ),
        None,
    )
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    w = U64(window)
    if ins.type != "u64":
        raise unsupported(ins, "32-bit generic addresses")
    if "to" in ins.mods:
        return lanewise(ins, lambda a: a - w, "u64")
    return lanewise(ins, lambda a: a + w, "u64")


@op("isspacep")
def build_isspacep(ins):
    from .memory import LOCAL_WINDOW, SHARED_WINDOW

    code = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(ins.mods[0].split("::")[0], 0) >> 56
    return lanewise(ins, lambda a: (a >> U64(56)) == U64(code), "u64")


@op("cvt")
def build_cvt(ins):
    if len(ins.types) < 2:
        raise unsupported(ins)
    dt, st = ins.types[0], ins.types[1]
    mods = set(ins.mods)
    if mods & {"rs", "scaled::n2::ue8m0"}:
        raise unsupported(ins)
    mode = next((m for m in ins.mods if m in ROUNDING), None)
    to_int = next((m for m in ins.mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    sat = mods & {"sat", "satfinite"}
    relu = "relu" in mods
    if dt in ("e4m3x2", "e5m2x2") or st in ("e4m3x2", "e5m2x2"):
        return _cvt_fp8(ins, dt, st, relu)
    if dt in ("f16x2", "bf16x2"):  # d = {hi: a, lo: b}
        if len(ins.operands) != 3 or sat:
            raise unsupported(ins)

        def pack2(a, b):
            n = max(a.size, b.size)
            y = np.empty((n, 2), F32)
            y[:, 1], y[:, 0] = a, b
            if relu:
                y = np.where(np.isnan(y), y, np.maximum(y, F32(0)))
            return encode(dt, y, mode or "rn")

        return lanewise(ins, pack2, "f32", "f32")
    if dt == "tf32":
        if "rna" in mods:
            return lanewise(ins, nx.f32_to_tf32, "f32")
        raise unsupported(ins)
    ftz = "ftz" in mods
    if st in FLOATS and dt in FLOATS:

        def f2f(a):
            y = decode(st, a) if st not in ("f32", "f64") else a
            if ftz and st == "f32":
                y = nx.flush(y)
            if to_int:
                y = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[to_int](y)
            if sat:
                y = np.where(np.isnan(y), y.dtype.type(0), np.clip(y, 0, 1)).astype(y.dtype)
            if relu:
                y = np.where(np.isnan(y), y, np.maximum(y, y.dtype.type(0)))
            if dt == "f64":
                return y.astype(F64)
            y = encode(dt, y, mode or "rn")
            return nx.flush(y) if ftz and dt == "f32" else y

        return lanewise(ins, f2f, st)
    if st in FLOATS:
        target = NP_TYPE[dt]
        return lanewise(
            ins,
            lambda a: nx.float_to_int(
                nx.flush(a) if ftz and st == "f32" else decode(st, a),
                target,
                to_int or "rzi",
                st == "f64",
            ),
            st,
        )
    if dt in FLOATS:

        def i2f(a):
            if dt == "f64":
                return a.astype(F64)
            if dt == "f32":
                if mode in (None, "rn"):
                    return a.astype(F32)
                return nx.f64_to_f32(a.astype(F64), mode)
            return encode(dt, a.astype(F64), mode or "rn")

        return lanewise(ins, i2f, st)
    target = NP_TYPE[dt]
    if sat:
        info = np.iinfo(target)

        def clamp(a):
            low, high = max(info.min, np.iinfo(a.dtype).min), min(info.max, np.iinfo(a.dtype).max)
            return np.clip(a, low, high).astype(target)

        return lanewise(ins, clamp, st)
    return lanewise(
        ins, lambda a: convert(a, target) if a.dtype.kind != "i" else a.astype(target), st
    )


def _cvt_fp8(ins, dt, st, relu):
    if dt in ("e4m3x2", "e5m2x2") and st == "f32":
        kind = dt[:4]

        def pack(a, b):
            if relu:
                a, b = np.maximum(a, 0), np.maximum(b, 0)
            return (nx.f32_to_fp8(a, kind).astype(U16) << U16(8)) | nx.f32_to_fp8(b, kind)

        return lanewise(ins, pack, "f32", "f32")
    if dt in ("e4m3x2", "e5m2x2") and st == "f16x2":
        kind = dt[:4]
        return lanewise(
            ins, lambda a: nx.f32_to_fp8(decode("f16x2", a), kind).view(U16).reshape(-1), "f16x2"
        )
    if dt == "f16x2":
        kind = st[:4]
        return lanewise(
            ins,
            lambda a: encode(
                "f16x2", nx.fp8_to_f32(np.ascontiguousarray(a).view(U8).reshape(-1, 2), kind)
            ),
            st,
        )
    raise unsupported(ins)
