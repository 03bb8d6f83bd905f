"""The steps, the most valuable first. And their environment, which keeps all that they write in the
checkout."""

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
#: Deep levels with reduction 2, as the articles and pytorch-3dunet have it: there the excitation
#: weighs most. Rows of 14 and 7 halves are no multiples of 16 bytes.
DEEP = ("8x256x16x16", "8x512x16x16", "8x512x14x14", "2x1024x7x7")
#: Its maps, 128 MiB in float16, are larger than any L2.
LARGE = "256x64x64x64"
#: Aligned and odd sizes, for tools that slow a kernel a hundredfold.
SMALL = ("2x64x32x32", "3x19x23x9")
# Counts the bytes that each kernel moves, with a cold L2; the clocks stay as they are.
_NCU = (
    *("ncu", "--profile-from-start", "off", "--clock-control", "none"),
    *("--metrics", "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"),
    *("--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "demangled"),
)
# Of Triton's kernels, which compile for seconds each, only tests that reach all of them.
_TRITON_TESTS = ("layouts", "max_semantics", "repeatability", "empty_batch")
_NORM_TESTS = ("maps_of_several_strips", "a_mean_of_a_thousand", "other_strides")


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
        240,
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
    check = Step("self-check", _python("scse_kernels"), 120, beside=True)
    timed = _python(
        *("bench.gpu.kernels", "--shape", *LEVELS, LARGE, "--output", folder / "kernels.csv"),
    )
    deep = _python(
        *("bench.gpu.kernels", "--shape", *DEEP, "--reduction", 2, "--combine", "add"),
        *("--family", kernels.OVERLAP, kernels.ALONE, kernels.THREE, kernels.THREE_ALONE),
        *("--output", folder / "deep.csv"),
    )
    tune = _python(
        *("bench", "tune", "--shape", "8x64x64x64", "--rounds", "7", "--jobs", jobs),
        *("--output", folder),
    )
    return [
        build,
        ahead,
        check,
        *_tests(facts, jobs),
        Step("kernels", timed, 80),
        Step("deep levels", deep, 60),
        Step("model", _model(), 120, ("rich",)),
        *(_ops(folder, "float16", layout) for layout in LAYOUTS),
        *(_ops(folder, "float16", layout, "bn_relu_scse") for layout in LAYOUTS),
        *(_ops(folder, "bfloat16", layout) for layout in LAYOUTS),
        Step("ncu", (*_NCU, "--log-file", str(folder / "ncu.csv"), *_once(LARGE)), 60, ("ncu",)),
        Step(
            "tune",
            tune,
            70,
            ("rich", "triton"),
            {"SCSE_TUNING": str(folder / "tuning.json")},
        ),
        *(_sanitizer(tool) for tool in ("memcheck", "racecheck")),
        _ops(folder, "float32", "contiguous"),
    ]


def _python(module: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *map(str, arguments))


def _tests(facts: Mapping, jobs: str) -> list[Step]:
    """Tests of the device, then the kernels' own with the CUDA kernels, then some with Triton's.
    They run beside each other and the self-check, which is one process."""
    options = ["-q", "-p", "no:cacheprovider"]
    if facts["modules"]["xdist"]:
        options += ["-p", "xdist.plugin", "-n", str(max(1, int(jobs) // 4))]
    triton = [f"tests/kernels/test_{name}.py" for name in _TRITON_TESTS]
    norm = " or ".join(_NORM_TESTS)
    chosen = {
        "tests of the device": ["tests/device"] if (ROOT / "tests/device").is_dir() else None,
        "tests, cuda": ["tests/kernels", "-k", "cuda-cuda"],
        "tests, triton": [*triton, "-k", "triton-cuda"],
        "tests, batch norm": ["tests/batch_norm", "-k", f"triton-cuda and ({norm})"],
    }
    given = [(name, words) for name, words in chosen.items() if words]
    return [
        Step(name, _python("pytest", *options, *words), 120, ("pytest",), beside=i + 1 < len(given))
        for i, (name, words) in enumerate(given)
    ]


def _model() -> tuple[str, ...]:
    """A network as it is trained on a GPU."""
    return _python(
        *("bench", "model", "--models", "smp", "--rounds", "5"),
        *("--images", "16x512x512", "--autocast", "float16", "--layout", "channels_last"),
    )


def _ops(folder: Path, dtype: str, layout: str, block: str = "scse") -> Step:
    """Only scSE in float16 against what torch.compile makes, which takes the longest to compile."""
    name = ", ".join(("ops", *(() if block == "scse" else (block,)), dtype, layout))
    compiled = dtype == "float16" and block == "scse"
    return Step(
        name,
        _python(
            *("bench", "ops", "--block", block, "--dtype", dtype, "--layout", layout),
            *("--shape", *LEVELS, "--reduction", 16, "--combine", "add", "max", "--rounds", 5),
            *(() if compiled else ("--without-compile",)),
            *("--output", folder / name.replace(", ", "-")),
        ),
        60 if compiled else 35,
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
    """One call of each kernel. Without overlap they would be the same again."""
    families = (kernels.OVERLAP, kernels.THREE, kernels.ONE)
    return _python("bench.gpu.kernels", "--once", "--shape", *shapes, "--family", *families)
