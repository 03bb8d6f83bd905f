"""What `make dist` leaves in dist/ is what a release has: `python release_files.py dist`."""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

VERSION = re.search(
    r'^__version__ = "(.*)"$',
    (Path(__file__).parents[2] / "scse_kernels" / "__init__.py").read_text(),
    re.M,
)[1]
#: The end of a file's name after the version -> the shared libraries inside of it.
EXPECTED = {
    r"\.tar\.gz": [],
    r"-py3-none-any\.whl": [],
    r"-cp310-abi3-manylinux[\w.]*_(x86_64|aarch64)\.whl": ["scse_kernels/_C.abi3.so"],
}
#: What each of them has, and what the sdist has besides.
ALL = ("scse_kernels/__init__.py", "scse_kernels/py.typed", "scse_kernels/_triton/launch.py")
SDIST = ("setup.py", "build_environment.py", "CHANGELOG.md", "csrc/formulas.inc", "tests/budget.py")


def members(path: Path) -> list[str]:
    """The files of an archive, by their paths in the package."""
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).namelist()
    with tarfile.open(path) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def wrong(folder: Path) -> list[str]:
    """What is missing in the folder, or too much."""
    errors = []
    left = sorted(folder.iterdir())
    for end, libraries in EXPECTED.items():
        name = rf"scse_kernels-{re.escape(VERSION)}{end}"
        found = [path for path in left if re.fullmatch(name, path.name)]
        if len(found) != 1:
            errors.append(f"expected one {name}, got {[path.name for path in left]}")
            continue
        left.remove(found[0])
        inside = members(found[0])
        shared = [member for member in inside if re.search(r"\.so(\.\d+)*$", member)]
        if shared != libraries:
            errors.append(f"{found[0].name}: expected the libraries {libraries}, got {shared}")
        wanted = ALL + SDIST * (found[0].suffix == ".gz")
        errors += [f"{found[0].name}: no {member}" for member in wanted if member not in inside]
    return errors + [f"not part of a release: {path.name}" for path in left]


if __name__ == "__main__":
    errors = wrong(Path(sys.argv[1]))
    print("\n".join(errors or sorted(path.name for path in Path(sys.argv[1]).iterdir())))
    sys.exit(bool(errors))
