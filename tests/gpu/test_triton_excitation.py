"""Every activation and every gate in the Triton kernels as compiled, executed in the emulator."""

import os

import pytest
import torch
from budget import ACTIVATIONS, GATES, make_case
from gpu.emulated import check

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_gates(activation, gate):
    """In three launches and in one; dtypes, variants and layouts take turns."""
    i = 2 * ACTIVATIONS.index(activation) + GATES.index(gate)
    slope = 0.3 if activation in ("leaky_relu", "elu") else None
    variant, dtype = ("cse", "max", "add")[i % 3], DTYPES[i % 4]
    case = make_case((2, 19, 5, 7), variant, dtype, activation=activation, slope=slope, gate=gate)
    if i % 2:
        case = case.arranged(*[lambda t: t.contiguous(memory_format=torch.channels_last)] * 2)
    check(case, orders=((3, None), (1, 1)), target=(80, 90)[i % 2])


def test_hard_gates_of_the_spatial_branch_alone():
    check(make_case((2, 19, 5, 7), "sse", gate="hard_sigmoid"), orders=((3, None), (1, 1)))
