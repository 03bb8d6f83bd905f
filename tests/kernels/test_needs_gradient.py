"""Gradients only where they are wanted, the other work skipped, and little saved for backward."""

import pytest
import torch
from budget import NAMES, VARIANTS, call, make_case, output_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

SUBSETS = {
    "only x": ("x",),
    "only parameters": NAMES[1:],
    "channel branch frozen": ("x", "ws", "bs"),
    "spatial branch frozen": ("x", "w1", "b1", "w2", "b2"),
    "only the spatial branch": ("ws", "bs"),
    "only the channel branch": ("w1", "b1", "w2", "b2"),
    "one weight": ("w1",),
    "one bias": ("b2",),
    "biases": ("b1", "b2", "bs"),
    "spatial bias": ("bs",),
}


def _tensors(case, device, wanted):
    return {
        name: None if t is None else t.detach().to(device).requires_grad_(name in wanted)
        for name, t in zip(NAMES, (case.x, *case.parameters), strict=True)
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("subset", SUBSETS)
def test_subsets(target, subset, variant):
    case = make_case((2, 6, 5, 7), variant)
    everything = output_and_gradients(
        lambda v, *a, **k: call(v, *a, **k, backend=target.backend), case, target.device
    )
    tensors = _tensors(case, target.device, SUBSETS[subset])
    y = call(variant, **tensors, backend=target.backend)
    wanted = [n for n, t in tensors.items() if t is not None and t.requires_grad]
    assert y.requires_grad == bool(wanted)
    torch.testing.assert_close(y.detach(), everything["y"], rtol=0, atol=0)
    if not wanted:
        return
    y.backward(case.dy.to(target.device))
    for name, t in tensors.items():
        if t is None:
            continue
        if name in wanted:
            torch.testing.assert_close(t.grad, everything[f"d{name}"], msg=f"d{name} differs")
        else:
            assert t.grad is None, f"d{name} was not asked for"


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_needs_a_gradient(target, variant):
    case = make_case((2, 6, 5, 7), variant)
    assert not call(
        variant, **_tensors(case, target.device, ()), backend=target.backend
    ).requires_grad
    with torch.no_grad():
        y = call(variant, **_tensors(case, target.device, NAMES), backend=target.backend)
    assert not y.requires_grad
    with torch.inference_mode():
        again = call(variant, **_tensors(case, target.device, ()), backend=target.backend)
    assert torch.equal(y, again.clone())


def test_gradients_accumulate(target):
    case = make_case((2, 6, 5, 7))
    tensors = _tensors(case, target.device, NAMES)
    dy = case.dy.to(target.device)
    call("add", **tensors, backend=target.backend).backward(dy)
    once = {name: t.grad.clone() for name, t in tensors.items()}
    call("add", **tensors, backend=target.backend).backward(dy)
    for name, t in tensors.items():
        torch.testing.assert_close(t.grad, 2 * once[name])


class _BackwardFlags(TorchDispatchMode):
    """Records need_dx, need_channel and need_spatial of each backward operator that runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "scse_kernels" and func.name().endswith("_backward"):
            self.seen.append(tuple(args[-3:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wanted, flags",
    [
        (("x",), (True, False, False)),
        (("w1",), (False, True, False)),
        (("bs",), (False, False, True)),
        (("x", "ws"), (True, False, True)),
        (("b2", "ws"), (False, True, True)),
        (NAMES, (True, True, True)),
    ],
)
def test_backends_are_told_what_is_not_needed(fused, wanted, flags):
    case = make_case((2, 6, 5, 7))
    y = call("add", **_tensors(case, fused.device, wanted), backend=fused.backend)
    with _BackwardFlags() as recorded:
        y.backward(case.dy.to(fused.device))
    assert recorded.seen == [flags]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_no_second_map_is_saved(fused, dtype, memory_format, variant):
    case = make_case((2, 16, 33, 31), variant, dtype)
    tensors = _tensors(case, fused.device, NAMES)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in tensors.values() if t is not None}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(variant, **tensors, backend=fused.backend)
    assert y.untyped_storage().data_ptr() not in saved
    assert tensors["x"].untyped_storage().data_ptr() in saved
    extra = sum(size for pointer, size in saved.items() if pointer not in given)
    assert extra <= 16 * 2 * 16 * 3  # a few [N, C] in the accumulation dtype
    assert y.grad_fn is not None
