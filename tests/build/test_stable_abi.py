"""The compiled extensions use nothing of torch but its stable ABI, so one binary serves many."""

import shutil
import subprocess
from pathlib import Path

import pytest

import scse_kernels

EXTENSIONS = sorted(Path(scse_kernels.__file__).parent.glob("_C*.so"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda path: path.name)
def test_only_stable_symbols(extension):
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", extension]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in symbols
    assert [s for s in symbols.splitlines() if "at::" in s or "c10::" in s] == []
    assert ".abi3." in extension.name
    assert "_Py" not in symbols
