"""Strides of every kind give the same answers, and y and dx have the memory format of x."""

from dataclasses import replace

import pytest
import torch
from budget import (
    CHANNELS_LAST,
    call,
    channels_last,
    check,
    make_case,
    moved,
    output_and_gradients,
)

SHAPES = ((3, 12, 45), (3, 12, 9, 7), (2, 12, 5, 3, 4))


def within(t, axis, step=1, before=1, after=2, arranged=torch.Tensor.contiguous):
    """t as a slice along `axis` of a larger tensor whose other elements are NaN."""
    size = list(t.shape)
    size[axis] = before + step * size[axis] + after
    larger = arranged(torch.full(size, torch.nan, dtype=t.dtype))
    index = [slice(None)] * t.dim()
    index[axis] = slice(before, before + step * t.shape[axis], step)
    view = larger[tuple(index)]
    view.copy_(t)
    return view


def misaligned(t):
    """t, dense, one element after an aligned address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def misaligned_channels_last(t):
    view = misaligned(torch.movedim(t, 1, -1).contiguous())
    return torch.movedim(view, -1, 1)


STRIDES = {
    "batch sliced": lambda t: within(t, 0),
    "every second sample": lambda t: within(t, 0, step=2),
    "channel sliced": lambda t: within(t, 1),
    "every second channel": lambda t: within(t, 1, step=2),
    "rows sliced": lambda t: within(t, 2),
    "columns sliced": lambda t: within(t, -1),
    "every second column": lambda t: within(t, -1, step=2),
    "channels_last, batch sliced": lambda t: within(t, 0, arranged=channels_last),
    "channels_last, channel sliced": lambda t: within(t, 1, arranged=channels_last),
    "channels_last, columns sliced": lambda t: within(t, -1, arranged=channels_last),
    "channels_last, every second sample": lambda t: within(t, 0, step=2, arranged=channels_last),
    "channels_last, every second channel": lambda t: within(t, 1, step=2, arranged=channels_last),
    "spatial axes swapped": lambda t: t.transpose(2, -1).contiguous().transpose(2, -1),
    "batch and channels swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "batch innermost": lambda t: torch.movedim(torch.movedim(t, 0, -1).contiguous(), -1, 0),
    "channels innermost": lambda t: torch.movedim(torch.movedim(t, 1, -1).contiguous(), -1, 1),
    "misaligned": misaligned,
    "misaligned channels_last": misaligned_channels_last,
}
NO_COPY = {  # what broadcasting leaves behind: several indices, one element
    "one sample": lambda t: t[:1].expand(t.shape),
    "one channel": lambda t: t[:, :1].expand(t.shape),
    "one position": lambda t: t[(..., *(slice(0, 1),) * (t.dim() - 2))].expand(t.shape),
    "one element": lambda t: t.flatten()[0].expand(t.shape),
    "one sample, channels_last": lambda t: channels_last(t[:1]).expand(t.shape),
    "one channel of a sample": lambda t: t[:1, :1].expand(t.shape),
    "one position of a sample": lambda t: t[(0, ..., *(slice(0, 1),) * (t.dim() - 2))].expand(
        t.shape
    ),
}


def _variant(index):
    return ("add", "max", "concat", "mul", "cse", "sse")[index % 6]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s) - 2}d")
@pytest.mark.parametrize("strides", (*STRIDES, *NO_COPY))
def test_strides(target, strides, shape):
    arrange = {**STRIDES, **NO_COPY}[strides]
    number = list({**STRIDES, **NO_COPY}).index(strides) + len(shape)
    for variant in (_variant(number), _variant(number + 1)):
        case = make_case(shape, variant)
        check(case.arranged(x=arrange), target)
        check(case.arranged(dy=arrange), target)
    check(case.arranged(arrange, arrange), target)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda s: f"{len(s) - 2}d")
@pytest.mark.parametrize("variant", ("cse", "sse", "add", "max", "mul", "concat"))
def test_x_and_dy_in_different_formats(target, shape, variant):
    case = make_case(shape, variant)
    check(case.arranged(x=channels_last), target)
    check(case.arranged(dy=channels_last), target)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("strides", ("misaligned", "misaligned channels_last"))
def test_misaligned_addresses(target, strides, dtype):
    arrange = STRIDES[strides]
    for shape in ((2, 24, 8, 8), (2, 7, 5, 13)):
        check(make_case(shape, "max", dtype).arranged(arrange, arrange), target)


@pytest.mark.parametrize("variant", ("cse", "sse", "add", "max", "mul", "concat"))
def test_gradient_of_a_sum(target, variant):
    """y.sum().backward() sends one element, expanded, as dy."""
    case = make_case((3, 12, 9, 7), variant)
    x = case.x.to(target.device).requires_grad_()
    parameters = [
        None if p is None else p.to(target.device).requires_grad_() for p in case.parameters
    ]
    call(variant, x, *parameters, backend=target.backend).sum().backward()
    ones = case.arranged(dy=torch.ones_like)
    expected = check(ones, target)
    for name, t in zip(("x", "w1", "b1", "w2", "b2", "ws", "bs"), (x, *parameters), strict=True):
        if t is not None:
            torch.testing.assert_close(t.grad, expected[f"d{name}"])


FORMATS = {
    torch.contiguous_format: ((2, 4, 6), (2, 4, 3, 5), (2, 4, 3, 5, 2)),
    torch.channels_last: ((2, 4, 3, 5),),
    torch.channels_last_3d: ((2, 4, 3, 5, 2),),
}


@pytest.mark.parametrize("variant", ("cse", "sse", "add", "max", "mul", "concat"))
@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_has_the_memory_format_of_x(target, variant, memory_format):
    for shape in FORMATS[memory_format]:
        case = make_case(shape, variant).arranged(
            x=lambda t: t.contiguous(memory_format=memory_format)
        )
        got = output_and_gradients(
            lambda v, *a, **k: call(v, *a, **k, backend=target.backend), case, target.device
        )
        assert got["y"].is_contiguous(memory_format=memory_format)
        if target.backend != "eager":  # there autograd decides
            assert got["dx"].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda s: f"{len(s) - 2}d")
@pytest.mark.parametrize("strides", [name for name in STRIDES if "channels_last, " in name])
def test_part_of_a_channels_last_map_stays_channels_last(target, strides, shape):
    """As every second sample does, though not every second channel: channels lie side by side."""
    stays = strides != "channels_last, every second channel"
    case = make_case(shape, "max").arranged(x=STRIDES[strides])
    got = output_and_gradients(
        lambda v, *a, **k: call(v, *a, **k, backend=target.backend), case, target.device
    )
    names = ("y",) if target.backend == "eager" else ("y", "dx")  # of eager's dx autograd decides
    for name in names:
        t = got[name]
        assert t.is_contiguous(memory_format=CHANNELS_LAST[t.dim()]) == stays
        assert t.is_contiguous() != stays


@pytest.mark.parametrize(
    "shape",
    ((3, 1, 9, 7), (1, 12, 9, 7), (3, 12, 1, 7), (3, 12, 9, 1), (3, 12, 1, 1), (1, 1, 1, 1)),
)
def test_axes_of_size_one(target, shape):
    """Their strides mean nothing, and may be anything."""
    for number, strides in enumerate(("channel sliced", "channels_last, channel sliced")):
        arrange = STRIDES[strides]
        case = make_case(shape, _variant(number + sum(shape)))
        check(case.arranged(arrange, arrange), target)
        check(case.arranged(x=arrange), target)
    odd = [5 if size == 1 else stride for size, stride in zip(shape, case.x.stride(), strict=True)]
    check(case.arranged(x=lambda t: t.as_strided(shape, odd)), target)


def test_output_of_a_map_with_other_strides_is_contiguous(target):
    case = make_case((2, 4, 3, 5))
    for strides in ("every second column", "batch innermost", "spatial axes swapped"):
        x = moved(STRIDES[strides](case.x), target.device)
        parameters = [p.to(target.device) for p in case.parameters]
        assert call("add", x, *parameters, backend=target.backend).is_contiguous()


def _in_channels_last(p):
    """[C, Cr, 1, 1] with the strides that module.to(memory_format=channels_last) leaves."""
    memory_format = CHANNELS_LAST.get(p.dim(), torch.contiguous_format)
    return torch.empty_like(p, memory_format=memory_format).copy_(p)


@pytest.mark.parametrize("parameter_dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("variant", ("cse", "sse", "max"))
@pytest.mark.parametrize("trailing", (2, 3))
def test_gradients_have_their_parameters_strides(target, variant, trailing, parameter_dtype):
    """DistributedDataParallel asks for that, also where only the strides of axes of size one are
    special. And other strides give right answers."""
    case = make_case((2, 12, 5, 7), variant, trailing=trailing, parameter_dtype=parameter_dtype)
    arranged = tuple(None if p is None else _in_channels_last(p) for p in case.parameters)
    case = replace(case, parameters=arranged)
    got = check(case, target)
    for name, p in zip(("w1", "b1", "w2", "b2", "ws", "bs"), arranged, strict=True):
        if p is not None:
            assert got[f"d{name}"].stride() == p.stride(), name
            if p.dim() > 2 and name != "ws":
                assert p.stride() != torch.empty(p.shape).stride()
    x, *parameters = (
        None if t is None else moved(t, target.device).requires_grad_() for t in (case.x, *arranged)
    )
    for times in (1, 2):
        call(variant, x, *parameters, backend=target.backend).backward(case.dy.to(target.device))
        for name, p in zip(("w1", "b1", "w2", "b2", "ws", "bs"), parameters, strict=True):
            if p is not None:
                assert p.grad.stride() == p.stride()
                torch.testing.assert_close(p.grad, times * got[f"d{name}"])


def test_gradients_of_transposed_parameters(fused):
    case = make_case((2, 12, 5, 7), "add")
    w1, b1, w2, *rest = case.parameters
    arranged = (w1.T.contiguous().T, b1, w2.T.contiguous().T, *rest)
    check(replace(case, parameters=arranged), fused)
