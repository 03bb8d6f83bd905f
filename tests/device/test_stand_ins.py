"""The checks of device_checks.py, tried on the CPU with stand-ins for streams and graphs. They pass
for kernels that are right, and fail for those that are not."""

import contextlib

import device_checks as checks
import pytest
import torch
from networks import needs_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from scse_kernels import ops, selfcheck

pytestmark = needs_kernels

CPU = torch.device("cpu")
BACKEND = "cpu"
FAMILY = selfcheck.Family("", BACKEND, {"SCSE_CUDA_OVERLAP": "1"})


class Recorder(TorchDispatchMode):
    """What runs under it can be run again, into the same results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results


class Graph:
    """Replays by running every operator again."""

    def replay(self):
        for function, args, kwargs, results in self.recorder.calls:
            again = function(*args, **kwargs)
            for into, source in zip(_tensors(results), _tensors(again), strict=True):
                if into.data_ptr() != source.data_ptr():
                    into.copy_(source)


def _tensors(results):
    results = results if isinstance(results, (tuple, list)) else [results]
    return [t for t in results if isinstance(t, torch.Tensor)]


class Stream:
    def __init__(self, device):
        assert device == CPU

    def synchronize(self):
        pass


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """torch.cuda as the checks use it; everything happens at once."""

    @contextlib.contextmanager
    def graph(graph):
        with Recorder() as graph.recorder:
            yield

    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "synchronize": lambda device: None,
        "_sleep": lambda cycles: None,
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return CPU


ALL = {
    "another device": checks.check_another_device,
    "side stream": checks.check_side_stream,
    "graph": lambda *on: checks.check_graph(*on, replays=3),
    "allocator": lambda *on: checks.check_allocator(*on, rounds=3),
    "refusals": checks.check_refusals,
}


@pytest.mark.parametrize("name", ALL)
def test_kernels_that_are_right_pass(device, name):
    ALL[name](FAMILY, device)


class Faulty:
    """The operators, wrong in every `every`-th call."""

    def __init__(self, monkeypatch, every):
        self.calls, self.every = 0, every
        for table in (ops.FORWARD, ops.BACKWARD):
            monkeypatch.setitem(table, BACKEND, self.around(table[BACKEND]))

    def around(self, operator):
        def wrong(*arguments):
            results = list(operator(*arguments))
            self.calls += 1
            if self.calls % self.every == 0:
                results[0] = results[0] * 1.01
            return tuple(results)

        return wrong


@pytest.mark.parametrize("name", [name for name in ALL if name != "refusals"])
@pytest.mark.parametrize("every", (1, 5))
def test_kernels_that_are_wrong_fail(device, name, every, monkeypatch):
    if name != "another device" and every == 1:
        pytest.skip("it compares kernels with themselves")
    Faulty(monkeypatch, every)
    with pytest.raises(AssertionError, match=r"differ|what is allowed"):
        ALL[name](FAMILY, device)


def test_a_graph_that_reads_what_it_was_captured_with_fails(device, monkeypatch):
    """As if a pointer to a copy of x had been captured."""

    def keeps_a_copy(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        kept = [a.clone() if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in args]
        self.calls.append((function, kept, kwargs or {}, results))
        return results

    monkeypatch.setattr(Recorder, "__torch_dispatch__", keeps_a_copy)
    with pytest.raises(AssertionError, match="differs"):
        ALL["graph"](FAMILY, device)
