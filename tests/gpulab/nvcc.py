"""CUDA C++ source -> PTX with nvcc."""

import os
import shutil
import subprocess
import tempfile

from .errors import GpuLabError


def nvcc_ptx(source, arch=80, options=()):
    """Compile CUDA C++ text to PTX for sm_<arch> (needs nvcc on PATH)."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise GpuLabError("nvcc was not found on PATH")
    with tempfile.TemporaryDirectory() as folder:
        path, out = os.path.join(folder, "kernel.cu"), os.path.join(folder, "kernel.ptx")
        with open(path, "w") as f:
            f.write(source)
        done = subprocess.run(
            [
                nvcc,
                "-ptx",
                f"-arch=sm_{arch}",
                "-lineinfo",
                "-std=c++17",
                *options,
                path,
                "-o",
                out,
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise GpuLabError(f"nvcc failed:\n{done.stderr}")
        with open(out) as f:
            return f.read().replace(folder + os.sep, "")
