"""The recalibration blocks inside a network: what they see, and what they take by themselves."""

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from . import timing


def shapes_seen(net: nn.Module, blocks: list[nn.Module], image: Tensor) -> list[list[torch.Size]]:
    """For each of the blocks, the shapes that it sees when the network sees `image`."""
    shapes = {block: [] for block in blocks}
    hooks = [
        block.register_forward_hook(lambda block, args, _: shapes[block].append(args[0].shape))
        for block in blocks
    ]
    mode = net.training
    net.eval()  # leaves the running statistics alone
    with torch.no_grad():
        net(image)
    net.train(mode)
    for hook in hooks:
        hook.remove()
    return [shapes[block] for block in blocks]


def seconds(
    blocks: Mapping[str, list[nn.Module]],
    shapes: Iterable[list[torch.Size]],
    device: torch.device,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, float]:
    """Seconds that each network's blocks take in a step, forward and backward, timed by themselves
    on the shapes that they see; all networks have as many blocks."""
    calls = {}
    for i, seen in enumerate(shapes):
        for shape in seen:
            x, dy = (
                torch.randn(shape, device=device, dtype=autocast).to(memory_format=memory_format)
                for _ in range(2)
            )
            for name, own in blocks.items():
                key = name, i, len(calls)
                calls[key] = functools.partial(_step, own[i], x.requires_grad_(), dy, autocast)
    for call in calls.values():
        call()
    timings = timing.interleaved(calls, device, rounds=9)
    return {name: sum(t.median for key, t in timings.items() if key[0] == name) for name in blocks}


def _step(block: nn.Module, x: Tensor, dy: Tensor, autocast: torch.dtype | None) -> None:
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = block(x)
    torch.autograd.grad(y, [x, *block.parameters()], dy.to(y.dtype))
