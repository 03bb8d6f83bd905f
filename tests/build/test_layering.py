"""Imports inside the package point one way, and Triton is imported only when used."""

import ast
import sys
from pathlib import Path

import pytest

import scse_kernels

PACKAGE = Path(scse_kernels.__file__).parent
#: each module may import those to its right only
ORDER = (
    *(
        "__main__",
        "selfcheck",
        "__init__",
        "convert",
        "keras",
        "batch_norm",
        "modules",
        "children",
        "functional",
        "backends",
        "autograd",
        "ops",
    ),
    *("_triton", "_native", "_build_info", "_library", "literals", "_torch_version", "reference"),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def _module(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    """(name, at module level) of each import; the package's own as '.<module>'."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == depth:
                names = [f".{node.module or alias.name}" for alias in node.names]
            elif node.level:
                names = []  # a neighbour in the same sub-package
            else:
                names = [node.module]
        else:
            continue
        for name in names:
            if name == "scse_kernels" or name.startswith("scse_kernels."):
                name = "." + (name.partition(".")[2] or "__init__")
            yield name, id(node) in top


def test_every_module_has_its_place():
    assert {_module(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_arrows_point_one_way(path):
    module = _module(path)
    for name, _ in _imports(path):
        if name.startswith("."):
            imported = name[1:].split(".")[0]
            if imported != module:
                assert ORDER.index(imported) > ORDER.index(module), f"{module} imports {imported}"


def test_reference_imports_torch_only():
    names = {name.split(".")[0] for name, _ in _imports(PACKAGE / "reference.py")}
    assert names - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_triton_is_imported_late(path):
    for name, at_module_level in _imports(path):
        if at_module_level and _module(path) != "_triton":
            assert name.split(".")[0] != "triton", "triton is imported with the package"
            assert not name.startswith("._triton"), f"{name} is imported with the package"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_keras_is_imported_by_one_module(path):
    names = {name.split(".")[0] for name, _ in _imports(path)}
    assert ("keras" in names) == (_module(path) == "keras")


def test_modules_do_not_choose_backends():
    text = (PACKAGE / "modules.py").read_text()
    assert "torch.ops" not in text and "backend" not in text
