"""The excitation of many weights, whose layers have a launch each (excite_layers.cuh)."""

from dataclasses import replace

import pytest
import torch
from budget import call, make_case, same_bits
from cases import LAYERED, execute, layered
from fakecuda import running_on
from gpulab import A100, H100

from scse_kernels.ops import BACKWARD, COMBINE, FORWARD

LAYERS = ("excite_hidden", "excite_gates"), ("excite_backward_hidden", "excite_backward_mean")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("of", LAYERED, ids=str)
def test_agrees_with_float64(of):
    machine, case = layered(of)
    kernels = [name.split("<")[0] for name in execute(machine, case).launched]
    assert kernels[1:3] == [*LAYERS[0]] and kernels[5:7] == [*LAYERS[1]]


SHAPES = {
    "slices of several chunks": ("add", HALF, (1, 4200, 1, 2), 600),
    "hidden channels of several chunks": ("max", FLOAT, (1, 600, 1, 3), 1),
    "... odd": ("add", FLOAT, (1, 519, 1, 3), 1),
    "many strips": ("add", HALF, (2, 128, 16, 60), 1),
    "few channels": ("add", FLOAT, (2, 5, 1, 5), 1),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes(what):
    variant, dtype, shape, reduction = SHAPES[what]
    case = make_case(shape, variant, dtype, reduction, parameter_dtype=FLOAT)
    if what == "few channels":  # and many hidden ones, as the functional form allows
        w1, b1, w2, b2 = make_case((1, 3300, 1, 1), "cse", dtype, 660).parameters[:4]
        case = replace(case, parameters=(w2, b2, w1, b1, *case.parameters[4:]))
    execute((A100, H100)[list(SHAPES).index(what) % 2], case)


@pytest.mark.parametrize("channels", (132, 131))
def test_no_batch_changes_a_bit(channels):
    """A sample's results are those of a batch of one, whoever shares its blocks."""
    case = make_case((70, channels, 1, 9), "max", HALF, 1, parameter_dtype=FLOAT)

    def of(some):
        with running_on(H100) as lab:
            y, *small = FORWARD["cuda"](case.x[some], *case.parameters, COMBINE["max"])
            needs = COMBINE["max"], True, False, False
            given = case.dy[some], case.x[some], *case.parameters, *small
            dx, *_ = BACKWARD["cuda"](*given, *needs)
        pooled, hidden, gate = small
        return (y, pooled, hidden.transpose(0, 1), gate, dx), {
            name.removesuffix(">")[-1] for name in lab.launched if "excite" in name
        }

    together, shares = of(slice(None))
    assert shares == {"2", "8"}
    for some in (slice(0, 1), slice(1, 4), slice(69, 70)):
        few, shares = of(some)
        assert shares == {"2"}
        for whole, part in zip(together, few, strict=True):
            assert same_bits(whole[some], part), some


def test_infinite_values_stay_in_their_sample():
    """Weights that are shared and slots that are empty carry nothing over."""
    case = make_case((3, 132, 1, 9), "cse", HALF, 1)
    case.x[1] = torch.inf
    plain = make_case((3, 132, 1, 9), "cse", HALF, 1)
    with running_on(H100):
        y = call("cse", case.x, *case.parameters, backend="cuda")
        expected = call("cse", plain.x, *plain.parameters, backend="cuda")
    assert same_bits(y[::2], expected[::2])
