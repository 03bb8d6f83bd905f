"""Whether the modules below a block are still those that its author put there.

A fused block takes the parameters of its children and never calls them. That is right for plain
layers only. An adapter in a layer's place (LoRA, quantisation), another activation, or hooks
(pruning, weight normalisation, offloading, GradCAM) change what a call computes. Then the block
must call its children.
"""

from torch import nn

#: (index of a parent, its children's names and classes) for each module that has children. The
#: block itself has index 0; children get the next ones, in the order in which they appear here.
Tree = tuple[tuple[int, tuple[tuple[str, type[nn.Module]], ...]], ...]


def untouched(block: nn.Module, tree: Tree) -> list[nn.Module] | None:
    """The block and the modules below it by their index, or None if one of them was replaced or
    must itself be called."""
    below = [block]
    for parent, expected in tree:
        children = below[parent]._modules
        if parent and len(children) != len(expected):  # a Sequential would run one more
            return None
        for name, kind in expected:
            module = children.get(name)
            if type(module) is not kind:
                return None
            has = module.__dict__  # `hooked`, written out: ten calls of it take too long
            if (
                has["_forward_hooks"]
                or has["_forward_pre_hooks"]
                or has["_backward_hooks"]
                or has["_backward_pre_hooks"]
                or "forward" in has
            ):
                return None
            below.append(module)
    return below


def hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
