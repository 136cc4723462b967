"""The set-up files: every version pinned, nothing of the machine in them, the commands named."""

import importlib.metadata
import os
import re
import shutil
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
CONSTRAINTS = ("constraints.txt", "constraints-gpu.txt")
# What the two files may pin differently: torch, what torch needs in one version only, and numpy.
OF_TORCH = re.compile(
    r"torch|torchvision|triton|setuptools|numpy|cuda-toolkit|nvidia-(?!dali|libnvcomp|nv(?:imgcodec|jpeg|tiff)).*"
)
ADDRESSES = re.compile(r"index-url|find-links|trusted-host|--hash|@ (?:file|https?):")
MACHINE = re.compile(r"(?<![\w.])/(?:root|home|work|opt|tmp/[a-z])\b")


def pins(file: str) -> list[tuple[str, str, Marker | None]]:
    """The lines of a file of constraints, comments left out, as (name, version, marker)."""
    lines = (ROOT / file).read_text().splitlines()
    matches = [(line, PIN.match(line)) for line in lines if not line.startswith("#")]
    bad = [line for line, match in matches if not match]
    assert not bad, f"not name==version[ ; marker]: {bad}"
    return [(m["name"], m["version"], Marker(m["marker"]) if m["marker"] else None) for _, m in matches if m]


def pinned(file: str, python: str) -> list[tuple[str, str]]:
    """The names and versions pinned for one Python version."""
    environment = {"python_version": python}
    return [(name, version) for name, version, marker in pins(file) if marker is None or marker.evaluate(environment)]


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
@pytest.mark.parametrize("file", CONSTRAINTS)
def test_each_dependency_has_one_pin_for_each_python(file: str, python: str) -> None:
    names = [name for name, _ in pinned(file, python)]
    assert len(names) == len(set(names)), "two pins for one package"
    assert dependencies() - set(names) == set()
    assert {"torch", "nvidia-dali-cuda120", "pytest"} <= dependencies()


@pytest.mark.parametrize("python", PYTHONS)
def test_the_files_of_constraints_differ_in_torch_and_numpy_alone(python: str) -> None:
    usual, gpu = (dict(pinned(file, python)) for file in CONSTRAINTS)
    changed = [name for name in usual.keys() | gpu.keys() if usual.get(name) != gpu.get(name)]
    assert [name for name in changed if not OF_TORCH.fullmatch(name)] == []


def test_the_gpu_machines_versions_are_those_that_figures_name() -> None:
    gpu = dict(pinned("constraints-gpu.txt", "3.12"))
    wanted = {"torch": "2.11", "triton": "3.6", "torchvision": "0.26", "numpy": "2.5"}
    assert {name: gpu[name].rpartition(".")[0] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], ".venv"),
        (["CONSTRAINTS=constraints.txt"], ".venv"),
        (["CONSTRAINTS=constraints-gpu.txt"], ".venv-gpu"),
        (["CONSTRAINTS=elsewhere/mine.txt"], ".venv-mine"),
    ],
)
def test_each_file_of_constraints_has_an_environment_of_its_own(arguments: list[str], folder: str) -> None:
    """Two environments in one folder would be set up anew at each change between them."""
    commands = make("-n", "test", *arguments).stdout
    file = arguments[0].partition("=")[2] if arguments else "constraints.txt"
    assert set(re.findall(r"\S*\.venv[\w-]*", commands)) == {folder}
    assert re.findall(r'-c "(.+?)"', commands) == [file, file]
    assert f'cat pyproject.toml "{file}"' in commands  # the stamp: an edit of the file sets up anew


def test_a_file_of_constraints_that_is_not_there_is_one_line() -> None:
    result = make("setup", "CONSTRAINTS=constraints-gup.txt")
    assert result.returncode
    assert "CONSTRAINTS=constraints-gup.txt is no file" in result.stderr.splitlines()[0]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make here. CONSTRAINTS and MAKEFLAGS of the make that runs the tests do not reach it."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    clean = {name: value for name, value in os.environ.items() if name != "CONSTRAINTS" and not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def test_what_is_installed_here_is_pinned_through_and_through() -> None:
    known = {name for file in CONSTRAINTS for name, _, _ in pins(file)}
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
    assert not any("://" in (ROOT / file).read_text() for file in CONSTRAINTS)


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
