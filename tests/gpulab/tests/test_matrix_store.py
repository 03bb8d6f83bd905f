"""stmatrix against its definition, and inside Triton's sm_90 layout conversions."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module


def kernel(count, trans):
    regs = ", ".join(f"%{i + 1}" for i in range(count))
    inputs = ", ".join(f'"r"(r[{i}])' for i in range(count))
    return f"""
extern "C" __global__ void st{count}{"t" if trans else "n"}(
    const unsigned* x, unsigned short* y, int pitch) {{
  extern __shared__ __align__(16) unsigned short s[];
  int t = threadIdx.x, rows = blockDim.x, base = blockIdx.x * rows;
  for (int i = t; i < rows * pitch; i += rows) s[i] = 0;
  __syncthreads();
  unsigned r[{count}];
  for (int i = 0; i < {count}; i++) r[i] = x[(base + t) * {count} + i];
  unsigned a = __cvta_generic_to_shared(s + t * pitch);
  asm volatile("stmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 "
               "[%0], {{{regs}}};"
               :: "r"(a), {inputs} : "memory");
  __syncthreads();
  for (int i = t; i < rows * 8; i += rows) y[base * 8 + i] = s[i / 8 * pitch + i % 8];
}}
"""


@pytest.fixture(scope="module")
def stores():
    return cuda_module("".join(kernel(c, t) for c in (1, 2, 4) for t in (False, True)), 90)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("pitch,ways", [(8, 1), (64, 8), (72, 1)])
def test_rows_land_where_the_lanes_say(stores, count, trans, pitch, ways):
    threads, ctas = 64, 3
    x = np.arange(ctas * threads * count * 2).astype(np.uint16).view(np.uint32)
    y = np.zeros((ctas * threads, 8), np.uint16)
    r = stores.launch(
        f"st{count}{'t' if trans else 'n'}",
        ctas,
        threads,
        [x, y, pitch],
        shared_bytes=threads * pitch * 2,
    )
    fragments = x.view(np.uint16).reshape(-1, 32, count, 2)  # warp, lane, matrix, pair
    expect = np.zeros((ctas * threads // 32, 32, 8), np.uint16)
    for i in range(count):
        matrix = fragments[:, :, i].reshape(-1, 8, 8)  # lane 4r + c holds row r, columns 2c, 2c + 1
        expect[:, 8 * i : 8 * i + 8] = matrix.swapaxes(1, 2) if trans else matrix
    assert (y.reshape(expect.shape) == expect).all()
    assert r.shared_max_ways >= ways


@pytest.mark.parametrize("warps,bc,bs", [(1, 32, 64), (4, 16, 256), (8, 8, 256)])
def test_triton_layout_conversions_on_sm_90(warps, bc, bs):
    pytest.importorskip("triton")
    import triton_kernels as tk

    rng = np.random.default_rng(0)
    C, S = 24, 1008
    x = rng.standard_normal((C, S)).astype(np.float16)
    g, s = rng.standard_normal(C).astype(np.float32), rng.standard_normal(S).astype(np.float32)
    y = gpulab.empty((C, S), np.float16)
    compiled, args = gpulab.triton_compile(
        tk.scale, (x, y, g, s, C, S), {"BC": bc, "BS": bs}, target=90, num_warps=warps
    )
    assert "stmatrix" in compiled.asm["ptx"]
    gpulab.triton_launch(compiled, (-(-S // bs),), *args, device=gpulab.H100)
    expect = (x.astype(np.float32) * (g[:, None] + s)).astype(np.float16)
    assert (np.asarray(y) == expect).all()
