"""`python -m scse_kernels` reports what is here, and fails if a backend is wrong in any respect."""

import os
import subprocess
import sys

import pytest
import torch

from scse_kernels import __version__, backends, functional, selfcheck
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


def marked(out, verdict="WRONG"):
    """The dtypes of the rows with that verdict."""
    return {
        line.split(verdict)[0].split()[-1] for line in out.splitlines() if f" {verdict} " in line
    }


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
    assert {"float64", "float32"} <= marked(capsys.readouterr().out)


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
    assert marked(out) == {"float16"}


NOT_ON_CHIP = "SCSE_CUDA_KERNELS=on_chip: the device offers no clusters"


@pytest.fixture
def families(small, monkeypatch):
    """families(*environments): the eager backend's, as if what is set chose its kernels."""

    def pretend(*environments):
        known = [
            selfcheck.Family(f"family {i}", "eager", environment)
            for i, environment in enumerate(environments)
        ]
        monkeypatch.setattr(
            selfcheck, "families", lambda backend, device: known if backend == "eager" else []
        )

    return pretend


def test_each_family_is_checked_with_its_environment(families, monkeypatch, capsys):
    monkeypatch.setenv("SCSE_CUDA_KERNELS", "auto")
    monkeypatch.delenv("SCSE_CUDA_OVERLAP", raising=False)
    families({"SCSE_CUDA_KERNELS": "general", "SCSE_CUDA_OVERLAP": "0"}, {})
    dispatch, seen = functional._dispatch, set()

    def faulty(name, x, *arguments):
        asked = os.environ["SCSE_CUDA_KERNELS"], os.environ.get("SCSE_CUDA_OVERLAP")
        seen.add(asked)
        return dispatch(name, x, *arguments) * (1.1 if asked == ("general", "0") else 1)

    monkeypatch.setattr(functional, "_dispatch", faulty)
    assert main([]) == 1
    assert seen == {("general", "0"), ("auto", None)}
    rows = capsys.readouterr().out.splitlines()
    assert sum("family 0" in row and "WRONG" in row for row in rows) == len(selfcheck.DTYPES)
    assert sum("family 1" in row and " ok " in row for row in rows) == len(selfcheck.DTYPES)


def test_what_does_not_fit_is_left_out(families, monkeypatch, capsys):
    """A case or two; where all are, the row says why, and is no fault."""
    families({"SCSE_CUDA_KERNELS": "on_chip"})
    dispatch = functional._dispatch

    def refusing(name, x, *arguments):
        if x.dtype == torch.float64 or "concat" in arguments:
            raise RuntimeError(NOT_ON_CHIP)
        return dispatch(name, x, *arguments)

    monkeypatch.setattr(functional, "_dispatch", refusing)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert marked(out, "refused") == {"float64"} and NOT_ON_CHIP in out
    assert marked(out, "ok") == {"float32", "float16", "bfloat16"}


def test_families_of_a_gpu(monkeypatch):
    device = torch.device("cuda", 1)
    for architecture, count in ((80, 1), (90, 3), (120, 3)):
        asked = {"scse_kernels.cuda_architecture": lambda index, a=architecture: a * (index == 1)}
        monkeypatch.setattr(
            torch.ops.scse_kernels, "cuda_architecture", *asked.values(), raising=False
        )
        assert len(selfcheck.families("cuda", device)) == count
    assert {
        f.environment["SCSE_TRITON_LAUNCHES"] for f in selfcheck.families("triton", device)
    } == {
        "1",
        "3",
    }
    assert [f.environment for f in selfcheck.families("triton", torch.device("cpu"))] == [{}]
    wide = {case.shape for case in selfcheck.cases(torch.float16, device)}
    assert wide == {*selfcheck.SHAPES, *selfcheck.WIDE_SHAPES}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_wide_shapes_are_within_tolerance_here(fused, dtype):
    """The reference's distance from kernels that are right, for the shapes that GPUs get."""
    if fused.backend != "cpu":
        pytest.skip("the interpreter takes minutes")
    for shape in selfcheck.WIDE_SHAPES:
        for operation in ("max", "concat"):
            case = selfcheck.Case(operation, dtype, shape, shape[1] == 64)
            got = selfcheck.computed(case, "cpu", torch.device("cpu"))
            for name, want in selfcheck.expected(case).items():
                assert selfcheck.error(got[name], want, case) <= 1, (name, case)
