"""Where a build's package is going to: the torch that is there, and the scse_kernels.

pip builds in an environment of its own, which has setuptools and ninja but no torch. It runs the
interpreter of the environment that it installs into, though, only with another search path: so that
interpreter, started anew, tells where things are. What it finds itself counts, by whatever way:
site-packages, dist-packages, the user's folder, path files.
"""

import functools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

_QUESTION = """
import importlib.util, json, sys
del sys.path[0]  # the working folder
spec = importlib.util.find_spec("scse_kernels")
print(json.dumps([sys.path, spec and spec.origin]))
"""
#: By these pip shuts out the environment that it installs into.
_SHUTTING_OUT = ("PYTHONPATH", "PYTHONNOUSERSITE")


@functools.cache
def _asked() -> tuple[list[str], str | None]:
    environment = {k: v for k, v in os.environ.items() if k not in _SHUTTING_OUT}
    command = [sys.executable, "-c", _QUESTION]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(said.stdout.splitlines()[-1]))


def make_importable() -> None:
    """Let this process import torch, and find ninja where the environment isn't activated."""
    os.environ["PATH"] = os.pathsep.join(
        (os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts"))
    )
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        # At the end: what the build brings itself, such as its setuptools, goes first.
        sys.path += [folder for folder in _asked()[0] if folder not in sys.path]


def built_with(package: Path) -> dict[str, dict[str, str]]:
    """What setup.py wrote into the package when it was built; nothing if it was not."""
    try:
        return json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def installed() -> Path | None:
    """The package that is there already: its folder."""
    origin = _asked()[1]
    return Path(origin).parent if origin else None
