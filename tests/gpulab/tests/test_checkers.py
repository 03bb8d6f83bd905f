"""Every checker must fire on a planted fault and stay silent on the corrected kernel."""

import numpy as np
import pytest

pytest.importorskip("triton")

import gpulab
import triton_kernels as tk
from cuda_source import cuda_module

N = 1000
SOURCE = r"""
extern "C" __global__ void oob(const float* x, float* y, int n, int guard) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n || !guard) y[i] = 2.f * x[i];
}
extern "C" __global__ void misaligned(const float* x, float* y, int shift) {
  float2 v = *reinterpret_cast<const float2*>(x + 2 * threadIdx.x + shift);
  y[threadIdx.x] = v.x + v.y;
}
extern "C" __global__ void shared_oob(float* y, int extra) {
  extern __shared__ float s[];
  s[threadIdx.x + extra] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
template <bool sync> __device__ void neighbour(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  if (sync) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void with_barrier(const float* x, float* y) { neighbour<true>(x, y); }
extern "C" __global__ void without_barrier(const float* x, float* y) { neighbour<false>(x, y); }
template <bool sync>
__device__ void rounds(float* y) {  // missing barrier between read and next write
  __shared__ float s[64];
  float acc = 0;
  for (int i = 0; i < 3; i++) {
    s[threadIdx.x] = i + threadIdx.x;
    __syncthreads();
    acc += s[threadIdx.x ^ 32];
    if (sync) __syncthreads();
  }
  y[threadIdx.x] = acc;
}
extern "C" __global__ void rounds_ok(float* y) { rounds<true>(y); }
extern "C" __global__ void rounds_race(float* y) { rounds<false>(y); }
extern "C" __global__ void same_slot(float* y, int same) {    // two warps store to one place
  __shared__ float s[2];
  s[0] = 0;
  __syncthreads();
  if (threadIdx.x % 32 == 0) s[0] = same ? 1.f : float(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = s[0];
}
template <bool fence> __device__ void message(float* data, int* flag, float* y) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = threadIdx.x;
    if (fence) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(flag, 1);
  } else {
    if (threadIdx.x == 0) while (atomicAdd(flag, 0) == 0) {}
    __syncthreads();
    if (fence) __threadfence();
    y[threadIdx.x] = data[threadIdx.x];
  }
}
extern "C" __global__ void message_ok(float* d, int* f, float* y) { message<true>(d, f, y); }
extern "C" __global__ void message_race(float* d, int* f, float* y) { message<false>(d, f, y); }
// One thread's fences for its CTA's data.  without: which barrier is left out.
template <int without> __device__ void by_one(float* data, int* flag, float* y) {
  if (blockIdx.x == 0) {
    data[threadIdx.x] = threadIdx.x;
    if (without != 1) __syncthreads();
    if (threadIdx.x == 0) { __threadfence(); atomicExch(flag, 1); }
  } else {
    if (threadIdx.x == 0) { while (atomicAdd(flag, 0) == 0) {} __threadfence(); }
    if (without != 2) __syncthreads();
    else while (atomicAdd(flag, 0) == 0) {}
    y[threadIdx.x] = data[threadIdx.x];
  }
}
extern "C" __global__ void by_one_ok(float* d, int* f, float* y) { by_one<0>(d, f, y); }
extern "C" __global__ void by_one_early(float* d, int* f, float* y) { by_one<1>(d, f, y); }
extern "C" __global__ void by_one_late(float* d, int* f, float* y) { by_one<2>(d, f, y); }
template <bool sync> __device__ void turned(float* data, float* y) {
  data[threadIdx.x] = threadIdx.x;
  if (sync) __syncthreads();
  y[threadIdx.x] = data[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void turned_ok(float* d, float* y) { turned<true>(d, y); }
extern "C" __global__ void turned_race(float* d, float* y) { turned<false>(d, y); }
extern "C" __global__ void half_barrier(float* y) {
  if (threadIdx.x < 32) { while (atomicAdd((int*)y, 0) == 0) {} }
  __syncthreads();
  y[1] = 1;
}
extern "C" __global__ void trapping(int n) { if (threadIdx.x == n) __trap(); }
extern "C" __global__ void banks(float* y, int stride) {
  __shared__ float s[32 * 33];
  s[threadIdx.x * stride] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x * stride];
}
"""


@pytest.fixture(scope="module")
def cuda():
    return cuda_module(SOURCE, 80)


def test_out_of_bounds(cuda):
    x, y = np.ones(N, np.float32), np.zeros(N, np.float32)
    cuda.launch("oob", 8, 128, [x, y, N, 1])
    assert (y == 2).all()
    with pytest.raises(gpulab.OutOfBounds) as error:
        cuda.launch("oob", 8, 128, [x, y, N, 0])
    text = str(error.value)
    assert (
        "0 bytes past the end of 'arg0'" in text and "ld.global" in text and "kernel.cu:4" in text
    )
    assert "thread (104, 0, 0) of CTA (7, 0, 0)" in text


def test_out_of_bounds_triton():
    x, y, z = (np.ones(N, np.float32) for _ in range(3))
    with pytest.raises(
        gpulab.OutOfBounds, match=r"triton_kernels.py:\d+\]\n  in kernel add_no_mask"
    ):
        gpulab.triton_launch(tk.add_no_mask, (8,), x, y, z, N, B=128)
    gpulab.triton_launch(tk.add_no_mask, (5,), x, y, z, N, B=128)  # 640 elements: inside


def test_write_to_the_red_zone_before_an_array(cuda):
    x, y = np.ones(N, np.float32), np.zeros(N, np.float32)
    with pytest.raises(gpulab.OutOfBounds):
        cuda.launch("oob", 1, 128, [x, y[:64], 128, 1])  # y is shorter than n claims


def test_misaligned(cuda):
    x, y = np.arange(80, dtype=np.float32), np.zeros(32, np.float32)
    cuda.launch("misaligned", 1, 32, [x, y, 2])
    with pytest.raises(gpulab.MisalignedAccess):
        cuda.launch("misaligned", 1, 32, [x, y, 1])


def test_shared_bounds(cuda):
    y = np.zeros(64, np.float32)
    cuda.launch("shared_oob", 1, 64, [y, 0], shared_bytes=256)
    with pytest.raises(gpulab.OutOfBounds, match="shared address 0x100"):
        cuda.launch("shared_oob", 1, 64, [y, 1], shared_bytes=256)


def test_uninitialised_read(cuda):
    x, y = gpulab.empty(N), gpulab.empty(N)
    with pytest.raises(gpulab.UninitialisedRead, match="'arg0'"):
        cuda.launch("oob", 8, 128, [x, y, N, 1])
    x[:] = 1
    cuda.launch("oob", 8, 128, [x, y, N, 1])
    z = np.zeros(N, np.float32)
    cuda.launch("oob", 8, 128, [y, z, N, 1])  # written by the first launch
    assert (z == 4).all()


def test_shared_race(cuda):
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    cuda.launch("with_barrier", 2, 128, [x, y])
    assert (y == x[::-1]).all()
    with pytest.raises(gpulab.SharedRace, match="no barrier in between") as error:
        cuda.launch("without_barrier", 2, 128, [x, y])
    assert "ld.shared" in str(error.value)
    cuda.launch("without_barrier", 2, 128, [x, y], checks=False)


def test_shared_race_of_a_read_with_the_next_write(cuda):
    y = np.zeros(64, np.float32)
    cuda.launch("rounds_ok", 1, 64, [y])
    with pytest.raises(gpulab.SharedRace, match=r"st.shared"):
        cuda.launch("rounds_race", 1, 64, [y])


def test_shared_race_of_two_stores(cuda):
    y = np.zeros(64, np.float32)
    cuda.launch("same_slot", 1, 64, [y, 1])  # equal values: benign
    with pytest.raises(gpulab.SharedRace):
        cuda.launch("same_slot", 1, 64, [y, 0])


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_global_race(cuda, seed):
    def args():
        return [np.zeros(64, np.float32), np.zeros(1, np.int32), np.zeros(64, np.float32)]

    a = args()
    cuda.launch("message_ok", 2, 64, a, seed=seed)
    assert (a[2] == np.arange(64)).all()
    with pytest.raises(gpulab.GlobalRace, match="has not released"):
        cuda.launch("message_race", 2, 64, args(), seed=seed)


def test_a_barrier_between_the_threads_of_a_release_or_an_acquire(cuda):
    def args():
        return [np.zeros(64, np.float32), np.zeros(1, np.int32), np.zeros(64, np.float32)]

    cuda.launch("by_one_ok", 2, 64, args())
    with pytest.raises(gpulab.GlobalRace, match=r"has not released it .* no barrier between"):
        cuda.launch("by_one_early", 2, 64, args())
    with pytest.raises(gpulab.GlobalRace, match=r"has not acquired it .* no barrier after"):
        cuda.launch("by_one_late", 2, 64, args())


def test_global_memory_between_warps_of_a_cta(cuda):
    def args():
        return [np.zeros(64, np.float32), np.zeros(64, np.float32)]

    cuda.launch("turned_ok", 1, 64, args())
    cuda.launch("turned_race", 1, 32, args())  # of one warp
    with pytest.raises(gpulab.GlobalRace, match=r"by warp 1 of CTA \(0, 0, 0\): no barrier"):
        cuda.launch("turned_race", 1, 64, args())


def test_deadlock_inside_a_cta(cuda):
    with pytest.raises(gpulab.Deadlock) as error:
        cuda.launch("half_barrier", 1, 64, [np.zeros(4, np.float32)], deadlock_rounds=100)
    assert "32 thread(s), waits at barrier 0" in str(error.value) and "32 thread(s), spins" in str(
        error.value
    )


def test_trap(cuda):
    cuda.launch("trapping", 1, 32, [99])
    with pytest.raises(gpulab.Trap, match=r"thread \(7, 0, 0\)"):
        cuda.launch("trapping", 1, 32, [7])


@pytest.mark.parametrize("stride", [1, 2, 8, 16])
def test_uncoalesced_access_shows_in_the_sectors(stride):
    n = 1024
    x, y = np.arange(n * stride, dtype=np.float32), np.zeros(n, np.float32)
    r = gpulab.triton_launch(tk.strided_copy, (8,), x, y, stride, B=128, num_warps=4)
    assert (y == x[::stride]).all()
    assert r.global_load_sectors == n * min(stride, 8) // 8  # 8 floats per sector
    assert r.load_efficiency == pytest.approx(1 / min(stride, 8))
    assert r.store_efficiency == 1.0
    if stride > 1:
        assert (
            r.worst_sites(1)[0].kind == "load" and "triton_kernels.py" in r.worst_sites(1)[0].where
        )


@pytest.mark.parametrize("stride,ways", [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_bank_conflicts(cuda, stride, ways):
    y = np.zeros(32, np.float32)
    r = cuda.launch("banks", 40, 32, [y, stride])
    assert (
        r.shared_max_ways == ways
        and r.shared_wavefronts == 40 * 2 * ways
        and r.bank_conflict_ratio == ways
    )


def test_arguments_are_checked(cuda):
    y = np.zeros(32, np.float32)
    with pytest.raises(gpulab.GpuLabError, match="takes 2 arguments"):
        cuda.launch("banks", 1, 32, [y])
    with pytest.raises(gpulab.GpuLabError, match="no kernel 'nothing'"):
        cuda.launch("nothing", 1, 32, [])
    read_only = np.zeros(32, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(gpulab.GpuLabError, match="read-only"):
        cuda.launch("banks", 1, 32, [read_only, 1])
