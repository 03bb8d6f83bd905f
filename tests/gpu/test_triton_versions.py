"""The versions of Triton that come with the torch versions that we name. Each is tested in a
process of its own that finds it first. And what happens with other versions."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu.proof import unavailable

from scse_kernels import _triton, backends
from scse_kernels.__main__ import triton_version

triton = pytest.importorskip("triton")

#: What each torch comes with: 2.10 and 2.11, 2.13, 2.14.
VERSIONS = ("3.6.0", "3.7.1", "3.8.0")
HERE = Path(__file__).parent
#: Every kernel, in as few compilations as that takes.
TESTS = (
    "test_triton_emulated.py::test_each_variant[add]",
    "test_triton_emulated.py::test_each_variant[max]",
    "test_triton_excitation.py::test_by_a_launch_for_each_layer[torch.float16]",
    "test_triton_norm.py::test_kinds[max]",
)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_kernels_compile_and_are_right(version):
    if version == triton.__version__:
        pytest.skip("all other tests here run with it")
    folder = Path(sys.prefix) / f"triton-{version}"
    if not (folder / "installed").exists():
        unavailable(f"Triton {version} is not in {folder}, where make installs it")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"),
            *(str(HERE / test) for test in TESTS),
        ],
        env={**os.environ, "PYTHONPATH": str(folder), "SCSE_TEST_TRITON": version},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(TESTS)} passed" in done.stdout


def test_the_named_versions_are_those_of_the_package():
    named = [_triton.version(version) for version in VERSIONS]
    assert (min(named), max(named)) == (_triton.OLDEST, _triton.NEWEST)
    assert _triton.version("3.10.0+git0d6f") == (3, 10)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that Triton's kernels would run on, and no CUDA kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    monkeypatch.setattr(backends._native, "why_not", lambda module: "not built")
    return torch.device("cuda")


def test_an_older_version_is_refused_and_auto_goes_on_without(gpu, monkeypatch):
    assert backends._fastest(gpu, torch.float16) == "triton"
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    reason = "Triton 3.6 or newer is needed, this is 3.5.1"
    assert backends.why_not("triton", gpu) == reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say that there are no kernels
        assert backends._fastest(gpu, torch.float16) == "eager"


def test_a_newer_version_is_used_and_the_selfcheck_says_that_it_was_not_tried(gpu, monkeypatch):
    assert triton_version() == triton.__version__
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert backends.why_not("triton", gpu) is None
    assert triton_version() == "3.10.0 (not tried: 3.8 is the newest that was)"
