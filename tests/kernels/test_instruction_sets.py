"""The kernels of every instruction set that this machine has agree with the reference."""

import os
import subprocess
import sys

import pytest

from scse_kernels import _native

pytestmark = pytest.mark.skipif(_native.why_not("_C") is not None, reason="no compiled extension")


def _self_check(capability):
    return subprocess.run(
        [sys.executable, "-m", "scse_kernels"],
        env={**os.environ, "SCSE_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_self_check(capability):
    result = _self_check(capability)
    assert result.returncode == 0, result.stdout + result.stderr
    assert capability in result.stdout


def test_unknown_name():
    result = _self_check("avx1024")
    assert result.returncode != 0
    assert "baseline, avx2 or avx512, got avx1024" in result.stdout + result.stderr
