"""What setup.py builds, for each SCSE_BUILD, kind of torch and toolkit; compiles nothing."""

import importlib.util
import os
import stat
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module; its sources are found from the checkout's folder."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("scse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("SCSE_BUILD", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "sh")
    yield module
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # which setup.py sets for torch


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """toolkit("12.8"): a CUDA torch, 13.0, and a toolkit of that version, or none for None."""

    def install(version):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path) if version else None)
        if version:
            nvcc = tmp_path / "bin" / "nvcc"
            nvcc.parent.mkdir()
            nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V0\n")
            nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)

    return install


def _built(arguments):
    return [extension.name for extension in arguments.get("ext_modules", [])]


def _said(build, arguments, monkeypatch, capsys):
    """What the build_py command prints."""
    command = arguments["cmdclass"]["build_py"]
    monkeypatch.setattr(build.build_py, "run", lambda self: None)
    command.run(command.__new__(command))
    return capsys.readouterr().out.splitlines()


def test_unknown_choice(build, monkeypatch):
    monkeypatch.setenv("SCSE_BUILD", "gpu")
    with pytest.raises(SystemExit, match="auto, cpu, cuda, none, got 'gpu'"):
        build.arguments_of_setup()


def test_none_builds_nothing_and_says_nothing(build, monkeypatch, capsys):
    monkeypatch.setenv("SCSE_BUILD", "none")
    arguments = build.arguments_of_setup()
    assert _built(arguments) == []
    assert _said(build, arguments, monkeypatch, capsys) == []


def test_cpu_does_not_look_for_cuda(build, monkeypatch, toolkit, capsys):
    toolkit("13.0")
    monkeypatch.setenv("SCSE_BUILD", "cpu")
    arguments = build.arguments_of_setup()
    assert _built(arguments) == ["scse_kernels._C"]
    assert _said(build, arguments, monkeypatch, capsys) == []


@pytest.mark.parametrize("choice", ("auto", "cuda"))
def test_cuda_needs_a_toolkit_but_no_gpu(build, monkeypatch, toolkit, capsys, choice):
    toolkit("13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SCSE_BUILD", choice)
    arguments = build.arguments_of_setup()
    assert _built(arguments) == ["scse_kernels._C", "scse_kernels._C_cuda"]
    assert _said(build, arguments, monkeypatch, capsys) == []
    cuda = arguments["ext_modules"][1]
    assert cuda.py_limited_api
    assert {"csrc/cuda/ops.cpp", "csrc/cuda/general/general.cu"} <= set(cuda.sources)


@pytest.mark.parametrize(
    "version, reason",
    [
        (None, "no CUDA toolkit is found"),
        ("12.8", "torch is built with CUDA 13.0, the toolkit is 12.8"),
    ],
)
def test_a_toolkit_that_does_not_serve(build, monkeypatch, toolkit, capsys, version, reason):
    toolkit(version)
    arguments = build.arguments_of_setup()
    assert _built(arguments) == ["scse_kernels._C"]
    (said,) = _said(build, arguments, monkeypatch, capsys)
    assert said.startswith("scse_kernels: building without the CUDA kernels: ") and reason in said
    monkeypatch.setenv("SCSE_BUILD", "cuda")
    with pytest.raises(SystemExit, match=f"SCSE_BUILD=cuda: {reason}"):
        build.arguments_of_setup()


def test_a_torch_without_cuda(build, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    arguments = build.arguments_of_setup()
    assert _built(arguments) == ["scse_kernels._C"]
    (said,) = _said(build, arguments, monkeypatch, capsys)
    assert "without the CUDA kernels: torch" in said and "built without CUDA" in said


def test_no_compiler(build, monkeypatch, capsys):
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "no-such-compiler")
    arguments = build.arguments_of_setup()
    assert _built(arguments) == []
    (said,) = _said(build, arguments, monkeypatch, capsys)
    assert "without the CPU and CUDA kernels: no C++ compiler" in said
    for choice in ("cpu", "cuda"):
        monkeypatch.setenv("SCSE_BUILD", choice)
        with pytest.raises(SystemExit, match=rf"SCSE_BUILD={choice}: no C\+\+ compiler"):
            build.arguments_of_setup()


@pytest.mark.parametrize(
    "torch_cuda, version, given, expected",
    [
        ("13.0", "13.0", None, "8.0+PTX;9.0;10.0;11.0;12.0+PTX"),
        ("12.8", "12.9", None, "8.0+PTX;9.0;10.0;12.0+PTX"),
        ("12.6", "12.6", None, "8.0;9.0+PTX"),
        ("13.0", "13.0", "8.6", "8.6"),
    ],
)
def test_architectures(build, monkeypatch, toolkit, torch_cuda, version, given, expected):
    toolkit(version)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    if given:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    build.arguments_of_setup()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == expected
    flags = cpp_extension._get_cuda_arch_flags()  # torch knows them all
    assert sum(",code=sm_" in flag for flag in flags) == len(expected.split(";"))
    assert sum(",code=compute_" in flag for flag in flags) == expected.count("+PTX")
