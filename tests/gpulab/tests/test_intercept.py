"""gpulab.intercept around unmodified host code."""

import threading

import gpulab
import host_code as host
import pytest
import torch
import triton

SMALL = gpulab.H100.scaled(l2_bytes=1 << 16)


def test_a_torch_function_and_its_reports():
    x, y = torch.randn(5000), torch.randn(5000)
    with gpulab.intercept() as lab:
        z = host.add(x, y, num_warps=8)
        w = host.add(z, y)
    assert torch.equal(z, x + y) and torch.equal(w, z + y)
    assert lab.launches == 2 and [r.kernel for r in lab.reports] == ["_add", "_add"]
    assert [r.num_warps for r in lab.reports] == [8, 4] and lab.reports[0].grid == (5, 1, 1)
    assert (
        lab.reports[0].dram_read_bytes == 2 * 20000 and lab.reports[1].dram_read_bytes == 0
    )  # one L2
    assert lab.dram_read_bytes == 40000 and lab.dram_write_bytes == 40000
    with pytest.raises((RuntimeError, ValueError)):  # Triton's own error: no driver, or CPU tensors
        host.scale(x.view(1, -1), 2.0)


def test_l2_size_and_carrying_on():
    x, y = torch.randn(1 << 16), torch.randn(1 << 16)
    with gpulab.intercept(device=SMALL) as lab:
        host.add(host.add(x, y), y)
    assert lab.dram_read_bytes == 4 * x.nbytes and lab.dram_write_bytes == 2 * x.nbytes
    with gpulab.intercept() as first:
        host.add(x, y)
    with gpulab.intercept(l2=first.l2) as second:
        host.add(x, y)
    assert second.dram_read_bytes == 0 and second.dram_write_bytes == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_strides_offsets_and_dtypes(dtype, offset):
    base = torch.randn(7, 400).to(dtype)
    x = base[:, offset : offset + 300]
    out = torch.full((9, 300), 5.0, dtype=dtype)
    with gpulab.intercept() as lab:
        host.scale(x, 2.0, out[1:8])
        assert torch.equal(host.scale(x, 2.0), 2 * x)
    assert torch.equal(out[1:8], 2 * x) and (out[0] == 5).all() and (out[8] == 5).all()
    assert lab.reports[0].kernel == "_scale"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8, torch.bool])
def test_integers_and_bools(dtype):
    x = torch.randint(0, 2, (3000,)).to(dtype)
    with gpulab.intercept():
        assert torch.equal(host.copy(x), x)


def test_heuristics_and_autotune():
    x = torch.randn(4, 384)
    with gpulab.intercept() as lab:
        assert torch.equal(host.scale(x, 2.0), 2 * x)
        v = torch.randn(4096)
        assert torch.equal(host.copy(v), v) and torch.equal(host.copy(v), v)
    assert [r.kernel for r in lab.reports] == ["_scale", "_copy", "_copy"]
    assert len(lab.trials) == 2 and {r.num_warps for r in lab.trials} == {4, 8}
    assert not host._copy.cache  # the choice stays inside the context


def test_aliasing_and_in_place():
    x = torch.randn(2000)
    expect = x + x
    with gpulab.intercept():
        host._add[(2,)](x, x, x, 2000, B=1024)
    assert torch.equal(x, expect)
    buffer = torch.randn(3000)
    a, b, c = buffer[:1000], buffer[1000:2000], buffer[2000:]
    expect = a + b
    with gpulab.intercept() as lab:
        host._add[(1,)](a, b, c, 1000, B=1024)
        host._add[(3,)](buffer, buffer, buffer, 3000, B=1024)
        with pytest.raises(gpulab.OutOfBounds):  # into the neighbour in the same storage
            host._add[(1,)](a, b, c, 1001, B=1024)
    assert torch.equal(c, 2 * expect)
    assert lab.dram_read_bytes < buffer.nbytes + 64  # the L2 sees one buffer through both launches


def test_poison():
    x = torch.randn(2000)
    with gpulab.intercept():
        assert torch.allclose(host.total(x), x.sum(), atol=1e-3)
        with pytest.raises(gpulab.UninitialisedRead, match=r"'part'.*\n.*host_code.py"):
            host.total(x, short=True)
        y = torch.empty(2000)
        y[:1000] = 1
        host.add(x[:1000], y[:1000])
        with pytest.raises(gpulab.UninitialisedRead):
            host.add(x, y)
        y.fill_(2)
        host.add(x, y)
    with gpulab.intercept(poison=False):
        host.total(x, short=True)
    assert torch.empty.__name__ == "empty" and not hasattr(torch.empty, "__wrapped__")


def test_poison_pattern_written_by_a_kernel_counts_as_written():
    x = torch.full((2000,), -2, dtype=torch.int8)  # every byte equals the pattern
    with gpulab.intercept():
        y = host.copy(x)
        assert torch.equal(host.copy(y), x)
        z = torch.empty(2000, dtype=torch.int8)
        with pytest.raises(gpulab.UninitialisedRead):
            host.copy(z)
        z.copy_(x)
        assert torch.equal(host.copy(z), x)


def test_autograd_and_custom_ops():
    x = torch.randn(3, 200, requires_grad=True)
    with gpulab.intercept() as lab:
        y = host.Double.apply(x)
        y.backward(torch.ones_like(y))
        assert torch.equal(x.grad, torch.full_like(x, 2.0))
        x.grad = None
        host.triple(x).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 3.0))
        assert lab.launches == 4
        done = []
        t = threading.Thread(target=lambda: done.append(host.add(y.detach(), y.detach())))
        t.start()
        t.join()
    assert lab.launches == 5 and torch.equal(done[0], 2 * y)


def test_device_figures():
    x, y = torch.randn(1000), torch.randn(1000)
    with gpulab.intercept(target=80) as lab:
        assert torch.equal(host.persistent_add(x, y), x + y)
        assert (
            torch.cuda.get_device_capability() == (8, 0)
            and torch.cuda.get_device_name() == gpulab.A100.name
        )
        assert (
            triton.runtime.driver.active.get_current_target().arch == 80
            and not torch.cuda.is_available()
        )
        with torch.cuda._DeviceGuard(0), torch.cuda.stream(torch.cuda.current_stream()):
            torch.cuda.synchronize()
        with gpulab.intercept(target=90, cuda_available=True) as inner:
            assert torch.cuda.is_available() and x.is_cuda and torch.cuda.device_count() == 1
            host.add(x, y)
        assert triton.runtime.driver.active.get_current_target().arch == 80
    assert lab.launches == inner.launches == 1 and lab.device is gpulab.A100
    assert not x.is_cuda and not torch.cuda.is_available()


def test_options_and_limits():
    x, y = torch.randn(300 * 1024), torch.randn(300 * 1024)
    with gpulab.intercept() as lab:
        host.add(
            x,
            y,
            num_stages=1,
            maxnreg=64,
            launch_cooperative_grid=True,
            launch_pdl=True,
            num_ctas=2,
        )
        assert lab.reports[-1].cluster == (2, 1, 1) and lab.reports[-1].grid == (600, 1, 1)
        with pytest.raises(KeyError, match="nonsense"):
            host.add(x, y, nonsense=3)
        compiled = host._add.warmup(
            torch.float32, torch.float32, torch.float32, 64, B=64, grid=(1,)
        )
        compiled._init_handles()
        assert compiled.n_regs > 0 and compiled.n_spills == 0
    with (
        gpulab.intercept(device=gpulab.H100.scaled(sms=2)),
        pytest.raises(gpulab.GpuLabError, match="cooperative launch of 300 CTAs"),
    ):
        host.add(x, y, launch_cooperative_grid=True)
    with (
        gpulab.intercept(device=gpulab.H100.scaled(sms=1)),
        pytest.raises(gpulab.GpuLabError, match="tensor on meta"),
    ):
        host.add(x.to("meta"), y)


def test_errors_name_the_source():
    x, y = torch.randn(1000), torch.randn(1000)
    with gpulab.intercept() as lab, pytest.raises(gpulab.OutOfBounds, match=r"host_code.py"):
        host._add[(1,)](x, y, torch.empty(500), 1000, B=1024)
    assert lab.launches == 0


@pytest.mark.parametrize("target", [80, 90])
def test_kinds_of_arguments(target):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y, square = torch.randn(100), torch.zeros(100), torch.randn(32, 32)
    with gpulab.intercept(target=target):
        host.tuples[(1,)]((x, y), 100, (2.0, 3), B=128)
        assert torch.allclose(y, 2 * x + 3)
        host.optional[(1,)](x, y, None, 100, 2, True, B=128)
        assert torch.equal(y, -2 * x)
        host.optional[(1,)](x, y, x, 1, 2.5, False, B=128, TWICE=True)
        assert torch.allclose(y[0], 7 * x[0]) and torch.equal(y[1:], -2 * x[1:])
        out = torch.empty(16, 16)
        source = TensorDescriptor.from_tensor(square, [16, 16])
        if target == 80:
            host.descriptor[(1,)](source, out, 16)
            assert torch.equal(out, square[:16, :16])
        else:
            with pytest.raises(gpulab.GpuLabError, match="TMA tensor descriptors"):
                host.descriptor[(1,)](source, out, 16)


def test_wrapped_triton_operator():
    @torch.library.triton_op("gpulab_tests::wrapped", mutates_args={})
    def wrapped(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.library.wrap_triton(host._add)[(1,)](x, x, y, x.numel(), B=128)
        return y

    x = torch.randn(100)
    with gpulab.intercept() as lab, torch.inference_mode():
        assert torch.equal(wrapped(x), 2 * x)
        with pytest.raises(gpulab.UninitialisedRead):
            wrapped(torch.empty(100))
    assert lab.launches == 1


def test_an_empty_view_of_a_tensor_with_storage():
    x, y = torch.randn(64), torch.randn(64)
    with gpulab.intercept() as lab:
        host._add[(1,)](x, y, torch.empty(64)[:0], 0, B=64)
        with pytest.raises(gpulab.OutOfBounds):
            host._add[(1,)](x, y, torch.empty(64)[:0], 1, B=64)
    assert lab.launches == 1
