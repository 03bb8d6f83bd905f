"""Programmatic dependent launch: a kernel that waits first passes, one that touches too early is
found."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

N = 512
SOURCE = r"""
__device__ void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ void trigger() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#define I int i = blockIdx.x * blockDim.x + threadIdx.x

extern "C" __global__ void produce(const float* x, float* y) { I; trigger(); y[i] = 2 * x[i]; }
extern "C" __global__ void consume(const float* w, const float* y,
                                   float* z) {  // the weights do not depend on it
  I; float scale = w[i]; wait(); z[i] = scale * y[i];
}
extern "C" __global__ void hasty(const float* w, const float* y, float* z) {
  I; float v = y[i]; wait(); z[i] = w[i] * v; }
extern "C" __global__ void no_wait(const float* w, const float* y, float* z) {
  I;
  z[i] = w[i] * y[i];
}
extern "C" __global__ void clears_early(float* z) { I; z[i] = 0; wait(); }
extern "C" __global__ void counts_early(float* z) { I; atomicAdd(z + i, 1.f); wait(); }
extern "C" __global__ void some_wait(const float* w, const float* y,
                                     float* z) {  // the last CTA forgets
  I; float scale = w[i]; if (blockIdx.x + 1 < gridDim.x) wait(); z[i] = scale * y[i];
}
extern "C" __global__ void late_trigger(const float* w, const float* y, float* z) {
  I; wait(); trigger(); z[i] = w[i] * y[i]; }
extern "C" __global__ void early_trigger(const float* w, const float* y, float* z) {
  I; trigger(); wait(); z[i] = w[i] * y[i]; }
extern "C" __global__ void idle(const float* w, const float* y, float* z) { I; z[i] = w[i]; }

extern "C" __global__ void bulk(const float* y, float* z,
                                int early) {  // a bulk copy of the CTA's elements
  __shared__ alignas(128) float s[128];
  __shared__ alignas(8) unsigned long long bar;
  unsigned b = __cvta_generic_to_shared(&bar), d = __cvta_generic_to_shared(s);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(b) : "memory");
    asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], 512; }" ::"r"(b)
                 : "memory");
    if (!early) wait();
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, "
        "[%2];" ::"r"(d),
        "l"(y + blockIdx.x * 128), "r"(b)
        : "memory");
    asm volatile(
        "{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra L; }" ::
            "r"(b)
        : "memory");
  }
  __syncthreads();
  wait();
  z[blockIdx.x * 128 + threadIdx.x] = s[threadIdx.x];
}
"""


@pytest.fixture(scope="module")
def cuda():
    return cuda_module(SOURCE, 90)


@pytest.fixture
def data():
    return {name: np.arange(N, dtype=np.float32) + k for k, name in enumerate("wxyzv")}


def launch(cuda, name, args, overlap, **options):
    return cuda.launch(name, N // 128, 128, args, overlap=overlap, resident_ctas=3, **options)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_waiting_first_is_right(cuda, data, seed):
    w, x, y, z, _ = data.values()
    first = launch(cuda, "produce", [x, y], [], seed=seed)
    launch(cuda, "consume", [w, y, z], [first], seed=seed)
    assert (z == 2 * w * x).all()
    launch(cuda, "bulk", [y, z, 0], [first], seed=seed)
    assert (z == y).all()


@pytest.mark.parametrize("name", ["hasty", "no_wait", "some_wait"])
def test_reading_before_the_wait(cuda, data, name):
    w, x, y, z, _ = data.values()
    first = launch(cuda, "produce", [x, y], [])
    with pytest.raises(
        gpulab.OverlapError,
        match="read before griddepcontrol.wait of memory written by the previous launch "
        r"\(produce\): byte \d+ of 'arg1'",
    ) as error:
        launch(cuda, name, [w, y, z], [first])
    assert (
        "ld.global" in str(error.value)
        and "PTX line" in str(error.value)
        and "kernel.cu" in str(error.value)
    )
    launch(cuda, name, [w, x, z], [first])  # the first launch only reads x, and does not touch z
    launch(cuda, name, [w, y, z], [])  # an ordinary launch
    launch(cuda, name, [w, y, z], None)


def test_writing_before_the_wait(cuda, data):
    _w, x, y, z, _ = data.values()
    first = launch(cuda, "produce", [x, y], [])
    for name in ("clears_early", "counts_early"):
        launch(cuda, name, [z], [first])
        with pytest.raises(
            gpulab.OverlapError, match=r"before griddepcontrol.wait of memory written by"
        ):
            launch(cuda, name, [y], [first])
    with pytest.raises(
        gpulab.OverlapError,
        match=r"write before griddepcontrol.wait of memory read by .*(?s:.*)st\.global",
    ):
        launch(cuda, "clears_early", [x], [first])


def test_bulk_copies(cuda, data):
    _w, x, y, z, _ = data.values()
    first = launch(cuda, "produce", [x, y], [])
    with pytest.raises(gpulab.OverlapError, match=r"cp.async.bulk"):
        launch(cuda, "bulk", [y, z, 1], [first])
    launch(cuda, "bulk", [x, z, 1], [first])


def test_bytes_are_exact_and_arrays_can_be_given(cuda, data):
    w, x, y, z, _ = data.values()
    both = np.zeros(2 * N, np.float32)
    first = launch(cuda, "produce", [x, both[:N]], [])
    launch(cuda, "hasty", [w, both[N:], z], [first])  # the other half
    with pytest.raises(gpulab.OverlapError, match="byte 4 of"):
        launch(cuda, "hasty", [w, both[N - 1 : -1], z], [both[N : N + 1]])
    launch(cuda, "hasty", [w, both[:N], z], [both[N:]])
    with pytest.raises(gpulab.GpuLabError, match="produce was launched without overlap="):
        launch(cuda, "hasty", [w, y, z], [launch(cuda, "produce", [x, y], None)])


def test_a_chain_of_launches(cuda, data):
    """The third launch reads, before its wait, what the first has written."""
    w, x, y, z, v = data.values()
    first = launch(cuda, "produce", [x, y], [])
    second = launch(cuda, "late_trigger", [w, y, z], [first])
    launch(cuda, "hasty", [w, y, v], [second])  # starts after the second has waited for the first
    second = launch(cuda, "early_trigger", [w, y, z], [first])
    with pytest.raises(
        gpulab.OverlapError, match=r"an earlier launch \(produce\); the previous launch lets its"
    ):
        launch(cuda, "hasty", [w, y, v], [second])
    launch(cuda, "consume", [w, y, v], [second])
    second = launch(
        cuda, "idle", [w, x, z], [first]
    )  # never waits: its end says nothing about the first launch
    with pytest.raises(
        gpulab.OverlapError, match=r"^read of memory written by an earlier launch .*not enough"
    ):
        launch(cuda, "consume", [w, y, v], [second])
    third = launch(cuda, "consume", [w, z, v], [second])
    with pytest.raises(
        gpulab.OverlapError, match=r"^read of memory written by an earlier launch .*not enough"
    ):
        launch(cuda, "consume", [w, y, x], [third])
    launch(cuda, "consume", [w, y, v], [])


def test_triton():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    import host_code as host

    x, w = torch.randn(3, 1000), torch.randn(3, 1000)
    with gpulab.intercept() as lab:
        y = host.scale(x, 2.0)
        assert torch.equal(host.dependent(w, y, "first"), w * y)
        host.scale(x, 3.0)
        assert torch.equal(host.dependent(w, x, "last"), w * x)  # nobody writes x
        host.dependent(w, host.scale(x, 2.0), "last", launch_pdl=False)
        for wait in ("last", "never"):
            with pytest.raises(
                gpulab.OverlapError,
                match=r"previous launch \(_scale\): byte \d+ of 'y'(?s:.*)host_code.py",
            ):
                host.dependent(w, host.scale(x, 2.0), wait)
    assert lab.launches == 8 and all(r.footprint is None for r in lab.reports)
    with gpulab.intercept(overlap=False):
        host.dependent(w, host.scale(x, 2.0), "never")
