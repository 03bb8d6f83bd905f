"""Results of 32 MiB and more lie in memory for which huge pages were asked."""

import re
from pathlib import Path

import pytest
import torch
from budget import call, make_case
from networks import needs_kernels

SMAPS = Path("/proc/self/smaps")

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not SMAPS.exists(),
        reason="this system has no transparent huge pages",
    ),
]


def asks_for_huge_pages(tensor):
    """Whether the memory in the middle of the tensor is marked so."""
    at = tensor.data_ptr() + tensor.nbytes // 2
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.M)[1:]:
        begin, end = (int(number, 16) for number in entry.split(" ", 1)[0].split("-"))
        if begin <= at < end:
            return " hg" in re.search(r"^VmFlags:(.*)$", entry, re.M)[1]
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_large_results_ask_for_huge_pages(memory_format):
    parameters = make_case((1, 8, 2, 2)).parameters
    x = torch.randn(1, 8, 1100, 1000).to(memory_format=memory_format).requires_grad_()
    y = call("add", x, *parameters, backend="cpu")
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert asks_for_huge_pages(y) and asks_for_huge_pages(dx)


def test_large_results_are_right():
    parameters = make_case((1, 8, 2, 2)).parameters
    x = torch.randn(1, 8, 1049, 1001)
    got, right = (call("add", x, *parameters, backend=name) for name in ("cpu", "eager"))
    torch.testing.assert_close(got, right)
