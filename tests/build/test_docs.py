"""What README and docs promise: links lead somewhere; commands, files, settings and names exist;
every table of times says which machine, which versions and when.

Each check is a function of a page that yields what is wrong. Each also gets faulty pages, and must
find the fault.
"""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import scse_kernels

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("tests/*/*.md")])

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir() or not (ROOT / "bench").is_dir(), reason="only a checkout has docs"
)


def blocks(text, language=""):
    """The contents of code blocks in one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.M | re.S)


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors(page):
    """The anchors of a page's headings, as the common hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    for link in re.findall(r"\]\(([^)]*)\)", without_code(page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def commands(text):
    """The command lines in blocks without a language and in inline code, without comments."""
    for block in blocks(text):
        yield from re.sub(r"\\\n", " ", block).splitlines()
    yield from re.findall(r"`([^`\n]+)`", text)


def exists(module):
    """Whether there is a module of that name, in the checkout, its tests, or installed."""
    package, path = module.partition(".")[0], Path(*module.split("."))
    for folder in (ROOT, ROOT / "tests"):
        if (folder / path).is_dir() or (folder / path).with_suffix(".py").exists():
            return True
    return not (ROOT / package).is_dir() and importlib.util.find_spec(package) is not None


def bench_refuses(arguments):
    """Whether `python -m bench ...` has no such benchmark, or no such option of it."""
    name = arguments[0]
    files = [ROOT / "bench" / f"{file}.py" for file in ("__main__", "options", name)]
    if name == "gpu":
        files[-1] = ROOT / "bench" / "gpu" / "__init__.py"
    listed = re.search(r"^NAMES = (.*)$", files[0].read_text(), re.M)[1]
    if f'"{name}"' not in listed:
        return True
    source = "".join(file.read_text() for file in files)
    given = [argument for argument in arguments if argument.startswith("--")]
    return any(f'"{option}"' not in source for option in given)


def wrong_commands(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    for line in commands(page.read_text()):
        command = line.partition(" # ")[0]
        for made in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", command):
            if made not in targets:
                yield f"make {made}"
        for run in re.findall(r"python3? -m ([\w.]+)", command):
            if not exists(run):
                yield f"-m {run}"
        for run in re.findall(r"python3? -m bench ([a-z].*)", command):
            if bench_refuses(shlex.split(run)):
                yield f"bench {run}"
        if re.search(r"\b(python3?|pytest)\b", command):
            for file in re.findall(r" ((?:tests|bench|docs)/\S+)", command):
                if not (ROOT / file).exists():
                    yield file


def wrong_paths(page):
    """Files of this repository that are named in code, from its root or from the page."""
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", page.read_text()):
        start = path.split("/")[0]
        ours = (ROOT / start).is_dir() and start not in ("build", "dist", "results")
        if ours and not any((folder / path).exists() for folder in (ROOT, page.parent)):
            yield path


def has(module, name):
    """Whether one of the package's modules has the name. Keras is not imported for it."""
    if module == "scse_kernels.keras":
        text = (ROOT / "scse_kernels" / "keras.py").read_text()
        return re.search(rf"^(class|def) {name}\b", text, re.M) is not None
    return hasattr(importlib.import_module(module), name)


def wrong_python(page):
    """Blocks of Python that are none, and names that the package lacks."""
    for block in blocks(page.read_text(), "python"):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            yield f"{error.msg}: {error.text}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("scse_kernels"):
                yield from (a.name for a in node.names if not has(node.module, a.name))
            is_ours = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "scse_kernels"
            if is_ours and not hasattr(scse_kernels, node.attr):
                yield node.attr


#: What a table of times must have around it.
MACHINE = re.compile(r"\b(H100|H200|EPYC|Xeon)\b")
VERSIONS = re.compile(r"\b(torch|Triton|nvcc) \d+\.\d+")
DATE = re.compile(r"\b20\d\d-\d\d-\d\d\b")
TIME = re.compile(r"\b(µs|us|ms|ns|microseconds|milliseconds|times as fast)\b", re.I)


def sections(text):
    """Each section's own text after the texts of the sections that it is part of."""
    texts = {}
    for part in re.split(r"^(?=#+ )", text, flags=re.M):
        level = len(part) - len(part.lstrip("#"))
        texts = {depth: above for depth, above in texts.items() if depth < level}
        yield part, "".join(texts.values()) + part
        texts[level] = part


def nameless_times(page):
    """Headings of sections that have a table of times without machine, versions or date.

    The tables of docs/gpu.md are counted in an emulator, and other tests count them again: of those
    sections none needs a date. The front page links to the versions.
    """
    needed = [MACHINE, VERSIONS, DATE]
    if page.name == "README.md":
        needed.remove(VERSIONS)
    for own, text in sections(page.read_text()):
        tables = re.findall(r"(?:^[^|\n].*\n)*\n(?:^\|.*\n)+", own, re.M)  # and what leads to them
        timed = any(TIME.search(t) and re.search(r"\|.*\d.*\|", t) for t in tables)
        counted = page.name == "gpu.md" and re.search(r"\bcounted\b|\bleast time\b|\bbound", text)
        if timed and not counted and not all(pattern.search(text) for pattern in needed):
            yield own.partition("\n")[0].strip("# ")


def unknown_settings(page):
    known = settings() | {"SCSE_GPU_PROOF", "SCSE_TEST_TRITON", "SCSE_TEST_PURE_PYTHON"}
    named = set(re.findall(r"\bSCSE_[A-Z_]+[A-Z]\b(?!_)", page.read_text()))
    return {name for name in named if not any(k.startswith(name) for k in known)}


def settings():
    """The environment variables that the package and its build read."""
    read = re.compile(r'(?:environ(?:\.get\(|\[)|getenv\()\s*"(SCSE_\w+)"')
    files = [ROOT / "setup.py", *(ROOT / "scse_kernels").rglob("*.py")]
    files += (f for f in (ROOT / "csrc").rglob("*") if f.is_file())
    return {name for file in files for name in read.findall(file.read_text())}


CHECKS = (
    broken_links,
    wrong_commands,
    wrong_paths,
    wrong_python,
    nameless_times,
    unknown_settings,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages(page, check):
    assert list(check(page)) == []


#: A check, a page, and what it finds there.
FAULTS = [
    (broken_links, "# One two\n[a](#one-two) [b](#three) [c](x.md) [d](https://x.org)", "#three"),
    (broken_links, "[an image with a title](x.png 'of it')", "x.png 'of it'"),
    (wrong_commands, "```\nmake tset   # all\nmake test\n```", "make tset"),
    (wrong_commands, "`python -m bench opps` `python -m bench ops --quick`", "bench opps"),
    (wrong_commands, "`python -m bench ops --qiuck`", "bench ops --qiuck"),
    (wrong_commands, "`python -m bench.gpu.kernels` `python -m bench.gpu.krenels`", "gpu.krenels"),
    (wrong_commands, "```\npython -m pytest tests/gpu tests/gup\n```", "tests/gup"),
    (wrong_paths, "`csrc/formulas.inc`, `csrc/formulae.h`, `https://x.org/y`", "csrc/formulae.h"),
    (wrong_python, "```python\nfrom scse_kernels import convert, convret\n```", "convret"),
    (wrong_python, "```python\nimport scse_kernels\nscse_kernels.revret(1)\n```", "revret"),
    (wrong_python, "```python\nx = (\n```", "was never closed"),
    (nameless_times, "## A\nOn an H100, torch 2.11.0.\n\n| a |\n|---|\n| 3 µs |\n", "A"),
    (nameless_times, "## A\ntorch 2.11.0, 2026-11-27, ms.\n\n| a |\n|---|\n| 3 |\n", "A"),
    (nameless_times, "## A\nH100, 2026-11-27.\n### B\n\n| a, ms |\n|---|\n| 3 |\n", "B"),
    (unknown_settings, "`SCSE_BACKEND`, `SCSE_CUDA_*`, `SCSE_BCAKEND`", "SCSE_BCAKEND"),
]


@pytest.mark.parametrize("check, text, found", FAULTS)
def test_faults_are_found(check, text, found, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    wrong = list(check(page))
    assert len(wrong) == (2 if found == "#three" else 1) and found in wrong[0]


def test_right_times_pass(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("## A\nH100, torch 2.11.0, 2026-11-27\n### B\n\n| a, ms |\n|---|\n| 3 |\n")
    assert list(nameless_times(page)) == []


def test_the_checks_see_what_the_pages_have():
    """Not one of them passes because it finds nothing to look at."""
    text = "".join(page.read_text() for page in PAGES)
    found = "\n".join(commands(text))
    assert all(f"make {target}" in found for target in ("test", "bench", "gpu"))
    assert all(f"-m bench {name}" in found for name in ("ops", "host", "model", "mri"))
    assert len(blocks(text, "python")) >= 15
    timed = [own for own, _ in sections(text) if TIME.search(own) and "\n|" in own]
    assert len(timed) >= 8


def test_every_setting_is_in_the_table():
    table = (ROOT / "docs" / "install.md").read_text().partition("## Environment variables")[2]
    named = set(re.findall(r"^\| `(SCSE_\w+)`", table, re.M))
    assert len(settings()) == 8 and named == settings()


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
