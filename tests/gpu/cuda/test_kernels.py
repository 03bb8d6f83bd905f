"""Every kernel's compiled code is right: all variants, dtypes, layouts, widths of access and
architectures, against float64."""

from itertools import combinations

import pytest
from cases import CALLS, LAYERED, MACHINES, execute, layered, results


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_agrees_with_float64(call):
    lab = execute(MACHINES[call.machine], call.case)
    assert not lab.refused


def test_every_kernel_is_reached(kernels):
    reached = {machine: set() for machine in MACHINES}
    for call in CALLS:
        _, lab = results(MACHINES[call.machine], call.case, dry=True)
        reached[call.machine].update(lab.launched)
    for of in LAYERED:
        _, lab = results(*layered(of), dry=True)
        reached[of[0]].update(lab.launched)
    everything = {function.readable for function in kernels.functions.values()}
    assert reached["sm_80"] == reached["sm_90"] == everything


def test_all_pairs_of_properties_occur():
    names = list(vars(CALLS[0]))
    values = {name: {getattr(call, name) for call in CALLS} for name in names}
    for one, other in combinations(names, 2):
        pairs = {(getattr(call, one), getattr(call, other)) for call in CALLS}
        missing = {(a, b) for a in values[one] for b in values[other]} - pairs
        # One axis has no channels last, a concatenation no residual; for the others see cases.py.
        assert missing <= {
            ("channels_last", 1),
            ("channels_last", "samples apart"),
            ("concat", True),
            ("16 bytes", "misaligned"),
            ("flat", "misaligned"),
        }
