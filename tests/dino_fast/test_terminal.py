"""Names from shards, manifests and checkpoints cannot harm a terminal, whichever command prints them."""

import importlib
from types import SimpleNamespace
from typing import NoReturn

import pytest
from rich.console import Console

from dino_fast.__main__ import main
from dino_fast.advise.doctor import print_line
from dino_fast.demo import image_sets
from dino_fast.demo.user_images import Selection
from dino_fast.run.display import Display
from dino_fast.run.monitor import Monitor
from shards.errors import UserError

NAME = "red\x1b[31m\x07\x9b2J\rbell\n\u202egpj\udce9"
SAFE = "red\\x1b[31m\\x07\\x9b2J\\rbell\\n\\u202egpj\\xe9"


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "dino_fast.train.read_recipe"),
        ("plan", "dino_fast.advise.plan.parse_arguments"),
        ("doctor", "dino_fast.advise.doctor.parse_arguments"),
        ("knn", "dino_fast.evaluate.knn.load_backbone_from"),
        ("linear", "dino_fast.evaluate.linear.load_backbone_from"),
        ("finetune", "dino_fast.evaluate.finetune.load_backbone_from"),
        ("retrieval", "dino_fast.evaluate.retrieval.choose_folder"),
        ("copies", "dino_fast.evaluate.copies.find_copies"),
        ("neighbors", "dino_fast.evaluate.neighbors.load_network_from"),
        ("evaluate", "dino_fast.evaluate.suite._find_checkpoint"),
    ],
)
def test_every_command_prints_its_errors_so(
    command: str, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> NoReturn:
        raise UserError(f"classes that the other set lacks: {NAME}")

    module, _, function = place.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), function, fail)
    flags = {
        "knn": ["--checkpoint", "x", "--train", "x", "--val", "x"],
        "linear": ["--checkpoint", "x", "--train", "x", "--val", "x"],
        "finetune": ["--checkpoint", "x", "--train", "x", "--val", "x", "--output", "x"],
        "retrieval": ["--checkpoint", "x", "--ground-truth", "x"],
        "copies": ["--checkpoint", "x", "--images", "x"],
        "neighbors": ["--checkpoint", "x", "--images", "x", "--csv", "x"],
        "evaluate": ["x", "--output", "x"],
    }.get(command, [])
    assert main([command, *flags]) == 1
    assert capsys.readouterr().err == f"dino-fast {command}: classes that the other set lacks: {SAFE}\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_lines_of_a_run(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich: as on a terminal
    display = Display(0, 10)
    display.say(f"replaced: {NAME}")
    display.close()
    printed = capsys.readouterr().out
    assert f"replaced: {SAFE}" in printed
    assert not {"\x07", "\x9b", "\u202e"} & set(printed)


def test_the_samples_that_another_rank_reports(capsys: pytest.CaptureFixture[str]) -> None:
    Monitor._report(SimpleNamespace(_display=None, _ranks=SimpleNamespace(rank=3)), NAME)  # type: ignore[arg-type]
    assert capsys.readouterr().err == f"rank 3: {SAFE}\n"


def test_the_lines_of_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(Console(), f"images of {NAME}")
    assert capsys.readouterr().out == f"images of {SAFE}\n"


def test_the_images_that_the_demo_leaves_out(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_sets, "copy_images", lambda *_: [(NAME, "empty file")])
    with pytest.raises(UserError):
        image_sets.make_user_sets(tmp_path, Selection(tmp_path, 1, 0, []), 0)
    assert f"{SAFE} is left out, because it does not decode (empty file)." in capsys.readouterr().out
