"""Ordinary Triton host code, as a library would write it; nothing here knows about gpulab."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add(x, y, z, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(z + o, tl.load(x + o, mask=o < n) + tl.load(y + o, mask=o < n), mask=o < n)


def add(x, y, **options):
    z = torch.empty_like(x)
    n = x.numel()
    with torch.cuda.device(x.device):
        _add[lambda meta: (triton.cdiv(n, meta["B"]),)](x, y, z, n, B=1024, **options)
    return z


@triton.heuristics({"EVEN": lambda a: a["n"] % a["B"] == 0})
@triton.jit
def _scale(x, y, factor, n, row_stride, B: tl.constexpr, EVEN: tl.constexpr):
    row = tl.program_id(1)
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = (
        tl.load(x + row * row_stride + o)
        if EVEN
        else tl.load(x + row * row_stride + o, mask=o < n, other=0.0)
    )
    tl.store(y + row * n + o, (v * factor).to(y.dtype.element_ty), mask=o < n)


def scale(x, factor, out=None):
    rows, n = x.shape
    y = torch.empty(rows, n, dtype=x.dtype) if out is None else out
    _scale[(triton.cdiv(n, 128), rows)](x, y, factor, n, x.stride(0), B=128)
    return y


@triton.autotune(
    configs=[triton.Config({"B": 128}, num_warps=8), triton.Config({"B": 1024}, num_warps=4)],
    key=["n"],
)
@triton.jit
def _copy(x, y, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o, mask=o < n), mask=o < n)


def copy(x):
    y = x.new_empty(x.shape)
    _copy[lambda meta: (triton.cdiv(x.numel(), meta["B"]),)](x, y, x.numel())
    return y


@triton.jit
def _partial_sums(x, part, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(part + tl.program_id(0), tl.sum(tl.load(x + o, mask=o < n, other=0.0), 0))


@triton.jit
def _total(part, out, count, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(out, tl.sum(tl.load(part + o, mask=o < count, other=0.0), 0))


def total(x, short=False):
    """Two launches over one scratch tensor; ``short`` plants a bug: the last partial sum is not
    written."""
    count = triton.cdiv(x.numel(), 256)
    scratch = torch.empty(count + 1)
    part, out = scratch[:count], scratch[count:]
    _partial_sums[(count - short,)](x, part, x.numel(), B=256)
    _total[(1,)](part, out, count, B=triton.next_power_of_2(count))
    return out[0]


def persistent_add(x, y):
    z, n = torch.empty_like(x), x.numel()
    p = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    assert (
        p["multiprocessor_count"]
        == torch.cuda.get_device_properties(x.device).multi_processor_count
    )
    sms = p["multiprocessor_count"]
    _add[(min(triton.cdiv(n, 128), sms),)](x, y, z, min(n, 128 * sms), B=128)
    return z


@triton.jit
def _dependent(w, y, z, n, WAIT: tl.constexpr, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    weight = tl.load(w + o, mask=o < n)
    if WAIT == "first":
        tl.extra.cuda.gdc_wait()
    v = tl.load(y + o, mask=o < n)
    if WAIT == "last":
        tl.extra.cuda.gdc_wait()
    tl.store(z + o, weight * v, mask=o < n)


def dependent(w, y, wait, launch_pdl=True):
    z, n = torch.empty_like(y), y.numel()
    _dependent[(triton.cdiv(n, 256),)](w, y, z, n, WAIT=wait, B=256, launch_pdl=launch_pdl)
    return z


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return add(x, x)

    @staticmethod
    def backward(ctx, g):
        return add(g, g)


@torch.library.custom_op("gpulab_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return scale(x, 3.0)


@triple.register_fake
def _(x):
    return torch.empty_like(x)


triple.register_autograd(lambda ctx, g: scale(g.contiguous(), 3.0))


@triton.jit
def tuples(ptrs, n, factors, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(ptrs[1] + o, tl.load(ptrs[0] + o, mask=o < n) * factors[0] + factors[1], mask=o < n)


@triton.jit
def descriptor(d, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i[:, None] * B + i[None, :], d.load([0, 0]))


@triton.jit
def optional(
    x, y, bias, n: tl.int64, factor: tl.float32, flag, B: tl.constexpr, TWICE: tl.constexpr = False
):
    o = tl.arange(0, B)
    v = tl.load(x + o, mask=o < n) * factor
    if bias is not None:
        v += tl.load(bias + o, mask=o < n)
    if flag:
        v = -v
    if TWICE:
        v *= 2
    tl.store(y + o, v, mask=o < n)
