"""The critical path: chains of dependent instructions, what they wait for, and what they do not."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

H100 = gpulab.H100
SOURCE = r"""
extern "C" __global__ void chase(const int* next, int* out, int n) {  // one load after the other
  int at = threadIdx.x;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = next[at];
  out[threadIdx.x] = at;
}
extern "C" __global__ void chase_l2(const int* next, int* out, int n) {
  int at = 0;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = __ldcg(next + at);
  out[0] = at;
}
extern "C" __global__ void asked_before(const int* next, int* out, int n, int ahead) {
  for (int i = threadIdx.x; i < ahead; i += 32)  // every element's line
    asm volatile("prefetch.global.L2 [%0];" ::"l"(next + 32 * i));
  int at = 0;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = next[at];
  if (threadIdx.x == 0) out[0] = at;
}
extern "C" __global__ void gather(const float* x, float* y) {              // 16 loads at once
  float s = 0;
  #pragma unroll
  for (int i = 0; i < 16; ++i) s += x[i * 1024 + threadIdx.x];
  y[threadIdx.x] = s;
}
extern "C" __global__ void guarded(const float* x, float* y,
                                   int n) {  // branches around loads and their uses
  float v[8];
  #pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = i * 32 + threadIdx.x < n ? sqrtf(x[i * 1024 + threadIdx.x]) : 0.f;
  float s = 0;
  #pragma unroll
  for (int i = 0; i < 8; ++i) s += v[i];
  y[threadIdx.x] = s;
}
template <int unroll> __device__ void accumulate(const float* x, float* y, int n) {
  float s = 0;
  #pragma unroll unroll
  for (int i = 0; i < n; ++i) s += x[i * 1024 + threadIdx.x];
  y[threadIdx.x] = s;
}
extern "C" __global__ void loop1(const float* x, float* y, int n) { accumulate<1>(x, y, n); }
extern "C" __global__ void loop8(const float* x, float* y, int n) { accumulate<8>(x, y, n); }
extern "C" __global__ void arithmetic(float* y, int n) {
  float s = threadIdx.x;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) {
    s = s * 0.5f + 1.f;
    s = s * 0.5f + 1.f;
    s = s * 0.5f + 1.f;
    s = s * 0.5f + 1.f;
  }
  y[threadIdx.x] = s;
}
extern "C" __global__ void roots(float* y) {
  float s = y[threadIdx.x];
  for (int i = 0; i < 8; ++i) asm volatile("ex2.approx.f32 %0, %0;" : "+f"(s));
  y[threadIdx.x] = s;
}
extern "C" __global__ void shuffles(float* y) {
  float s = threadIdx.x;
  for (int i = 16; i > 0; i /= 2) s = __shfl_xor_sync(~0u, s, i);
  y[threadIdx.x] = s;
}
extern "C" __global__ void turns(const int* next, int* out, int n,
                                 int meet) {  // warp 0, then warp 1
  int at = 0, warp = threadIdx.x / 32;
  #pragma unroll 1
  for (int i = 0; warp == 0 && i < n; ++i) at = next[at];
  if (meet) __syncthreads();
  #pragma unroll 1
  for (int i = 0; warp == 1 && i < n; ++i) at = next[1 + at];
  out[threadIdx.x] = at;
}
extern "C" __global__ void through_shared(float* y, int n) {
  __shared__ int buffer[256];
  buffer[threadIdx.x] = (threadIdx.x + 1) % 256;
  __syncthreads();
  int at = threadIdx.x;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = buffer[at];
  y[threadIdx.x] = at;
}
extern "C" __global__ void shared_line(const float* x,
                                       float* y) {  // warp 1 asks for what warp 0 waits for
  float v = 0;
  if (threadIdx.x < 32) { v = __ldcg(x); y[threadIdx.x] = v; }
  else { v = __ldcg(x); y[threadIdx.x] = v + 1.f; }
}
extern "C" __global__ void ring(const int* next, int* out, int n,
                                volatile int* flag) {  // CTA i after CTA i - 1
  int at = 0;
  if (blockIdx.x) { while (flag[blockIdx.x - 1] == 0) {} }
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = next[32 * 8 * blockIdx.x + at];
  out[blockIdx.x] = at;
  __threadfence();
  flag[blockIdx.x] = 1;
}
extern "C" __global__ void signal(const int* x, int* out, volatile int* flag,
                                  int c) {  // after a load, through a store
  if (blockIdx.x) { while (flag[0] == 0) {} }
  int v = x[32 * blockIdx.x];
  if (c) out[blockIdx.x] = v;
  __threadfence();
  if (blockIdx.x == 0) flag[0] = 1;
}
extern "C" __global__ void last_one(const int* next, int* out, int n, unsigned* tickets) {
  int at = 0;
  #pragma unroll 1
  for (int i = 0; i < n * (int)blockIdx.x; ++i) at = next[at];
  out[blockIdx.x] = at;
  __threadfence();
  if (atomicAdd(tickets, 1) == gridDim.x - 1) out[gridDim.x] = at;
}
extern "C" __global__ void queue(const int* next, int* out, unsigned* tickets,
                                 int* done) {  // uneven, not waiting
  int at = 0, n = blockIdx.x ? 2 : 40;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = next[at];
  unsigned t;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(t) : "l"(tickets) : "memory");
  #pragma unroll 1
  for (int i = 0; i < 42 - n; ++i) at = next[at];
  out[t] = at;
  if (threadIdx.x == 0) {  // a relaxed poll waits all the same
    unsigned seen;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(done) : "memory");
    do
      asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 0;"
                   : "=r"(seen)
                   : "l"(done)
                   : "memory");
    while (seen < gridDim.x);
  }
}
extern "C" __global__ void chase_volatile(const int* next, int* out, int n) {     // no polls
  int at = 0;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = *(volatile const int*)(next + at);
  out[0] = at;
}
"""
ASYNC = r"""
#include <cooperative_groups.h>
#include <cuda/barrier>
#include <cuda_pipeline.h>
namespace cg = cooperative_groups;
extern "C" __global__ void copies(const float4* x, float* y, int n) {
  __shared__ float4 buffer[32 * 8];
  #pragma unroll 1
  for (int i = 0; i < n; ++i) {
    __pipeline_memcpy_async(buffer + i * 32 + threadIdx.x, x + i * 32 + threadIdx.x, 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(0);
  y[threadIdx.x] = buffer[threadIdx.x].x;
}
extern "C" __global__ void one_by_one(const float4* x, float* y, int n) {
  __shared__ float4 buffer[32 * 8];
  #pragma unroll 1
  for (int i = 0; i < n; ++i) {
    __pipeline_memcpy_async(buffer + i * 32 + threadIdx.x, x + i * 32 + threadIdx.x, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  y[threadIdx.x] = buffer[threadIdx.x].x;
}
extern "C" __global__ void bulk(const float* x, float* y) {
  __shared__ alignas(128) float buffer[1024];
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  if (threadIdx.x == 0) init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda::memcpy_async(buffer, x, cuda::aligned_size_t<16>(4096), bar);
    bar.wait(bar.arrive());
  }
  __syncthreads();
  y[threadIdx.x] = buffer[threadIdx.x];
}
extern "C" __global__ void meetings(float* y, int n) {                     // of the whole grid
  #pragma unroll 1
  for (int i = 0; i < n; ++i) cg::this_grid().sync();
  y[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}
extern "C" __global__ void neighbours(float* y, int n) {  // a chain through the cluster's memories
  __shared__ int buffer[32];
  auto cluster = cg::this_cluster();
  buffer[threadIdx.x] = (threadIdx.x + 1) % 32;
  cluster.sync();
  const int* other =
      cluster.map_shared_rank(buffer, (cluster.block_rank() + 1) % cluster.num_blocks());
  int at = threadIdx.x;
  #pragma unroll 1
  for (int i = 0; i < n; ++i) at = other[at];
  y[blockIdx.x * 32 + threadIdx.x] = at;
  cluster.sync();
}
"""


@pytest.fixture(scope="module")
def module():
    return cuda_module(SOURCE)


@pytest.fixture(scope="module")
def asynchronous():
    return cuda_module(ASYNC, 90)


def cycles(module, name, grid, block, args, **options):
    return module.launch(
        name, grid, block, args, latency=True, **{"device": H100, **options}
    ).latency_cycles


def chain(n, stride=32):
    """Each element, ``stride`` apart (128 bytes), names the next one."""
    next_ = np.zeros((n + 1) * stride, np.int32)
    next_[: n * stride : stride] = stride * np.arange(1, n + 1)
    return next_


@pytest.mark.parametrize(
    "device", [gpulab.A100, gpulab.H100, gpulab.RTX4090, gpulab.B200], ids=lambda d: d.name
)
def test_pointer_chase(module, device):
    n, out = 50, gpulab.empty(1, np.int32)
    r = module.launch("chase", 1, 1, [chain(n), out, n], device=device, latency=True)
    assert (
        n * device.dram_cycles <= r.latency_cycles <= n * (device.dram_cycles + 12)
        and out[0] == 32 * n
    )
    line = r.roofline()
    assert line["latency_us"] == pytest.approx(r.latency_cycles / device.clock_mhz)
    assert (
        line["latency_us"] == r.roofline(device.scaled(clock_mhz=1000))["latency_us"]
    )  # of its own device
    assert line["binds"] == "latency" and line["bound_us"] == line["latency_us"]


def test_a_prefetch_brings_a_line_to_the_l2(module):
    """What was asked for before takes as long as the L2, but no access to DRAM more."""
    n, out = 40, gpulab.empty(1, np.int32)

    def run(ahead):
        args = [chain(n), out, n, ahead]
        r = module.launch("asked_before", 1, 32, args, device=H100, latency=True)
        assert out[0] == 32 * n
        return r

    without, with_all = run(0), run(n)
    # The first element is still on its way.
    saved = (n - 1) * (H100.dram_cycles - H100.l2_cycles)
    assert abs(without.latency_cycles - with_all.latency_cycles - saved) <= 60
    assert without.dram_read_bytes == 32 * n  # a sector of each line
    assert with_all.dram_read_bytes == 128 * n
    assert with_all.l2_read_sectors == without.l2_read_sectors == n


def test_a_prefetch_beyond_the_memory_is_found(module):
    with pytest.raises(gpulab.OutOfBounds, match="asked_before"):
        module.launch("asked_before", 1, 32, [chain(3), gpulab.empty(1, np.int32), 3, 32])


def test_chase_in_the_caches(module):
    n, ring, out = 60, chain(3), gpulab.empty(1, np.int32)
    ring[3 * 32] = 0  # 4 lines, again and again
    l1 = cycles(module, "chase", 1, 1, [ring, out, n])
    assert 4 * 479 + 56 * 38 <= l1 <= 4 * 479 + 56 * 38 + 12 * n
    l2 = cycles(module, "chase_l2", 1, 1, [ring, out, n])
    assert 4 * 479 + 56 * 219 <= l2 <= 4 * 479 + 56 * 219 + 12 * n


def test_warm_l2(module):
    n, l2, out, x = 20, gpulab.L2Cache(1 << 20), gpulab.empty(1, np.int32), chain(20)
    cold, warm = (cycles(module, "chase", 1, 1, [x, out, n], l2=l2) for _ in range(2))
    assert cold - warm == n * (479 - 219)


def test_independent_loads(module):
    c = cycles(module, "gather", 1, 1024, [np.ones(1 << 14, np.float32), gpulab.empty(1024)])
    assert 479 + 16 * 4 <= c <= 479 + 16 * 4 + 40  # all at once, then a sum


@pytest.mark.parametrize("threads, n", [(32, 256), (32, 100), (48, 300), (7, 5)])
def test_loads_behind_branches(module, threads, n):
    """ptxas makes predicates of such branches, so they do not keep the loads apart."""
    y = gpulab.empty(threads)
    c = cycles(module, "guarded", 1, threads, [np.ones(1 << 13, np.float32), y, n])
    assert 479 + 20 <= c <= 479 + 20 + 200
    assert (y == [sum(i * 32 + t < n for i in range(8)) for t in range(threads)]).all()


def test_loads_of_a_loop(module):
    x, y = np.ones(32 * 1024, np.float32), gpulab.empty(1024)
    one, eight = (cycles(module, f"loop{k}", 1, 1024, [x, y, 32]) for k in (1, 8))
    assert 32 * 479 <= one <= 32 * (479 + 16)  # a sum waits for its load before the next iteration
    assert 4 * 479 <= eight <= 4 * (479 + 8 * 4 + 30) + 50
    assert cycles(module, "loop1", 1, 1024, [x, y, 0]) < 100


def test_arithmetic(module):
    y = gpulab.empty(256)
    short, long = (cycles(module, "arithmetic", 1, 256, [y, n]) for n in (100, 300))
    assert long - short == 200 * 4 * H100.alu_cycles
    assert (
        cycles(module, "arithmetic", 1, 256, [y, 100], device=H100.scaled(alu_cycles=6))
        > 1.4 * short
    )
    c = cycles(module, "roots", 1, 32, [np.ones(32, np.float32)])
    assert 479 + 8 * H100.sfu_cycles <= c <= 479 + 8 * H100.sfu_cycles + 20
    c = cycles(module, "shuffles", 1, 32, [gpulab.empty(32)])
    assert 5 * H100.shuffle_cycles <= c <= 5 * H100.shuffle_cycles + 20


def test_issue_slots_of_one_warp(module):
    """A warp cannot issue faster than one instruction per cycle."""
    r = module.launch(
        "gather",
        1,
        32,
        [np.ones(1 << 14, np.float32), gpulab.empty(32)],
        latency=True,
        device=H100.scaled(alu_cycles=0, l1_cycles=0, l2_cycles=0, dram_cycles=0),
    )
    assert r.sm_issued <= r.latency_cycles <= r.sm_issued + 2


def test_barrier_waits_for_the_last(module):
    n, x, out = 20, chain(20), gpulab.empty(64, np.int32)
    x[1::32] = x[::32]  # warp 1 walks through the same lines, which are in the L1
    apart, met = (cycles(module, "turns", 1, 64, [x, out, n, meet]) for meet in (0, 1))
    assert n * 479 <= apart <= n * (479 + 12)
    late = (n - 1) * 479  # the barrier waits for instructions, not for their results
    assert (
        late + H100.barrier_cycles + n * 38
        <= met
        <= n * (479 + 12) + H100.barrier_cycles + n * (38 + 16) + 20
    )


def test_shared_memory_chain(module):
    y = gpulab.empty(256)
    short, long = (cycles(module, "through_shared", 1, 256, [y, n]) for n in (10, 60))
    assert 50 * 29 <= long - short <= 50 * (29 + 12)


def test_a_line_on_its_way_is_not_there_yet(module):
    """Not even for a warp that runs later in the emulation."""
    c = cycles(module, "shared_line", 1, 64, [np.ones(32, np.float32), gpulab.empty(64)])
    assert 479 <= c <= 479 + 20


def test_ctas_of_a_slot_follow_one_another(module):
    n, out = 10, gpulab.empty(8, np.int32)
    times = []
    for resident in (8, 4, 1):
        with_l1_cold = H100.scaled(sms=8)
        times.append(
            cycles(
                module,
                "chase",
                8,
                1,
                [chain(n), out, n],
                resident_ctas=resident,
                device=with_l1_cold,
            )
        )
    assert n * 479 <= times[0] <= n * 500
    assert times[0] < times[1] < times[2]
    assert times[2] >= n * 479 + 7 * n * 38  # seven more, through the L1


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_waiting_for_another_cta(module, seed):
    """Each CTA starts its chain when the one before has set its flag, however often it has polled
    until then."""
    n, ctas = 8, 4
    x = np.concatenate([chain(n - 1)] * ctas)
    c = cycles(
        module,
        "ring",
        ctas,
        1,
        [x, gpulab.empty(ctas, np.int32), n, np.zeros(ctas, np.int32)],
        seed=seed,
    )
    polls = (ctas - 1) * H100.l2_cycles
    assert ctas * n * 479 + polls <= c <= ctas * n * (479 + 16) + (ctas - 1) * (479 + 40) + 40


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_fence_comes_after_the_stores_before_it(module, seed):
    arguments = [np.zeros(64, np.int32), gpulab.empty(2, np.int32), np.zeros(1, np.int32), 1]
    c = cycles(module, "signal", 2, 1, arguments, seed=seed)
    assert 2 * 479 + 219 <= c <= 2 * 479 + 479 + 100


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_last_ticket_comes_after_all(module, seed):
    n, ctas, out = 5, 6, gpulab.empty(7, np.int32)
    c = cycles(
        module, "last_one", ctas, 1, [chain(n * ctas), out, n, np.zeros(1, np.uint32)], seed=seed
    )
    longest = n * (ctas - 1)
    assert longest * 479 + 219 <= c <= longest * (479 + 16) + 479 + 60


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_relaxed_tickets_do_not_wait(module, seed):
    ring, arguments = (
        chain(41),
        [gpulab.empty(8, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)],
    )
    ring[41 * 32] = 0
    c = cycles(module, "queue", 8, 1, [ring, *arguments], seed=seed, device=H100.scaled(sms=8))
    assert 42 * 479 <= c <= 42 * (479 + 16) + 219 + 479 + 479 + 150


def test_volatile_chain_is_no_polling(module):
    c = cycles(module, "chase_volatile", 1, 1, [chain(30), gpulab.empty(1, np.int32), 30])
    assert 30 * 479 <= c <= 30 * (479 + 12)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_grid_barrier(asynchronous, seed):
    y = gpulab.empty(8 * 64)
    short, long = (cycles(asynchronous, "meetings", 8, 64, [y, n], seed=seed) for n in (1, 6))
    each = (long - short) / 5  # an atomic, the others' poll, two barriers, some arithmetic
    assert 219 + 2 * 20 <= each <= 2 * 219 + 2 * 20 + 150


def test_asynchronous_copies(asynchronous):
    x, y = np.ones(32 * 8 * 4, np.float32), gpulab.empty(32)
    one, eight = (cycles(asynchronous, "copies", 1, 32, [x, y, n]) for n in (1, 8))
    assert (
        479 + 29 <= one <= 479 + 29 + 60 and one <= eight <= one + 7 * 30
    )  # they are on their way together
    c = cycles(asynchronous, "one_by_one", 1, 32, [x, y, 8])
    assert 8 * 479 + 29 <= c <= 8 * (479 + 30) + 60


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_bulk_copy(asynchronous, seed):
    c = cycles(
        asynchronous, "bulk", 1, 32, [np.ones(1024, np.float32), gpulab.empty(32)], seed=seed
    )
    assert 479 + 2 * H100.barrier_cycles + 29 <= c <= 479 + 2 * H100.barrier_cycles + 29 + 200


def test_distributed_shared_memory(asynchronous):
    y = gpulab.empty(4 * 32)
    short, long = (cycles(asynchronous, "neighbours", 4, 32, [y, n], cluster=4) for n in (2, 12))
    assert 10 * 180 <= long - short <= 10 * (180 + 16)
    assert short >= 2 * H100.cluster_barrier_cycles + 2 * 180
    alone = cycles(asynchronous, "neighbours", 4, 32, [y, 12], cluster=1)
    assert alone < long - 10 * 140  # its own memory


def test_results_and_counters_stay_the_same(module):
    x, y = (
        np.random.default_rng(0).random(1 << 14, np.float32),
        [gpulab.empty(1024) for _ in range(2)],
    )
    plain, timed = (
        module.launch("gather", 1, 1024, [x, v], latency=latency)
        for v, latency in zip(y, (False, True), strict=False)
    )
    assert (y[0] == y[1]).all() and plain.latency_cycles == 0 < timed.latency_cycles
    a, b = plain.roofline(), timed.roofline()
    assert "latency_us" not in a and b.pop("latency_us") > 0
    assert {k: v for k, v in a.items() if k not in ("binds", "bound_us")} == {
        k: v for k, v in b.items() if k not in ("binds", "bound_us")
    }


def test_triton_and_intercept():
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    import host_code as host
    import triton_kernels as tk

    x = torch.randn(4096)
    with gpulab.intercept(latency=True) as lab:
        host.add(x, x)
    with gpulab.intercept() as plain:
        host.add(x, x)
    assert lab.reports[0].latency_cycles >= 479 and plain.reports[0].latency_cycles == 0
    n = 1024
    r = gpulab.triton_launch(
        tk.add,
        (1,),
        np.ones(n, np.float32),
        np.ones(n, np.float32),
        gpulab.empty(n),
        n,
        B=1024,
        latency=True,
    )
    assert 479 <= r.latency_cycles <= 479 + 60
