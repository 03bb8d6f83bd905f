"""Every activation and every gate of the CUDA kernels, against float64."""

import pytest
import torch
from budget import ACTIVATIONS, GATES, VARIANTS, make_case
from cases import DTYPES, LAYOUTS, MACHINES, execute, in_layout


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(machine, activation, gate):
    """Also without biases, where the hidden layer is centred on zero."""
    i = ACTIVATIONS.index(activation) + GATES.index(gate)
    slope = 0.3 if activation in ("leaky_relu", "elu") else None
    case = make_case(
        (2, 37, 9, 11),
        ("cse", "add", "max")[i % 3],
        DTYPES[i // 2 % 3],
        biases=i % 4 > 0,
        activation=activation,
        slope=slope,
        gate=gate,
    )
    execute(MACHINES[machine], case)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_gates(machine, layout, variant):
    """Of both branches: closed, open and between."""
    case = make_case((2, 40, 6, 20), variant, torch.float16, gate="hard_sigmoid")
    case = case.arranged(lambda t: in_layout(layout, t), lambda t: in_layout(layout, t))
    execute(MACHINES[machine], case)
