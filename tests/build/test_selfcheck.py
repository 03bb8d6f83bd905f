"""`python -m scse_kernels` reports what is here, and fails if a backend is wrong in any respect."""

import os
import subprocess
import sys

import pytest
import torch

from scse_kernels import __main__ as selfcheck
from scse_kernels import __version__, backends, functional
from scse_kernels.__main__ import main


def test_passes_here_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "scse_kernels"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (__version__, torch.__version__, "eager", "bfloat16", "all agree"):
        assert expected in done.stdout
    assert "WRONG" not in done.stdout
    if os.environ.get("SCSE_TEST_PURE_PYTHON"):
        assert "built without scse_kernels._C" in done.stdout


@pytest.fixture
def small(monkeypatch):
    """A report on one small shape; the command above has been through all."""
    monkeypatch.setattr(selfcheck, "SHAPES", ((2, 5, 7, 3),))


def test_says_why_a_backend_is_missing(small, monkeypatch, capsys):
    monkeypatch.setattr(
        backends,
        "why_not",
        lambda backend, *_: None if backend == "eager" else "no such CPU",
    )
    assert main([]) == 0
    assert "not usable: no such CPU" in capsys.readouterr().out


def wrong_dtypes(out):
    """The dtypes of the rows that the report marks."""
    rows = [line.split() for line in out.splitlines() if " WRONG " in line]
    return {row[2] for row in rows}


def wrong_values(y, x):
    return y * 1.001


def wrong_gradients(y, x):
    return y + 0.01 * (x.sum() - x.sum().detach())


def not_a_number(y, x):
    return torch.where(torch.arange(y.numel()).reshape(y.shape) == 0, torch.nan, y)


def wrong_dtype(y, x):
    return y.double() if y.dtype != torch.float64 else y.float()


def failing(y, x):
    raise RuntimeError("illegal instruction")


@pytest.mark.parametrize(
    "fault", [wrong_values, wrong_gradients, not_a_number, wrong_dtype, failing]
)
def test_fails_if_a_backend_is_wrong(fault, small, monkeypatch, capsys):
    dispatch = functional._dispatch

    def faulty(name, x, *arguments):
        return fault(dispatch(name, x, *arguments), x)

    monkeypatch.setattr(functional, "_dispatch", faulty)
    assert main([]) == 1
    assert {"float64", "float32"} <= wrong_dtypes(capsys.readouterr().out)


def test_a_single_wrong_operation_is_found(small, monkeypatch, capsys):
    """A defect in one dtype, one way to combine and one memory format doesn't drown in the rest."""
    dispatch = functional._dispatch

    def faulty(name, x, *arguments):
        y = dispatch(name, x, *arguments)
        hit = name == "scse" and "max" in arguments and x.dtype == torch.float16
        return y * 1.1 if hit and x.dim() == 4 and not x.is_contiguous() else y

    monkeypatch.setattr(functional, "_dispatch", faulty)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "of max [2, 5, 7, 3], channels_last" in out
    assert wrong_dtypes(out) == {"float16"}
