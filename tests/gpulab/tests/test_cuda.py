"""CUDA C++ kernels compiled with nvcc, against numpy."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

RNG = np.random.default_rng(11)

SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace cg = cooperative_groups;

extern "C" __global__ void block_sum(const float* x, float* y, int n) {
  __shared__ float part[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int o = 16; o; o >>= 1) v += __shfl_down_sync(~0u, v, o);
    if (threadIdx.x == 0) atomicAdd(y, v);
  }
}

extern "C" __global__ void warp_ops(const int* x, int* y) {
  int lane = threadIdx.x, v = x[lane];
  int* o = y + lane * 12;
  o[0] = __shfl_sync(~0u, v, lane * 7 % 32);
  o[1] = __shfl_up_sync(~0u, v, 3);
  o[2] = __shfl_down_sync(~0u, v, 5, 8);
  o[3] = __shfl_xor_sync(~0u, v, 9);
  o[4] = __ballot_sync(~0u, v & 1);
  o[5] = __any_sync(~0u, v > 90);
  o[6] = __all_sync(~0u, v >= 0);
  o[7] = __match_any_sync(~0u, v & 3);
  o[8] = __reduce_add_sync(~0u, v);
  o[9] = __reduce_max_sync(~0u, v);
  if (lane % 3 == 0) o[10] = __activemask();          // diverged: only some lanes are here
  if (lane < 20) o[11] = __shfl_sync(0xFFFFF, v, 19 - lane);
}

extern "C" __global__ void divergent(const int* x, int* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = x[i], steps = 0;
  while (v != 1 && steps < 1000) { v = v & 1 ? 3 * v + 1 : v / 2; steps++; }       // Collatz
  y[i] = steps;
}

extern "C" __global__ void half2_ops(const __half2* a, const __half2* b, __half2* c,
                                     const __nv_bfloat162* d, __nv_bfloat162* e, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  c[i] = __hfma2(a[i], b[i], __hmax2(a[i], b[i]));
  e[i] = __hadd2(__hmul2(d[i], d[i]), d[i]);
}

extern "C" __global__ void vector_copy(const uint4* x, uint4* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

extern "C" __global__ void atomics(int* y, float* f, unsigned long long* big, __half2* h) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&y[0], i); atomicMax(&y[1], i); atomicMin(&y[2], -i); atomicOr(&y[3], 1 << (i % 31));
  y[5 + atomicAdd(&y[4], 1)] = i;                      // every thread gets its own slot
  atomicAdd(f, 0.5f);
  atomicAdd(big, 1ull << 33);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  int old = f[1], seen;                                // float multiply with compare-and-swap
  do {
    seen = old;
    old = atomicCAS((int*)f + 1, seen, __float_as_int(__int_as_float(seen) * 2.f));
  } while (old != seen);
}

extern "C" __global__ void shared_histogram(const unsigned char* x, int* y, int n) {
  __shared__ int h[16];
  if (threadIdx.x < 16) h[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) atomicAdd(&h[x[i] & 15], 1);
  int odd = __syncthreads_count(threadIdx.x & 1);
  if (threadIdx.x < 16) y[threadIdx.x] = h[threadIdx.x];
  if (threadIdx.x == 0) y[16] = odd;
}

struct Shape { int rows; short flag; float scale[3]; };
__constant__ float table[4] = {1.f, 10.f, 100.f, 1000.f};
__device__ int launches;
extern "C" __global__ void by_value(Shape s, double d, float* y) {
  int i = threadIdx.x;
  float local[8];
  for (int k = 0; k < 8; k++) local[k] = k * s.scale[k % 3];
  y[i] = local[(i * s.rows) & 7] + table[i & 3] + (float)d + s.flag;
  if (i == 0) atomicAdd(&launches, 1);
}

extern "C" __global__ void grid_sync(const float* x, float* sum, float* y, int n) {
  auto grid = cg::this_grid();
  for (int i = grid.thread_rank(); i < n; i += grid.size()) atomicAdd(sum, x[i]);
  grid.sync();
  for (int i = grid.thread_rank(); i < n; i += grid.size()) y[i] = x[i] / *sum;
}

extern "C" __global__ void lane_zero_waits(int* flag, int* y) {
  if (blockIdx.x == 1) { __threadfence(); atomicExch(flag, 42); return; }
  int v = 0;
  if (threadIdx.x == 0) while ((v = atomicAdd(flag, 0)) == 0) {}
  y[threadIdx.x] = __shfl_sync(~0u, v, 0);             // the other lanes must wait for lane 0
}
"""

CLUSTER = r"""
#include <cooperative_groups.h>
namespace cg = cooperative_groups;

extern "C" __global__ void __cluster_dims__(4, 1, 1) cluster_sum(const float* x, float* y, int n) {
  __shared__ float part[32];
  __shared__ float total;
  auto cluster = cg::this_cluster();
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    v = 0;
    for (int i = 0; i < blockDim.x / 32; i++) v += part[i];
    total = v;
  }
  cluster.sync();
  if (threadIdx.x == 0) {
    v = 0;
    for (int r = 0; r < cluster.num_blocks(); r++) v += *cluster.map_shared_rank(&total, r);
    y[blockIdx.x] = v;
  }
  cluster.sync();
}

template <bool first, bool last>
__device__ void ring(int* y) {  // write into the next CTA, then read own
  __shared__ int s[64];
  auto cluster = cg::this_cluster();
  int rank = cluster.block_rank();
  s[threadIdx.x] = -1;
  if (first) cluster.sync();
  cluster.map_shared_rank(s, (rank + 1) % cluster.num_blocks())[threadIdx.x] =
      1000 * rank + threadIdx.x;
  if (last) cluster.sync(); else __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void ring_ok(int* y) { ring<true, true>(y); }
extern "C" __global__ void ring_no_first(int* y) { ring<false, true>(y); }
extern "C" __global__ void ring_no_last(int* y) { ring<true, false>(y); }

extern "C" __global__ void remote_atomic(int* y) {
  __shared__ int s;
  auto cluster = cg::this_cluster();
  if (threadIdx.x == 0) s = 0;
  cluster.sync();
  atomicAdd(cluster.map_shared_rank(&s, 0), 1);
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) y[blockIdx.x / cluster.num_blocks()] = s;
}

extern "C" __global__ void leaves_early(int* y) {
  __shared__ int s;
  auto cluster = cg::this_cluster();
  s = 5;
  cluster.sync();
  if (cluster.block_rank() == 1) return;
  for (int i = 0; i < 50; i++) y[threadIdx.x] = *cluster.map_shared_rank(&s, 1);
}

extern "C" __global__ void ranks(int* y) {
  auto cluster = cg::this_cluster();
  int i = blockIdx.x + gridDim.x * blockIdx.y;
  y[4 * i] = cluster.block_rank(); y[4 * i + 1] = cluster.num_blocks();
  y[4 * i + 2] = cluster.block_index().x; y[4 * i + 3] = cluster.block_index().y;
}
"""


@pytest.fixture(scope="module", params=[80, 90])
def cuda(request):
    return cuda_module(SOURCE, request.param)


@pytest.fixture(scope="module")
def clusters():
    return cuda_module(CLUSTER, 90)


@pytest.mark.parametrize("seed", [None, 0])
def test_block_sum(cuda, seed):
    x, y = RNG.standard_normal(5003).astype(np.float32), np.zeros(1, np.float32)
    cuda.launch("block_sum", 6, 160, [x, y, 5003], seed=seed)
    assert abs(y[0] - x.astype(np.float64).sum()) < 1e-3


def test_warp_operations(cuda):
    x, y = RNG.integers(0, 100, 32).astype(np.int32), np.zeros((32, 12), np.int32)
    cuda.launch("warp_ops", 1, 32, [x, y])
    lane = np.arange(32)
    u = y.view(np.uint32)
    assert (y[:, 0] == x[lane * 7 % 32]).all()
    assert (y[:, 1] == x[np.where(lane >= 3, lane - 3, lane)]).all()
    assert (y[:, 2] == x[np.where(lane % 8 + 5 < 8, lane + 5, lane)]).all()
    assert (y[:, 3] == x[lane ^ 9]).all()
    assert (u[:, 4] == sum(int(b) << i for i, b in enumerate(x & 1))).all()
    assert (y[:, 5] == (x > 90).any()).all() and (y[:, 6] == 1).all()
    match = [sum(int(x[j] & 3 == x[i] & 3) << j for j in range(32)) for i in range(32)]
    assert [int(v) for v in u[:, 7]] == match
    assert (y[:, 8] == x.sum()).all() and (y[:, 9] == x.max()).all()
    third = sum(1 << i for i in range(0, 32, 3))
    assert (u[::3, 10] == third).all() and (y[lane % 3 != 0, 10] == 0).all()
    assert (y[:20, 11] == x[19 - lane[:20]]).all()


def test_divergence(cuda):
    x, y = np.arange(1, 1001, dtype=np.int32), np.zeros(1000, np.int32)
    cuda.launch("divergent", 8, 128, [x, y, 1000])

    def collatz(v):
        n = 0
        while v != 1:
            v, n = (3 * v + 1 if v & 1 else v // 2), n + 1
        return n

    assert [int(v) for v in y] == [collatz(int(v)) for v in x]


def test_half2(cuda):
    torch = pytest.importorskip("torch")
    n = 500
    a, b = (RNG.standard_normal((n, 2)).astype(np.float16) for _ in range(2))
    c, d = np.zeros((n, 2), np.float16), torch.randn(n, 2).bfloat16()
    e = torch.zeros_like(d)
    cuda.launch("half2_ops", 4, 128, [a, b, c, d, e, n])
    assert (c == (a.astype(float) * b + np.maximum(a, b)).astype(np.float16)).all()
    # the compiler may contract multiply and add: accept either rounding
    once = (d.double() * d.double() + d.double()).bfloat16()
    assert ((e == d * d + d) | (e == once)).all()


def test_vector_access_is_fully_efficient(cuda):
    x, y = RNG.integers(0, 2**31, (300, 4)).astype(np.uint32), np.zeros((300, 4), np.uint32)
    r = cuda.launch("vector_copy", 3, 128, [x, y, 300])
    assert (
        (x == y).all()
        and dict(r.load_widths) == {16: 300}
        and r.load_efficiency == r.store_efficiency == 1.0
    )


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_atomics(cuda, seed):
    n = 96
    y, f = np.zeros(5 + n, np.int32), np.array([0, 1], np.float32)
    big, h = np.zeros(1, np.uint64), np.zeros(2, np.float16)
    cuda.launch("atomics", 3, 32, [y, f, big, h], seed=seed)
    assert (
        y[0] == n * (n - 1) // 2
        and y[1] == n - 1
        and y[2] == 1 - n
        and y[3] == 2**31 - 1
        and y[4] == n
    )
    assert sorted(y[5:]) == list(range(n))
    if seed is None:  # with a seed: any order of the warps
        assert list(y[5:]) == list(range(n))
    assert f[0] == n / 2 and f[1] == 2.0**n and big[0] == n << 33 and list(h) == [n, 2 * n]


def test_shared_atomics_and_barrier_reduction(cuda):
    x, y = RNG.integers(0, 256, 3000).astype(np.uint8), np.zeros(17, np.int32)
    cuda.launch("shared_histogram", 1, 96, [x, y, 3000])
    assert (y[:16] == np.bincount(x & 15, minlength=16)).all() and y[16] == 48


def test_structs_constants_locals_and_module_variables(cuda):
    import struct

    y = np.zeros(32, np.float32)
    raw = struct.pack("ihxxfff", 3, -2, 0.5, 1.5, 2.5)
    before = int(cuda.globals["launches"].view(np.int32)[0])
    for _ in range(2):
        cuda.launch("by_value", 1, 32, [raw, 0.25, y])
    k = (np.arange(32) * 3) & 7
    want = k * np.float32([0.5, 1.5, 2.5])[k % 3] + 10.0 ** (np.arange(32) & 3) + 0.25 - 2
    assert (y == want.astype(np.float32)).all()
    assert cuda.globals["launches"].view(np.int32)[0] == before + 2


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_cooperative_grid_sync(cuda, seed):
    x, total, y = (
        RNG.integers(1, 9, 700).astype(np.float32),
        np.zeros(1, np.float32),
        gpulab.empty(700),
    )
    cuda.launch("grid_sync", 5, 64, [x, total, y, 700], seed=seed, resident_ctas=5)
    assert (y == x / x.sum()).all()


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_warp_waits_for_its_spinning_lane(cuda, seed):
    flag, y = np.zeros(1, np.int32), np.zeros(32, np.int32)
    cuda.launch("lane_zero_waits", 2, 32, [flag, y], seed=seed)
    assert (y == 42).all()


# ---- clusters -------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_cluster_reduction_through_dsmem(clusters, seed):
    x, y = RNG.standard_normal(5000).astype(np.float32), np.zeros(8, np.float32)
    clusters.launch("cluster_sum", 8, 128, [x, y, 5000], seed=seed)
    owner = np.arange(5000) // 128 % 8 // 4
    for c in range(2):
        np.testing.assert_allclose(
            y[4 * c : 4 * c + 4], x[owner == c].sum(dtype=np.float64), rtol=1e-4, atol=1e-4
        )


def test_cluster_ring_and_its_races(clusters):
    y = np.zeros((6, 64), np.int32)
    clusters.launch("ring_ok", 6, 64, [y], cluster=(3, 1, 1))
    for c in range(6):
        assert (y[c] == 1000 * ((c + 2) % 3) + np.arange(64)).all()
    for name in ("ring_no_first", "ring_no_last"):
        with pytest.raises(gpulab.SharedRace):
            clusters.launch(name, 6, 64, [y], cluster=(3, 1, 1))


def test_remote_shared_atomics(clusters):
    y = np.zeros(3, np.int32)
    clusters.launch("remote_atomic", 12, 96, [y], cluster=4, resident_ctas=4)
    assert (y == 4 * 96).all()


def test_access_to_an_exited_cta(clusters):
    with pytest.raises(gpulab.KernelFault, match="exit"):
        clusters.launch("leaves_early", 2, 32, [np.zeros(32, np.int32)], cluster=2)


def test_cluster_coordinates(clusters):
    y = np.zeros((3, 4, 4), np.int32)
    clusters.launch("ranks", (4, 3), 1, [y], cluster=(2, 3))
    for by in range(3):
        for bx in range(4):
            assert list(y[by, bx]) == [bx % 2 + 2 * by, 6, bx % 2, by]


def test_clusters_need_the_right_device(clusters):
    with pytest.raises(gpulab.GpuLabError, match="no thread block clusters"):
        clusters.launch("ranks", 4, 1, [np.zeros(16, np.int32)], cluster=2, device=gpulab.A100)
    with pytest.raises(gpulab.GpuLabError, match="multiple of the cluster"):
        clusters.launch("ranks", 3, 1, [np.zeros(16, np.int32)], cluster=2)
