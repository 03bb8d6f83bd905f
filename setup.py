"""Builds the compiled extensions. What is built follows SCSE_BUILD:

auto  the kernels for the CPU, and those for GPUs if torch has CUDA and a CUDA toolkit is found;
      what can't be built is left out, with one line that says why
cpu   the kernels for the CPU, or an error
cuda  the kernels for both, or an error; no GPU is needed
none  a pure-Python package

torch must be installed already and visible (`--no-build-isolation`): the kernels are built against
its headers, and a build of its own choice would be another one than yours.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
# Oldest torch whose stable ABI has what the kernels use; one binary serves it and all later ones.
TORCH_MINIMUM, TORCH_TARGET = "2.10", "0x020a000000000000"
PYTHON_TAG, PYTHON_TARGET = "cp310", "0x030A0000"
# The oldest CUDA toolkit with thread-block clusters, the oldest that knows sm_100 and sm_120, and
# the oldest that knows sm_110 (to those before it was sm_101).
CUDA_MINIMUM, CUDA_BLACKWELL, CUDA_THOR = (12, 0), (12, 8), (13, 0)


def chosen_build() -> str:
    choice = os.environ.get("SCSE_BUILD") or "auto"
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


def toolkit_version(nvcc: Path) -> tuple[int, int]:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", said).groups()
    return int(major), int(minor)


def missing_for_cuda() -> str | None:
    """None if everything that the CUDA kernels' build needs is here, else what is not.

    Whether this machine has a GPU doesn't matter.
    """
    if missing := missing_for_cpu():
        return missing
    import torch
    from torch.utils import cpp_extension

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit is found (CUDA_HOME names its folder)"
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    if not nvcc.exists():
        return f"no CUDA compiler ('{nvcc}' is not found; CUDA_HOME names the toolkit's folder)"
    found = toolkit_version(nvcc)
    if found < CUDA_MINIMUM or found[0] != int(torch.version.cuda.split(".")[0]):
        return (
            f"torch is built with CUDA {torch.version.cuda}, the toolkit is {found[0]}.{found[1]}"
        )
    return None


def arguments_of_both() -> dict:
    """What both extensions are given."""
    return {
        "depends": [*sorted(str(p) for p in Path("csrc").rglob("*.*h")), "setup.py"],
        "py_limited_api": True,
    }


def macros() -> list[tuple[str, str | None]]:
    return [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)]


def compiler_flags() -> list[str]:
    from torch.utils import cpp_extension

    return [
        "-O3",
        "-std=c++17",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",  # in torch's headers
        # The folders of this build in messages of failed checks would make every build differ.
        f"-ffile-prefix-map={ROOT.resolve()}=.",
        f"-ffile-prefix-map={cpp_extension.include_paths()[0]}=torch",
    ]


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p) for p in Path("csrc", folder).rglob("*") if p.suffix in suffixes)


def cpu_kernels() -> Extension:
    from torch.utils import cpp_extension

    return cpp_extension.CppExtension(
        "scse_kernels._C",
        sources("cpu", ".cpp"),
        define_macros=macros(),
        extra_compile_args=[
            *compiler_flags(),
            "-Wno-psabi",  # vectors cross no boundary between instruction sets
            "-ffp-contract=fast",  # a * b + c is one rounding where the machine has fma
        ],
        **arguments_of_both(),
    )


def architectures(toolkit: tuple[int, int]) -> str:
    """What the CUDA kernels are built for. Code for 9.0 runs on no other major version: PTX of the
    newest is for GPUs to come, and PTX of 8.0 for those that have neither."""
    if toolkit < CUDA_BLACKWELL:
        return "8.0;9.0+PTX"
    thor = "11.0;" if toolkit >= CUDA_THOR else ""
    return f"8.0+PTX;9.0;10.0;{thor}12.0+PTX"


def cuda_kernels() -> Extension:
    from torch.utils import cpp_extension

    # Without a list torch asks the GPUs of this machine, of which there may be none.
    default = architectures(toolkit_version(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")))
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or default
    return cpp_extension.CUDAExtension(
        "scse_kernels._C_cuda",
        sources("cuda", ".cpp", ".cu"),
        define_macros=[*macros(), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": compiler_flags(),
            "nvcc": ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden"],
        },
        **arguments_of_both(),
    )


def line(kernels: list[str], reason: str) -> str:
    return f"scse_kernels: building without the {' and '.join(kernels)} kernels: {reason}"


def arguments_of_setup() -> dict:
    choice = chosen_build()
    wanted = {"auto": ("CPU", "CUDA"), "cpu": ("CPU",), "cuda": ("CPU", "CUDA"), "none": ()}[choice]
    missing = {"CPU": missing_for_cpu, "CUDA": missing_for_cuda}
    reasons = {kernels: missing[kernels]() for kernels in wanted}
    left_out: dict[str, list[str]] = {}
    for kernels, reason in reasons.items():
        if reason:
            left_out.setdefault(reason, []).append(kernels)
    if left_out and choice != "auto":
        raise SystemExit(f"SCSE_BUILD={choice}: {next(iter(left_out))}")

    class SayWhy(build_py):
        def run(self):
            for reason, kernels in left_out.items():
                print(line(kernels, reason), flush=True)
            super().run()

    build = {"CPU": cpu_kernels, "CUDA": cuda_kernels}
    extensions = [build[kernels]() for kernels, reason in reasons.items() if not reason]
    if not extensions:
        return {"cmdclass": {"build_py": SayWhy}}
    from torch.utils import cpp_extension

    class BuildKernels(cpp_extension.BuildExtension):
        def build_extensions(self):
            """One by one, so that what fails to build can be left out."""
            built = []
            for extension in self.extensions:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:  # compilers and linkers fail in many types
                    self.leave_out(extension, error)
            self.extensions = self.distribution.ext_modules = built
            if not built:  # the wheel's tag was fixed before the build
                self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

        def leave_out(self, extension: Extension, error: Exception) -> None:
            reason = f"the build failed ({error}), see its messages above"
            if choice != "auto":
                raise SystemExit(f"SCSE_BUILD={choice}: {reason}") from error
            # one built earlier doesn't fit these sources
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            kernels = "CUDA" if extension.name.endswith("_cuda") else "CPU"
            print(line([kernels], reason), flush=True)

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_py": SayWhy, "build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


if __name__ == "__main__":
    setup(**arguments_of_setup())
