"""bench/gpu.sh: that its commands are right, that a part costs only itself, and that results are there in any case."""

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import loader
from dino_fast.config import read_recipe
from dino_fast.evaluate.arguments import EvaluationParser

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
PARTS = [
    "first",
    "second",
    "vit",
    "batches",
    "small",
    "norms",
    "norms-sweep",
    "convolutions",
    "roofline",
    "peers",
    "doctor",
    "bring-up",
]
SETTINGS = set(re.findall(r"\$\{([A-Z_]+):", SCRIPT.read_text()))  # what the environment may set
FEW = 8  # files that come back from a machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="setsid and /proc")


def script(*parts: str, **settings: str) -> subprocess.Popen[str]:
    """The script under way, without settings of this process's own environment."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *parts],
        env={**environment, "PYTHON": sys.executable, "ENTER": "nowhere", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def printed(*parts: str, status: int = 0, **settings: str) -> list[str]:
    """The lines of a run of the script."""
    process = script(*parts, **settings)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == status, out
    return out.splitlines()


# The commands


def commands(part: str) -> list[list[str]]:
    """What a part would run: the words after the interpreter."""
    lines = [line for line in printed(part, DRY="show", STEP_ARMS="stock ours-fused") if line.startswith("$ ")]
    assert lines
    words = [shlex.split(line[2:]) for line in lines if " -c " not in line]
    return [line[line.index(sys.executable) + 1 :] for line in words]


class Parsed(Exception):
    """A command's arguments are right."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command's arguments as it would, and do nothing else."""
    assert words[0] == "-m"
    module, arguments = words[1], words[2:]
    if module.startswith("bench."):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            importlib.import_module(module).main()
    elif module == "pytest":
        files = [word for word in arguments if word.startswith("tests/")]
        assert len(files) >= 4
        assert all((ROOT / file).is_file() for file in files)
    elif arguments[0] == "knn":
        EvaluationParser("knn", "").parse_args(arguments[1:])
    else:
        assert arguments[0] in ("train", "doctor")
        settings = arguments[1:]
        if arguments[0] == "doctor":
            settings[settings.index("--data")] = "--data.train"
        read_recipe(settings)


@pytest.mark.parametrize("part", PARTS)
def test_the_arguments_of_every_command_are_right(part: str, monkeypatch: pytest.MonkeyPatch):
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: object) -> argparse.Namespace:
        options: argparse.Namespace = parse_args(self, *arguments)  # type: ignore[arg-type]
        if arguments:  # not those of this process
            return options
        raise Parsed

    found = commands(part)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for words in found:
        parse(words, monkeypatch)


def test_the_arms_of_the_loader_are_there_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    named = [
        words[words.index("--arm") + 1] for part in ("first", "second") for words in commands(part) if "--arm" in words
    ]
    assert len(named) == 4
    assert {name.removesuffix(loader.ALONE) for name in named} <= loader.find_arms().keys()


def test_an_unknown_part_is_named():
    assert "unknown PART thoughts" in printed("thoughts", status=2, DRY="show")[-1]


# Parts


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str], str]:
    """A function that makes an interpreter of a shell script. It notes the words of its command in `called` first."""

    def make(body: str) -> str:
        file = tmp_path / "python"
        file.write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/called\n{body}\n')
        file.chmod(0o755)
        return str(file)

    return make


def called(folder: Path) -> str:
    file = folder / "called"
    return file.read_text() if file.exists() else ""


def files_in(out: Path, call: str) -> dict[str, str]:
    """The archive's files, as text."""
    found = {}
    with tarfile.open(out / f"{call}.tgz") as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                found[Path(member.name).name] = file.read().decode()
    return found


def statuses(lines: list[str]) -> dict[str, int]:
    """The status of each command that ended."""
    found = [re.match(r"== ([\w-]+): status (\d+), ", line) for line in lines]
    return {match[1]: int(match[2]) for match in found if match}


def test_a_part_that_fails_costs_only_itself(python: Callable[[str], str], tmp_path: Path):
    made = python('case $* in *bench.kernels*) echo "left out: x (no)"; echo gone >&2; exit 3 ;; *) echo fine ;; esac')
    lines = printed("first", PYTHON=made, OUT=str(tmp_path / "out"), SHARDS="somewhere")
    assert statuses(lines) == {"tests": 0, "kernels": 3, "augment": 0, "step": 0, "train": 0, "vit": 0}
    assert {"left out: x (no)", "gone", "fine"} <= set(lines)
    found = files_in(tmp_path / "out", "first")
    assert found["kernels.log"] == "left out: x (no)\ngone\n"
    assert {"dali.log", "warm-stock-compiled.log", "warm-imagenette.log", "step.log", "machine.txt"} <= found.keys()
    assert re.search(r"^warm-ours-compiled: status 0, \d s$", found["beside.txt"], re.MULTILINE)
    order = [match[1] for match in map(re.compile(r"== (\w+):").match, lines) if match]
    assert order == ["machine", "tests", "quiet", "kernels", "augment", "step", "train", "vit", "all"]


def test_a_command_that_hangs_is_interrupted_at_its_limit_and_leaves_what_it_had(
    python: Callable[[str], str], tmp_path: Path
):
    made = python("""out=${*: -1}
trap 'echo interrupted; echo {} >"$out"; exit 1' INT
while :; do sleep 0.1; done""")
    start = time.monotonic()
    lines = printed("augment", PYTHON=made, OUT=str(tmp_path / "out"), LIMIT_S="16")
    assert statuses(lines) == {"augment": 124}
    assert 9 < time.monotonic() - start < 20
    assert files_in(tmp_path / "out", "augment")["augment.log"] == "interrupted\n"
    assert (tmp_path / "out" / "augment-gpu.jsonl").read_text() == "{}\n"


def test_what_no_longer_fits_is_left_out_with_a_line(python: Callable[[str], str], tmp_path: Path):
    lines = printed("augment", "kernels", "train", PYTHON=python(""), OUT=str(tmp_path), SHARDS="x", LIMIT_S="20")
    assert statuses(lines) == {"augment": 0}
    left_out = [line for line in lines if "left out" in line]
    assert [re.sub(r"\d+ s", "N s", line) for line in left_out] == [
        "== kernels: left out, N s are left of 20",
        "== train: left out, N s are left of 20",
    ]


def test_nothing_runs_beside_what_is_timed(python: Callable[[str], str], tmp_path: Path):
    """Not even a process that one in the background has started in a session of its own."""
    made = python(f"""case $* in
*"bench.step --rounds 1"*) setsid sleep 1000 & echo $! >>{tmp_path}/held; wait ;;
*pytest*) until [ "$(wc -l <{tmp_path}/held)" = 2 ]; do sleep 0.1; done ;;
*bench.kernels*) for process in $(cat {tmp_path}/held); do grep State /proc/$process/status || echo gone; done ;;
esac""")
    out, arms = tmp_path / "out", "stock ours-compiled stock-compiled"
    lines = printed("warm-up", "tests", "kernels", PYTHON=made, OUT=str(out), SHARDS="somewhere", STEP_ARMS=arms)
    assert statuses(lines) == {"tests": 0, "kernels": 0}
    found = [line for line in files_in(out, "parts")["kernels.log"].splitlines() if not line.startswith("grep")]
    assert len(found) == 2
    assert all(line == "gone" or "Z" in line for line in found)
    assert "warm-ours-compiled" not in files_in(out, "parts")["beside.txt"]  # it did not end by itself


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_what_there_is(python: Callable[[str], str], tmp_path: Path, number: int):
    made = python("""case $* in *bench.kernels*)
    trap 'echo interrupted; exit 1' INT
    while :; do sleep 0.1; done
esac""")
    process = script("augment", "kernels", PYTHON=made, OUT=str(tmp_path / "out"))
    while "bench.kernels" not in called(tmp_path):
        time.sleep(0.05)
    time.sleep(0.3)  # its trap is set
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    found = files_in(tmp_path / "out", "parts")
    assert found["kernels.log"] == "interrupted\n"
    assert "augment.log" in found


def test_a_step_that_takes_the_process_with_it_is_repeated_without_it(python: Callable[[str], str], tmp_path: Path):
    """With the arms that were ready before, as the partial file names them."""
    rows = "\\n".join(json.dumps({"arm": arm}) for arm in ("stock", "ours", "stock", "probes"))
    made = python(f"""case $* in
*"bench.step --rounds 3"*) printf '{rows}\\n' >"${{*: -1}}.partial"; exit 139 ;;
*"import json"*) exec {sys.executable} "$@" ;;
esac""")
    lines = printed("step", PYTHON=made, OUT=str(tmp_path / "out"))
    assert statuses(lines) == {"step": 139, "step-again": 0}
    [again] = [line for line in called(tmp_path).splitlines() if "--rounds 2" in line]
    assert "--only stock ours --json" in again
    assert "step-broken.jsonl" in files_in(tmp_path / "out", "step")


def test_what_it_enters_may_name_the_shards(python: Callable[[str], str], tmp_path: Path):
    (tmp_path / "enter").write_text("export SHARDS=there\n")
    made = python("echo begun")
    lines = printed("train", PYTHON=made, OUT=str(tmp_path / "out"), ENTER=str(tmp_path / "enter"))
    assert statuses(lines) == {"train": 0}
    assert "--data.train there" in called(tmp_path)


def test_nothing_is_begun_where_it_cannot_enter(python: Callable[[str], str], tmp_path: Path):
    (tmp_path / "enter").write_text("echo no driver\nreturn 1\n")
    lines = printed("first", status=1, PYTHON=python(""), OUT=str(tmp_path / "out"), ENTER=str(tmp_path / "enter"))
    assert {"no driver", f"== {tmp_path}/enter failed"} <= set(lines)
    assert files_in(tmp_path / "out", "first").keys() == {"machine.txt"}
    assert called(tmp_path) == "-m pip list\n"


# The whole, tiny


@pytest.mark.slow
@pytest.mark.parametrize("call", ["first", "second"])
def test_every_part_runs_without_a_gpu(call: str, tmp_path: Path):
    lines = printed(call, DRY="1", OUT=str(tmp_path), STEP_ARMS="stock ours stock-compiled")
    ended = statuses(lines)
    assert len(ended) == {"first": 6, "second": 9}[call]
    assert all(status == (124 if name == "learn" else 0) for name, status in ended.items()), lines
    found = files_in(tmp_path, call)
    assert not [name for name, text in found.items() if name.endswith(".log") and "Traceback" in text]
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(files) == FEW
    assert max(files.values()) < 16 * 2**20
    if call == "first":
        assert found["beside.txt"].count("status 0") == 3
    else:
        assert {"teacher.pt.00", "teacher.pt.01"} <= files.keys()
