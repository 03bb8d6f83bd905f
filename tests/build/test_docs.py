"""What README and docs promise: links lead somewhere, commands exist, figures say where they come
from."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

pytestmark = pytest.mark.skipif(
    not (ROOT / "docs").is_dir() or not (ROOT / "bench").is_dir(), reason="only a checkout has docs"
)


def anchors(page):
    """The anchors of a page's headings, as the common hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def broken(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert list(broken(page)) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n[a](#one-two) [b](#three) [c](other.md) [d](https://x.org) [e](page.md)\n"
    )
    assert list(broken(page)) == ["#three", "other.md"]


def commands(text):
    """Targets of make and subcommands of bench that are named as commands."""
    code = "\n".join(
        [*re.findall(r"^```\n(.*?)^```", text, re.M | re.S), *re.findall(r"`([^`\n]+)`", text)]
    )
    return (
        set(re.findall(r"\bmake ([a-z][\w-]*)", code)),
        set(re.findall(r"python3? -m bench (\w+)", code)),
    )


def test_commands_exist():
    named = re.search(r"^NAMES = \((.*)\)$", (ROOT / "bench" / "__main__.py").read_text(), re.M)[1]
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    made, run = set(), set()
    for page in PAGES:
        here = commands(page.read_text())
        made, run = made | here[0], run | here[1]
    assert {"test", "bench", "gpu"} <= made <= targets
    assert {"ops", "model", "mri"} <= run <= {*re.findall(r"\w+", named)}


def test_every_machine_of_the_measurements_is_named_with_versions_and_date():
    text = (ROOT / "docs" / "performance.md").read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert sections
    for section in sections:
        name = section.partition("\n")[0]
        assert re.search(r"torch \d+\.\d+\.\d+", section), name
        assert re.search(r"20\d\d-\d\d-\d\d", section), name
        assert re.search(r"python -m bench|make gpu", section), name


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
