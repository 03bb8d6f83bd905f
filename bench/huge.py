"""A map with more bytes than 32-bit numbers can count: 2**31 elements of float16, forward, once."""

import time

import torch
from torch import Tensor

from . import memory, ops
from .cases import Case

SHAPE = (2048, 64, 128, 128)
#: Samples that are filled at a time.
_CHUNK = 64


def run(name: str, device: torch.device, layout: str, reduction: int, combine: str) -> str:
    """What the provider takes for it, and x.clone(); or why that can't be known here.

    Some samples are compared with the reference in float64.

    Raises:
        SystemExit: they are wrong.
    """
    case = Case(SHAPE, torch.float16, layout, reduction, combine, device)
    what = f"{case}, forward, once"
    chunk = 8 * _CHUNK * case.x_bytes // SHAPE[0]
    if too_large := memory.too_large(case.x_bytes + case.y_bytes + chunk, device):
        return f"{what}: left out, {too_large}"
    one = Case((1, *SHAPE[1:]), torch.float16, layout, reduction, combine, device)
    inputs = one.inputs()
    x, module = _map(inputs.x.detach(), case), ops.module_of(name, one, inputs)
    with torch.no_grad():
        y, seconds = _timed(lambda: module(x), device)
    for i in (0, SHAPE[0] // 2, SHAPE[0] - 1):
        right = ops.expected(one, inputs._replace(x=x[i : i + 1]))[0]
        if error := ops.too_far(case.dtype, y[i : i + 1], right):
            raise SystemExit(f"{what}: {name} is wrong: sample {i} {error}")
    del y
    clone = _timed(x.clone, device)[1]
    return f"{what}: {seconds:.2f} s, x.clone() {clone:.2f} s; three samples are right"


def _map(sample: Tensor, case: Case) -> Tensor:
    """[N, C, *S] on the device: the sample, in each place with channels of other magnitudes."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(*case.shape[:2], 1, 1, generator=generator) + 0.5
    factors = factors.to(sample.device, sample.dtype)
    channels_last = case.layout == "channels_last"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=case.dtype, device=case.device, memory_format=memory_format)
    for part, factor in zip(x.split(_CHUNK), factors.split(_CHUNK), strict=True):
        torch.mul(sample, factor, out=part)
    return x


def _timed(call, device: torch.device) -> tuple[Tensor, float]:
    start = _now(device)
    result = call()
    return result, _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
