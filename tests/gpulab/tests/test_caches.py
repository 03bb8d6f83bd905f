"""The L1 and L2 models."""

import gpulab
import numpy as np
import pytest
from gpulab import caches
from gpulab.caches import L1Filter, L2Cache


def exact_lru(accesses, capacity):
    """Reference: line by line LRU with sectors; returns DRAM bytes (read, written incl. flush)."""
    from collections import OrderedDict

    lines, read, written = OrderedDict(), 0, 0
    for sector, write in accesses:
        line = sector >> 2
        valid, dirty = lines.pop(line, (set(), set()))
        if write:
            dirty.add(sector)
        elif sector not in valid:
            read += 32
        valid.add(sector)
        lines[line] = (valid, dirty)
        if len(lines) > capacity:
            written += 32 * len(lines.popitem(last=False)[1][1])
    return read, written + 32 * sum(len(d) for _, d in lines.values())


@pytest.mark.parametrize("seed", range(4))
def test_l2_is_lru(seed):
    rng = np.random.default_rng(seed)
    accesses = [
        (int(s), bool(w))
        for s, w in zip(rng.zipf(1.3, 4000) % 600, rng.random(4000) < 0.3, strict=False)
    ]
    cache = L2Cache(40 * 128)
    cache.batch = 1
    for s, w in accesses:
        cache.access(np.array([s]), w)
    cache.flush()
    assert (cache.dram_read, cache.dram_written) == exact_lru(accesses, 40)


def test_l2_batches_stay_close_to_lru():
    rng = np.random.default_rng(9)
    sectors = rng.integers(0, 4000, 20000)
    cache = L2Cache(640 * 128)
    cache.access(sectors, False)
    read, _ = exact_lru([(int(s), False) for s in sectors], 640)
    assert abs(cache.dram_read - read) < 0.02 * read


def test_l1_filter():
    l1 = L1Filter(2, 64 * 32)
    sm, s = np.array([0, 0, 1, 0]), np.array([5, 5, 5, 6])
    assert l1.misses(sm, s).sum() == 3  # the repeat on SM 0 merges
    assert l1.misses(sm, s).sum() == 0
    l1.misses(np.array([0]), np.array([5 + 64]))  # evicts sector 5 of SM 0
    assert list(l1.misses(sm, s)) == [False, True, False, False] or l1.misses(sm, s).sum() == 0


def second_pass(n, l2_bytes):
    import triton_kernels as tk

    x, y = np.ones(n, np.float32), np.zeros(1024, np.float32)
    device = gpulab.H100.scaled(l2_bytes=l2_bytes)
    r = gpulab.triton_launch(tk.read_sum, (1,), x, y, n, 2, B=1024, device=device)
    assert (y == 2 * n / 1024).all()
    return r


def test_second_pass_hits_when_the_buffer_fits_and_misses_when_not():
    pytest.importorskip("triton")
    n = 64 * 1024  # 256 KiB
    fits, misses = second_pass(n, 1 << 20), second_pass(n, 1 << 17)
    assert fits.dram_read_bytes == 4 * n
    assert misses.dram_read_bytes == 8 * n
    assert abs(fits.l2_hit_rate - 0.5) < 0.01 and misses.l2_hit_rate < 0.01


def test_l2_carried_between_launches():
    pytest.importorskip("triton")
    import triton_kernels as tk

    n = 32 * 1024
    x, y, z, w = (np.ones(n, np.float32) for _ in range(4))

    def sequence(l2_bytes):
        l2 = L2Cache(l2_bytes)
        a = gpulab.triton_launch(tk.add, (32,), x, y, z, n, B=1024, launch_options={"l2": l2})
        b = gpulab.triton_launch(tk.add, (32,), z, x, w, n, B=1024, launch_options={"l2": l2})
        return a, b

    a, b = sequence(1 << 20)
    assert a.dram_read_bytes == 8 * n and a.dram_write_bytes == 0 and a.l2_dirty_bytes == 4 * n
    assert b.dram_read_bytes == 0 and b.l2_dirty_bytes == 8 * n  # warm
    a, b = sequence(1 << 15)
    assert b.dram_read_bytes == 8 * n and a.dram_write_bytes > 0  # too small to keep anything
    cold = gpulab.triton_launch(tk.add, (32,), z, x, w, n, B=1024)
    assert cold.dram_read_bytes == 8 * n and cold.dram_write_bytes == 4 * n
    assert cold.roofline(gpulab.H100)["dram_us"] == pytest.approx(12 * n / 3350e9 * 1e6)


@pytest.mark.parametrize("step", [1, 7, 40])
def test_l2_keeps_exactly_the_newest_lines(step):
    cache = L2Cache(160 * 128)
    cache.batch = step
    cache.access(4 * np.arange(1000), False)
    assert list(np.flatnonzero(cache._last)) == list(range(840, 1000))
    cache.access(4 * np.arange(900, 1000), False)
    assert cache.read_hits == 100


def exact_priorities(accesses, capacity):
    """Reference: LRU among the lines of the lowest priority class."""
    lines, read, hits = {}, 0, [0] * 5
    for time, (sector, policy) in enumerate(accesses):
        line = sector >> 2
        kept, valid = lines.get(line, (caches.NORMAL, set()))[0], lines.get(line, (0, set(), 0))[1]
        if sector in valid:
            hits[policy] += 1
        else:
            read += 32
        if policy == caches.NO_ALLOCATE and line not in lines:
            continue
        lines[line] = (policy if policy <= caches.LAST else kept, valid | {sector}, time)
        if len(lines) > capacity:
            del lines[min(lines, key=lambda n: (lines[n][0], lines[n][2]))]
    return read, hits


@pytest.mark.parametrize("seed", range(4))
def test_eviction_priorities(seed):
    rng = np.random.default_rng(seed)
    accesses = [
        (int(s), int(p))
        for s, p in zip(
            rng.zipf(1.3, 3000) % 500,
            rng.choice(5, 3000, p=[0.2, 0.4, 0.1, 0.2, 0.1]),
            strict=False,
        )
    ]
    cache = L2Cache(40 * 128)
    cache.batch = 1
    for i, (s, p) in enumerate(accesses):
        cache.access(np.array([s]), False, p)
        if i % 700 == 699:
            cache._compact()
    read, hits = exact_priorities(accesses, 40)
    assert cache.dram_read == read and list(cache.policies[:, 1]) == hits


def test_evict_last_lines_survive_a_stream_and_evict_first_lines_go_first():
    cache = L2Cache(100 * 128)
    kept, stream = 4 * np.arange(50), 4 * np.arange(1000, 3000)
    cache.access(kept, False, caches.LAST)
    cache.access(stream, False)
    cache.access(kept, False, caches.LAST)
    assert cache.policies[caches.LAST, 1] == 50
    cache = L2Cache(100 * 128)
    cache.access(kept, False)
    cache.access(stream, False, caches.FIRST)
    cache.access(kept, False)
    assert cache.policies[caches.NORMAL, 1] == 50


@pytest.mark.parametrize(
    "first,second,hits", [("", "", 0), ("evict_last", "", 1), ("", "evict_first", 1)]
)
def test_triton_eviction_policies(first, second, hits):
    pytest.importorskip("triton")
    import triton_kernels as tk

    n, m = 8 * 1024, 64 * 1024
    x, y, z = np.ones(n, np.float32), np.ones(m, np.float32), np.zeros(1024, np.float32)
    device = gpulab.H100.scaled(l2_bytes=2 * x.nbytes, l1_bytes=1 << 14)
    r = gpulab.triton_launch(
        tk.reuse_after_stream,
        (1,),
        x,
        y,
        z,
        n,
        m,
        B=1024,
        FIRST=first,
        SECOND=second,
        device=device,
    )
    assert (z == (2 * n + m) / 1024).all()
    assert r.dram_read_bytes == x.nbytes * (2 - hits) + y.nbytes
    if first:
        assert r.l2_policies["evict_last"] == (2 * n // 8, n // 8, 0) and "evict_last" in str(r)
    if second:
        assert r.l2_policies["evict_first"][0] == m // 8


def ptx_policy(qualifiers, make, operand):
    return f"""
.version 8.4
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1)
{{
  .reg .b32 %t, %v; .reg .b64 %a, %b, %p;
  mov.u32 %t, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
  {make}
  mad.wide.u32 %a, %t, 4, %a; mad.wide.u32 %b, %t, 4, %b;
  ld.global{qualifiers}.b32 %v, [%a]{operand};
  st.global{qualifiers}.b32 [%b], %v{operand};
  ret;
}}
"""


@pytest.mark.parametrize(
    "qualifiers,make,operand,names",
    [
        (".L2::evict_last", "", "", {"evict_last"}),
        (".L1::evict_last.L2::evict_first", "", "", {"evict_first"}),
        (".L1::no_allocate", "", "", {"evict_normal"}),
        (".cs", "", "", {"evict_first"}),
        (
            ".L2::cache_hint",
            "createpolicy.fractional.L2::evict_last.b64 %p, 1.0;",
            ", %p",
            {"evict_last"},
        ),
        (
            ".L2::cache_hint",
            "createpolicy.fractional.L2::evict_first.L2::evict_unchanged.b64 %p, 0.5;",
            ", %p",
            {"evict_first", "evict_unchanged"},
        ),
        (".L2::cache_hint", "mov.b64 %p, 0x14F0000000000000;", ", %p", {"evict_last"}),
    ],
)
def test_ptx_forms(qualifiers, make, operand, names):
    x, y = np.arange(1024, dtype=np.int32), np.zeros(1024, np.int32)
    r = gpulab.Module(ptx_policy(qualifiers, make, operand)).launch(
        "k", 1, 1024, [x, y], resident_ctas=1
    )
    assert (y == x).all() and set(r.l2_policies) == names
    assert (
        sum(v[0] for v in r.l2_policies.values())
        == sum(v[2] for v in r.l2_policies.values())
        == 128
    )


def test_l1_no_allocate():
    l1 = L1Filter(1, 64 * 32)
    sm, s = np.zeros(2, int), np.array([5, 6])
    assert (
        l1.misses(sm, s, allocate=False).all()
        and l1.misses(sm, s).all()
        and not l1.misses(sm, s, False).any()
    )
