"""`dino-fast train --help` and `--help-all`."""

import re

import pytest

from dino_fast.config import Recipe, list_settings
from dino_fast.config_help import GROUPS, read_setting_texts
from dino_fast.train import main as train


def print_help(capsys: pytest.CaptureFixture[str], flag: str) -> str:
    assert train([flag]) == 0
    return capsys.readouterr().out


def test_help_has_twenty_settings_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_help(capsys, "--help")
    shown = re.findall(r"^  --([\w.]+) \(default", text, re.MULTILINE)
    assert shown == [name for names in GROUPS.values() for name in names]
    assert len(shown) == len(set(shown)) == 20
    assert all(f"\n{title}\n" in text for title in GROUPS)
    assert "--batch_size (default: 512; a whole number, at least 1)\n      images a step" in text
    assert "--help-all" in text


def test_help_all_has_every_setting_once_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = print_help(capsys, "--help-all")
    assert sorted(re.findall(r"^  --([\w.]+) \(default", text, re.MULTILINE)) == sorted(list_settings(Recipe))
    words = " ".join(text.split())
    assert all(meaning and meaning in words for meaning in read_setting_texts().values())


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_texts_are_wrapped_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    meanings = [line for line in print_help(capsys, "--help-all").splitlines() if line.startswith(" " * 6)]
    assert max(map(len, meanings)) <= min(columns, 100)


def test_help_wins_over_wrong_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--no.such", "1", "-h"]) == 0
    assert "usage: dino-fast train" in capsys.readouterr().out
