"""Cluster addressing in a launch without clusters, which is one of clusters of one CTA."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

SOURCE = r"""
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
#define ASM(text, ...) asm volatile(text : : __VA_ARGS__ : "memory")

extern "C" __global__ void library(const float* x, float* y, int* facts) {
  __shared__ float s[64];
  __shared__ int count;
  auto c = cg::this_cluster();
  if (threadIdx.x == 0) count = 0;
  s[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  c.sync();
  float* next = c.map_shared_rank(s, (c.block_rank() + 1) % c.num_blocks());
  y[blockIdx.x * 64 + threadIdx.x] = next[63 - threadIdx.x];
  atomicAdd(c.map_shared_rank(&count, 0), 1);
  c.sync();
  int* f = facts + 8 * blockIdx.x;
  if (threadIdx.x == 0) {
    f[0] = c.block_rank(); f[1] = c.num_blocks(); f[2] = c.query_shared_rank(next); f[3] = count;
    f[4] = c.dim_blocks().x; f[5] = c.block_index().x; f[6] = c.num_threads();
    asm volatile("{ .reg .pred p; mov.pred p, %%is_explicit_cluster; selp.s32 %0, 1, 0, p; }"
                 : "=r"(f[7]));
  }
}
extern "C" __global__ void __cluster_dims__(1, 1, 1) declared(int* y) {
  __shared__ int s;
  auto c = cg::this_cluster();
  if (threadIdx.x == 0) *c.map_shared_rank(&s, 0) = 7;
  c.sync();
  y[threadIdx.x] = s;
}

__device__ unsigned at(const void* p) { return __cvta_generic_to_shared(p); }
__device__ unsigned map(unsigned a, int rank) {
  unsigned r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  return r;
}

extern "C" __global__ void instructions(unsigned* y) {
  __shared__ unsigned s[32], other[32], sum;
  __shared__ alignas(8) unsigned long long bar;
  unsigned i = threadIdx.x, v, rank;
  if (i == 0) { sum = 0; ASM("mbarrier.init.shared::cta.b64 [%0], 1;", "r"(at(&bar))); }
  asm volatile("barrier.cluster.arrive.relaxed; barrier.cluster.wait;" ::: "memory");
  ASM("st.shared::cluster.u32 [%0], %1;", "r"(map(at(s + i), 0)), "r"(i * i));
  ASM("red.shared::cluster.add.u32 [%0], %1;", "r"(map(at(&sum), 0)), "r"(i));
  if (i == 0) {
    ASM("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], 4;",
        "r"(map(at(&bar), 0)));
    ASM("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];",
        "r"(map(at(other), 0)), "r"(99u), "r"(map(at(&bar), 0)));
  }
  asm volatile(
      "{ .reg .pred p; L: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra L; }" ::"r"(
          at(&bar))
      : "memory");
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(map(at(s + (31 - i)), 0)));
  asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(rank) : "r"(map(at(s), 0)));
  y[i] = v + 1000 * rank;
  if (i == 0) { y[32] = sum; y[33] = other[0]; }
}

extern "C" __global__ void stray(unsigned* y, int rank, int offset) {
  __shared__ unsigned s[32];
  s[threadIdx.x] = 1;
  __syncthreads();
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(y[threadIdx.x])
               : "r"(map(at(s + threadIdx.x), rank) + offset));
}
"""


@pytest.fixture(scope="module")
def cuda():
    return cuda_module(SOURCE, 90)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("cluster", [None, 1, (1, 1, 1)])
def test_library(cuda, cluster, seed):
    x, y, facts = (
        np.arange(256, dtype=np.float32),
        np.zeros(256, np.float32),
        np.zeros((4, 8), np.int32),
    )
    cuda.launch("library", 4, 64, [x, y, facts], cluster=cluster, seed=seed)
    assert (y.reshape(4, 64) == x.reshape(4, 64)[:, ::-1]).all()
    assert (facts == [0, 1, 0, 64, 1, 0, 64, cluster is not None]).all()


def test_declared_dimensions(cuda):
    y = np.zeros(40, np.int32)
    cuda.launch("declared", 1, 40, [y])
    assert (y == 7).all()


@pytest.mark.parametrize("cluster", [None, (1, 1, 1)])
def test_instructions(cuda, cluster):
    y = np.zeros(34, np.uint32)
    cuda.launch("instructions", 1, 32, [y], cluster=cluster)
    assert (y[:32] == np.arange(32)[::-1] ** 2).all() and list(y[32:]) == [496, 99]


def test_addresses_outside_are_still_found(cuda):
    y = np.zeros(32, np.uint32)
    cuda.launch("stray", 1, 32, [y, 0, 0])
    with pytest.raises(gpulab.OutOfBounds, match="CTA rank 1 in a cluster of 1"):
        cuda.launch("stray", 1, 32, [y, 1, 0])
    with pytest.raises(gpulab.OutOfBounds, match="beyond the CTA's 128 bytes"):
        cuda.launch("stray", 1, 32, [y, 0, 4])
    with pytest.raises(gpulab.OutOfBounds, match="beyond the CTA's 128 bytes"):
        cuda.launch("stray", 1, 32, [y, 40, 0])
