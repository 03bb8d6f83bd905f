"""The articles' networks: sizes, what the blocks add, and that convert finds each block."""

import pytest
import torch
from torch import nn

pytest.importorskip("bench.timing", reason="only a checkout has bench")
pytest.importorskip("rich")
from bench import complexity, networks
from scse_kernels import convert

CLASSES, WIDTH = 5, 8
# Indices of a pooling without overlap don't collide.
pytestmark = pytest.mark.filterwarnings("ignore:max_unpooling2d.* deterministic")


def build(network, pattern, width=WIDTH):
    torch.manual_seed(0)
    return networks.build(network, pattern, CLASSES, width)


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_every_block_is_used_and_found(network):
    """Logits have the size of the image, and no parameter is without a gradient."""
    for pattern in networks.PATTERNS:
        net = build(network, pattern)
        y = net(torch.randn(2, 1, 48, 32))
        assert y.shape == (2, CLASSES, 48, 32)
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        found = convert(net).converted
        assert len(found) == (0 if pattern == "none" else 2 * networks.blocks.BLOCKS)
        computes = {"cSE": "cse", "sSE": "sse", "scSE": "scse, add"}
        assert {entry.detail for entry in found} <= {computes.get(pattern)}


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_what_the_blocks_add(network):
    """By the formulas: C * C and C weights, and the biases that the articles leave out."""
    plain, size = sum(p.numel() for p in build(network, "none").parameters()), 2 * 4
    hidden = WIDTH // 2
    for pattern, weights, biases in (
        ("cSE", WIDTH * WIDTH, hidden + WIDTH),
        ("sSE", WIDTH, 1),
        ("scSE", WIDTH * WIDTH + WIDTH, hidden + WIDTH + 1),
    ):
        added = sum(p.numel() for p in build(network, pattern).parameters()) - plain
        assert added == size * (weights + biases)
        assert complexity.as_the_articles_count(pattern, WIDTH) == size * weights


def test_multiply_adds():
    """Of a U-Net without blocks, counted by hand: 5x5 convolutions at each resolution."""
    _, macs = complexity.counts("U-Net", "none", WIDTH, 32)
    convolutions, pixels = 0, 32 * 32
    for level in range(4):
        here = pixels // 4**level
        encoder = (1 if level == 0 else WIDTH) * WIDTH + WIDTH * WIDTH
        convolutions += 25 * here * (encoder + 2 * WIDTH * WIDTH + WIDTH * WIDTH)
    convolutions += 25 * (pixels // 4**4) * 2 * WIDTH * WIDTH
    assert macs == convolutions + pixels * WIDTH * 28
    gates = complexity.counts("U-Net", "sSE", WIDTH, 32)[1] - macs
    maps = sum(2 * pixels // 4**level * WIDTH for level in range(4))
    assert gates == 2 * maps  # the squeeze, and the product with the gate


def test_sd_net_unpools_by_indices():
    """A value goes back to where the maximum was found."""
    net = build("SD-Net", "none")
    seen = []
    net.decoders[-1].register_forward_hook(lambda _, args, y: seen.append(args[0]))
    net(torch.randn(1, 1, 32, 32))
    skip, unpooled = seen[0].split(WIDTH, 1)
    _, indices = nn.functional.max_pool2d(skip, 2, return_indices=True)
    at_maxima = unpooled.flatten(2).gather(2, indices.flatten(2))
    assert at_maxima.count_nonzero() > 0
    assert at_maxima.count_nonzero() == unpooled.count_nonzero()
