"""The operators of BatchNorm + ReLU + scSE: their schemas, and what their results look like.

As in the package's ops.py: one operator forward and one backward for each backend,
`torch.ops.scse_kernels.<backend>_bn_forward` and `..._bn_backward`. They change none of their
arguments: the caller updates the running statistics, from `mean` and `var`.
"""

from functools import cache

import torch
from torch import Tensor

from .. import ops
from .._library import library
from ..ops import COMBINE, gradient_memory, memory_format
from ..reference import accumulation_dtype
from . import reference

#: those of the package's backends that have kernels for this
BACKENDS = ("cpu", "triton")

# mean, var: the running statistics; None: those of u. The operator returns those that it used, in
# the dtype of sums (the variance biased).
_FORWARD = (
    "(Tensor u, Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var, Tensor? w1,"
    " Tensor? b1, Tensor? w2, Tensor? b2, Tensor? ws, Tensor? bs, float eps, int combine)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor pooled, Tensor hidden, Tensor channel_gate)"
)
# of_batch: the statistics are those of u, so u has a gradient through them.
_BACKWARD = (
    "(Tensor dy, Tensor u, Tensor? bn_weight, Tensor? bn_bias, Tensor? w1, Tensor? b1, Tensor? w2,"
    " Tensor? b2, Tensor? ws, Tensor? bs, Tensor mean, Tensor var, Tensor pooled, Tensor hidden,"
    " Tensor channel_gate, float eps, bool of_batch, int combine, bool need_du, bool need_affine,"
    " bool need_channel, bool need_spatial)"
    " -> (Tensor du, Tensor d_bn_weight, Tensor d_bn_bias, Tensor dw1, Tensor db1, Tensor dw2,"
    " Tensor db2, Tensor dws, Tensor dbs)"
)


def _forward_results(u, bn_weight, bn_bias, mean, var, w1, b1, w2, b2, ws, bs, eps, combine):
    """The results, not filled in, as in the package's ops.py."""
    n, c = u.shape[:2]
    concat = w1 is not None and ws is not None and combine == COMBINE["concat"]
    shape = (n, 2 * c, *u.shape[2:]) if concat else u.shape
    channels, hidden = (0, 0) if w1 is None else (c, w1.shape[0])
    small = ((c,), (c,), (n, channels), (2, n, hidden), (n, channels))
    dtype = accumulation_dtype(u.dtype)
    return (
        torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=memory_format(u)),
        *(u.new_empty(sizes, dtype=dtype) for sizes in small),
    )


def _backward_results(
    dy, u, bn_weight, bn_bias, w1, b1, w2, b2, ws, bs, mean, var, pooled, hidden, channel_gate, eps,
    of_batch, combine, need_du, need_affine, need_channel, need_spatial,
):  # fmt: skip
    """The same for the backward."""
    return (
        torch.empty_like(u, memory_format=memory_format(u)) if need_du else u.new_empty((0,)),
        *(gradient_memory(p, need_affine, u) for p in (bn_weight, bn_bias)),
        *(gradient_memory(p, need_channel, u) for p in (w1, b1, w2, b2)),
        *(gradient_memory(p, need_spatial, u) for p in (ws, bs)),
    )


_library = library()
for _backend in BACKENDS:
    for _name, _schema, _results in (
        (f"{_backend}_bn_forward", _FORWARD, _forward_results),
        (f"{_backend}_bn_backward", _BACKWARD, _backward_results),
    ):
        _library.define(_name, _schema)
        _library.register_fake(_name, _results)
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # see autograd.py

#: backend -> its operator.
FORWARD = {name: getattr(torch.ops.scse_kernels, f"{name}_bn_forward").default for name in BACKENDS}
BACKWARD = {
    name: getattr(torch.ops.scse_kernels, f"{name}_bn_backward").default for name in BACKENDS
}


@cache
def _launch():
    from .._triton import batch_norm  # imports Triton, which takes a second

    return batch_norm


def _triton_forward(u, *others, moving=None):
    results = _forward_results(u, *others)
    _launch().forward(memory_format(u), results, u, *others, moving)
    return results


def _triton_backward(dy: Tensor, u: Tensor, *others):
    results = _backward_results(dy, u, *others)
    _launch().backward(memory_format(u), results, dy, u, *others)
    return results


for _key in ("CUDA", "CPU"):  # CPU tensors: under Triton's interpreter
    _library.impl("triton_bn_forward", _triton_forward, _key)
    _library.impl("triton_bn_backward", _triton_backward, _key)


def forward(
    backend: str, arguments: tuple, moving: tuple[Tensor, Tensor, float] | None = None
) -> tuple[Tensor, ...]:
    """What `FORWARD[backend]` gives. Where nothing observes operators, Triton's launcher is called
    directly, as in the package's ops.py.

    moving: running_mean, running_var and momentum; they are moved towards the statistics that the
    call has found. (The operators change none of their arguments.)
    """
    if backend == "triton" and ops.unseen(arguments[:11]):
        if moving is None:
            return _triton_forward(*arguments)
        if _movable(arguments[0], *moving[:2]):
            results = _triton_forward(*arguments, moving=moving)
            torch.autograd.graph.increment_version(moving[:2])
            return results
    results = FORWARD[backend](*arguments)
    if moving is not None:
        reference.move(arguments[0], *results[1:3], *moving)
    return results


def backward(backend: str, *arguments) -> tuple[Tensor, ...]:
    """The same for `BACKWARD[backend]`."""
    if backend == "triton" and ops.unseen(arguments[:15]):
        return _triton_backward(*arguments)
    return BACKWARD[backend](*arguments)


def _movable(u: Tensor, running_mean: Tensor, running_var: Tensor) -> bool:
    """Whether Triton's kernels can move them."""
    running = running_mean, running_var
    return (
        u.dtype != torch.float64
        and ops.unseen(running)
        and all(
            t.is_contiguous() and (torch.is_inference_mode_enabled() or not t.is_inference())
            for t in running
        )
    )
