"""The operators: their schemas, and what their results look like. (Those of BatchNorm + ReLU + scSE
are in batch_norm/ops.py.)

Each kernel backend has one operator for the forward and one for the backward, all with the same
two signatures: `torch.ops.scse_kernels.<backend>_forward` and `..._backward`. The kernels
themselves are registered where they live (`cpu` and `cuda` in csrc) or below (`triton`).

A missing branch is a missing w1 (and b1, w2, b2) or ws (and bs). Parameters keep the shape their
module gave them: w1 [Cr, C, ...], w2 [C, Cr, ...], ws C elements, bs one element.
"""

from functools import cache
from typing import get_args

import torch
from torch import Tensor, compiler
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import _profiler_enabled
from torch.nn import Parameter

from ._library import library
from .literals import Activation, Combine, Gate
from .reference import accumulation_dtype

#: combine -> the code that operators take (an integer crosses into C++ for nothing).
COMBINE = {name: code for code, name in enumerate(get_args(Combine))}
#: activation of the hidden layer -> its code.
ACTIVATION = {name: code for code, name in enumerate(get_args(Activation))}
#: gate -> its code.
GATE = {name: code for code, name in enumerate(get_args(Gate))}

BACKENDS = ("cpu", "cuda", "triton")

_FORWARD = (
    "(Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? ws, Tensor? bs,"
    " int combine, int activation=0, float slope=0., int gate=0, bool residual=False)"
    " -> (Tensor y, Tensor pooled, Tensor hidden, Tensor channel_gate)"
)
# hidden [2, N, Cr]: the activation's value and its derivative. The backward needs no more of the
# activation. The spatial gate isn't saved: the backward reads x anyway, and squeezes it again.
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? ws, Tensor? bs,"
    " Tensor pooled, Tensor hidden, Tensor channel_gate, int combine, bool need_dx,"
    " bool need_channel, bool need_spatial, int gate=0, bool residual=False)"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dws, Tensor dbs)"
)


def codes(
    combine: str, excitation: tuple[str, float, str] | tuple[()], residual: bool = False
) -> tuple:
    """The operators' arguments for `combine`, for activation, slope and gate, and for `residual`.
    An excitation of () is ReLU and sigmoid, the operators' defaults."""
    if not (excitation or residual):
        return (COMBINE[combine],)
    activation, slope, gate = excitation or ("relu", 0.0, "sigmoid")
    return COMBINE[combine], ACTIVATION[activation], slope, GATE[gate], residual


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of y and dx: channels_last where x is, else contiguous.

    x need not be dense: the first channels of a channels_last concatenation are channels_last too.
    Channels must lie side by side, and the spatial axes around them in their order. C++ has the
    same rule in csrc/tensors.h.
    """
    if x.dim() < 4 or x.stride(1) != 1 or x.is_contiguous():
        return torch.contiguous_format
    least = pixel = max(x.shape[1], 2)
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:  # its stride means nothing
            continue
        if stride < least:
            return torch.contiguous_format
        least = size * stride
    if least == pixel:  # a single position
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def gradient_memory(parameter: Tensor | None, needed: bool, x: Tensor) -> Tensor:
    """Memory for the gradient of a parameter, to be written row by row; empty, of x's dtype, where
    there is no parameter or its gradient is not needed.

    It has the parameter's strides, which DistributedDataParallel expects, where they mean the same
    order of elements: those of [C, Cr, 1, 1] in channels_last are other numbers than the contiguous
    ones.
    """
    if parameter is None or not needed:
        return x.new_empty((0,))
    if parameter.is_contiguous():
        return torch.empty_like(parameter)
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _check_residual(w1, ws, combine, residual):
    if residual and w1 is not None and ws is not None and combine == COMBINE["concat"]:
        raise RuntimeError(
            "scse_kernels: residual can't be added to concat, which has twice x's channels"
        )


def _forward_results(
    x, w1, b1, w2, b2, ws, bs, combine, activation=0, slope=0.0, gate=0, residual=False
):
    """The results, not filled in: Triton's kernels fill them; of tensors without data they are what
    the operator gives."""
    _check_residual(w1, ws, combine, residual)
    n, c, *positions = x.shape
    channels_last = memory_format(x)
    if w1 is not None and ws is not None and combine == COMBINE["concat"]:
        shape = (n, 2 * c, *positions)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=channels_last)
    else:
        y = torch.empty_like(x, memory_format=channels_last)
    channels, hidden = (0, 0) if w1 is None else (c, w1.shape[0])
    pooled = x.new_empty((n, channels), dtype=accumulation_dtype(x.dtype))
    return y, pooled, pooled.new_empty((2, n, hidden)), torch.empty_like(pooled)


def _backward_results(
    dy, x, w1, b1, w2, b2, ws, bs, pooled, hidden, channel_gate, combine, need_dx, need_channel,
    need_spatial, gate=0, residual=False,
):  # fmt: skip
    """The same for the backward."""
    _check_residual(w1, ws, combine, residual)
    return (
        torch.empty_like(x, memory_format=memory_format(x)) if need_dx else x.new_empty((0,)),
        *(gradient_memory(p, need_channel, x) for p in (w1, b1, w2, b2)),
        *(gradient_memory(p, need_spatial, x) for p in (ws, bs)),
    )


_library = library()
for _backend in BACKENDS:
    for _name, _schema, _results in (
        (f"{_backend}_forward", _FORWARD, _forward_results),
        (f"{_backend}_backward", _BACKWARD, _backward_results),
    ):
        _library.define(_name, _schema)
        _library.register_fake(_name, _results)
        # Differentiation happens outside, in autograd.py. This line lets a call pass by autograd's
        # key, which would look for a derivative.
        _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


#: backend -> its operator.
FORWARD = {name: getattr(torch.ops.scse_kernels, f"{name}_forward").default for name in BACKENDS}
BACKWARD = {name: getattr(torch.ops.scse_kernels, f"{name}_backward").default for name in BACKENDS}


@cache
def _launch():
    from ._triton import launch  # imports Triton, which takes a second

    return launch


def _triton_forward(x, *others):
    results = _forward_results(x, *others)
    _launch().forward(memory_format(x), results, x, *others)
    return results


def _triton_backward(dy, x, *others):
    results = _backward_results(dy, x, *others)
    _launch().backward(memory_format(x), results, dy, x, *others)
    return results


# CPU tensors: under Triton's interpreter.
for _key in ("CUDA", "CPU"):
    _library.impl("triton_forward", _triton_forward, _key)
    _library.impl("triton_backward", _triton_backward, _key)


def forward(backend: str, *arguments) -> tuple[Tensor, ...]:
    """What `FORWARD[backend]` gives. Where nothing observes operators, Triton's launcher is called
    directly: the dispatcher would take as long as all that the launcher does."""
    if backend == "triton" and unseen(arguments[:7]):
        return _triton_forward(*arguments)
    return FORWARD[backend](*arguments)


def backward(backend: str, *arguments) -> tuple[Tensor | None, ...]:
    """The same for `BACKWARD[backend]`; what is not needed may be None."""
    if backend == "triton" and unseen(arguments[:11]):
        return _triton_backward(*arguments)
    return BACKWARD[backend](*arguments)


def unseen(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an operator on the tensors would go straight to its kernel: no compiler, transform,
    mode or profiler sees it, and every tensor is a plain one."""
    if (
        compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state()
        or _profiler_enabled()
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
        if tensor.is_neg():
            return False
    first = tensors[0]
    return not (first._is_zerotensor() or torch._is_functional_tensor(first))


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "scse_kernels: torch.compile has no second derivatives of these operators; what"
                " differentiates a gradient (create_graph=True) must be left uncompiled"
            )
        return gradient


# An operator, since torch.compile traces a Function, and in there takes gradients for constants.
_library.define("once_differentiable", "(Tensor input) -> Tensor")
_library.impl("once_differentiable", _OnceDifferentiable.apply, "Autograd")
_library.impl("once_differentiable", torch.clone, "CompositeExplicitAutograd")


def once_differentiable(*inputs: Tensor | None) -> list[Tensor | None]:
    """The inputs, for torch.compile: a backward through them with create_graph=True raises. The
    compiled program spends nothing on it."""
    identity = torch.ops.scse_kernels.once_differentiable.default
    return [identity(t) if t is not None and t.requires_grad else t for t in inputs]


# The instruction set that the cpu kernels use on this machine: baseline, avx2 or avx512.
_library.define("cpu_capability", "() -> str")
# The compute capability that the cuda kernels of a device are compiled for: 90 for 9.0, 0 if the
# device can run none of the code.
_library.define("cuda_architecture", "(int device) -> int")
