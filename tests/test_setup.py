"""The set-up files: every version pinned, nothing of the machine in them, the two commands named."""

import importlib.metadata
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PIN = re.compile(r"^(?P<name>[a-z0-9][a-z0-9-]*)==(?P<version>[0-9][0-9a-z.]*)(?: ; (?P<marker>.+))?$")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ADDRESSES = re.compile(r"index-url|find-links|trusted-host|--hash|@ (?:file|https?):")
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|work|opt|tmp/[a-z])\b")


def pins() -> list[tuple[str, Marker | None]]:
    """The lines of constraints.txt, comments left out, as (name, marker)."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = [(line, PIN.match(line)) for line in lines if not line.startswith("#")]
    bad = [line for line, match in matches if not match]
    assert not bad, f"not name==version[ ; marker]: {bad}"
    return [(m["name"], Marker(m["marker"]) if m["marker"] else None) for _, m in matches if m]


def pinned(python: str) -> list[str]:
    """The names pinned for one Python version."""
    return [name for name, marker in pins() if marker is None or marker.evaluate({"python_version": python})]


def dependencies() -> set[str]:
    """The names in pyproject.toml's dependencies and extras, read from the file's text (3.10 has no tomllib)."""
    text = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0].split("[project]")[1]
    lists = re.findall(r"^[\w-]+ = \[(.*?)\]$", text, flags=re.DOTALL | re.MULTILINE)
    quoted = [entry for block in lists for entry in re.findall(r'"([^"]+)"', block) if entry != "LICENSE"]
    return {canonicalize_name(Requirement(entry).name) for entry in quoted}


def tracked() -> list[Path]:
    """The text files that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in result.stdout.splitlines()]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_has_one_pin_for_each_python(python: str) -> None:
    names = pinned(python)
    assert len(names) == len(set(names)), "two pins for one package"
    assert dependencies() - set(names) == set()
    assert {"torch", "nvidia-dali-cuda120", "pytest"} <= dependencies()


def test_what_is_installed_here_is_pinned_through_and_through() -> None:
    known = {name for name, _ in pins()}
    waiting, seen = dependencies(), set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        needed = (Requirement(line) for line in requires)
        waiting |= {
            canonicalize_name(r.name) for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})
        } - seen
    assert seen - known == set()


def test_no_addresses_and_no_machine_paths() -> None:
    here = Path(__file__).name
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.name != here
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if ADDRESSES.search(line) or MACHINE.search(line)
    ]
    assert not found, "\n".join(found)
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


def test_ci_is_executable_and_calls_the_makefile() -> None:
    path = ROOT / ".ci" / "run"
    assert os.stat(path).st_mode & stat.S_IXUSR
    goals = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"setup", "demo", "test", "slow", "lint", "types", "clean"} <= set(goals)
    assert re.findall(r"^make (\w+)", path.read_text(), flags=re.MULTILINE) == ["test", "lint", "types"]
