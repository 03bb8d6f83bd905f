"""Triton kernels used by the tests."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, z, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    tl.store(z + o, tl.load(x + o, mask=m) + tl.load(y + o, mask=m), mask=m)


@triton.jit
def add_no_mask(x, y, z, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + o, tl.load(x + o) + tl.load(y + o))


@triton.jit
def scale_tile(x, y, H, W, a, BH: tl.constexpr, BW: tl.constexpr):
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    p = h[:, None] * W + w[None, :]
    m = (h < H)[:, None] & (w < W)[None, :]
    v = tl.load(x + p, mask=m, other=0.0)
    tl.store(y + p, v.to(tl.float32) * a, mask=m)


@triton.jit
def row_sum(x, y, W, B: tl.constexpr):
    r = tl.program_id(0)
    acc = tl.zeros((B,), tl.float32)
    for w0 in range(0, W, B):
        w = w0 + tl.arange(0, B)
        acc += tl.load(x + r * W + w, mask=w < W, other=0.0).to(tl.float32)
    tl.store(y + r, tl.sum(acc, 0))


@triton.jit
def softmax(x, y, W, B: tl.constexpr):
    r = tl.program_id(0)
    w = tl.arange(0, B)
    v = tl.load(x + r * W + w, mask=w < W, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + r * W + w, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=w < W)


@triton.jit
def sigmoid(x, y, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n)
    tl.store(y + o, tl.sigmoid(v.to(tl.float32)).to(y.dtype.element_ty), mask=o < n)


@triton.jit
def accumulate(x, total, hist, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    v = tl.load(x + o, mask=m, other=0.0)
    tl.atomic_add(total, tl.sum(v, 0))
    tl.atomic_add(hist + o % 8, 1, mask=m)


@triton.jit
def column_dot(x, w, z, q, C, HW, BC: tl.constexpr, BHW: tl.constexpr):
    """q[hw] = sum_c w[c] x[c, hw] and z[c] = sum_hw x[c, hw]: both reductions of an scSE block."""
    n = tl.program_id(1)
    o = tl.program_id(0) * BHW + tl.arange(0, BHW)
    m = o < HW
    q_acc = tl.zeros((BHW,), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        v = tl.load(
            x + (n * C + c)[:, None] * HW + o[None, :],
            mask=(c < C)[:, None] & m[None, :],
            other=0.0,
        )
        v = v.to(tl.float32)
        q_acc += tl.sum(v * tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)[:, None], 0)
        tl.atomic_add(z + n * C + c, tl.sum(v, 1), mask=c < C)
    tl.store(q + n * HW + o, q_acc, mask=m)


@triton.jit
def two_phase(x, y, total, arrived, n, B: tl.constexpr):
    """Sum everything with atomics, wait until all CTAs have, then divide: a grid barrier in one
    launch."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=0.0)
    tl.atomic_add(total, tl.sum(v, 0))
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < tl.num_programs(0):
        pass
    s = tl.load(total, volatile=True)
    tl.store(y + o, v / s, mask=o < n)


@triton.jit
def look_back(x, y, ticket, flag, prefix, n, B: tl.constexpr):
    """Inclusive scan over CTAs: each takes a ticket, waits for its predecessor's prefix, publishes
    its own."""
    t = tl.atomic_add(ticket, 1)
    o = t * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=0)
    before = 0
    if t > 0:
        while tl.atomic_add(flag + t - 1, 0, sem="acquire") == 0:
            pass
        before = tl.load(prefix + t - 1)
    tl.store(prefix + t, before + tl.sum(v, 0))
    tl.debug_barrier()
    tl.atomic_xchg(flag + t, 1, sem="release")
    tl.store(y + o, tl.cumsum(v, 0) + before, mask=o < n)


@triton.jit
def strided_copy(x, y, stride, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o * stride))


@triton.jit
def read_sum(x, y, n, passes, B: tl.constexpr):
    o = tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    for _p in range(passes):
        for i in range(0, n, B):
            acc += tl.load(x + i + o, volatile=True)
    tl.store(y + o, acc)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + i[:, None] * K + (k0 + k)[None, :])
        y = tl.load(b + (k0 + k)[:, None] * N + j[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + i[:, None] * N + j[None, :], acc)


@triton.jit
def squeeze(x, w, part, s, C, S, BC: tl.constexpr, BS: tl.constexpr):
    """s = sigmoid(sum_c w[c] x[c, :]) and part[c] = sum over this CTA's columns."""
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    q = tl.zeros((BC, BS), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        v = tl.load(
            x + c[:, None] * S + o[None, :], mask=(c < C)[:, None] & (o < S)[None, :], other=0.0
        ).to(tl.float32)
        q += v * tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
        tl.store(part + tl.program_id(0) * C + c, tl.sum(v, 1), mask=c < C)
    tl.store(s + o, 1 / (1 + tl.exp(-tl.sum(q, 0))), mask=o < S)


@triton.jit
def scale(x, y, g, s, C, S, BC: tl.constexpr, BS: tl.constexpr):
    """y[c, o] = x[c, o] (g[c] + s[o])"""
    o = tl.program_id(0) * BS + tl.arange(0, BS)
    sv = tl.load(s + o, mask=o < S, other=0.0, cache_modifier=".cg")
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        m = (c < C)[:, None] & (o < S)[None, :]
        v = tl.load(x + c[:, None] * S + o[None, :], mask=m, other=0.0).to(tl.float32)
        gv = tl.load(g + c, mask=c < C, other=0.0, cache_modifier=".cg")
        tl.store(
            y + c[:, None] * S + o[None, :],
            (v * (gv[:, None] + sv[None, :])).to(y.dtype.element_ty),
            mask=m,
        )


@triton.jit
def reuse_after_stream(x, y, z, n, m, B: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Reads x, then y, then x again."""
    o = tl.arange(0, B)
    acc = tl.zeros((B,), tl.float32)
    for i in range(0, n, B):
        acc += tl.load(x + i + o, eviction_policy=FIRST)
    for i in range(0, m, B):
        acc += tl.load(y + i + o, eviction_policy=SECOND)
    for i in range(0, n, B):
        acc += tl.load(x + i + o, eviction_policy=FIRST)
    tl.store(z + o, acc)
