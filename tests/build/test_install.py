"""The package installed by pip, with its own way of building, into fresh environments.

The compiler's results are those that lie in the checkout already: what is tested is how they are
come by. `make test-wheel` installs with a real compilation.
"""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("SCSE_TEST_PURE_PYTHON") == "1", reason="SCSE_TEST_PURE_PYTHON=1"
    ),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="only a checkout has setup.py"),
]

# Takes the place of c++. The objects that it compiles are kept, for the next environment.
_COMPILER = """#!{python}
import os, pathlib, shutil, subprocess, sys

words = sys.argv[1:]
command = ["c++", *words]
if "-c" not in words:
    os.execvp(command[0], command)
source, target = words[words.index("-c") + 1], words[words.index("-o") + 1]
known = pathlib.Path({objects!r}, target.rpartition("/csrc/")[2])
if not known.exists():
    subprocess.run(command, check=True)
    known.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(target, known)
shutil.copy(known, target)
if "-MF" in words:
    pathlib.Path(words[words.index("-MF") + 1]).write_text(f"{{target}}: {{source}}\\n")
"""


def _newest(files):
    return max((file.stat().st_mtime for file in files), default=0)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Where a compiler is that begins with the checkout's own objects, if they are up to date."""
    folder = tmp_path_factory.mktemp("compiler")
    objects = folder / "objects"
    built = next(iter(ROOT.glob("build/temp*/csrc")), ROOT / "none")
    sources = [*(ROOT / "csrc" / "cpu").rglob("*.*"), *(ROOT / "csrc").glob("*.h")]
    if min((o.stat().st_mtime for o in built.rglob("*.o")), default=0) > _newest(sources):
        shutil.copytree(built, objects)
    path = folder / "c++"
    path.write_text(_COMPILER.format(python=sys.executable, objects=str(objects)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def sources(tmp_path):
    """A copy of the checkout, with nothing built in it."""
    there = tmp_path / "checkout"
    there.mkdir()
    for name in ("csrc", "scse_kernels"):
        ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
        shutil.copytree(ROOT / name, there / name, ignore=ignored)
    for name in ("setup.py", "build_environment.py", "pyproject.toml", "README.md", "LICENSE",
                 "MANIFEST.in", "CHANGELOG.md"):  # fmt: skip
        shutil.copy(ROOT / name, there)
    return there


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the packages that are here, but for this one: outside of virtual environments
    pip would uninstall it from where it finds it, which is this very environment."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in TORCH.iterdir():
        if "scse_kernels" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A fresh Python, into which pip installs from outside."""

    def __init__(self, python: Path, compiler: Path, packages: Path) -> None:
        self.python, self.compiler, self.packages = python, compiler, packages
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(self.run("-c", where).stdout.strip())

    def run(self, *words, **variables):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SCSE_", "PYTHON"))}
        return subprocess.run(
            [self.python, *words],
            cwd=self.python.parent,  # not in a checkout
            env={**kept, "CXX": str(self.compiler), **variables},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def share_torch(self) -> None:
        """torch and what it needs, by a path file."""
        (self.site / "torch.pth").write_text(f"{self.packages}\n")

    def pip(self, *words, **variables):
        """The outer pip, run by this environment's interpreter."""
        path = str(self.packages)
        runner = f"import sys, runpy; sys.path.append({path!r}); sys.argv[0] = 'pip'; " \
                 "runpy.run_module('pip', run_name='__main__')"  # fmt: skip
        return self.run(
            *("-c", runner, "--disable-pip-version-check", *words),
            **{"PIP_ROOT_USER_ACTION": "ignore", **variables},
        )

    def install(self, *words, **variables):
        done = self.pip("install", "--no-deps", *words, **variables)
        assert done.returncode == 0, done.stdout + done.stderr

    def self_check(self) -> str:
        done = self.run("-m", "scse_kernels")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def in_venv(tmp_path, compiler, packages):
    """A virtual environment."""
    venv.create(tmp_path / "venv", symlinks=True)
    return Environment(tmp_path / "venv" / "bin" / "python", compiler, packages)


@pytest.fixture
def in_prefix(tmp_path, compiler, packages):
    """A Python of its own, as conda's and as a container's are: no virtual environment."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    stdlib, here = Path(sysconfig.get_path("stdlib")), tmp_path / "prefix" / "lib" / version
    (here / "site-packages").mkdir(parents=True)
    for entry in stdlib.iterdir():
        if entry.name not in ("site-packages", "EXTERNALLY-MANAGED"):
            (here / entry.name).symlink_to(entry)
    binary = tmp_path / "prefix" / "bin" / version
    binary.parent.mkdir()
    shutil.copy(Path(sys.executable).resolve(), binary)
    include = Path(sysconfig.get_path("include"))
    (tmp_path / "prefix" / "include").mkdir()
    (tmp_path / "prefix" / "include" / include.name).symlink_to(include)
    environment = Environment(binary, compiler, packages)
    assert environment.site == here / "site-packages"
    return environment


def _usable(report: str) -> bool:
    """Whether a self-check's report says that the CPU kernels are usable."""
    return re.search(r"^ *cpu +cpu +usable", report, re.M) is not None


def test_a_checkout_in_a_virtual_environment(in_venv, sources):
    in_venv.share_torch()
    in_venv.install(str(sources))
    report = in_venv.self_check()
    assert _usable(report) and f"loaded from {in_venv.site}" in report
    assert f"torch {torch.__version__}" in report and "no kernels" not in report

    # In the checkout's folder its package would be taken.
    done = in_venv.run("-m", "scse_kernels", PYTHONPATH=str(sources))
    assert done.returncode == 1 and f"hides the package that is installed in {in_venv.site}" in (
        done.stdout
    )

    # Without a compiler these kernels would get lost.
    done = in_venv.pip("install", "--no-deps", str(sources), CXX="no-such-compiler")
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "has CPU kernels, this build would have none: no C++ compiler" in told
    assert "SCSE_BUILD=none builds without them" in told
    assert _usable(in_venv.self_check())
    in_venv.install("--force-reinstall", str(sources), SCSE_BUILD="none")
    report = in_venv.self_check()
    assert not _usable(report) and "none: SCSE_BUILD=none was asked for" in report


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_from_git_before_and_after_torch(in_prefix, sources):
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *author, *words], cwd=sources, check=True)
    in_prefix.install(f"git+file://{sources}")
    info = json.loads((in_prefix.site / "scse_kernels" / "_build_info.json").read_text())
    assert "No module named 'torch'" in info["_C"]["left_out"]
    assert "--no-build-isolation" in info["_C"]["left_out"]

    in_prefix.share_torch()
    report = in_prefix.self_check()
    assert not _usable(report) and "No module named 'torch'" in report
    # It says what mends it. pip has a wheel of this commit without kernels in its cache.
    (command,) = set(re.findall(r"`pip (install [^`]*)`", report))
    assert f"git+file://{sources}@" in command
    words = shlex.split(command)
    in_prefix.install(*words[1:])
    assert _usable(in_prefix.self_check())


def test_editable(in_venv, sources, compiler):
    in_venv.share_torch()
    before = sorted(in_venv.site.rglob("*"))
    in_venv.install("-e", str(sources))
    report = in_venv.self_check()
    assert _usable(report) and f"loaded from {sources}" in report
    assert (sources / "scse_kernels" / "_build_info.json").exists()

    # A build that fails: the kernels from before stay, and the compiler's words are told.
    broken = compiler.with_name("broken")
    broken.write_text(
        '#!/bin/sh\ncase " $* " in\n*" -c "*) echo k.h:7:1: error: expected a miracle; exit 1;;\n'
        '*) exec c++ "$@";;\nesac\n'
    )
    broken.chmod(compiler.stat().st_mode)
    again = ("install", "--no-deps", "--no-build-isolation", "-e", str(sources))
    done = in_venv.pip(*again, CXX=str(broken))
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert "would have none: the build failed: k.h:7:1: error: expected a miracle" in told
    assert len(list((sources / "scse_kernels").glob("*.so"))) == 1

    # Without them the package is what it is told to be.
    assert in_venv.pip(*again, SCSE_BUILD="none").returncode == 0
    assert list((sources / "scse_kernels").glob("*.so")) == []
    done = in_venv.pip(*again, CXX=str(broken))
    assert done.returncode == 0, done.stdout + done.stderr
    report = in_venv.self_check()
    assert not _usable(report) and "none: the build failed: k.h:7:1: error: exp" in report

    in_venv.pip("uninstall", "-y", "scse_kernels")
    assert sorted(in_venv.site.rglob("*")) == before
    assert "No module named 'scse_kernels'" in in_venv.run("-c", "import scse_kernels").stderr
