"""`make dist` notices a file of a release that is missing, or that is not what it should be."""

import io
import tarfile
import zipfile

import pytest
import release_files
from release_files import VERSION

#: The CPU's wheel, the pure one, the sdist.
NAMES = [
    f"scse_kernels-{VERSION}-cp310-abi3-manylinux_2_31_x86_64.manylinux_2_34_x86_64.whl",
    f"scse_kernels-{VERSION}-py3-none-any.whl",
    f"scse_kernels-{VERSION}.tar.gz",
]


@pytest.fixture
def dist(tmp_path):
    """dist(cpu, pure or sdist=(what it has too much, what it lacks), ...)"""

    def make(**changes):
        for name in NAMES:
            kind = dict(zip(NAMES, ("cpu", "pure", "sdist"), strict=True))[name]
            more, less = changes.get(kind, ([], []))
            inside = [*release_files.ALL, *more, *release_files.EXPECTED[_end(name)]]
            inside += release_files.SDIST if kind == "sdist" else ()
            inside = [member for member in inside if member not in less]
            if kind == "sdist":
                with tarfile.open(tmp_path / name, "w:gz") as archive:
                    for member in inside:
                        archive.addfile(tarfile.TarInfo(f"top/{member}"), io.BytesIO())
            else:
                with zipfile.ZipFile(tmp_path / name, "w") as archive:
                    for member in inside:
                        archive.writestr(member, "")
        return tmp_path

    return make


def _end(name):
    (end,) = (e for e in release_files.EXPECTED if release_files.re.search(e + "$", name))
    return end


def test_a_whole_release(dist):
    assert release_files.wrong(dist()) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"pure": (["scse_kernels/_C.abi3.so"], [])},
            "py3-none-any.whl: expected the libraries []",
        ),
        ({"cpu": (["scse_kernels.libs/libtorch_cpu-1f.so.2"], [])}, "libtorch_cpu-1f.so.2"),
        ({"cpu": ([], ["scse_kernels/_C.abi3.so"])}, "x86_64.whl: expected the libraries"),
        ({"cpu": ([], ["scse_kernels/py.typed"])}, "x86_64.whl: no scse_kernels/py.typed"),
        ({"sdist": ([], ["csrc/formulas.inc"])}, ".tar.gz: no csrc/formulas.inc"),
    ],
)
def test_what_is_wrong_inside(dist, changes, words):
    (error,) = release_files.wrong(dist(**changes))
    assert words in error


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(dist, name):
    folder = dist()
    (folder / name).unlink()
    (error,) = release_files.wrong(folder)
    assert error.startswith("expected one")


def test_a_file_of_another_version_and_one_that_is_for_this_machine_alone(dist):
    folder = dist()
    (folder / NAMES[0]).rename(folder / f"scse_kernels-{VERSION}-cp310-abi3-linux_x86_64.whl")
    (folder / NAMES[2]).rename(folder / "scse_kernels-0.0.1.tar.gz")
    assert len(release_files.wrong(folder)) == 4
