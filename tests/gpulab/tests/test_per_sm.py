"""What the busiest SM has to do: issue slots, bytes from and to the L2, shared-memory passes."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

H100 = gpulab.H100
SOURCE = r"""
#include <cuda_pipeline.h>
extern "C" __global__ void sum(const float4* x, float* y, int n) {  // each CTA reads everything
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) { float4 v = x[i]; s += v.x + v.y + v.z + v.w; }
  y[blockIdx.x * blockDim.x + threadIdx.x] = s;
}
extern "C" __global__ void uneven(float* y, int n) {                       // the work of CTA i is i
  float s = threadIdx.x;
  #pragma unroll 1
  for (int i = 0; i < n * (int)blockIdx.x; ++i) s = s * 0.5f + 1.f;
  y[blockIdx.x * blockDim.x + threadIdx.x] = s;
}
extern "C" __global__ void passes(float* y, int stride,
                                  int idle) {  // a pass for each bank conflict
  __shared__ float buffer[32 * 33];
  if (blockIdx.x < idle) return;
  buffer[threadIdx.x * stride] = threadIdx.x + blockIdx.x;
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = buffer[threadIdx.x * stride];
}
extern "C" __global__ void copy(const float4* x, float4* y) {              // through shared memory
  __shared__ float4 buffer[128];
  __pipeline_memcpy_async(buffer + threadIdx.x, x + blockIdx.x * 128 + threadIdx.x, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  y[blockIdx.x * 128 + threadIdx.x] = buffer[threadIdx.x];
}
extern "C" __global__ void count(int* y) { atomicAdd(y + threadIdx.x, 1); }
"""


@pytest.fixture(scope="module")
def module():
    return cuda_module(SOURCE)


def test_one_cta_is_bound_by_its_sm(module):
    n = 1 << 20
    x, y = np.ones(n // 4, np.float32), gpulab.empty(1024)
    r = module.launch("sum", 1, 1024, [x, y, n // 16], device=H100)
    line = r.roofline()
    assert r.sm_read_bytes == n and r.sm_written_bytes == 4096
    assert (
        line["sm_l2_us"] == pytest.approx(1e6 * (n + 4096) / 64 / 1980e6) and line["sm_l2_us"] > 8
    )
    assert line["binds"] == "sm_l2" and line["bound_us"] == line["sm_l2_us"] > 10 * line["l2_us"]
    assert "latency_us" not in line and r.latency_cycles == 0


def test_hits_in_the_l1_do_not_count(module):
    n = 1 << 14
    x, y = np.ones(n // 4, np.float32), gpulab.empty(64)
    r = module.launch("sum", 2, 32, [x, y, n // 16], device=H100.scaled(sms=1))
    assert r.sm_read_bytes == n  # the second CTA reads what the first has left in the L1
    r = module.launch("sum", 2, 32, [x, y, n // 16], device=H100.scaled(sms=2))
    assert r.sm_read_bytes == n and r.l2_read_sectors == 2 * n // 32


@pytest.mark.parametrize("ctas, sms, per_sm", [(1, 4, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3)])
def test_ctas_are_dealt_to_the_sms(module, ctas, sms, per_sm):
    x, y = np.ones(1024, np.float32), gpulab.empty(128 * ctas)
    one = module.launch("sum", 1, 128, [x, y, 256], device=H100)
    r = module.launch("sum", ctas, 128, [x, y, 256], device=H100.scaled(sms=sms))
    assert r.sm_issued == per_sm * one.sm_issued
    line = r.roofline()
    assert line["sm_issue_us"] == pytest.approx(1e6 * r.sm_issued / (4 * 1980e6))
    assert line["sm_issue_us"] >= line["issue_us"] * (1 - 1e-9)


def test_uneven_ctas(module):
    y = gpulab.empty(8 * 32)
    r = module.launch("uneven", 8, 32, [y, 100], device=H100)
    heaviest = r.sm_issued  # CTA 7 alone
    line = r.roofline()
    assert (
        heaviest > 0.9 * r.warp_instructions * 7 / 28
        and line["sm_issue_us"] > 1.8 * line["issue_us"]
    )
    assert (
        module.launch("uneven", 8, 32, [y, 100], device=H100.scaled(sms=1)).sm_issued
        > 3.5 * heaviest
    )


@pytest.mark.parametrize("stride, ways", [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_shared_passes(module, stride, ways):
    y = gpulab.empty(32 * 4)
    for sms in (1, 2, 4):
        r = module.launch("passes", 4, 32, [y, stride, 0], device=H100.scaled(sms=sms))
        assert r.sm_wavefronts == 2 * ways * 4 // sms and r.shared_wavefronts == 8 * ways
    assert r.roofline()["sm_shared_us"] == pytest.approx(1e6 * 2 * ways / 1980e6)
    r = module.launch(
        "passes", 4, 32, [y, stride, 3], device=H100.scaled(sms=2)
    )  # only the last CTA works
    assert r.sm_wavefronts == r.shared_wavefronts == 2 * ways


def test_copies_and_atomics_count(module):
    x, y = np.ones(512 * 4, np.float32), gpulab.empty(512 * 4)
    r = module.launch("copy", 4, 128, [x, y], device=H100.scaled(sms=2))
    assert (r.sm_read_bytes, r.sm_written_bytes) == (4096, 4096)
    counts = np.zeros(32, np.int32)
    r = module.launch("count", 6, 32, [counts], device=H100.scaled(sms=2))
    assert r.sm_written_bytes == 3 * 128 and r.sm_read_bytes == 0


def test_bulk_copies_count():
    source = r"""
#include <cuda/barrier>
extern "C" __global__ void bulk(const float* x, float* y) {
  __shared__ alignas(128) float buffer[1024];
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  if (threadIdx.x == 0) init(&bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    cuda::memcpy_async(buffer, x + blockIdx.x * 1024, cuda::aligned_size_t<16>(4096), bar);
    bar.wait(bar.arrive());
  }
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = buffer[threadIdx.x];
}
"""
    x, y = np.ones(4096, np.float32), gpulab.empty(128)
    r = cuda_module(source, 90).launch("bulk", 4, 32, [x, y], device=H100.scaled(sms=2))
    assert r.sm_read_bytes == 2 * 4096 and r.sm_written_bytes == 2 * 128


def test_summary_has_the_columns(module):
    x, y = np.ones(4096, np.float32), gpulab.empty(128)
    text = gpulab.summary_text(module.launch("sum", 1, 128, [x, y, 1024]))
    assert (
        all(f" {c} us " in text for c in ("sm_issue", "sm_l2", "sm_shared"))
        and "latency us" not in text
    )
    reports = [
        module.launch("sum", 1, 128, [x, y, 1024], latency=latency) for latency in (False, True)
    ]
    text = gpulab.summary_text(reports)
    assert " latency us " in text and "| latency |" in text.replace("  ", "")
