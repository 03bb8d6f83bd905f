"""A whole network under torch.compile: no graph break, and no compiling anew for each new size."""

import pytest
import torch
from networks import gradients, images, needs_kernels, unet
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = [
    pytest.mark.filterwarnings("default"),  # torch warns of its own parts while tracing
    needs_kernels,
]

SHAPES = ((2, 3, 16, 12), (3, 3, 16, 12), (5, 3, 16, 12), (4, 3, 24, 32), (7, 3, 40, 20))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _same(compiled, network, x):
    expected, got = gradients(network, x), gradients(compiled, x)
    for (name, a), b in zip(expected.items(), got.values(), strict=True):
        torch.testing.assert_close(
            b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_no_graph_break():
    explained = torch._dynamo.explain(unet())(images(2, 3, 16, 12))
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    operators = [getattr(op, "__name__", str(op)) for ops in explained.ops_per_graph for op in ops]
    assert sum("autograd_function_apply" in name for name in operators) == 4, operators


@pytest.mark.parametrize("dynamic", (None, True), ids=("automatic", "dynamic"))
def test_new_sizes(dynamic):
    """The first size is compiled; without dynamic=True a second kind makes sizes variables."""
    network = unet()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for shape in SHAPES:
        _same(compiled, network, images(*shape))
        counts.append(counter.frame_count)
    # without: a batch of another size, then other heights and widths
    assert counts == ([1] * 5 if dynamic else [1, 2, 2, 3, 3])


def test_marked_batch():
    network = unet()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for n in (2, 3, 8):
        x = images(n, 3, 16, 12)
        torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, network(x))
    assert counter.frame_count == 1


class _Decoder(torch.nn.Module):
    """One block of the decoder; Inductor takes most of a minute for the whole network."""

    def __init__(self):
        super().__init__()
        network = unet()
        self.encoder, self.decoder = network.encoders[0], network.decoders[1]

    def forward(self, x):
        skip = self.encoder(x)
        low = torch.cat([skip[..., ::2, ::2], skip[:, :4, ::2, ::2]], 1)
        return self.decoder(low, skip)


def test_inductor_and_new_batches():
    """Batches only: Inductor's own convolutions are compiled for one height and width."""
    network = _Decoder().to(memory_format=torch.channels_last)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
    for n in (2, 3, 7):
        x = images(n, 3, 16, 12).contiguous(memory_format=torch.channels_last)
        _same(compiled, network, x)
    assert counter.frame_count == 1


def test_inductor_and_new_sizes():
    network = torch.nn.Sequential(torch.nn.ReLU(), unet().decoders[0].attention2, torch.nn.Tanh())
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(network, fullgraph=True, backend=counter, dynamic=True)
    for shape in ((2, 12, 16, 20), (3, 12, 16, 20), (5, 12, 9, 31)):
        _same(compiled, network, images(*shape))
    assert counter.frame_count == 1
