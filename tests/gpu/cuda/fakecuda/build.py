"""Builds csrc/cuda for the emulator: one library of the operators' own host code, with the kernels'
PTX inside it as nvcc embeds it, linked to the fake runtime instead of the real one.

`python -m fakecuda.build` (from tests/gpu/cuda) builds it and prints its path. Products lie in
build/fakecuda of the checkout, named after a hash of all that went into them, so that only what
changed is compiled again.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
ARCHITECTURES = (80, 90)
#: Torch's functions that tensors.cpp has its own versions of.
WRAPPED = re.findall(r"^WRAP\((\w+)", (HERE / "tensors.cpp").read_text(), re.M)
#: As setup.py builds the extension; -lineinfo has the emulator name source lines.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA")
HOST = ("-fPIC", "-fvisibility=hidden")


class NoCompiler(Exception):
    """There is no nvcc here; the message says where it was looked for."""


@lru_cache(None)
def toolkit() -> Path:
    """The folder of a CUDA toolkit: CUDA_HOME's, else that of nvcc on PATH, else the one that the
    Makefile installs from PyPI."""
    for nvcc in (
        os.environ.get("CUDA_HOME") and Path(os.environ["CUDA_HOME"], "bin", "nvcc"),
        shutil.which("nvcc"),
        Path(sys.prefix, "cuda-toolkit", "nvidia", "cu13", "bin", "nvcc"),
    ):
        if nvcc and Path(nvcc).exists():  # it may be a script that calls another
            command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            return Path(re.search(r"^#\$ TOP=(.*)$", said, re.M)[1]).resolve()
    raise NoCompiler(
        "no nvcc: CUDA_HOME names no toolkit, PATH has none, and the wheels that `make test`"
        f" installs are not in {sys.prefix}"
    )


def _includes(source: Path, seen: set[Path]) -> set[Path]:
    """The source and the headers of ours that it includes, and they."""
    if source not in seen:
        seen.add(source)
        for name in re.findall(r'^\s*#include "([^"]+)"', source.read_text(), re.M):
            if (header := (source.parent / name).resolve()).exists():
                _includes(header, seen)
    return seen


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _run(command: list) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _command(source: Path, architectures) -> list:
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    if source.suffix == ".cpp":
        python = subprocess.check_output(
            [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"],
            text=True,
        ).strip()
        return [
            *cpp_extension.get_cxx_compiler().split(),
            *("-O1", "-std=c++17", *HOST, *DEFINES, *includes),
            *(f"-I{python}", f"-I{toolkit() / 'include'}"),
        ]
    return [
        *(toolkit() / "bin" / "nvcc", "-O3", "-std=c++17", "-lineinfo", "--cudart=none"),
        *cpp_extension.COMMON_NVCC_FLAGS,
        f"-Xcompiler={','.join(HOST)}",
        f"-I{toolkit() / 'include'}",
        "--no-compress",  # images.py reads the PTX
        *(f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures),
    ]


def _object(source: Path, folder: Path, architectures) -> Path:
    command = _command(source, architectures)
    files = sorted(_includes(source.resolve(), set()))
    key = _key(torch.__version__, *map(str, command), *(path.read_bytes() for path in files))
    made = folder / f"{source.parent.name}-{source.stem}-{key}.o"
    if not made.exists():
        part = made.with_suffix(f".{os.getpid()}.part.o")
        _run([*command, "-c", source, "-o", part])
        part.rename(made)
    return made


def library(architectures=ARCHITECTURES, sources: Path = ROOT / "csrc" / "cuda") -> Path:
    """Builds what isn't built yet, two files at a time; other processes wait meanwhile.

    `sources`: the folder of the CUDA kernels and their launchers.
    """
    toolkit()
    folder = ROOT / "build" / "fakecuda"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = sorted(path for path in sources.rglob("*") if path.suffix in (".cpp", ".cu"))
        files.sort(key=lambda path: path.name in ("general.cu", "ops.cpp"))
        files += [HERE / "runtime.cpp", HERE / "tensors.cpp"]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda file: _object(file, folder, architectures), files))
        made = folder / f"ops-{_key(*(path.name for path in objects))}.so"
        if not made.exists():
            part = made.with_suffix(f".{os.getpid()}.part")
            torch_libraries = cpp_extension.library_paths("cpu")[0]
            _run(
                [
                    *(*cpp_extension.get_cxx_compiler().split(), "-shared", "-o", part, *objects),
                    *(f"-Wl,--wrap={name}" for name in WRAPPED),
                    "-Wl,-Bsymbolic",  # this library's own runtime, whatever else is loaded
                    *(f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}"),
                    *("-ltorch_cpu", "-lc10"),
                ]
            )
            part.rename(made)
        return made


if __name__ == "__main__":
    print(library())
