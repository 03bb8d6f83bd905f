"""Bitwise the same results from call to call and for any number of threads."""

import pytest
import torch
from budget import VARIANTS, call, make_case, output_and_gradients, same_bits

SHAPES = (
    (1, 8, 97, 131),
    (2, 64, 33, 31),
    (3, 8, 97, 31),
    (5, 33, 17, 9),
    (1, 256, 4, 4),
    (1, 6, 29, 31, 37),
    (2, 4, 20011),
    (7, 3, 5, 5),
)


def _run(target, case):
    return output_and_gradients(
        lambda v, *a, **k: call(v, *a, **k, backend=target.backend), case, target.device
    )


def _assert_same(first, second):
    for name in first:
        assert same_bits(first[name], second[name]), f"{name} differs"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_repeated_calls(target, variant, dtype):
    case = make_case((3, 24, 31, 33), variant, dtype)
    first = _run(target, case)
    for _ in range(4):
        _assert_same(first, _run(target, case))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(fused, threads, shape, variant):
    arrangements = [torch.Tensor.contiguous]
    if len(shape) > 3:
        arrangements.append(lambda t: torch.movedim(torch.movedim(t, 1, -1).contiguous(), -1, 1))
    for arrange in arrangements:
        case = make_case(shape, variant).arranged(arrange, arrange)
        results = []
        for number in (1, 2, 3, 4):
            threads(number)
            results.append(_run(fused, case))
        for other in results[1:]:
            _assert_same(results[0], other)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_any_number_of_threads_in_other_dtypes(fused, threads, dtype):
    case = make_case((3, 8, 97, 131), "max", dtype)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(_run(fused, case))
    for other in results[1:]:
        _assert_same(results[0], other)
