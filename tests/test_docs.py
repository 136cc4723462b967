"""The documentation: links resolve, generated pages are up to date, README.md is short, and the commands run."""

import functools
import html
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import generate
from shards.version import version

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
LOG = ROOT / "docs" / "reference" / "LOG.md"
PITFALLS = ROOT / "docs" / "pitfalls.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:bench|configs|dino_fast|docs|pipelines|shards|tests)/[\w/.-]+)`")
EXTERNAL = ("https://", "http://", "mailto:")

MAX_README_LINES, MAX_LINE, MAX_WORDS = 200, 120, 30

# Pages whose `bash` blocks are run, in this order. Each begins with the folder that the first one has left.
FIRST_PAGE = "getting-started"
LATER_PAGES = ("packing", "training", "evaluation")
PAGE_SECONDS = 900


@functools.cache
def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def read_prose(page: Path) -> str:
    """The text of a page without blocks of code and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", read(page)), flags=re.DOTALL)


def find_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    anchors: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", read_prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower())
        anchors.add(re.sub(r"[-\s]+", "-", slug))
    return anchors


def find_links(page: Path) -> Iterator[tuple[str, str]]:
    """File and anchor of every link of a page that leads to a file here."""
    for target in LINK.findall(read_prose(page)):
        if not target.startswith(EXTERNAL):
            file, _, anchor = target.partition("#")
            yield file, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path) -> None:
    wrong = []
    for file, anchor in find_links(page):
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in find_anchors(target)):
            wrong.append(f"{file}#{anchor}" if anchor else file)
    assert not wrong, f"{page.relative_to(ROOT)} has links that lead nowhere: {wrong}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_pages_name_are_there(page: Path) -> None:
    wrong = [path for path in CODE_PATH.findall(read(page)) if "*" not in path and not (ROOT / path).exists()]
    assert not wrong, f"{page.relative_to(ROOT)} names files that are not there: {wrong}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.is_relative_to(ROOT / "docs")], ids=lambda page: page.name
)
def test_links_of_the_site_stay_in_it(page: Path) -> None:
    """mkdocs publishes the files of docs/ alone."""
    outside = [
        file
        for file, _ in find_links(page)
        if file and not (page.parent / file).resolve().is_relative_to(ROOT / "docs")
    ]
    assert not outside


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"[\w/-]+\.md", navigation.replace("main_dino.py", "")))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if (ROOT / "docs") in page.parents}


def test_generated_pages_are_up_to_date() -> None:
    outdated = [str(path.relative_to(ROOT)) for path in generate.find_outdated_pages()]
    assert not outdated, f"{outdated} are out of date. Run python -m docs.generate."


def test_the_changelog_has_this_version() -> None:
    assert f"## [{version()}]" in read(ROOT / "CHANGELOG.md")


# ---- What people stumble over


def find_named_tests() -> list[tuple[str, str]]:
    """File below tests/ and name of each test that the page names."""
    return re.findall(r"`([\w/]+\.py)::(\w+)`", read(PITFALLS))


def test_the_tests_that_the_page_of_pitfalls_names_are_there() -> None:
    wrong = [
        f"{file}::{name}"
        for file, name in find_named_tests()
        if not re.search(rf"^def {name}\(", read(ROOT / "tests" / file), re.MULTILINE)
    ]
    assert not wrong
    rows = [line for line in read(PITFALLS).splitlines() if line.startswith("| ")]
    assert all("::" in row for row in rows if not row.startswith("| situation |"))


def test_the_page_of_pitfalls_names_all_tests_of_reports() -> None:
    files = sorted((ROOT / "tests" / "reports").glob("test_*.py"))
    written = {
        (f"reports/{file.name}", name)
        for file in files
        for name in re.findall(r"^def (test_\w+)", read(file), re.MULTILINE)
    }
    assert written
    assert written <= set(find_named_tests())


# ---- README.md


def test_readme_is_short() -> None:
    assert len(read(ROOT / "README.md").splitlines()) <= MAX_README_LINES


def test_readme_has_no_long_line_of_prose() -> None:
    lines = [line for line in read_prose(ROOT / "README.md").splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > MAX_LINE]


def test_readme_has_no_long_sentence() -> None:
    long = [sentence for sentence in find_sentences(ROOT / "README.md") if len(sentence.split()) > MAX_WORDS]
    assert not long


def find_sentences(page: Path) -> Iterator[str]:
    """The sentences of a page's paragraphs, list items and cells of tables."""
    prose = LINK.sub(lambda link: link[0].partition("]")[0].lstrip("!["), read_prose(page))
    cells = re.sub(r"^\|(.*)\|$", lambda row: row[1].replace("|", "\n\n"), prose, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d+\. |#)", cells):
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z`*])", " ".join(paragraph.split()))


# ---- The commands of the documentation


def find_commands(page: str) -> list[str]:
    """The blocks of a page that readers can run on a CPU."""
    blocks = FENCE.findall(read(ROOT / "docs" / f"{page}.md"))
    return [text for language, text in blocks if language in ("bash", "console")]


def run_page(page: str, folder: Path) -> None:
    """Run a page's blocks in a folder, as one session."""
    script = "set -euo pipefail\n" + "\n".join(find_commands(page))
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-x", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=PAGE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"docs/{page}.md:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def first_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes, in which the commands of the first page were run."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(ROOT / "configs", folder / "configs")
    run_page(FIRST_PAGE, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(2 * PAGE_SECONDS)
def test_the_first_page_runs_from_a_clean_folder(first_folder: Path) -> None:
    assert list((first_folder / "runs" / "first").glob("step-*.pt"))


@pytest.mark.slow
@pytest.mark.timeout(2 * PAGE_SECONDS)
@pytest.mark.parametrize("page", LATER_PAGES)
def test_the_commands_of_a_page_run(page: str, first_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clean"
    shutil.copytree(first_folder, folder)
    run_page(page, folder)


def test_all_pages_with_commands_are_run() -> None:
    pages = [page.stem for page in PAGES if page.parent == ROOT / "docs" and find_commands(page.stem)]
    assert sorted(pages) == sorted([FIRST_PAGE, *LATER_PAGES])


# ---- The site


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs mkdocs-material: make docs installs it")
def test_the_site_fetches_nothing_from_the_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    config = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    done = subprocess.run([*command, "-f", "-"], cwd=ROOT, input=config, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(LATER_PAGES)
    for page in pages:
        text = html.unescape(page.read_text(encoding="utf-8"))
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", text)
        assert not fetched, page
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?https?://", style.read_text(encoding="utf-8")), style
