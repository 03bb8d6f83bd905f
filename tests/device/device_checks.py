"""What only a device shows, as functions of kernels and a device. test_stand_ins.py tries these
functions where there is none."""

import contextlib
from typing import NamedTuple

import torch
from budget import VARIANTS, call, check, make_case, same_bits
from torch import Tensor

from scse_kernels import selfcheck

#: 16 bytes to an access, and an element.
SHAPES = ((4, 64, 32, 32), (2, 35, 13, 9))


class On(NamedTuple):
    """Where budget.check computes."""

    backend: str
    device: str


class Inputs(NamedTuple):
    """x and the parameters as leaves, and dy, on a device."""

    variant: str
    leaves: list[Tensor | None]
    dy: Tensor

    def results(self, backend: str) -> list[Tensor]:
        """y and all gradients."""
        y = call(self.variant, *self.leaves, backend=backend)
        present = [t for t in self.leaves if t is not None]
        return [y.detach(), *torch.autograd.grad(y, present, self.dy)]


def inputs(variant, shape, device, channels_last=False, dtype=torch.float16, seed=0) -> Inputs:
    case = make_case(shape, variant, dtype, parameter_dtype=torch.float32, seed=seed)
    case = case.in_channels_last(channels_last)
    leaves = [
        None if t is None else t.to(device).requires_grad_() for t in (case.x, *case.parameters)
    ]
    return Inputs(variant, leaves, case.dy.to(device))


def kinds():
    """(variant, shape, channels_last): every variant, and every shape in both layouts."""
    for number, variant in enumerate(VARIANTS):
        yield variant, SHAPES[number % 2], number % 4 > 1


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"result {number} differs"


def environment(family: selfcheck.Family):
    return selfcheck.environment(family.environment)


def check_another_device(family, device):
    """Tensors on a device that isn't the current one, which stays as it is."""
    before = torch.cuda.current_device()
    for variant, shape, channels_last in kinds():
        case = make_case(shape, variant)
        case = case.in_channels_last(channels_last)
        with environment(family):
            got = check(case, On(family.backend, str(device)))
        assert all(t.device == device for t in got.values())
        assert torch.cuda.current_device() == before


def check_side_stream(family, device):
    """What a side stream computes waits for what that stream did before, and for nothing else. x is
    filled late on that stream."""
    for variant, shape, channels_last in kinds():
        wanted = inputs(variant, shape, device, channels_last)
        late = inputs(variant, shape, device, channels_last)
        with environment(family):
            expected = wanted.results(family.backend)
            late.leaves[0].detach().fill_(torch.nan)
            torch.cuda.synchronize(device)
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # about ten milliseconds
                late.leaves[0].detach().copy_(wanted.leaves[0].detach())
                got = late.results(family.backend)
            stream.synchronize()
        assert_same(got, expected)


def check_graph(family, device, replays=1000):
    """Forward and backward in a CUDA graph: every replay has the bits that a call has, also on new
    input. Results are poisoned between replays."""
    for variant, shape, channels_last in kinds():
        given = inputs(variant, shape, device, channels_last)
        other = inputs(variant, shape, device, channels_last, seed=1)
        with environment(family):
            expected = given.results(family.backend), other.results(family.backend)
            side = torch.cuda.Stream(device)  # as torch.cuda.graph asks of what is captured
            with torch.cuda.stream(side):
                given.results(family.backend)
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = given.results(family.backend)

        differing = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(replays):
            for t in got:
                t.fill_(torch.nan)
            graph.replay()
            for a, b in zip(got, expected[0], strict=True):
                differing += (a != b).any()  # no result is NaN
        torch.cuda.synchronize(device)
        assert differing.item() == 0, f"{differing.item()} results differ from those of a call"

        for into, source in zip(given.leaves, other.leaves, strict=True):
            if into is not None:
                into.detach().copy_(source.detach())
        given.dy.copy_(other.dy)
        graph.replay()
        torch.cuda.synchronize(device)
        assert_same(got, expected[1])


def check_allocator(family, device, rounds=50):
    """Scratch memory is freed when a call returns, while its kernels may still run. Others take it
    at once, on this stream and on another one, and fill it."""

    def others(sizes):
        for size in sizes:
            torch.full((size,), torch.nan, device=device)

    aside = torch.cuda.Stream(device)
    for variant, shape, channels_last in kinds():
        given = inputs(variant, shape, device, channels_last)
        n, c, *spatial = shape
        sizes = [n * c, n * c * 8, n * torch.Size(spatial).numel(), n * c * 64, 2 * n]
        with environment(family):
            expected = given.results(family.backend)
            torch.cuda.synchronize(device)
            results = []
            for _ in range(rounds):
                with torch.cuda.stream(aside):
                    others(sizes)
                results.append(given.results(family.backend))
                others(sizes)
            torch.cuda.synchronize(device)
        for got in results:
            assert_same(got, expected)


def check_refusals(family, device):
    """A call that is refused leaves nothing behind: the next operator of torch and ours work."""
    given = inputs("add", SHAPES[0], device)
    with environment(family):
        expected = given.results(family.backend)
        x, w1, *others = given.leaves
        with contextlib.suppress(ValueError):
            call("add", x, w1[:, :-1], *others, backend=family.backend)
            raise AssertionError("w1 of another shape was taken")
        with contextlib.suppress(RuntimeError):
            torch.ops.scse_kernels.cuda_forward(x, None, None, None, None, None, None, 0)
            raise AssertionError("no branch was taken")
        with (
            selfcheck.environment({"SCSE_CUDA_OVERLAP": "fast"}),
            contextlib.suppress(RuntimeError),
        ):
            call("add", *given.leaves, backend=family.backend)
            assert family.backend != "cuda", "SCSE_CUDA_OVERLAP=fast was taken"
        assert (torch.ones(3, device=device) + 1).sum().item() == 6
        assert_same(given.results(family.backend), expected)
