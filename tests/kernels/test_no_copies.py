"""No copy of a map is made that its layout doesn't need: channels_last passes through from one
convolution to the next, and dense samples of a larger tensor are read where they are."""

import pytest
import torch
from budget import VARIANTS, call, make_case
from networks import images, needs_kernels
from torch.profiler import ProfilerActivity, profile

import scse_kernels

pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("default"),  # some versions of the profiler warn of themselves
]

COPY = "aten::copy_"  # what clone, contiguous and to come down to
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(t):
    return t.contiguous(memory_format=CHANNELS_LAST[t.dim()])


def batch_of_a_larger_tensor(t):
    return torch.cat([t, t], 1).contiguous()[:, : t.shape[1]]


def _copies(function):
    """How many copies of at least a sample a function makes, those inside of operators included."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        results = function()
    shapes = [e.input_shapes[0] for e in recorded.events() if e.name == COPY]
    return sum(len(shape) > 2 for shape in shapes), results


def _forward_and_backward(case):
    leaves = [None if t is None else t.requires_grad_() for t in (case.x, *case.parameters)]

    def function():
        y = call(case.variant, *leaves, backend="cpu")
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
