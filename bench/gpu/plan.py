"""The steps, most valuable first, and the environment that keeps all they write in the checkout."""

import os
import site
import sys
from collections.abc import Mapping
from pathlib import Path

from ..cases import LAYOUTS
from . import kernels
from .steps import Step

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "gpu"
CACHE = ROOT / "build" / "gpu"
#: Of a U-Net's levels; the largest is what kernels and counters are measured on.
LEVELS = ("8x256x16x16", "8x128x32x32", "8x64x64x64", "8x32x128x128")
#: Its maps, 128 MiB in float16, are larger than any L2, and a sample of it fits on chip.
LARGE = "256x64x64x64"
#: Aligned and odd sizes, for tools that slow a kernel a hundredfold.
SMALL = ("2x64x32x32", "3x19x23x9")
# Counts the bytes that each kernel moves, with a cold L2; the clocks stay as they are.
_NCU = (
    *("ncu", "--profile-from-start", "off", "--clock-control", "none"),
    *("--metrics", "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"),
    *("--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "demangled"),
)
# Of Triton's kernels, which compile for seconds each, only files that reach all of them.
_TRITON_TESTS = ("layouts", "max_semantics", "repeatability", "empty_batch")


def environment(given: Mapping[str, str], cache: Path) -> dict[str, str]:
    """What all steps are told: `given` without settings of this package, and everything that
    torch, Triton, CUDA and others write lies in `cache`."""
    kept = {
        name: value
        for name, value in given.items()
        if not name.startswith("SCSE_") and name != "TRITON_INTERPRET"
    }
    folders = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "XDG_CACHE_HOME": "xdg",
        "TRITON_HOME": "home",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TORCH_EXTENSIONS_DIR": "extensions",
        "TORCH_HOME": "torch",
        "CUDA_CACHE_PATH": "cuda",
        "MPLCONFIGDIR": "matplotlib",
    }
    for name in folders.values():
        (cache / name).mkdir(parents=True, exist_ok=True)
    # This Python's own folder has ninja, where it is an environment that isn't activated.
    tools = [str(Path(sys.executable).parent), given.get("PATH", os.defpath)]
    home = given.get("CUDA_HOME") or given.get("CUDA_PATH") or "/usr/local/cuda"
    tools += [f"{home}/bin", f"{home}/compute-sanitizer"]
    return {
        **kept,
        **{variable: str(cache / name) for variable, name in folders.items()},
        "PATH": os.pathsep.join(tools),
        "PYTHONUSERBASE": site.getuserbase(),  # packages there stay, though HOME moves
        "PYTHONUNBUFFERED": "1",
        # What other plugins warn of would be errors here.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def device_step(folder: Path) -> Step:
    """What has to work before anything else."""
    return Step("device", _python("bench.gpu.facts", folder / "device.json"), 60)


def steps(facts: Mapping, folder: Path) -> list[Step]:
    """All others, for the device that `facts` describe. `folder`: for their files."""
    # Processes that use the GPU, each with up to 2 GiB of its memory.
    jobs = str(max(1, min(facts["cores"] - 2, facts["memory"] // (2 << 30))))
    build = Step(
        "build",
        (sys.executable, "setup.py", "build_ext", "--inplace"),
        150,
        environment={
            "SCSE_BUILD": "cuda",
            "TORCH_CUDA_ARCH_LIST": facts["capability"],
            "MAX_JOBS": str(facts["cores"]),
        },
        beside=True,
    )
    ahead = Step(
        "compile ahead",
        _python("bench.gpu.ahead", "--jobs", jobs),
        150,
        ("triton",),
        {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # the processes share the cores already
    )
    check = Step("self-check", _python("scse_kernels"), 90)
    timed = _python(
        *("bench.gpu.kernels", "--shape", *LEVELS, LARGE, "--output", folder / "kernels.csv"),
    )
    tune = _python(
        *("bench", "tune", "--shape", "8x64x64x64", "--rounds", "7", "--jobs", jobs),
        *("--output", folder),
    )
    return [
        build,
        ahead,
        check,
        *_tests(jobs, facts["modules"]["xdist"]),
        Step("kernels", timed, 80),
        *(_ops(folder, dtype, layout) for dtype in ("float16", "bfloat16") for layout in LAYOUTS),
        Step("ncu", (*_NCU, "--log-file", str(folder / "ncu.csv"), *_once(LARGE)), 60, ("ncu",)),
        Step(
            "tune",
            tune,
            70,
            ("rich", "triton"),
            {"SCSE_TUNING": str(folder / "tuning.json")},
        ),
        Step("model", _python("bench", "model", "--rounds", "5"), 60, ("rich",)),
        *(_sanitizer(tool) for tool in ("memcheck", "racecheck")),
        _ops(folder, "float32", "contiguous"),
    ]


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


def _tests(jobs: str, xdist: bool) -> list[Step]:
    """Tests of the device, then the kernels' own with the CUDA kernels, then some with Triton's."""
    options = ["-q", "-p", "no:cacheprovider"]
    if xdist:
        options += ["-p", "xdist.plugin", "-n", jobs]
    triton = [f"tests/kernels/test_{name}.py" for name in _TRITON_TESTS]
    chosen = {
        "tests of the device": ["tests/device"] if (ROOT / "tests/device").is_dir() else None,
        "tests, cuda": ["tests/kernels", "-k", "cuda-cuda"],
        "tests, triton": [*triton, "-k", "triton-cuda"],
    }
    return [
        Step(name, _python("pytest", *options, *words), 60, ("pytest",))
        for name, words in chosen.items()
        if words
    ]


def _ops(folder: Path, dtype: str, layout: str) -> Step:
    """Only in float16 against what torch.compile makes, which takes the longest to compile."""
    return Step(
        f"ops, {dtype}, {layout}",
        _python(
            *("bench", "ops", "--dtype", dtype, "--layout", layout, "--shape", *LEVELS),
            *("--reduction", 16, "--combine", "add", "max", "--rounds", 5),
            *(() if dtype == "float16" else ("--without-compile",)),
            *("--output", folder / f"ops-{dtype}-{layout}"),
        ),
        60 if dtype == "float16" else 35,
        ("rich",),
    )


def _sanitizer(tool: str) -> Step:
    return Step(
        tool,
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *_once(*SMALL)),
        60,
        ("compute-sanitizer",),
        # Each tensor is memory of its own, so that an access past its end shows.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _once(*shapes: str) -> tuple[str, ...]:
    """One call of each kernel. `auto` and no overlap would be the same kernels again."""
    families = (kernels.ON_CHIP, kernels.GENERAL, kernels.THREE, kernels.ONE)
    return _python("bench.gpu.kernels", "--once", "--shape", *shapes, "--family", *families)
