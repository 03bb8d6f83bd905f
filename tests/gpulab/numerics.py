"""Bit-level number formats: bf16, fp8, directed rounding, float->int conversion of numpy arrays."""

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64


def bf16_to_f32(bits):
    """uint16 bf16 bit patterns -> float32 (exact)."""
    return (bits.astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x, mode="rn"):
    """float32 -> uint16 bf16 bit patterns; NaN becomes the canonical 0x7fff."""
    u = np.ascontiguousarray(x, F32).view(U32)
    if mode == "rn":
        r = (u + (U32(0x7FFF) + ((u >> U32(16)) & U32(1)))) >> U32(16)
    elif mode == "rz":
        r = u >> U32(16)
    else:
        raise ValueError(mode)
    nan = (u & U32(0x7FFFFFFF)) > U32(0x7F800000)
    r = r.astype(U16)
    return np.where(nan, U16(0x7FFF), r) if nan.any() else r


def f64_to_f32_odd(x):
    """float64 -> float32 rounding to odd, so that a later rounding to a shorter format is exact."""
    x = np.asarray(x, F64)
    y = x.astype(F32)
    wide = y.astype(F64)
    inexact = (wide != x) & np.isfinite(x) & np.isfinite(y)
    if not inexact.any():
        return y
    toward = np.where(wide > x, np.nextafter(y, F32(-np.inf)), np.nextafter(y, F32(np.inf)))
    even = (y.view(U32) & U32(1)) == 0
    return np.where(inexact & even, toward, y).astype(F32)


def f64_to_f32(x, mode="rn"):
    """float64 -> float32 with rounding mode rn, rz, rm (down) or rp (up)."""
    y = x.astype(F32)
    if mode == "rn":
        return y
    wide = y.astype(F64)
    if mode == "rz":
        off, to = np.abs(wide) > np.abs(x), F32(0)
    elif mode == "rm":
        off, to = wide > x, F32(-np.inf)
    elif mode == "rp":
        off, to = wide < x, F32(np.inf)
    else:
        raise ValueError(mode)
    return np.where(off, np.nextafter(y, to), y).astype(F32)


def to_f16(x, mode="rn"):
    """float32/float64 -> float16 with rounding mode rn or rz."""
    y = x.astype(F16)
    if mode == "rn":
        return y
    off = np.abs(y.astype(x.dtype)) > np.abs(x)
    return np.where(off, np.nextafter(y, F16(0)), y).astype(F16)


def f32_to_tf32(x):
    """Round to tf32 (10-bit mantissa), nearest with ties away, as cvt.rna.tf32.f32 does."""
    u = np.ascontiguousarray(x, F32).view(U32)
    special = (u & U32(0x7F800000)) == U32(0x7F800000)
    return np.where(special, u, (u + U32(0x1000)) & U32(0xFFFFE000)).astype(U32).view(F32)


def flush(x):
    """Flush subnormal float32 values to zero of the same sign (.ftz)."""
    small = np.abs(x) < F32(1.17549435e-38)
    return np.where(small, np.copysign(F32(0), x), x) if small.any() else x


def float_to_int(x, dtype, mode, src_is_f64):
    """Saturating float -> integer conversion (rni, rzi, rmi, rpi) with PTX's NaN results."""
    x = x.astype(F64)
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    info = np.iinfo(dtype)
    nan = np.isnan(x)
    low, high = x <= float(info.min), x >= float(info.max)
    out = np.where(nan | low | high, 0.0, x).astype(dtype)
    out = np.where(low, dtype(info.min), out)
    out = np.where(high, dtype(info.max), out)
    wide = src_is_f64 or info.bits == 64
    nan_value = (info.min if info.min < 0 else 1 << (info.bits - 1)) if wide else 0
    return np.where(nan, dtype(nan_value), out).astype(dtype)


def fmin(a, b, nan_propagates):
    """IEEE minimumNumber (or minimum with .NaN); -0 < +0."""
    r = np.minimum(a, b) if nan_propagates else np.fmin(a, b)
    return _fix_zero_and_nan(r, a, b, np.signbit(a) | np.signbit(b))


def fmax(a, b, nan_propagates):
    r = np.maximum(a, b) if nan_propagates else np.fmax(a, b)
    return _fix_zero_and_nan(r, a, b, np.signbit(a) & np.signbit(b))


def _fix_zero_and_nan(r, a, b, negative):
    zero = (a == 0) & (b == 0)
    if zero.any():
        r = np.where(zero, np.where(negative, r.dtype.type(-0.0), r.dtype.type(0.0)), r)
    nan = np.isnan(r)
    if nan.any():
        r = np.where(nan, canonical_nan(r.dtype), r)
    return r.astype(a.dtype, copy=False)


def canonical_nan(dtype):
    bits = {2: (U16, 0x7FFF), 4: (U32, 0x7FFFFFFF), 8: (U64, 0x7FFFFFFFFFFFFFFF)}
    kind, value = bits[np.dtype(dtype).itemsize]
    return np.array(value, kind).view(dtype)[()]


def _fp8_table(exp_bits):
    codes = np.arange(256)
    man_bits = 7 - exp_bits
    bias = (1 << (exp_bits - 1)) - 1
    e, m = (codes >> man_bits) & ((1 << exp_bits) - 1), codes & ((1 << man_bits) - 1)
    frac = m / (1 << man_bits)
    v = np.where(e == 0, frac * 2.0 ** (1 - bias), (1 + frac) * 2.0 ** (e - bias))
    if exp_bits == 4:
        v[(codes & 0x7F) == 0x7F] = np.nan
    else:
        top = e == 31
        v[top & (m == 0)] = np.inf
        v[top & (m != 0)] = np.nan
    return np.where(codes & 0x80, -v, v).astype(F32)


FP8 = {"e4m3": _fp8_table(4), "e5m2": _fp8_table(5)}


def fp8_to_f32(bits, kind):
    return FP8[kind][bits.astype(np.intp)]


def f32_to_fp8(x, kind):
    """Round to nearest even with saturation to the largest finite value (.rn.satfinite)."""
    table = FP8[kind][:128]
    finite = table[np.isfinite(table)]
    a = np.minimum(np.abs(x.astype(F64)), float(finite[-1]))
    a = np.where(np.isnan(x), 0, a)
    hi = np.clip(np.searchsorted(finite, a), 1, len(finite) - 1)
    lo = hi - 1
    d_lo, d_hi = a - finite[lo], finite[hi] - a
    pick_hi = (d_hi < d_lo) | ((d_hi == d_lo) & (hi % 2 == 0))
    code = np.where(pick_hi, hi, lo).astype(U8)
    code = np.where(np.isnan(x), U8(0x7F), code)
    return (code | np.where(np.signbit(x) & ~np.isnan(x), U8(0x80), U8(0))).astype(U8)
