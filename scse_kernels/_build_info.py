"""What this installation was built with, and how to get one with kernels.

setup.py writes `_build_info.json` beside this file. It says of each extension module what it was
built against, or why it was left out.
"""

import functools
import json
from importlib import metadata
from pathlib import Path

#: The folder that the package was loaded from.
PACKAGE = Path(__file__).resolve().parent


@functools.cache
def _written() -> dict[str, dict[str, str]]:
    try:
        return json.loads((PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError:
        return {}


def built_against(module: str) -> str | None:
    """Torch, toolkit and architectures of the extension `module`; None if it wasn't built."""
    about = _written().get(module, {})
    if "torch" not in about:
        return None
    parts = [f"torch {about['torch']}"]
    if "toolkit" in about:
        parts += [about["toolkit"], f"for compute capability {about['architectures']}"]
    return ", ".join(parts)


def why_left_out(module: str) -> str:
    """Why the build did without the extension `module`."""
    if not _written():
        return f"{PACKAGE} is as it was checked out, nothing was built in it"
    return _written().get(module, {}).get("left_out", "its file is gone")


def is_checkout() -> bool:
    """Whether the package was loaded from its sources."""
    return (PACKAGE.parent / "setup.py").exists()


def mending_command() -> str:
    """The command that replaces this installation by one with kernels. What kernels need must be
    there by then."""
    if is_checkout():
        return f"pip install --no-deps --force-reinstall -e {PACKAGE.parent}"
    # The one beside this package: another may be installed elsewhere.
    found = metadata.distributions(name="scse_kernels", path=[str(PACKAGE.parent)])
    installed = next(iter(found), None)
    source, installer = ".", ""
    if installed:
        source = _source(json.loads(installed.read_text("direct_url.json") or "{}"))
        installer = (installed.read_text("INSTALLER") or "").strip()
    if installer == "uv":
        return (
            "uv pip install --no-build-isolation --no-cache --no-deps"
            f" --reinstall-package scse_kernels {source}"
        )
    # pip keeps a wheel without kernels for the same version and commit.
    return f"pip install --no-cache-dir --no-deps --force-reinstall {source}"


def _source(direct_url: dict) -> str:
    """Where the package was installed from (PEP 610), as pip takes it; "." if that was a file."""
    url = direct_url.get("url", ".")
    if "vcs_info" in direct_url:
        vcs = direct_url["vcs_info"]
        return f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return url.removeprefix("file://") if "dir_info" in direct_url else "."
