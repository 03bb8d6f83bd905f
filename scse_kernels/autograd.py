"""The autograd Function around a backend's forward and backward operators."""

import torch
from torch import Tensor

from . import ops, reference


class SCSE(torch.autograd.Function):
    """y = scSE(x). Saves x, the parameters and small [N, C] tensors, never a second full map."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, ws, bs, combine, excitation, residual, backend):
        codes = ops.codes(combine, excitation, residual)
        y, *small = ops.forward(backend, x, w1, b1, w2, b2, ws, bs, *codes)
        ctx.save_for_backward(x, w1, b1, w2, b2, ws, bs, *small)
        ctx.combine, ctx.excitation, ctx.residual = combine, excitation, residual
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # the seven inputs, then the small ones
        needs = x, w1, b1, w2, b2, ws, bs = ctx.needs_input_grad[:7]
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated again
            formula = (ctx.combine, *ctx.excitation)
            grads = _reference_gradients(dy, saved[:7], needs, *formula, residual=ctx.residual)
            return (*grads, None, None, None, None)
        _, *others = ops.codes(ctx.combine, ctx.excitation, ctx.residual)
        grads = ops.backward(
            *(ctx.backend, dy, *saved, ops.COMBINE[ctx.combine]),
            *(x, w1 or b1 or w2 or b2, ws or bs, *others[2:]),  # gate and residual
        )
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*grads, None, None, None, None)


def _reference_gradients(
    dy: Tensor, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], *formula, residual: bool
) -> list[Tensor | None]:
    """The gradients as a differentiable function of dy and the inputs: the reference's own."""
    # Views, since one tensor may be several inputs, or one input be computed from another.
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    with reference.out_of_autocast(dy):
        y = reference.scse(*inputs, *formula, residual=residual)
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
