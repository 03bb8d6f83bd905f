"""The autograd Function around a backend's forward and backward operators."""

import torch
from torch import Tensor

from . import ops, reference


class SCSE(torch.autograd.Function):
    """y = scSE(x). Saves x, the parameters and small [N, C] tensors, never a second full map."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, ws, bs, combine, excitation, backend):
        codes = ops.codes(combine, excitation)
        y, *small = ops.forward(backend, x, w1, b1, w2, b2, ws, bs, *codes)
        ctx.save_for_backward(x, w1, b1, w2, b2, ws, bs, *small)
        ctx.combine, ctx.excitation, ctx.backend = combine, excitation, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # the seven inputs, then the small ones
        needs = x, w1, b1, w2, b2, ws, bs = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():  # create_graph=True: the result will be differentiated again
            grads = _reference_gradients(dy, saved[:7], needs, ctx.combine, *ctx.excitation)
            return (*grads, None, None, None)
        gate = [ops.GATE[ctx.excitation[-1]]] if ctx.excitation else []
        grads = ops.backward(
            *(ctx.backend, dy, *saved, ops.COMBINE[ctx.combine]),
            *(x, w1 or b1 or w2 or b2, ws or bs, *gate),
        )
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*grads, None, None, None)


def _reference_gradients(
    dy: Tensor, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], *formula
) -> list[Tensor | None]:
    """The gradients as a differentiable function of dy and the inputs: the reference's own."""
    # Views, since one tensor may be several inputs, or one input be computed from another.
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    with reference.out_of_autocast(dy):
        y = reference.scse(*inputs, *formula)
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
