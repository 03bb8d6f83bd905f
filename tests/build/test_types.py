"""What a type checker says to names of backends and of ways to combine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import scse_kernels

_CODE = """\
from torch import Tensor
from scse_kernels import ChannelSpatialSELayer, ChannelSpatialSELayer3D, scse, set_backend
from scse_kernels import use_backend

ChannelSpatialSELayer(8, combine="max", device="cuda")
ChannelSpatialSELayer(8, combine="sum")
ChannelSpatialSELayer3D(8, 2, "mul")
ChannelSpatialSELayer3D(8, 2, "sum")
set_backend("triton")
set_backend("gpu")
with use_backend("eager"):
    pass
with use_backend("Eager"):
    pass


def both(x: Tensor, w: Tensor) -> Tensor:
    scse(x, w, None, w, None, w, None, combine="concat", backend="cpu")
    scse(x, w, None, w, None, w, None, combine="sum")
    return scse(x, w, None, w, None, w, None, backend="CPU")
"""


@pytest.mark.skipif(
    os.environ.get("SCSE_TEST_PURE_PYTHON") == "1", reason="the sources are those of the checkout"
)
def test_mypy_strict(tmp_path):
    (tmp_path / "user.py").write_text(_CODE)
    # torch itself would take minutes
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n"
        "[mypy-torch.*]\nfollow_imports = skip\n"
        "[mypy-scse_kernels.*]\nfollow_imports = silent\n"
        "[mypy-triton.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"MYPYPATH": str(Path(scse_kernels.__file__).parents[1]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.stderr, done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    wrong = [n for n, text in enumerate(_CODE.splitlines(), 1) if "sum" in text or "gpu" in text
             or "Eager" in text or '"CPU"' in text]  # fmt: skip
    assert [int(line.split(":")[1]) for line in errors] == wrong, done.stdout
    assert 'expected "Literal[' in errors[0]
