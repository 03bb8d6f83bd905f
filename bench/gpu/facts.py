"""What is here: device, versions, modules, tools. Written as JSON, which the other parts read.

python -m bench.gpu.facts FILE
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

#: Modules and tools that steps use and that may be missing.
MODULES = (
    *("triton", "ninja", "setuptools", "pytest", "xdist", "rich", "matplotlib", "nilearn"),
    *("segmentation_models_pytorch", "pytorch3dunet"),
)
TOOLS = ("nvcc", "c++", "ncu", "compute-sanitizer", "nvidia-smi")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported already, by other means than a file
        return True


def facts() -> dict[str, object]:
    """Of the current device. Sizes in bytes; absent modules and tools are None."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    modules = {name: _is_there(name) for name in MODULES}
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory": device.total_memory,
        "l2": device.L2_cache_size,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "triton": _triton_version() if modules["triton"] else None,
        "commit": _said("git", "describe", "--always", "--dirty"),
        "modules": modules,
        "tools": {name: shutil.which(name) for name in TOOLS},
    }


def _triton_version() -> str:
    import triton

    return triton.__version__


def _said(*command: str) -> str | None:
    """The first line that a command prints, None where it isn't here or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0] if done.returncode == 0 else None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(facts(), indent=1))
