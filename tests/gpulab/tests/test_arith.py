"""PTX arithmetic against plain Python integers, or exact rational arithmetic for floats."""

import math
from fractions import Fraction

import gpulab
import numpy as np
import pytest
from ptx_snippet import run

RNG = np.random.default_rng(7)
N = 256


def u32(n=N):
    x = RNG.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32)
    x[:6] = [0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 31]
    return x


def s(x, bits=32):
    x = int(x) & (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def check(code, inputs, reference, out_type="b32", out_dtype=np.uint32, declare=""):
    got = run(code, inputs, out_type, out_dtype, declare)
    mask = (1 << 8 * got.itemsize) - 1
    want = [reference(*[int(v) for v in row]) & mask for row in zip(*inputs, strict=False)]
    assert [int(v) for v in got] == want


def bfe(a, pos, length, signed):
    pos, length = pos & 255, length & 255
    sign = (a >> min(pos + length - 1, 31)) & 1 if signed and length else 0
    return sum(
        ((a >> (pos + i) & 1) if i < length and pos + i <= 31 else sign) << i for i in range(32)
    )


def bfi(a, b, pos, length):
    pos, length = pos & 255, length & 255
    for i in range(length):
        if pos + i <= 31:
            b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i) if i < 32 else b
    return b


def prmt(a, b, c):
    data, out = a | b << 32, 0
    for i in range(4):
        sel = c >> 4 * i & 15
        byte = data >> 8 * (sel & 7) & 255
        out |= ((255 if byte & 128 else 0) if sel & 8 else byte) << 8 * i
    return out


INTEGER = {
    "add.s32 %d, %a, %b;": lambda a, b: a + b,
    "sub.u32 %d, %a, %b;": lambda a, b: a - b,
    "mul.lo.s32 %d, %a, %b;": lambda a, b: a * b,
    "mul.hi.u32 %d, %a, %b;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %d, %a, %b;": lambda a, b: s(a) * s(b) >> 32,
    "mul24.lo.u32 %d, %a, %b;": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "add.sat.s32 %d, %a, %b;": lambda a, b: max(-(2**31), min(2**31 - 1, s(a) + s(b))),
    "min.s32 %d, %a, %b;": lambda a, b: min(s(a), s(b)),
    "max.u32 %d, %a, %b;": lambda a, b: max(a, b),
    "shl.b32 %d, %a, %b;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %d, %a, %b;": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 %d, %a, %b;": lambda a, b: s(a) >> min(b, 31),
    "shf.l.wrap.b32 %d, %a, %b, 7;": lambda a, b: (a | b << 32) << 7 >> 32,
    "shf.r.clamp.b32 %d, %a, %b, 40;": lambda a, b: b,
    "div.s32 %d, %a, %b;": lambda a, b: (
        int(math.copysign(1, s(a)) * math.copysign(1, s(b))) * (abs(s(a)) // abs(s(b))) if b else -1
    ),
    "rem.s32 %d, %a, %b;": lambda a, b: (
        s(a)
        - s(b) * int(math.copysign(1, s(a)) * math.copysign(1, s(b))) * (abs(s(a)) // abs(s(b)))
        if b
        else a
    ),
    "div.u32 %d, %a, %b;": lambda a, b: a // b if b else -1,
    "sad.u32 %d, %a, %b, 5;": lambda a, b: abs(a - b) + 5,
    "dp4a.u32.u32 %d, %a, %b, 9;": lambda a, b: (
        sum((a >> i & 255) * (b >> i & 255) for i in (0, 8, 16, 24)) + 9
    ),
    "and.b32 %d, %a, %b;": lambda a, b: a & b,
    "setp.gt.s32 %p, %a, %b; selp.b32 %d, %a, %b, %p;": lambda a, b: max(s(a), s(b)),
    "setp.lo.and.u32 %p, %a, %b, %p; selp.b32 %d, 3, 4, %p;": lambda a, b: 4,
    "slct.b32.s32 %d, %a, 12, %b;": lambda a, b: a if s(b) >= 0 else 12,
    "add.cc.u32 %d, %a, %b; addc.u32 %d, 0, 0;": lambda a, b: a + b >> 32,
    "sub.cc.u32 %d, %a, %b; subc.u32 %d, 0, 0;": lambda a, b: -(a < b),
}


@pytest.mark.parametrize("code", INTEGER)
def test_integer(code):
    b = u32()
    b[64:160] = RNG.integers(0, 40, 96)
    check(code, [u32(), b], INTEGER[code], declare=".reg .pred %p;")


@pytest.mark.parametrize("signed", [False, True])
def test_bit_field(signed):
    a, pos, length = (
        u32(),
        RNG.integers(0, 40, N).astype(np.uint32),
        RNG.integers(0, 40, N).astype(np.uint32),
    )
    check(
        f"bfe.{'s' if signed else 'u'}32 %d, %a, %b, %c;",
        [a, pos, length],
        lambda *v: bfe(*v, signed),
    )
    b = u32()
    check("bfi.b32 %d, %a, %b, %c, 9;", [a, b, pos], lambda x, y, p: bfi(x, y, p, 9))


@pytest.mark.parametrize("table", [0xE8, 0x96, 0x1F, 0xFE])
def test_lop3_and_prmt(table):
    def lop3(a, b, c):
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
            for i in range(32)
        )

    a, b, c = u32(), u32(), u32()
    check(f"lop3.b32 %d, %a, %b, %c, {table};", [a, b, c], lop3)
    check("prmt.b32 %d, %a, %b, %c;", [a, b, c], prmt)


def test_one_operand_integer():
    a = u32()
    check("popc.b32 %d, %a;", [a], lambda x: bin(x).count("1"))
    check("clz.b32 %d, %a;", [a], lambda x: 32 - x.bit_length())
    check("brev.b32 %d, %a;", [a], lambda x: int(f"{x:032b}"[::-1], 2))
    check("bfind.u32 %d, %a;", [a], lambda x: x.bit_length() - 1)
    check("abs.s32 %d, %a;", [a], lambda x: abs(s(x)))
    check("neg.s32 %d, %a;", [a], lambda x: -x)
    check("cnot.b32 %d, %a;", [a], lambda x: int(x == 0))
    check(
        "cvt.u16.u32 %h, %a; cvt.s32.s16 %d, %h;", [a], lambda x: s(x, 16), declare=".reg .b16 %h;"
    )
    check(
        "cvt.sat.s8.s32 %h, %a; cvt.s32.s8 %d, %h;",
        [a],
        lambda x: max(-128, min(127, s(x))),
        declare=".reg .b16 %h;",
    )


def test_64_bit():
    a, b = (RNG.integers(0, 2**64, N, dtype=np.uint64) for _ in range(2))
    check("mul.hi.u64 %d, %a, %b;", [a, b], lambda x, y: x * y >> 64, "b64", np.uint64)
    check(
        "mul.hi.s64 %d, %a, %b;", [a, b], lambda x, y: s(x, 64) * s(y, 64) >> 64, "b64", np.uint64
    )
    x, y = u32(), u32()
    check("mul.wide.s32 %d, %a, %b;", [x, y], lambda p, q: s(p) * s(q), "b64", np.uint64)
    check("mad.wide.u32 %d, %a, %b, %c;", [x, y, a], lambda p, q, r: p * q + r, "b64", np.uint64)
    check("mov.b64 %d, {%b, %a};", [x, y], lambda p, q: q | p << 32, "b64", np.uint64)


# ---- floats -----------------------------------------------------------------------
def floats(n=N):
    x = (RNG.standard_normal(n) * np.exp(RNG.uniform(-30, 30, n))).astype(np.float32)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, 3.4e38, 1e-40]
    return x


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def same(got, want):
    got, want = np.asarray(got), np.asarray(want)
    ok = (got == want) & (np.signbit(got) == np.signbit(want)) | (np.isnan(got) & np.isnan(want))
    assert ok.all(), [(g, w) for g, w, o in zip(got, want, ok, strict=False) if not o][:5]


def test_f32_arithmetic():
    a, b = floats(), floats()
    b[8:16] = a[8:16]
    with np.errstate(all="ignore"):
        for name, fn in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
            same(
                run(
                    f"{name}.f32 %d, %a, %b;",
                    [a.view(np.uint32), b.view(np.uint32)],
                    "b32",
                    np.float32,
                ),
                fn(a, b),
            )
        same(run("div.rn.f32 %d, %a, %b;", [bits(a), bits(b)], "b32", np.float32), a / b)
        same(run("sqrt.rn.f32 %d, %a;", [bits(a)], "b32", np.float32), np.sqrt(a))
        same(
            run("add.ftz.f32 %d, %a, 0f00000000;", [bits(a)], "b32", np.float32),
            np.where(np.abs(a) < 1.1754944e-38, np.float32(0), a) + np.float32(0),
        )


def test_fma_rounds_once():
    a = np.float32([1 + 2**-12, 1 + 2**-23, 3.0, 1e20])
    b = np.float32([1 + 2**-12, 1 - 2**-23, 1 / 3, 1e20])
    c = np.float32([-1.0, -1.0, -1.0, 0.0])
    got = run("fma.rn.f32 %d, %a, %b, %c;", [bits(a), bits(b), bits(c)], "b32", np.float32)
    exact = [
        Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        for x, y, z in zip(a[:3], b[:3], c[:3], strict=False)
    ]
    assert [float(g) for g in got[:3]] == [float(np.float32(float(e))) for e in exact]
    assert np.isinf(got[3])
    assert np.float32(a[0] * b[0]) + c[0] != got[0]  # two roundings would give another result


@pytest.mark.parametrize(
    "name,fn,ulps",
    [
        ("ex2.approx.f32", np.exp2, 2),
        ("lg2.approx.f32", np.log2, 3),
        ("rcp.approx.f32", lambda x: 1 / x, 1),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2),
        ("sqrt.approx.f32", np.sqrt, 1),
        ("tanh.approx.f32", np.tanh, 2),
    ],
)
def test_special_functions(name, fn, ulps):
    x = RNG.uniform(0.01, 20, N).astype(np.float32)
    got = run(f"{name} %d, %a;", [bits(x)], "b32", np.float32)
    want = fn(x.astype(np.float64))
    assert (np.abs(got - want) <= ulps * np.spacing(np.abs(want).astype(np.float32))).all()


def test_min_max_nan_and_zero():
    a = np.float32([1, np.nan, np.nan, 0.0, -0.0, 5])
    b = np.float32([np.nan, 2, np.nan, -0.0, 0.0, 3])
    two = [bits(a), bits(b)]
    same(
        run("min.f32 %d, %a, %b;", two, "b32", np.float32),
        np.float32([1, 2, np.nan, -0.0, -0.0, 3]),
    )
    same(
        run("max.f32 %d, %a, %b;", two, "b32", np.float32), np.float32([1, 2, np.nan, 0.0, 0.0, 5])
    )
    same(
        run("max.NaN.f32 %d, %a, %b;", two, "b32", np.float32),
        np.float32([np.nan, np.nan, np.nan, 0.0, 0.0, 5]),
    )
    assert run("max.f32 %d, %a, %b;", two, "b32", np.uint32)[2] == 0x7FFFFFFF


@pytest.mark.parametrize(
    "cmp,fn",
    [
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a != b and a == a and b == b),
        ("neu", lambda a, b: a != b),
        ("ltu", lambda a, b: not a >= b),
        ("ge", lambda a, b: a >= b),
        ("nan", lambda a, b: a != a or b != b),
    ],
)
def test_float_comparisons(cmp, fn):
    a, b = np.float32([1, 2, np.nan, 3, np.nan]), np.float32([1, 3, 1, np.nan, np.nan])
    got = run(
        f"setp.{cmp}.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p;",
        [bits(a), bits(b)],
        "b32",
        np.uint32,
        ".reg .pred %p;",
    )
    assert [bool(g) for g in got] == [bool(fn(x, y)) for x, y in zip(a, b, strict=False)]


def test_float_to_integer():
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, np.nan, 255.7, np.inf])
    want = {
        "rni.s32": [0, 2, 2, 0, -2, 2**31 - 1, -(2**31), 0, 256, 2**31 - 1],
        "rzi.s32": [0, 1, 2, 0, -1, 2**31 - 1, -(2**31), 0, 255, 2**31 - 1],
        "rmi.s32": [0, 1, 2, -1, -2, 2**31 - 1, -(2**31), 0, 255, 2**31 - 1],
        "rpi.s32": [1, 2, 3, 0, -1, 2**31 - 1, -(2**31), 0, 256, 2**31 - 1],
        "rzi.u32": [0, 1, 2, 0, 0, 4294967295, 0, 0, 255, 4294967295],
    }
    for mode, expect in want.items():
        got = run(
            f"cvt.{mode}.f32 %d, %a;", [bits(x)], "b32", np.int32 if mode[-3] == "s" else np.uint32
        )
        assert [int(g) for g in got] == expect, mode


def test_integer_to_float():
    a = u32()
    assert (run("cvt.rn.f32.u32 %d, %a;", [a], "b32", np.float32) == a.astype(np.float32)).all()
    assert (
        run("cvt.rn.f32.s32 %d, %a;", [a], "b32", np.float32) == a.view(np.int32).astype(np.float32)
    ).all()
    rz = run("cvt.rz.f32.u32 %d, %a;", [a], "b32", np.float32)
    assert (rz.astype(np.float64) <= a).all() and (
        np.nextafter(rz, np.float32(np.inf)).astype(np.float64) > a
    ).all()


def test_conversions_f16_bf16():
    torch = pytest.importorskip("torch")
    x = floats(1024)
    t = torch.from_numpy(x)
    same(run("cvt.rn.f16.f32 %d, %a;", [bits(x)], "b16", np.float16), t.half().numpy())
    want = t.bfloat16().float().numpy()
    same(gpulab.bf16_to_float(run("cvt.rn.bf16.f32 %d, %a;", [bits(x)], "b16", np.uint16)), want)
    packed = run("cvt.rn.bf16x2.f32 %d, %a, %b;", [bits(x), bits(x[::-1].copy())], "b32", np.uint32)
    same(gpulab.bf16_to_float(packed >> 16), want)
    same(gpulab.bf16_to_float(packed & 0xFFFF), want[::-1])
    h = np.arange(1024).astype(np.uint16) * 64
    same(run("cvt.f32.f16 %d, %a;", [h], "b32", np.float32), h.view(np.float16).astype(np.float32))
    tf = run("cvt.rna.tf32.f32 %d, %a;", [bits(x[8:])], "b32", np.float32)
    assert (np.abs(tf - x[8:]) <= np.abs(x[8:]) * 2.0**-11).all()


@pytest.mark.parametrize("kind,name", [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_fp8(kind, name):
    torch = pytest.importorskip("torch")
    x = RNG.uniform(-400, 400, N).astype(np.float32)
    x[:64] /= 1000
    got = run(f"cvt.rn.satfinite.{kind}x2.f32 %d, %a, %b;", [bits(x), bits(-x)], "b16", np.uint16)
    want = torch.from_numpy(x).to(getattr(torch, name)).view(torch.uint8).numpy()
    assert ((got >> 8).astype(np.uint8) == want).all()
    back = (
        run(f"cvt.rn.f16x2.{kind}x2 %d, %a;", [got], "b32", np.uint32)
        .view(np.float16)
        .reshape(-1, 2)
    )
    same(
        back[:, 1].astype(np.float32),
        torch.from_numpy(want).view(getattr(torch, name)).float().numpy(),
    )


def test_half2_and_bf162():
    torch = pytest.importorskip("torch")
    h = RNG.standard_normal((3, N, 2)).astype(np.float16)
    a, b, c = (x.view(np.uint32).reshape(-1) for x in h)
    got = (
        run("fma.rn.f16x2 %d, %a, %b, %c;", [a, b, c], "b32", np.uint32)
        .view(np.float16)
        .reshape(-1, 2)
    )
    assert (got == (h[0].astype(float) * h[1] + h[2]).astype(np.float16)).all()
    got = run("max.f16x2 %d, %a, %b;", [a, b], "b32", np.uint32).view(np.float16).reshape(-1, 2)
    assert (got == np.maximum(h[0], h[1])).all()
    f = torch.randn(2, N, 2).bfloat16()
    a, b = (
        np.ascontiguousarray(x.view(torch.int16).numpy()).view(np.uint32).reshape(-1) for x in f
    )
    for name, want in (
        ("mul", f[0] * f[1]),
        ("add", f[0] + f[1]),
        ("min", torch.minimum(f[0], f[1])),
    ):
        got = (
            run(f"{name}.bf16x2 %d, %a, %b;", [a, b], "b32", np.uint32)
            .view(np.uint16)
            .reshape(-1, 2)
        )
        assert (got == want.view(torch.int16).numpy().view(np.uint16)).all(), name


def test_mixed_precision_and_packed_f32():
    h, x = RNG.standard_normal(N).astype(np.float16), floats()
    for name, fn in (("add", np.add), ("sub", np.subtract)):
        same(
            run(
                f"{name}.rn.f32.f16 %d, %a, %b;",
                [h.view(np.uint16), bits(x)],
                "b32",
                np.float32,
                arch="sm_100",
            ),
            fn(h.astype(np.float32), x),
        )
    b = gpulab.float_to_bf16(RNG.standard_normal(N)).view(np.ndarray)
    bf = gpulab.bf16_to_float(b).astype(np.float64)
    same(
        run("fma.rn.f32.bf16 %d, %a, %a, %b;", [b, bits(x)], "b32", np.float32, arch="sm_100"),
        (bf * bf + x).astype(np.float32),
    )
    p, q = floats(), floats()
    got = run(
        "mul.f32x2 %d, %a, %b;",
        [p.view(np.uint64), q.view(np.uint64)],
        "b64",
        np.float32,
        arch="sm_100",
    )
    with np.errstate(all="ignore"):
        same(got, p * q)


@pytest.mark.parametrize(
    "code", ["add.u16x2 %d, %a, %b;", "add.f32.weird %d, %a, %b;", "mul.f32.f16 %d, %a, %b;"]
)
def test_unknown_forms_are_refused(code):
    with pytest.raises(gpulab.UnsupportedInstruction):
        run(code, [u32(), u32()], "b32", np.uint32)


def test_unsupported_instruction_names_itself():
    with pytest.raises(gpulab.UnsupportedInstruction, match=r"vadd4.*at line"):
        run("vadd4.u32.u32.u32 %d, %a, %b, 0;", [u32(), u32()], "b32", np.uint32)
    # an unsupported instruction that is never reached does no harm
    run("bra L; vadd4.u32.u32.u32 %d, %a, %a, 0; L: mov.b32 %d, %a;", [u32()], "b32", np.uint32)
