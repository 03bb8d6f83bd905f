"""Maps whose rows are no multiples of an access and that are taken as one run of elements, see
apply_flat.cuh. The kernels that go by rows are the reference, bit for bit: a map that begins
anywhere takes those, in sums of the same order."""

from functools import partial
from itertools import product
from math import prod

import pytest
from budget import VARIANTS, make_case, same_bits
from cases import ARRANGED, DTYPES, LAYOUTS, execute, in_layout, misaligned, proved, results
from counts import count
from gpulab import A100, H100

PLANES, LAST = LAYOUTS
FLOAT, HALF, BFLOAT = DTYPES
#: What a sample's size or rows are -> layout, variant, dtype, shape, residual.
FLAT = {
    "7 x 7": (PLANES, "add", HALF, (3, 200, 7, 7), True),
    "7 x 7, one period": (PLANES, "max", HALF, (2, 8, 7, 7), False),
    "rows of 8 bytes": (PLANES, "max", HALF, (2, 44, 14, 14), True),
    "rows of 4 bytes": (PLANES, "cse", BFLOAT, (2, 36, 3, 18), False),
    "runs of several blocks": (PLANES, "mul", BFLOAT, (2, 64, 13, 13), True),
    "rows longer than a block": (PLANES, "concat", HALF, (2, 40, 21, 21), False),
    "... in float32": (PLANES, "add", FLOAT, (1, 24, 1, 1099), True),
    "the shortest rows": (PLANES, "sse", HALF, (2, 936, 3, 3), True),
    "the shortest rows of float32": (PLANES, "max", FLOAT, (2, 420, 1, 5), False),
    "many samples": (PLANES, "add", HALF, (9, 16, 3, 5), False),
    "one sample": (PLANES, "mul", HALF, (1, 176, 7, 7), False),
    "odd channels": (LAST, "add", HALF, (3, 37, 8, 29), True),
    "odd channels, max": (LAST, "max", BFLOAT, (2, 41, 8, 27), False),
    "few channels": (LAST, "mul", FLOAT, (2, 5, 24, 31), True),
    "many channels": (LAST, "max", FLOAT, (2, 523, 2, 6), False),
    "more channels than threads": (LAST, "add", HALF, (1, 2051, 2, 4), False),
}


def kernels_of(lab) -> set[str]:
    """Those that apply the gates."""
    return {name.split("<")[0] for name in lab.launched if name.startswith("apply")}


def agree(case, layout, gpu=H100, way="dense"):
    """The flat kernels with float64, and with the kernels that go by rows."""
    flat, lab = proved(gpu, case.arranged(*[partial(ARRANGED[way], layout)] * 2))
    assert kernels_of(lab) == {"apply_flat", "apply_backward_flat"}
    by_rows, lab = results(gpu, case.arranged(*[partial(misaligned, layout)] * 2))
    assert kernels_of(lab) == {"apply", "apply_backward"}
    for name, t in by_rows.items():
        assert same_bits(t, flat[name]), name


@pytest.mark.parametrize("what", FLAT)
def test_shapes(what):
    layout, variant, dtype, shape, residual = FLAT[what]
    gpu = (H100, A100)[list(FLAT).index(what) % 2]
    way = "samples apart" if layout == PLANES and shape[0] % 3 == 0 else "dense"
    reduction = 64 if shape[1] > 1000 else 2  # few weights: they take the emulator long
    agree(make_case(shape, variant, dtype, reduction, residual=residual), layout, gpu, way)


@pytest.mark.parametrize(
    "variant, layout", [w for w in product(VARIANTS, LAYOUTS) if w != ("concat", LAST)]
)
def test_every_kernel_has_the_bits_of_the_one_that_goes_by_rows(variant, layout):
    shape = (2, 72, 7, 7) if layout == PLANES else (2, 37, 8, 11)
    agree(make_case(shape, variant, HALF), layout)


@pytest.mark.parametrize("variant, layout", [("max", PLANES), ("add", LAST), ("concat", PLANES)])
def test_any_order_of_execution_gives_the_same_bits(variant, layout):
    shape = (3, 200, 7, 7) if layout == PLANES else (3, 37, 8, 30)
    case = make_case(shape, variant, HALF).arranged(*[partial(in_layout, layout)] * 2)
    in_order, lab = results(H100, case, seed=None)
    assert kernels_of(lab) == {"apply_flat", "apply_backward_flat"}
    for schedule in ({"seed": 1, "resident": 1}, {"seed": 2, "resident": 3}, {"seed": 3}):
        again, _ = results(H100, case, **schedule)
        for name, t in in_order.items():
            assert same_bits(t, again[name]), f"{name} with {schedule}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_moved_once(layout):
    """The map by 16 bytes to a thread, and no element by two threads."""
    shape = (2, 200, 7, 7) if layout == PLANES else (2, 37, 8, 29)
    x_bytes, labs = count(shape, "max", layout)
    for lab, maps in zip(labs, (1, 2), strict=True):
        report = lab.reports[-1]
        assert report.load_widths[16] == maps * x_bytes // 16
        # In the backward the others store the parameters' gradients.
        assert report.store_widths[16] == x_bytes // 16


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_pass_before_has_left_in_l2_is_read_first(layout):
    """From the last tile to the first: in the other order no read would find anything there. (In
    the backward the parameters' gradients come first.)"""
    shape = (8, 512, 7, 7) if layout == PLANES else (8, 255, 8, 8)
    # As large as the map, so that sums of strips and weights leave room for its end alone.
    l2_bytes = 2 * prod(shape)
    how = {"l2_bytes": l2_bytes, "resident": 1, "seed": None}
    x_bytes, (forward, _) = count(shape, "add", layout, **how)
    assert l2_bytes == x_bytes
    assert forward.reports[-1].dram_read_bytes < 0.9 * x_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_map_that_begins_anywhere_is_enough(layout):
    """Rows of an aligned x are taken with a dy that is not aligned, and the other way round."""
    shape = (2, 8, 7, 7) if layout == PLANES else (2, 37, 8, 3)
    dense, anywhere = (partial(way, layout) for way in (in_layout, misaligned))
    case = make_case(shape, "max", HALF)
    lab = execute(H100, case.arranged(dense, anywhere))
    assert kernels_of(lab) == {"apply_flat", "apply_backward"}
    assert kernels_of(execute(H100, case.arranged(anywhere, dense))) == {
        "apply",
        "apply_backward",
    }


def test_a_concatenation_with_channels_last_goes_by_rows():
    case = make_case((2, 37, 8, 3), "concat", HALF)
    lab = execute(H100, case.arranged(*[partial(in_layout, LAST)] * 2))
    assert kernels_of(lab) == {"apply", "apply_backward"}
