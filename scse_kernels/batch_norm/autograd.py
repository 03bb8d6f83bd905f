"""The autograd Function around a backend's operators for BatchNorm + ReLU + scSE."""

import torch
from torch import Tensor

from .. import reference as scse_reference
from . import ops, reference


class BNReLUSCSE(torch.autograd.Function):
    """y = scSE(relu(BatchNorm(u))), and the statistics that were used, which have no gradient.

    `moving`, where it is given, are running statistics to be moved, see `ops.forward`. Saves u, the
    parameters and small tensors [C] and [N, C]: no map besides u.
    """

    @staticmethod
    def forward(
        ctx, u, bn_weight, bn_bias, w1, b1, w2, b2, ws, bs, running_mean, running_var, eps, combine,
        backend, moving=None,
    ):  # fmt: skip
        arguments = (
            u, bn_weight, bn_bias, running_mean, running_var, w1, b1, w2, b2, ws, bs, eps,
            ops.COMBINE[combine],
        )  # fmt: skip
        y, *small = ops.forward(backend, arguments, moving)
        mean, var = small[:2]
        ctx.save_for_backward(u, bn_weight, bn_bias, w1, b1, w2, b2, ws, bs, *small)
        ctx.of_batch, ctx.eps = running_mean is None, eps
        ctx.combine, ctx.backend = combine, backend
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        rest = (None,) * (len(ctx.needs_input_grad) - 9)
        if dy is None:
            return (None,) * 9 + rest
        saved = ctx.saved_tensors  # the nine inputs, then mean and var and the other small ones
        needs = u, bn_weight, bn_bias, w1, b1, w2, b2, ws, bs = ctx.needs_input_grad[:9]
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated again
            statistics = (None, None) if ctx.of_batch else saved[9:11]
            return (
                *_reference_gradients(dy, saved[:9], needs, statistics, ctx.eps, ctx.combine),
                *rest,
            )
        grads = ops.backward(
            ctx.backend, dy, *saved, ctx.eps, ctx.of_batch, ops.COMBINE[ctx.combine],
            u, bn_weight or bn_bias, w1 or b1 or w2 or b2, ws or bs,
        )  # fmt: skip
        return (*[g if need else None for g, need in zip(grads, needs, strict=True)], *rest)


def _reference_gradients(
    dy: Tensor,
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    statistics: tuple[Tensor | None, Tensor | None],
    eps: float,
    combine: str,
) -> list[Tensor | None]:
    """The gradients as a differentiable function of dy and the inputs: the reference's own."""
    # Views, since one tensor may be several inputs, or one input be computed from another.
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    u, bn_weight, bn_bias, *parameters = inputs
    with scse_reference.out_of_autocast(dy):
        y = reference.bn_relu_scse(
            u, bn_weight, bn_bias, *statistics, *parameters, eps=eps, combine=combine
        )
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needs]
