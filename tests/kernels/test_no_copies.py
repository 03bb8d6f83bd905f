"""A map is copied only where its layout needs it. channels_last passes through from one convolution
to the next; parts of a larger tensor with dense rows are read where they are."""

import norm_budget
import pytest
import torch
from budget import CHANNELS_LAST, VARIANTS, call, channels_last, make_case
from networks import images, needs_kernels
from torch.profiler import ProfilerActivity, profile

import scse_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("default"),  # some versions of the profiler warn of themselves
]

COPY = "aten::copy_"  # what clone, contiguous and to come down to


def batch_of_a_larger_tensor(t):
    return torch.cat([t, t], 1).contiguous()[:, : t.shape[1]]


def channels_of_a_larger_tensor(t):
    return channels_last(torch.cat([t, t], 1))[:, : t.shape[1]]


def positions_of_a_larger_tensor(t):
    return torch.cat([t, t], -2)[..., : t.shape[-2], :]


def _copied(function):
    """The shapes of the maps that a function copies, also inside of operators, and its results."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        results = function()
    shapes = [e.input_shapes[0] for e in recorded.events() if e.name == COPY]
    return [shape for shape in shapes if len(shape) > 2], results


def _copies(function):
    """How many those are."""
    shapes, results = _copied(function)
    return len(shapes), results


def _gradient(case):
    x = case.x.requires_grad_()
    y = call(case.variant, x, *case.parameters, backend="cpu")
    return torch.autograd.grad(y, x, case.dy)


def _forward_and_backward(case):
    leaves = [None if t is None else t.requires_grad_() for t in (case.x, *case.parameters)]

    def function():
        y = case.call(case.variant, **dict(zip(case.names, leaves, strict=True)), backend="cpu")
        return y, torch.autograd.grad(y, leaves[0], case.dy)[0]

    return _copies(function)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ((2, 12, 9, 7), (2, 12, 5, 4, 3)), ids=("2d", "3d"))
@pytest.mark.parametrize(
    "arrange", (torch.Tensor.contiguous, channels_last), ids=("contiguous", "channels_last")
)
def test_one_block(arrange, shape, variant):
    case = make_case(shape, variant).arranged(arrange, arrange)
    copies, (y, dx) = _forward_and_backward(case)
    assert copies == 0
    assert y.stride() == arrange(y).stride() and dx.stride() == case.x.stride()


def test_dense_samples_of_a_larger_tensor():
    """As a skip connection leaves them: the first channels of a concatenation."""
    case = make_case((3, 12, 9, 7)).arranged(batch_of_a_larger_tensor, batch_of_a_larger_tensor)
    assert not case.x.is_contiguous()
    assert _forward_and_backward(case)[0] == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ((3, 12, 9, 7), (2, 12, 5, 4, 3)), ids=("2d", "3d"))
def test_channels_of_a_larger_tensor(shape, variant):
    """The first channels of a channels_last concatenation: y and dx are dense and channels_last."""
    case = make_case(shape, variant).arranged(*[channels_of_a_larger_tensor] * 2)
    assert not case.x.is_contiguous(memory_format=CHANNELS_LAST[len(shape)])
    copies, (y, dx) = _forward_and_backward(case)
    assert copies == 0
    assert y.stride() == channels_last(y).stride() and dx.stride() == channels_last(case.x).stride()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "arrange",
    (batch_of_a_larger_tensor, channels_of_a_larger_tensor, positions_of_a_larger_tensor),
)
def test_parts_of_a_larger_tensor_behind_batch_norm(arrange, variant):
    case = norm_budget.make_case((3, 12, 9, 7), variant).arranged(arrange, arrange)
    copies, _ = _forward_and_backward(case)
    assert copies == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "arrange", (torch.Tensor.contiguous, channels_last), ids=("contiguous", "channels_last")
)
def test_of_an_expanded_gradient_one_row_is_copied(arrange, variant):
    """As y.sum().backward() sends it: a row of positions, or of channels, is what kernels read."""
    case = make_case((3, 12, 9, 7), variant).arranged(x=arrange)
    channels = case.dy.shape[1]
    case = case.arranged(dy=lambda t: t.new_ones(()).expand(t.shape))
    shapes, _ = _copied(lambda: _gradient(case))
    assert shapes == [[1, 1, 9, 7] if case.x.is_contiguous() else [1, channels, 1, 1]]


def test_a_gradient_of_each_channel_is_read_as_it_is():
    """As y.sum((2, 3)) sends it, for a channels_last map."""
    case = make_case((3, 12, 9, 7)).arranged(channels_last, lambda t: t[..., :1, :1].contiguous())
    case = case.arranged(dy=lambda t: t.expand(case.x.shape))
    assert _copied(lambda: _gradient(case))[0] == []


def test_what_the_kernels_cannot_read_is_copied_once():
    """Also shows that a copy would have been seen above."""

    def swapped(t):
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    case = make_case((3, 12, 9, 7)).arranged(x=swapped)
    assert _forward_and_backward(case)[0] == 2  # of x, for the forward and for the backward


@pytest.mark.parametrize("autocast", (False, True))
def test_between_convolutions(autocast):
    """As many copies as without the block, which gets and gives channels_last."""
    counts, seen = [], []
    for block in (scse_kernels.SCSEModule(16, 4), torch.nn.Identity()):
        convolutions = [torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)]
        network = torch.nn.Sequential(convolutions[0], block, convolutions[1])
        network.to(memory_format=torch.channels_last)
        block.register_forward_hook(lambda _, args, y: seen.extend((args[0], y)))
        x = channels_last(images(2, 16, 12, 10)).requires_grad_()

        def step(network=network, x=x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = network(x)
            y.float().sum().backward()

        step()
        counts.append(_copies(step)[0])
    assert counts[0] == counts[1]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
