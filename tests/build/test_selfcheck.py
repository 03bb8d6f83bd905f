"""`python -m scse_kernels` reports what is here, and fails if a backend is wrong in any respect."""

import json
import os
import subprocess
import sys

import pytest
import torch

from scse_kernels import (
    __version__,
    _build_info,
    _native,
    backends,
    batch_norm,
    functional,
    selfcheck,
)
from scse_kernels.__main__ import hidden_installation, main


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


@pytest.fixture
def installation(monkeypatch, tmp_path):
    """installation(info, direct_url, installer): the package as one that pip installed so."""

    def pretend(info, direct_url=None, installer="pip"):
        package, metadata = tmp_path / "scse_kernels", tmp_path / "scse_kernels-0.1.0.dist-info"
        package.mkdir()
        (package / "_build_info.json").write_text(json.dumps(info))
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: scse_kernels\n")
        (metadata / "INSTALLER").write_text(f"{installer}\n")
        if direct_url:
            (metadata / "direct_url.json").write_text(json.dumps(direct_url))
        monkeypatch.setattr(_build_info, "PACKAGE", package)
        _build_info._written.cache_clear()

    yield pretend
    _build_info._written.cache_clear()


def test_says_what_was_built_and_why_not_the_rest(small, installation, monkeypatch, capsys):
    installation({
        "_C": {"left_out": "no C++ compiler"},
        "_C_cuda": {"torch": "2.14.1+cu130", "toolkit": "CUDA 13.0", "architectures": "8.0;9.0"},
    })  # fmt: skip
    reason = "built without scse_kernels._C: no C++ compiler"
    monkeypatch.setattr(_native, "_WHY_NOT", {"_C": reason, "_C_cuda": "no driver"})
    monkeypatch.setattr(backends, "_KNOWN", {})
    assert main([]) == 0
    out = capsys.readouterr().out
    assert f"loaded from {_build_info.PACKAGE}" in out
    assert "CPU, C++   none: no C++ compiler" in out
    assert "CUDA, C++  torch 2.14.1+cu130, CUDA 13.0, for compute capability 8.0;9.0" in out
    if not torch.cuda.is_available():
        assert "no kernels for cpu tensors" in out and "`pip install --no-cache-dir" in out


COMMIT = {"vcs": "git", "commit_id": "beef", "requested_revision": "main"}


@pytest.mark.parametrize(
    "direct_url, installer, expected",
    [
        (
            {"url": "https://example.org/s.git", "vcs_info": COMMIT},
            "pip",
            "pip install --no-cache-dir --no-deps --force-reinstall"
            " git+https://example.org/s.git@beef",
        ),
        (
            {"url": "file:///src/scse", "dir_info": {}},
            "uv",
            "uv pip install --no-build-isolation --no-cache --no-deps"
            " --reinstall-package scse_kernels /src/scse",
        ),
        (
            {"url": "file:///tmp/scse_kernels-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip",
            "pip install --no-cache-dir --no-deps --force-reinstall .",
        ),
        (None, "pip", "pip install --no-cache-dir --no-deps --force-reinstall ."),
    ],
)
def test_the_command_that_mends(installation, direct_url, installer, expected):
    installation({}, direct_url, installer)
    assert _build_info.mending_command() == expected


def test_a_checkout_that_hides_an_installed_package(installation, monkeypatch, tmp_path, capsys):
    installation({})
    (tmp_path / "setup.py").touch()
    other = tmp_path / "site" / "scse_kernels"
    other.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(other.parent)])
    monkeypatch.chdir(tmp_path)
    assert hidden_installation() is None  # nothing is in it
    (other / "__init__.py").touch()
    assert main([]) == 1
    out = capsys.readouterr().out
    assert f"hides the package that is installed in {other}" in out
    assert f"-e {tmp_path}" in out and "all agree" not in out
    (tmp_path / "setup.py").unlink()  # two installed ones: the first one is meant
    assert hidden_installation() is None


def test_says_who_computes_by_default(small, capsys):
    with backends.use_backend("eager"):
        assert main([]) == 0
    assert "name no backend use 'eager' (from use_backend())" in capsys.readouterr().out


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
    monkeypatch.setenv("SCSE_TRITON_LAUNCHES", "auto")
    monkeypatch.delenv("SCSE_CUDA_OVERLAP", raising=False)
    families({"SCSE_TRITON_LAUNCHES": "3", "SCSE_CUDA_OVERLAP": "0"}, {})
    dispatch, seen = functional._dispatch, set()

    def faulty(name, x, *arguments):
        asked = os.environ["SCSE_TRITON_LAUNCHES"], os.environ.get("SCSE_CUDA_OVERLAP")
        seen.add(asked)
        return dispatch(name, x, *arguments) * (1.1 if asked == ("3", "0") else 1)

    monkeypatch.setattr(functional, "_dispatch", faulty)
    assert main([]) == 1
    assert seen == {("3", "0"), ("auto", None)}
    rows = capsys.readouterr().out.splitlines()
    assert sum("family 0" in row and "WRONG" in row for row in rows) == len(selfcheck.DTYPES)
    assert sum("family 1" in row and " ok " in row for row in rows) == len(selfcheck.DTYPES)


def test_batch_norms_operator_is_checked(small, monkeypatch, capsys):
    right = batch_norm.bn_relu_scse
    monkeypatch.setattr(batch_norm, "bn_relu_scse", lambda *a, **k: right(*a, **k) * 1.1)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "of bn_relu_scse" in out and not marked(out, "ok")


def test_families_of_a_gpu(monkeypatch):
    device = torch.device("cuda", 1)
    for architecture, count in ((80, 1), (90, 2), (120, 2)):
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
    wide = {case.shape for case in selfcheck.cases(torch.float16, device, "cuda")}
    assert wide == {*selfcheck.SHAPES, *selfcheck.WIDE_SHAPES}


def test_kernels_that_are_compiled_first_get_fewer_cases():
    """Still every operation in each dtype, and every kind of map."""
    device = torch.device("cuda")
    every = list(selfcheck.cases(torch.float16, device, "cpu"))
    maps = {(case.shape, case.channels_last) for case in every}
    seen = set()
    for dtype in selfcheck.DTYPES:
        some = list(selfcheck.cases(dtype, device, "triton"))
        assert len(some) == len(maps) == len(every) / len(selfcheck.OPERATIONS)
        assert {case.operation for case in some} == {*selfcheck.OPERATIONS}
        assert {(case.shape, case.channels_last) for case in some} == maps
        seen |= {(case.operation, case.shape, case.channels_last) for case in some}
    assert len(seen) == len(selfcheck.DTYPES) * len(maps)  # no dtype repeats another one's


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
