"""Without the compiled extension and without Triton the package runs, and says why it is slower."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from budget import make_case

import scse_kernels
from scse_kernels import _native

PURE_PYTHON = os.environ.get("SCSE_TEST_PURE_PYTHON") == "1"


def _python(code):
    """Run code in a fresh interpreter that finds the same package; returns what it prints."""
    package = Path(scse_kernels.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(PURE_PYTHON, reason="SCSE_TEST_PURE_PYTHON=1")
def test_the_cpu_extension_is_built():
    assert _native.why_not("_C") is None


@pytest.mark.skipif(not PURE_PYTHON, reason="SCSE_TEST_PURE_PYTHON is not 1")
def test_a_missing_extension_is_explained():
    reason = _native.why_not("_C")
    assert reason and "scse_kernels._C" in reason
    case = make_case((2, 6, 5, 7))
    with pytest.raises(RuntimeError) as caught:
        scse_kernels.scse(case.x, *case.parameters, backend="cpu")
    assert reason in str(caught.value) and "'cpu'" in str(caught.value)
    assert torch.equal(
        scse_kernels.scse(case.x, *case.parameters),
        scse_kernels.scse(case.x, *case.parameters, backend="eager"),
    )


BLOCKED = """
    import sys

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("scse_kernels._C") or name.split(".")[0] == "triton":
                raise {error}
            return None

    sys.meta_path.insert(0, Block())
    import torch
    import scse_kernels
    from scse_kernels import backends
"""


@pytest.mark.parametrize(
    "error, words",
    [
        ('ModuleNotFoundError(f"No module named {name!r}", name=name)', "without scse_kernels._C"),
        ('ImportError("undefined symbol: aoti_torch_empty")', "undefined symbol: aoti_torch"),
    ],
    ids=["absent", "broken"],
)
def test_runs_without_extension_and_triton(error, words):
    output = _python(
        BLOCKED.format(error=error)
        + """
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    layer = scse_kernels.ChannelSpatialSELayer(4)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and layer.sSE.conv.weight.grad is not None
    parameters = (layer.cSE.fc1.weight, layer.cSE.fc1.bias, layer.cSE.fc2.weight,
                  layer.cSE.fc2.bias, layer.sSE.conv.weight, layer.sSE.conv.bias)
    assert torch.equal(y, scse_kernels.scse(x, *parameters, backend="eager"))
    print(backends.why_not("cpu", x.device))
    try:
        scse_kernels.scse(x, *parameters, backend="cpu")
    except RuntimeError as reason:
        print(reason)
    """
    )
    why_not, message = output.splitlines()
    assert words in why_not
    assert "'cpu'" in message and why_not in message


def test_the_package_does_not_import_triton():
    output = _python(
        """
    import sys
    import torch
    before = set(sys.modules)
    import scse_kernels
    new = set(sys.modules) - before
    print(sorted(name for name in new if name.split(".")[0] == "triton"))
    """
    )
    assert output.strip() == "[]"
