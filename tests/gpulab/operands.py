"""Compile PTX operands into small closures that read or write the register cache of a Group.

Values are numpy arrays with one element per active lane, or a single element when
the value is the same for all of them.
"""

import numpy as np

from .errors import UnsupportedInstruction
from .parser import TYPE_BYTES, UINT, Imm, Not, Pair, Reg, Sink, Special, Sym, Vec

NP_TYPE = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "e4m3x2": np.uint16,
    "e5m2x2": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
}

OPS = {}


def op(*names):
    """Register a builder: builder(ins) -> run(group)."""

    def register(build):
        for name in names:
            OPS[name] = build
        return build

    return register


def unsupported(ins, detail=""):
    return UnsupportedInstruction(ins.text, ins.line, detail)


def convert(value, dtype):
    """Reinterpret equal widths, otherwise truncate or extend according to the value's own type."""
    if value.dtype == dtype:
        return value
    if value.dtype.itemsize == np.dtype(dtype).itemsize and value.dtype != np.bool_:
        return np.ascontiguousarray(value).view(dtype)
    if value.dtype.kind == "f":  # float bits in a register of another width
        value = value.view(UINT[value.dtype.itemsize])
    if value.dtype.kind == "i" and np.dtype(dtype).kind == "u":
        return value.astype(np.dtype(dtype).str.replace("u", "i")).view(dtype)
    return value.astype(dtype)


def constant(imm, type_, ins):
    dtype = NP_TYPE[type_]
    if type_ == "pred":
        return np.array([bool(imm.value)])
    size = TYPE_BYTES[type_]
    if imm.kind == "int":
        raw = np.array([imm.value & ((1 << 8 * size) - 1)], UINT[size])
        return raw.view(dtype)
    if imm.kind == "float":
        return np.array([imm.value], np.float64 if size == 8 else np.float32).view(dtype)
    raw = np.array([imm.value], np.uint32 if imm.kind == "f32" else np.uint64)
    if raw.dtype.itemsize != size:
        if np.dtype(dtype).kind == "f":
            return raw.view(np.float32 if imm.kind == "f32" else np.float64).astype(dtype)
        raise unsupported(ins, "literal width")
    return raw.view(dtype)


def reader(operand, type_, ins):
    """Closure g -> array of the numpy type that stands for PTX type ``type_``."""
    dtype = NP_TYPE.get(type_)
    if dtype is None:
        raise unsupported(ins, f"type {type_}")
    if isinstance(operand, Reg):
        slot, have = operand.slot, operand.dtype
        if have is None:
            raise unsupported(ins, "128-bit register")
        if have == dtype:
            return lambda g: g.get(slot)
        if np.dtype(have).itemsize == np.dtype(dtype).itemsize and np.bool_ not in (have, dtype):
            return lambda g: g.get(slot).view(dtype)
        return lambda g: convert(g.get(slot), dtype)
    if isinstance(operand, Imm):
        value = constant(operand, type_, ins)
        return lambda g: value
    if isinstance(operand, Special):
        name = operand.name
        return lambda g: convert(g.sreg(name), dtype)
    if isinstance(operand, Sym):
        name, offset = operand.name, operand.offset
        return lambda g: convert(g.m.symbol(name, ins) + np.uint64(offset & (1 << 64) - 1), dtype)
    if isinstance(operand, Not):
        inner = reader(operand.reg, type_, ins)
        return lambda g: ~inner(g)
    raise unsupported(ins, "operand form")


def writer(operand, ins):
    """Closure (g, array) storing into a register, converting width as PTX does."""
    if isinstance(operand, Sink):
        return lambda g, value: None
    if isinstance(operand, Pair):
        return writer(operand.first, ins)
    if not isinstance(operand, Reg) or operand.dtype is None:
        raise unsupported(ins, "destination form")
    slot, dtype = operand.slot, operand.dtype

    def write(g, value):
        if value.dtype != dtype:
            value = convert(value, dtype)
        g.set(slot, value)

    return write


def lanewise(ins, fn, *source_types):
    """run(g): destination = fn(sources...), element by element."""
    if len(ins.operands) - 1 < len(source_types):
        raise unsupported(ins, "operand count")
    d = writer(ins.operands[0], ins)
    r = [reader(o, t, ins) for o, t in zip(ins.operands[1:], source_types, strict=False)]
    if len(r) == 1:
        (a,) = r
        return lambda g: d(g, fn(a(g)))
    if len(r) == 2:
        a, b = r
        return lambda g: d(g, fn(a(g), b(g)))
    if len(r) == 3:
        a, b, c = r
        return lambda g: d(g, fn(a(g), b(g), c(g)))
    return lambda g: d(g, fn(*[x(g) for x in r]))


def elements(operand):
    """The scalar operands of a possibly-vector operand."""
    return list(operand.items) if isinstance(operand, Vec) else [operand]
