"""Triton kernels against numpy and torch."""

import gpulab
import numpy as np
import pytest
import torch
import triton_kernels as tk

RNG = np.random.default_rng(3)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("n", [1, 1000, 4096, 10007])
def test_vector_add(n, target):
    x, y, z = normal(n), normal(n), gpulab.empty(n)
    report = gpulab.triton_launch(tk.add, (-(-n // 1024),), x, y, z, n, B=1024, target=target)
    assert (z == x + y).all()
    assert report.global_load_bytes == 8 * n and report.global_store_bytes == 4 * n
    if n == 4096:  # divisible by 16: 16-byte accesses
        assert set(report.load_widths) == {16} and report.load_efficiency == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(37, 61), (64, 128), (5, 300)])
def test_masked_tile_of_any_size(shape, dtype):
    h, w = shape
    x, y = torch.randn(shape).to(dtype), torch.full(shape, -1.0)
    gpulab.triton_launch(tk.scale_tile, (-(-h // 16), -(-w // 64)), x, y, h, w, 2.5, BH=16, BW=64)
    assert torch.equal(y, x.float() * 2.5)


@pytest.mark.parametrize("num_warps", [1, 4, 8])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_row_reduction(dtype, num_warps):
    x, y = normal(9, 1500).astype(dtype), gpulab.empty(9)
    report = gpulab.triton_launch(tk.row_sum, (9,), x, y, 1500, B=512, num_warps=num_warps)
    np.testing.assert_allclose(y, x.astype(np.float64).sum(1), rtol=1e-5, atol=1e-4)
    assert report.instructions["shuffle"] > 0
    assert (report.shared_requests > 0) == (num_warps > 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softmax(dtype):
    x = torch.randn(7, 333).to(dtype)
    y = torch.zeros_like(x)
    gpulab.triton_launch(tk.softmax, (7,), x, y, 333, B=512)
    want = torch.softmax(x.float(), 1)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}[dtype]
    assert ((y.float() - want).abs() <= tolerance * want + 1e-7).all()


def test_sigmoid_accuracy():
    x = np.linspace(-30, 30, 6001, dtype=np.float32)
    y = gpulab.empty(6001)
    report = gpulab.triton_launch(tk.sigmoid, (6,), x, y, 6001, B=1024)
    want = 1 / (1 + np.exp(-x.astype(np.float64)))
    # exp(-x) is ex2(x * log2 e) in fp32: its relative error grows with |x|
    assert (np.abs(y - want) <= 1.2e-7 * (4 + 1.5 * np.abs(x)) * want).all()
    assert np.abs(y - want).max() < 2e-7
    assert report.instructions["sfu"] > 0


def test_sigmoid_bf16_marked_array():
    x = gpulab.float_to_bf16(normal(500))
    y = gpulab.as_bf16(np.zeros(500, np.uint16))
    gpulab.triton_launch(tk.sigmoid, (1,), x, y, 500, B=512)
    want = torch.sigmoid(torch.from_numpy(gpulab.bf16_to_float(x))).bfloat16().float().numpy()
    np.testing.assert_allclose(gpulab.bf16_to_float(y), want, rtol=2**-8)


def test_atomic_accumulation():
    n = 5000
    x, total, hist = (
        RNG.integers(0, 9, n).astype(np.float32),
        np.zeros(1, np.float32),
        np.zeros(8, np.int32),
    )
    report = gpulab.triton_launch(tk.accumulate, (20,), x, total, hist, n, B=256)
    assert total[0] == x.sum() and (hist == n // 8).all()
    assert report.atomic_lane_ops == 20 + n and report.atomic_max_same_address == n // 8


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("hw", [1000, 1024])
def test_fused_reductions(hw, stages):
    n, c = 2, 48
    x, w = normal(n, c, hw).astype(np.float16), normal(c).astype(np.float16)
    z, q = np.zeros((n, c), np.float32), gpulab.empty((n, hw))
    gpulab.triton_launch(
        tk.column_dot, (-(-hw // 256), n), x, w, z, q, c, hw, BC=16, BHW=256, num_stages=stages
    )
    xf, wf = x.astype(np.float64), w.astype(np.float64)
    np.testing.assert_allclose(q, np.einsum("nch,c->nh", xf, wf), atol=2e-5)
    np.testing.assert_allclose(z, xf.sum(2), atol=2e-4)


@pytest.mark.parametrize(
    "target,device", [(75, gpulab.A100), (89, gpulab.RTX4090), (100, gpulab.B200)]
)
@pytest.mark.parametrize("num_warps", [1, 8])
def test_other_targets(target, device, num_warps):
    n, c, hw = 1, 20, 777
    x, w = torch.randn(n, c, hw).bfloat16(), torch.randn(c).bfloat16()
    z, q = np.zeros((n, c), np.float32), gpulab.empty((n, hw))
    gpulab.triton_launch(
        tk.column_dot,
        (4, n),
        x,
        w,
        z,
        q,
        c,
        hw,
        BC=16,
        BHW=256,
        target=target,
        device=device,
        num_warps=num_warps,
    )
    np.testing.assert_allclose(q, torch.einsum("nch,c->nh", x.float(), w.float()), atol=2e-5)
    np.testing.assert_allclose(z, x.float().sum(2), atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dot_with_pipelined_async_copies(dtype):
    a, b = torch.randn(64, 96).to(dtype), torch.randn(96, 64).to(dtype)
    c = gpulab.empty((64, 64))
    report = gpulab.triton_launch(
        tk.matmul, (1, 1), a, b, c, 64, 64, 96, BM=64, BN=64, BK=32, target=80
    )
    want = a.double() @ b.double()
    assert np.abs(c - want.numpy()).max() < (
        5e-2 if dtype is torch.float32 else 1e-4
    )  # tf32 inputs
    assert report.instructions["mma"] > 0 and report.instructions["async_copy"] > 0


def test_integer_one_is_specialised_and_divisibility_follows_the_pointer():
    base = normal(5000)
    out = np.zeros(4096, np.float32)
    aligned = gpulab.triton_launch(tk.add, (4,), base[:4096], base[:4096], out, 4096, B=1024)
    shifted = gpulab.triton_launch(tk.add, (4,), base[1:4097], base[1:4097], out, 4096, B=1024)
    assert set(aligned.load_widths) == {16} and set(shifted.load_widths) == {4}
    assert (out == 2 * base[1:4097]).all()


def test_registers_and_occupancy_from_ptxas():
    compiled, _ = gpulab.triton_compile(
        tk.softmax, (normal(4, 512), normal(4, 512), 512), {"B": 512}, 90, num_warps=4
    )
    r = gpulab.resources(compiled.asm["ptx"])["softmax"]
    assert 8 < r.registers < 128 and r.spill_stores == 0
    ctas, fraction = r.occupancy(128, compiled.metadata.shared)
    assert ctas == 16 and fraction == 1.0
    cubin = gpulab.resources(compiled.asm["cubin"], 90)
    assert cubin["softmax"].registers > 0
