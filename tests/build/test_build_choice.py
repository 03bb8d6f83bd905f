"""What setup.py builds, for each SCSE_BUILD, kind of torch and toolkit; compiles nothing."""

import importlib.util
import os
import re
import stat
import subprocess
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
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "true")
    monkeypatch.setattr(module.build_environment, "installed", lambda: None)
    yield module
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # which setup.py sets for torch


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """toolkit("12.8"): a CUDA torch, 13.0, and a toolkit of that version, or none for None."""

    def install(version, compiling="exit 0"):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path) if version else None)
        if version:
            nvcc = tmp_path / "bin" / "nvcc"
            nvcc.parent.mkdir()
            says = f"[ $1 != --version ] || exec echo Cuda compilation tools, release {version}, V0"
            nvcc.write_text(f"#!/bin/sh\n{says}\n{compiling}\n")
            nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)

    return install


def _built(arguments):
    return [extension.name for extension in arguments.get("ext_modules", [])]


def _said(build, arguments, monkeypatch, capsys):
    """What the build_py command prints."""
    command = arguments["cmdclass"]["build_py"]
    monkeypatch.setattr(build.build_py, "run", lambda self: None)
    monkeypatch.setattr(build, "write_info", lambda *_: None)
    here = command.__new__(command)
    here.editable_mode = True
    command.run(here)
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


@pytest.mark.parametrize(
    "nvcc, reason",
    [
        ("echo empty.cu:3:10: fatal error: cuda_bf16.h: No such file >&2; exit 1", "cuda_bf16.h"),
        ("echo error -- unsupported GNU version!; exit 1", "unsupported GNU version"),
        ("exit 139", "exit status 139"),
    ],
)
def test_a_toolkit_that_cannot_compile(build, monkeypatch, toolkit, capsys, nvcc, reason):
    """It is found out before minutes of compiling."""
    toolkit("13.0", nvcc)
    arguments = build.arguments_of_setup()
    assert _built(arguments) == ["scse_kernels._C"]
    (said,) = _said(build, arguments, monkeypatch, capsys)
    assert "without the CUDA kernels: the CUDA compiler" in said and reason in said
    monkeypatch.setenv("SCSE_BUILD", "cuda")
    with pytest.raises(SystemExit, match=rf"SCSE_BUILD=cuda: the CUDA compiler .*{reason}"):
        build.arguments_of_setup()


def test_a_toolkit_whose_headers_the_cxx_compiler_does_not_find(
    build, monkeypatch, toolkit, tmp_path
):
    """Where nvcc is a script in another folder than the toolkit's, torch takes that folder."""
    toolkit("13.0")
    assert build.missing_for_cuda() is None
    cxx = tmp_path / "cxx"
    found = 'for last; do true; done; grep -q cuda_runtime_api.h "$4" && [ -e "${last#-I}" ]'
    error = "empty.cpp:1:10: fatal error: cuda_runtime_api.h: No such file or directory"
    cxx.write_text(f"#!/bin/sh\n{found} || {{ echo {error} >&2; exit 1; }}\n")
    cxx.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: f"{cxx} -O1")
    include = tmp_path / "include"
    monkeypatch.setattr(cpp_extension, "include_paths", lambda device: [str(include)])
    why = build.missing_for_cuda()
    home = f"{tmp_path} (CUDA_HOME names the toolkit's folder)"
    assert why == f"the C++ compiler '{cxx}' can't compile for {home}: {error}"
    include.mkdir()
    assert build.missing_for_cuda() is None


def test_a_toolkit_that_does_not_run(build, monkeypatch, toolkit, tmp_path):
    toolkit("13.0")
    (tmp_path / "bin" / "nvcc").write_text("\x7fELF of another machine")
    assert "nvcc' does not run" in build.missing_for_cuda()


NVCC = Path("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(not NVCC.exists(), reason="there is no CUDA toolkit")
def test_a_toolkit_that_compiles(build, monkeypatch):
    """The headers are named as they are called."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(NVCC.parents[1]))
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: "c++")
    assert build.compiling_fails(NVCC) is None
    monkeypatch.setattr(build, "CUDA_HEADERS", ("cuda_runtime.h", "no_such_header.h"))
    assert "no_such_header.h" in build.compiling_fails(NVCC)


def test_the_headers_are_those_that_the_kernels_include(build):
    included = set()
    for path in (ROOT / "csrc" / "cuda").rglob("*.*"):
        found = re.findall(r"#include <(cu\w*\.h)>", path.read_text())
        included.update(found)
    assert included == {*build.CUDA_HEADERS, build.CUDA_HOST_HEADER}


def test_an_old_torch(build, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    assert build.missing_for_cpu() == "torch >= 2.10 is needed to build, found 2.9.1"


def test_an_old_setuptools(build, monkeypatch):
    for version in ("65.5.0", "77.0.2"):
        monkeypatch.setattr(build.setuptools, "__version__", version)
        with pytest.raises(SystemExit, match=f"setuptools >= 77.0.3 is needed .*{version}.*<82"):
            build.check_setuptools()
    monkeypatch.setattr(build.setuptools, "__version__", "81.0.0.post1")
    build.check_setuptools()


def test_what_is_written_into_the_package(build, monkeypatch, toolkit, tmp_path):
    toolkit("13.0")
    package = tmp_path / "scse_kernels"
    package.mkdir()
    for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (package / name).touch()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build.write_info(tmp_path, {"_C": "no compiler"})
    assert build.build_environment.built_with(package) == {
        "_C": {"left_out": "no compiler"},
        "_C_cuda": {
            "torch": torch.__version__, "toolkit": "CUDA 13.0", "architectures": "9.0",
        },
    }  # fmt: skip
    # What this build left out would be of other sources.
    assert [p.name for p in package.glob("*.so")] == ["_C_cuda.abi3.so"]

    monkeypatch.setattr(build.build_environment, "installed", lambda: package)
    build.refuse_to_drop({"_C": "no compiler"})
    with pytest.raises(SystemExit, match=r"has CUDA kernels, .* no toolkit. SCSE_BUILD=cpu builds"):
        build.refuse_to_drop({"_C_cuda": "no toolkit"})


def test_the_last_lines_of_a_failed_build(build, capfd):
    with build.recorded_output() as lines:
        print("building")
        subprocess.run(["sh", "-c", "echo a.cpp:1:2: error: this; echo b.o: undefined that >&2"])
        print("done")
    assert build.last_errors(lines) == "a.cpp:1:2: error: this | b.o: undefined that"
    assert "a.cpp:1:2: error: this" in capfd.readouterr().out  # it goes out all the same
    assert build.last_errors(["-Werror=format", "fine"]) == ""
