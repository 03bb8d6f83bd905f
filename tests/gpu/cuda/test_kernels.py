"""Every kernel's compiled code is right: all variants, dtypes, layouts, widths of access, families
and architectures, against float64."""

from itertools import combinations

import pytest
from cases import CALLS, LAYERED, MACHINES, execute, layered, results
from fakecuda import SMALL_BLOCKS


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_agrees_with_float64(call):
    lab = execute(MACHINES[call.machine], call.case)
    on_chip = [kernel.startswith("on_chip") for kernel in lab.launched]
    assert all(on_chip) if call.machine == "on chip" else not any(on_chip), lab.launched
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
    on_chip = {name for name in everything if name.startswith("on_chip")}
    assert reached["on chip"] == on_chip
    assert reached["general sm_80"] == reached["general sm_90"] == everything - on_chip


def test_all_pairs_of_properties_occur():
    names = list(vars(CALLS[0]))
    values = {name: {getattr(call, name) for call in CALLS} for name in names}
    for one, other in combinations(names, 2):
        pairs = {(getattr(call, one), getattr(call, other)) for call in CALLS}
        missing = {(a, b) for a in values[one] for b in values[other]} - pairs
        # One axis has no channels last, a concatenation no residual; for the third see cases.py.
        assert missing <= {
            ("channels_last", 1), ("channels_last", "samples apart"), ("concat", True)
        }  # fmt: skip


def test_on_chip_clusters_of_several_sizes():
    sizes = set()
    for call in CALLS:
        if call.machine == "on chip":
            _, lab = results(SMALL_BLOCKS, call.case, dry=True)
            sizes |= set(lab.clusters)
    assert {1, 2, 4, 8} <= sizes
