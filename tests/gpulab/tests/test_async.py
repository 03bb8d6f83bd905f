"""sm_90 asynchronous copies: correct kernels pass on every schedule, planted faults are found."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

SEEDS = [None, 0, 1, 2, 3]
SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda/barrier>
#include <cuda/ptx>
namespace cg = cooperative_groups;
namespace ptx = cuda::ptx;
using block_barrier = cuda::barrier<cuda::thread_scope_block>;

// ---- the library interfaces ----
extern "C" __global__ void library_bulk(const float* x, float* y) {
  __shared__ alignas(128) float s[1024];
  #pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ block_barrier bar;
  if (threadIdx.x == 0) { init(&bar, blockDim.x); ptx::fence_proxy_async(ptx::space_shared); }
  __syncthreads();
  block_barrier::arrival_token token;
  if (threadIdx.x == 0) {
    cuda::device::memcpy_async_tx(s, x + blockIdx.x * 1024, cuda::aligned_size_t<16>(sizeof(s)),
                                  bar);
    token = cuda::device::barrier_arrive_tx(bar, 1, sizeof(s));
  } else token = bar.arrive();
  bar.wait(std::move(token));
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] *= 2;
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, y + blockIdx.x * 1024, s, sizeof(s));
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
  }
}

extern "C" __global__ void library_memcpy_async(const float* x, float* y) {
  __shared__ alignas(128) float s[1024];
  __shared__ block_barrier bar;
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  cuda::memcpy_async(s + threadIdx.x * 4, x + blockIdx.x * 1024 + threadIdx.x * 4,
                     sizeof(float) * 4, bar);
  bar.arrive_and_wait();
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) y[blockIdx.x * 1024 + i] = s[1023 - i];
}

// ---- inline PTX ----
__device__ unsigned at(const void* p) { return __cvta_generic_to_shared(p); }
__device__ void mb_init(uint64_t* b, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(b)), "r"(n) : "memory");
}
__device__ void mb_expect(uint64_t* b, int n) {
  asm volatile(
      "{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(at(b)), "r"(n)
      : "memory");
}
__device__ void mb_arrive(uint64_t* b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(at(b)) : "memory");
}
__device__ bool mb_try(uint64_t* b, int parity) {
  int ok;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; "
      "}"
      : "=r"(ok)
      : "r"(at(b)), "r"(parity)
      : "memory");
  return ok;
}
__device__ void mb_wait(uint64_t* b, int parity) { while (!mb_try(b, parity)) {} }
__device__ void load(void* s, const void* g, int n, uint64_t* b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(at(s)),
      "l"(g), "r"(n), "r"(at(b))
      : "memory");
}
__device__ void store(void* g, const void* s, int n) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(g), "r"(at(s)),
               "r"(n)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int n>
__device__ void wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
}
__device__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A producer warp fills a ring of stages; consumer warps add the tiles up.  fault: which rule to
// break.
enum { OK, NO_WAIT, NO_EMPTY, SHORT, LONG, NO_INIT_SYNC, WRONG_PARITY };
template <int fault> __device__ void ring(const float* x, float* y, int tiles) {
  constexpr int stages = 3, width = 64;
  __shared__ alignas(128) float s[stages][width];
  __shared__ alignas(8) uint64_t full[stages], empty[stages];
  if (threadIdx.x == 0)
    for (int i = 0; i < stages; i++) {
      mb_init(full + i, 1);
      mb_init(empty + i, width);
    }
  if (fault != NO_INIT_SYNC) __syncthreads();
  if (threadIdx.x >= width) {
    if (threadIdx.x == width) for (int t = 0; t < tiles; t++) {
      int i = t % stages, round = t / stages;
      if (fault != NO_EMPTY) mb_wait(empty + i, (round & 1) ^ 1);
      mb_expect(full + i, fault == LONG ? 512 : 256);
      load(s[i], x + (blockIdx.x * tiles + t) * width, fault == SHORT ? 128 : 256, full + i);
    }
  } else {
    float acc = 0;
    for (int t = 0; t < tiles; t++) {
      int i = t % stages, round = t / stages;
      if (fault != NO_WAIT) mb_wait(full + i, (round & 1) ^ (fault == WRONG_PARITY));
      acc += s[i][threadIdx.x];
      mb_arrive(empty + i);
    }
    y[blockIdx.x * width + threadIdx.x] = acc;
  }
  __syncthreads();
}
#define RING(name, fault) \
  extern "C" __global__ void name(const float* x, float* y, int t) { ring<fault>(x, y, t); }
RING(ring_ok, OK) RING(ring_no_wait, NO_WAIT) RING(ring_no_empty, NO_EMPTY) RING(ring_short, SHORT)
RING(ring_long, LONG) RING(ring_no_init_sync, NO_INIT_SYNC) RING(ring_wrong_parity, WRONG_PARITY)

// Two buffers written and sent out by bulk stores.
enum { NO_FENCE = 1, NO_READ_WAIT, NO_LAST_WAIT, UNWRITTEN };
template <int fault> __device__ void send(float* y, int tiles) {
  __shared__ alignas(128) float s[2][128];
  for (int t = 0; t < tiles; t++) {
    if (fault != NO_READ_WAIT && threadIdx.x == 0) wait_read<1>();
    __syncthreads();
    if (fault != UNWRITTEN || threadIdx.x < 100) s[t % 2][threadIdx.x] = 1000 * t + threadIdx.x;
    if (fault != NO_FENCE) proxy_fence();
    __syncthreads();
    if (threadIdx.x == 0) { store(y + (blockIdx.x * tiles + t) * 128, s[t % 2], 512); commit(); }
  }
  if (fault != NO_LAST_WAIT && threadIdx.x == 0) wait_read<0>();
}
#define SEND(name, fault) extern "C" __global__ void name(float* y, int t) { send<fault>(y, t); }
SEND(send_ok, OK) SEND(send_no_fence, NO_FENCE) SEND(send_no_read_wait, NO_READ_WAIT)
SEND(send_no_last_wait, NO_LAST_WAIT) SEND(send_unwritten, UNWRITTEN)

// Every CTA of a cluster sends one value per thread to its right neighbour.
template <bool wait> __device__ void neighbour(const int* x, int* y) {
  __shared__ alignas(16) int box[64];
  __shared__ alignas(8) uint64_t bar;
  auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) { mb_init(&bar, 1); mb_expect(&bar, sizeof(box)); }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  cluster.sync();
  int to = (cluster.block_rank() + 1) % cluster.num_blocks();
  unsigned a = at(&box[threadIdx.x]), b = at(&bar), ra, rb;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(ra) : "r"(a), "r"(to));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(rb) : "r"(b), "r"(to));
  int i = blockIdx.x * 64 + threadIdx.x;
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(ra),
      "r"(x[i]), "r"(rb)
      : "memory");
  if (wait) mb_wait(&bar, 0);
  y[i] = box[threadIdx.x];
  cluster.sync();
}
extern "C" __global__ void neighbour_ok(const int* x, int* y) { neighbour<true>(x, y); }
extern "C" __global__ void neighbour_no_wait(const int* x, int* y) { neighbour<false>(x, y); }

extern "C" __global__ void multicast(const float* x, float* y) {
  __shared__ alignas(128) float s[64];
  __shared__ alignas(8) uint64_t bar;
  auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) { mb_init(&bar, 1); mb_expect(&bar, sizeof(s)); }
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0)
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(at(s)),
        "l"(x + blockIdx.x * 64), "r"(256), "r"(at(&bar)), "h"((short)0xB)
        : "memory");
  if (cluster.block_rank() != 2) mb_wait(&bar, 0);
  y[blockIdx.x * 64 + threadIdx.x] = cluster.block_rank() != 2 ? s[threadIdx.x] : 0;
  cluster.sync();
}

extern "C" __global__ void tokens(
    int* y) {  // arrival tokens, test_wait, counts, drop, pending_count
  __shared__ alignas(8) uint64_t bar;
  if (threadIdx.x == 0) mb_init(&bar, 64);
  __syncthreads();
  uint64_t t; int p, pending;
  if (threadIdx.x < 32)
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(t) : "r"(at(&bar)) : "memory");
  if (threadIdx.x == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
        : "=r"(p)
        : "r"(at(&bar)), "l"(t)
        : "memory");
    y[0] = p;
    asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(pending) : "l"(t));
    y[1] = pending > 0;
  }
  __syncthreads();
  if (threadIdx.x == 32)
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1], 31;"
                 : "=l"(t)
                 : "r"(at(&bar))
                 : "memory");
  if (threadIdx.x == 33)
    asm volatile("mbarrier.arrive_drop.shared::cta.b64 %0, [%1];"
                 : "=l"(t)
                 : "r"(at(&bar))
                 : "memory");
  __syncthreads();
  if (threadIdx.x == 33) {
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
        : "=r"(p)
        : "r"(at(&bar)), "l"(t)
        : "memory");
    y[2] = p;
  }
  if (threadIdx.x < 63) mb_arrive(&bar);                  // one fewer is expected now
  y[3 + threadIdx.x] = mb_try(&bar, 1);
}
extern "C" __global__ void too_many(int n) {
  __shared__ alignas(8) uint64_t bar;
  if (threadIdx.x == 0) mb_init(&bar, 16);
  __syncthreads();
  if (threadIdx.x < n) mb_arrive(&bar);
}
extern "C" __global__ void no_init(int* y) { __shared__ alignas(8) uint64_t bar; mb_arrive(&bar); }
extern "C" __global__ void bulk_args(const float* x, float* y, int shift, int bytes) {
  __shared__ alignas(128) float s[256];
  __shared__ alignas(8) uint64_t bar;
  mb_init(&bar, 1);
  mb_expect(&bar, bytes);
  load(s, x + shift, bytes, &bar);
  mb_wait(&bar, 0);
  y[0] = s[0];
}
extern "C" __global__ void never_waited(const float* x) {
  __shared__ alignas(128) float s[64];
  __shared__ alignas(8) uint64_t bar;
  mb_init(&bar, 1);
  mb_expect(&bar, 256);
  load(s, x, 256, &bar);
}
extern "C" __global__ void unwritten_shared(float* y, int n) {
  __shared__ float s[64];
  if (threadIdx.x < n) s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void dependent(float* y) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  y[threadIdx.x] = 3;
}
"""


@pytest.fixture(scope="module")
def cuda():
    return cuda_module(SOURCE, 90)


def ring(cuda, name, seed=None, **options):
    x, y = (
        np.random.default_rng(0).standard_normal((4, 10, 64)).astype(np.float32),
        gpulab.empty((4, 64)),
    )
    report = cuda.launch(name, 4, 96, [x, y, 10], seed=seed, **options)
    return report, np.allclose(y, x.sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", ["library_bulk", "library_memcpy_async"])
def test_library_interfaces(cuda, kernel, seed):
    x, y = np.random.default_rng(0).standard_normal(4096).astype(np.float32), gpulab.empty(4096)
    r = cuda.launch(kernel, 4, 256, [x, y], seed=seed)
    bulk = kernel == "library_bulk"
    assert (np.asarray(y) == (2 * x if bulk else x.reshape(4, -1)[:, ::-1].reshape(-1))).all()
    assert r.global_load_bytes == r.global_store_bytes == 4 * 4096 and r.load_efficiency == (
        1 if bulk else 0.25
    )
    assert r.dram_read_bytes == r.dram_write_bytes == 4 * 4096


@pytest.mark.parametrize("seed", SEEDS)
def test_ring_of_stages(cuda, seed):
    report, correct = ring(cuda, "ring_ok", seed)
    assert correct and report.load_widths == {256: 40}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "name,error,text",
    [
        ("ring_no_wait", gpulab.UninitialisedRead, "still under way"),
        (
            "ring_no_empty",
            (gpulab.SharedRace, gpulab.AsyncError),
            "no barrier in between|more bytes|arrival",
        ),
        ("ring_long", gpulab.Deadlock, "256 bytes missing"),
        ("ring_no_init_sync", (gpulab.SharedRace, gpulab.AsyncError), "initialised|wrote"),
    ],
)
def test_ring_faults(cuda, name, error, text, seed):
    with pytest.raises(error, match=text):
        ring(cuda, name, seed, deadlock_rounds=100)


@pytest.mark.parametrize("name", ["ring_short", "ring_wrong_parity"])
def test_more_ring_faults(cuda, name):
    with pytest.raises(gpulab.KernelFault):
        ring(cuda, name, deadlock_rounds=100)


@pytest.mark.parametrize("seed", SEEDS)
def test_bulk_stores(cuda, seed):
    y = gpulab.empty((3, 5, 128))
    r = cuda.launch("send_ok", 3, 128, [y, 5], seed=seed)
    assert (np.asarray(y) == 1000 * np.arange(5)[:, None] + np.arange(128)).all()
    assert r.store_widths == {512: 15} and r.store_efficiency == 1


@pytest.mark.parametrize(
    "name,error,text",
    [
        ("send_no_fence", gpulab.AsyncError, "no fence.proxy.async"),
        ("send_no_read_wait", gpulab.AsyncError, "overwritten before the copy"),
        ("send_no_last_wait", gpulab.AsyncError, "exits while its bulk copy"),
        ("send_unwritten", gpulab.UninitialisedRead, "never-written shared memory"),
    ],
)
def test_bulk_store_faults(cuda, name, error, text):
    with pytest.raises(error, match=text):
        cuda.launch(name, 3, 128, [np.zeros((3, 5, 128), np.float32), 5], seed=None)


def test_late_read_of_a_bulk_store_source_gives_wrong_data(cuda):
    y = np.zeros((3, 5, 128), np.float32)
    cuda.launch("send_no_read_wait", 3, 128, [y, 5], seed=None, checks=False)
    assert not (y == 1000 * np.arange(5)[:, None] + np.arange(128)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_st_async_to_a_neighbour(cuda, seed):
    x, y = np.arange(8 * 64, dtype=np.int32), np.zeros(8 * 64, np.int32)
    cuda.launch("neighbour_ok", 8, 64, [x, y], cluster=4, seed=seed)
    assert (y.reshape(2, 4, 64) == np.roll(x.reshape(2, 4, 64), 1, axis=1)).all()


def test_st_async_needs_the_wait(cuda):
    x, y = np.arange(8 * 64, dtype=np.int32), np.zeros(8 * 64, np.int32)
    with pytest.raises(gpulab.UninitialisedRead):
        cuda.launch("neighbour_no_wait", 8, 64, [x, y], cluster=4, seed=None)
    cuda.launch("neighbour_no_wait", 8, 64, [x, y], cluster=4, seed=None, checks=False)
    assert (y == np.int32(-0x34343435)).all()  # what was there before: garbage


@pytest.mark.parametrize("seed", SEEDS)
def test_multicast(cuda, seed):
    x, y = np.arange(8 * 64, dtype=np.float32), np.zeros((2, 4, 64), np.float32)
    cuda.launch("multicast", 8, 64, [x, y], cluster=4, seed=seed)
    expect = np.repeat(x.reshape(2, 4, 64)[:, :1], 4, axis=1)
    expect[:, 2] = 0
    assert (y == expect).all()


def test_tokens_counts_and_drop(cuda):
    y = np.full(3 + 64, -1, np.int32)
    cuda.launch("tokens", 1, 64, [y])
    assert list(y[:3]) == [0, 1, 1] and (y[3:] == 1).all()


def test_misuse_of_mbarriers(cuda):
    cuda.launch("too_many", 1, 32, [16])
    with pytest.raises(
        gpulab.AsyncError, match=r"17 arrival\(s\) at an mbarrier that waits for 16"
    ):
        cuda.launch("too_many", 1, 32, [17])
    with pytest.raises(gpulab.AsyncError, match="no mbarrier has been initialised"):
        cuda.launch("no_init", 1, 32, [np.zeros(1, np.int32)])


def test_bulk_arguments(cuda):
    x, y = np.arange(256, dtype=np.float32), np.zeros(4, np.float32)
    cuda.launch("bulk_args", 1, 1, [x, y, 4, 64])
    assert y[0] == 4
    for shift, size, error in [
        (1, 64, gpulab.MisalignedAccess),
        (0, 60, gpulab.MisalignedAccess),
        (252, 32, gpulab.OutOfBounds),
        (0, 2048, gpulab.OutOfBounds),
    ]:
        with pytest.raises(error, match=r"cp.async.bulk"):
            cuda.launch("bulk_args", 1, 1, [x, y, shift, size])
    with pytest.raises(gpulab.UninitialisedRead, match="'arg0'"):
        cuda.launch("bulk_args", 1, 1, [gpulab.empty(256), y, 0, 64])
    with pytest.raises(gpulab.AsyncError, match="nothing waited on the mbarrier"):
        cuda.launch("never_waited", 1, 1, [x], seed=None)


def test_never_written_shared_memory(cuda):
    y = np.zeros(64, np.float32)
    cuda.launch("unwritten_shared", 1, 64, [y, 64])
    with pytest.raises(gpulab.UninitialisedRead, match="shared memory byte 252"):
        cuda.launch("unwritten_shared", 1, 64, [y, 63])
    cuda.launch("unwritten_shared", 1, 64, [y, 63], shared_init=False)


def test_griddepcontrol_does_nothing(cuda):
    y = np.zeros(32, np.float32)
    cuda.launch("dependent", 1, 32, [y])
    assert (y == 3).all()
