"""Results stored past the caches are the same to the last bit as those stored into them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from budget import VARIANTS, call, make_case, output_and_gradients, same_bits

from scse_kernels import _native

pytestmark = pytest.mark.skipif(_native.why_not("_C") is not None, reason="no compiled extension")

# Rows of whole cache lines, as streaming wants them, in one strip or more; and rows of other sizes.
SHAPES = ((3, 32, 24, 8), (2, 64, 48, 32), (1, 16, 4, 8, 80), (2, 33, 7, 9))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of this module and of what it imports, for a process of its own.
HERE = Path(__file__).parent
TESTS = (HERE, HERE.parent)


def _results():
    for shape in SHAPES:
        for dtype in DTYPES:
            for variant in VARIANTS:
                residual = variant != "concat" and dtype in DTYPES[::2]
                case = make_case(shape, variant, dtype, residual=residual)
                for layout in ("contiguous", "channels_last"):
                    yield output_and_gradients(partial(call, backend="cpu"), case.in_layout(layout))


def _run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, TESTS))},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_same_bits(capability, tmp_path):
    saved = {}
    for bytes_ in (0, 1 << 62):
        file = tmp_path / f"{bytes_}.pt"
        code = (
            "import conftest, torch, test_streaming as t;"
            f" torch.save(list(t._results()), {str(file)!r})"
        )
        ran = _run(code, SCSE_CPU_STREAM=str(bytes_), SCSE_CPU_CAPABILITY=capability)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        saved[bytes_] = torch.load(file)
    for streamed, stored in zip(*saved.values(), strict=True):
        for name, t in stored.items():
            assert t.isfinite().all(), f"{name} is not finite"
            assert same_bits(streamed[name], t), f"{name} differs"


@pytest.mark.parametrize("value", ("8 MB", "", "-1"))
def test_bad_threshold(value):
    code = "import test_streaming as t; next(t._results())"
    ran = _run(code, SCSE_CPU_STREAM=value)
    assert ran.returncode != 0
    assert f"SCSE_CPU_STREAM must be a number of bytes, got {value}" in ran.stderr
