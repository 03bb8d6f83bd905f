"""128-bit registers and 256-bit loads and stores."""

import gpulab
import numpy as np
import pytest
from cuda_source import cuda_module

SOURCE = r"""
struct alignas(32) F8 { float v[8]; };
struct alignas(32) D4 { double v[4]; };
extern "C" __global__ void wide(const F8* x, F8* y, const D4* a, D4* b, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  F8 t = x[i];
  for (int k = 0; k < 8; k++) t.v[k] *= 2;
  y[i] = t;
  D4 d = a[i];
  for (int k = 0; k < 4; k++) d.v[k] += 1;
  b[i] = d;
}
"""

PTX = """
.version 8.4
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p0, .param .u64 p1)
{
  .reg .b128 %q<3>; .reg .b32 %t; .reg .b64 %a, %b, %lo, %hi; .reg .pred %p;
  mov.u32 %t, %tid.x; ld.param.u64 %a, [p0]; ld.param.u64 %b, [p1];
  mad.wide.u32 %a, %t, 16, %a; mad.wide.u32 %b, %t, 16, %b;
  ld.relaxed.gpu.global.b128 %q1, [%a];
  mov.b128 %q0, %q1;
  mov.b128 {%lo, %hi}, %q0;
  add.u64 %lo, %lo, 1;
  setp.lt.u32 %p, %t, 16;
  @%p mov.b128 %q1, {%hi, %lo};
  st.relaxed.gpu.global.b128 [%b], %q1;
  ret;
}
"""


def test_256_bit_accesses():
    module = cuda_module(SOURCE, 100)
    assert "ld.global.v8" in module.ptx and "st.global.v4.f64" in module.ptx
    x, a = np.arange(8 * 100, dtype=np.float32), np.arange(4 * 100, dtype=np.float64)
    y, b = gpulab.empty(800), gpulab.empty(400, np.float64)
    r = module.launch("wide", 2, 64, [x, y, a, b, 100], device=gpulab.B200)
    assert (y == 2 * x).all() and (b == a + 1).all()
    assert r.load_widths == {32: 200} and r.load_efficiency == 1 and r.store_efficiency == 1
    with pytest.raises(gpulab.MisalignedAccess, match="32-byte access"):
        module.launch("wide", 2, 64, [x[4:], y, a, b, 10], device=gpulab.B200)


def test_128_bit_registers():
    x, y = np.arange(64, dtype=np.uint64).reshape(32, 2), np.zeros((32, 2), np.uint64)
    gpulab.Module(PTX).launch("k", 1, 32, [x, y], resident_ctas=1)
    expect = x.copy()
    expect[:16] = np.stack([x[:16, 1], x[:16, 0] + 1], axis=1)
    assert (y == expect).all()
