"""Builds the compiled extensions. What is built follows SCSE_BUILD:

auto  the CPU kernels, or a pure-Python package (with one line that says why) if they can't be built
cpu   the CPU kernels, or an error
none  a pure-Python package

torch must be installed already and visible (`--no-build-isolation`): the kernels are built against
its headers, and a build of its own choice would be another one than yours.
"""

import os
import shlex
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "none")
# Oldest torch whose stable ABI has what the kernels use; one binary serves it and all later ones.
TORCH_MINIMUM, TORCH_TARGET = "2.10", "0x020a000000000000"
PYTHON_TAG, PYTHON_TARGET = "cp310", "0x030A0000"


def chosen_build() -> str:
    choice = os.environ.get("SCSE_BUILD") or "auto"
    if choice == "cuda":
        raise SystemExit("SCSE_BUILD=cuda: this version of scse_kernels has no CUDA extension")
    if choice not in CHOICES:
        raise SystemExit(f"SCSE_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def missing_for_cpu() -> str | None:
    """None if everything that the CPU kernels' build needs is here, else what is not."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return (
            f"torch is not importable while building ({error}); install it first"
            " and build with --no-build-isolation"
        )
    if torch.torch_version.TorchVersion(torch.__version__) < TORCH_MINIMUM:
        return f"torch >= {TORCH_MINIMUM} is needed to build, found {torch.__version__}"
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ('{compiler}' is not found; CXX names another one)"
    if not cpp_extension.is_ninja_available():
        return "ninja is not found (it can be installed with pip)"
    return None


def line(reason: str) -> str:
    return f"scse_kernels: building without the CPU kernels: {reason}"


def without_kernels(reason: str) -> dict:
    """Arguments of setup() for a pure-Python package that says why it is one."""

    class SayWhy(build_py):
        def run(self):
            print(line(reason), flush=True)
            super().run()

    return {"cmdclass": {"build_py": SayWhy}}


def with_cpu_kernels(required: bool) -> dict:
    """Arguments of setup() for the CPU kernels; unless `required`, a failed build goes without."""
    from torch.utils import cpp_extension

    class BuildKernels(cpp_extension.BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # compilers and linkers fail in many types
                reason = f"the build failed ({error}), see its messages above"
                if required:
                    raise SystemExit(f"SCSE_BUILD=cpu: {reason}") from error
                self.go_without(reason)

        def go_without(self, reason: str) -> None:
            for extension in self.extensions:  # one built earlier doesn't fit these sources
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            self.distribution.ext_modules = []
            # The wheel's tag was fixed before the build.
            self.distribution.get_command_obj("bdist_wheel").root_is_pure = True
            print(line(reason), flush=True)

    folder = Path("csrc", "cpu")
    sources = sorted(map(str, folder.glob("*.cpp")))
    headers = sorted(map(str, Path("csrc").rglob("*.h")))
    torch_headers = cpp_extension.include_paths()[0]
    extension = cpp_extension.CppExtension(
        "scse_kernels._C",
        sources,
        depends=[*headers, "setup.py"],
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)],
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-g0",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",  # in torch's headers
            "-Wno-psabi",  # vectors cross no boundary between instruction sets
            "-ffp-contract=fast",  # a * b + c is one rounding where the machine has fma
            # The folders of this build in messages of failed checks would make every build differ.
            f"-ffile-prefix-map={ROOT.resolve()}=.",
            f"-ffile-prefix-map={torch_headers}=torch",
        ],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


def arguments() -> dict:
    choice = chosen_build()
    if choice == "none":
        return {}
    missing = missing_for_cpu()
    if missing is None:
        return with_cpu_kernels(required=choice == "cpu")
    if choice == "cpu":
        raise SystemExit(f"SCSE_BUILD=cpu: {missing}")
    return without_kernels(missing)


setup(**arguments())
