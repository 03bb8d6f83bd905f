"""Builds the compiled extensions. What is built follows SCSE_BUILD:

auto  (default) all kernels that can be built here
cpu   the kernels for the CPU, or an error
cuda  the kernels for both, or an error; no GPU is needed
none  a pure-Python package

The kernels are built against the headers of the torch of the environment that is installed into
(build_environment.py finds it). What was built, and why something was not, is written into the
package, as _build_info.json: installers hide what a build prints.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # installers don't
import build_environment  # noqa: E402

sys.path.remove(str(ROOT))

CHOICES = ("auto", "cpu", "cuda", "none")
#: Extension module -> whose kernels it has.
KERNELS = {"_C": "CPU", "_C_cuda": "CUDA"}
# The oldest that reads this pyproject.toml.
SETUPTOOLS_MINIMUM = (77, 0, 3)
# Oldest torch whose stable ABI has what the kernels use; one binary serves it and all later ones.
TORCH_MINIMUM, TORCH_TARGET = "2.10", "0x020a000000000000"
PYTHON_TAG, PYTHON_TARGET = "cp310", "0x030A0000"
# The oldest CUDA toolkit of a major version that torch is built with, the oldest that knows sm_100
# and sm_120, and the oldest that knows sm_110 (to those before it was sm_101).
CUDA_MINIMUM, CUDA_BLACKWELL, CUDA_THOR = (12, 0), (12, 8), (13, 0)
# What csrc/cuda includes of a toolkit, in separate packages where it comes from PyPI or conda.
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
CUDA_HOST_HEADER = "cuda_runtime_api.h"  # which C++ files include


def check_setuptools() -> None:
    found = setuptools.__version__
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < SETUPTOOLS_MINIMUM:
        needed = ".".join(map(str, SETUPTOOLS_MINIMUM))
        raise SystemExit(
            f"scse_kernels: setuptools >= {needed} is needed to build, found {found}:"
            f' pip install "setuptools>={needed},<82" ninja, or leave out --no-build-isolation'
        )


def chosen_build() -> str:
    choice = os.environ.get("SCSE_BUILD") or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"SCSE_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def missing_for_cpu() -> str | None:
    """None if everything that the CPU kernels' build needs is here, else what is not."""
    build_environment.make_importable()
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        return (
            f"{error} where it was built ({sys.prefix}): torch must be installed before;"
            " uv and `python -m build` see it only with --no-build-isolation (--no-isolation)"
        )
    except (ImportError, OSError) as error:
        return f"torch can't be imported where it was built ({sys.prefix}): {error}"
    if torch.torch_version.TorchVersion(torch.__version__) < TORCH_MINIMUM:
        return f"torch >= {TORCH_MINIMUM} is needed to build, found {torch.__version__}"
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ('{compiler}' is not found; CXX names another one)"
    if not cpp_extension.is_ninja_available():
        return "ninja is not found (it can be installed with pip)"
    return None


def toolkit_version(nvcc: Path) -> tuple[int, int] | None:
    """None if the compiler doesn't run."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:  # of another machine, or not a program
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return found and (int(found[1]), int(found[2]))


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
    if found is None:
        return f"the CUDA compiler '{nvcc}' does not run"
    if found < CUDA_MINIMUM or found[0] != int(torch.version.cuda.split(".")[0]):
        return (
            f"torch is built with CUDA {torch.version.cuda}, the toolkit is {found[0]}.{found[1]}"
        )
    return compiling_fails(nvcc)


def compiling_fails(nvcc: Path) -> str | None:
    """None if a few lines compile, else which compiler fails and its error: a missing header or an
    unfit host compiler shows in seconds, and not after minutes."""
    from torch.utils import cpp_extension

    folders = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
    cxx = shlex.split(cpp_extension.get_cxx_compiler())
    with tempfile.TemporaryDirectory() as folder:
        source, host = Path(folder, "empty.cu"), Path(folder, "empty.cpp")
        includes = "".join(f"#include <{header}>\n" for header in CUDA_HEADERS)
        source.write_text(f"{includes}__global__ void empty() {{}}\n")
        host.write_text(f"#include <{CUDA_HOST_HEADER}>\n")
        cuda = [nvcc, "-std=c++17", "-c", source, "-o", source.with_suffix(".o"), *folders]
        if host_compiler := os.environ.get("CC"):  # as torch has it
            cuda += ["-ccbin", host_compiler]
        # nvcc finds its own headers. The C++ compiler finds them in CUDA_HOME alone.
        for compiler, command in (
            (f"CUDA compiler '{nvcc}'", cuda),
            (f"C++ compiler '{cxx[0]}'", [*cxx, "-std=c++17", "-fsyntax-only", host, *folders]),
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = (done.stdout + done.stderr).splitlines()
                failure = last_errors(said) or f"exit status {done.returncode}"
                home = f"{cpp_extension.CUDA_HOME} (CUDA_HOME names the toolkit's folder)"
                return f"the {compiler} can't compile for {home}: {failure}"
    return None


def last_errors(lines: list[str]) -> str:
    """What a compiler or linker complained of at last."""
    errors = [text for text in lines if re.search(r"\b(error|fatal|undefined)\b", text, re.I)]
    return " | ".join(text.strip()[:300] for text in errors[-3:])


def arguments_of_both() -> dict:
    """What both extensions are given."""
    return {
        "depends": [*sources("", ".h", ".cuh", ".inc"), "setup.py"],
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


def built_against(module: str) -> dict[str, str]:
    """What _build_info.json says of an extension that was built."""
    import torch
    from torch.utils import cpp_extension

    about = {"torch": torch.__version__}
    if module == "_C_cuda":
        toolkit = toolkit_version(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))
        about["toolkit"] = "CUDA {}.{}".format(*toolkit)
        about["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    return about


def write_info(folder: Path, left_out: dict[str, str]) -> None:
    """Write the _build_info.json of the package that is built in `folder`, and remove extensions of
    earlier builds that this one left out."""
    package = folder / "scse_kernels"
    info = {
        module: {"left_out": left_out[module]} if module in left_out else built_against(module)
        for module in KERNELS
    }
    for module in left_out:
        for old in package.glob(f"{module}.*so"):
            old.unlink()
    (package / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")


def refuse_to_drop(left_out: dict[str, str]) -> None:
    """Stop where an installation with kernels would get one without: nothing else is seen of it."""
    package = build_environment.installed()
    here = build_environment.built_with(package) if package else {}
    for module, reason in left_out.items():
        if "torch" in here.get(module, {}):
            raise SystemExit(
                f"scse_kernels: the one in {package} has {KERNELS[module]} kernels, this build"
                f" would have none: {reason}. SCSE_BUILD={'cpu' if module != '_C' else 'none'}"
                " builds without them."
            )


def line(kernels: list[str], reason: str) -> str:
    return f"scse_kernels: building without the {' and '.join(kernels)} kernels: {reason}"


@contextlib.contextmanager
def recorded_output() -> Iterator[deque[str]]:
    """The last lines of what this process and its children print, which goes out all the same."""
    lines: deque[str] = deque(maxlen=1000)
    sys.stdout.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    source, sink = os.pipe()

    def pass_on() -> None:
        with open(source, errors="replace") as pipe:
            for text in pipe:
                lines.append(text)
                os.write(kept[1], text.encode())

    thread = threading.Thread(target=pass_on)
    thread.start()
    for stream in kept:
        os.dup2(sink, stream)
    os.close(sink)
    try:
        yield lines
    finally:
        sys.stdout.flush()
        for stream, before in kept.items():
            os.dup2(before, stream)
        thread.join()  # the pipe has no writers any more
        for before in kept.values():
            os.close(before)


def arguments_of_setup() -> dict:
    choice = chosen_build()
    wanted = {"auto": ("_C", "_C_cuda"), "cpu": ("_C",), "cuda": ("_C", "_C_cuda"), "none": ()}
    needs = {"_C": missing_for_cpu, "_C_cuda": missing_for_cuda}
    left_out: dict[str, str] = {}
    for module in KERNELS:
        if module not in wanted[choice]:
            left_out[module] = f"SCSE_BUILD={choice} was asked for"
        elif reason := needs[module]():
            left_out[module] = reason
            if choice != "auto":
                raise SystemExit(f"SCSE_BUILD={choice}: {reason}")
    to_build = [module for module in KERNELS if module not in left_out]

    class BuildPython(build_py):
        def run(self):
            if choice == "auto":
                for reason in dict.fromkeys(left_out.values()):
                    kernels = [KERNELS[module] for module in left_out if left_out[module] == reason]
                    print(line(kernels, reason), flush=True)
                refuse_to_drop(left_out)
            super().run()
            if not to_build:  # else it is written when they are
                write_info(Path("" if self.editable_mode else self.build_lib), left_out)

    if not to_build:
        return {"cmdclass": {"build_py": BuildPython}}
    build = {"_C": cpu_kernels, "_C_cuda": cuda_kernels}
    extensions = [build[module]() for module in to_build]
    from torch.utils import cpp_extension

    class BuildKernels(cpp_extension.BuildExtension):
        def run(self):
            super().run()
            write_info(Path("" if self.inplace else self.build_lib), left_out)

        def build_extensions(self):
            """One by one, so that what fails to build can be left out."""
            built = []
            for extension in self.extensions:
                self.extensions = [extension]
                try:
                    with recorded_output() as lines:
                        super().build_extensions()
                    built.append(extension)
                except Exception as error:  # compilers and linkers fail in many types
                    self.leave_out(extension, f"the build failed: {last_errors(lines) or error}")
            self.extensions = self.distribution.ext_modules = built
            if not built:  # the wheel's tag was fixed before the build
                self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

        def leave_out(self, extension: Extension, reason: str) -> None:
            if choice != "auto":
                raise SystemExit(f"SCSE_BUILD={choice}: {reason}")
            module = extension.name.rpartition(".")[2]
            left_out[module] = reason
            print(line([KERNELS[module]], reason), flush=True)
            refuse_to_drop(left_out)

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_py": BuildPython, "build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


if __name__ == "__main__":
    check_setuptools()
    setup(**arguments_of_setup())
