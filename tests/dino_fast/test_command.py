"""The dino-fast command itself: its list of commands, its version, its completion, and an unknown command."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dino_fast.__main__ import COMMANDS, USAGE, main
from dino_fast.completion import build_command_parser
from dino_fast.config import Recipe, list_settings
from shards.completion import SHELLS


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_lists_its_commands_with_one_line_each(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    listed = re.findall(r"^  (\w+) +(\w+ .*)", out.split("options:")[0], re.MULTILINE)
    assert listed == list(COMMANDS.items())
    assert {
        "train", "plan", "doctor", "knn", "linear", "finetune", "retrieval", "copies", "neighbors", "evaluate",
    } == COMMANDS.keys()  # fmt: skip
    assert max(map(len, out.splitlines())) <= 100


def test_the_list_needs_no_torch():
    program = "import sys, dino_fast.__main__ as command; command.main([]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, USAGE, "")


def test_it_prints_its_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"dino-fast \d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "Did you mean train?"),
        ("liner", "Did you mean linear?"),
        ("fly", f"Choose one of {', '.join(COMMANDS)}."),
        ("--verison", "Did you mean --version?"),
        ("--print-complete", "Did you mean --print-completion?"),
    ],
)
def test_an_unknown_command_is_one_line(word: str, hint: str, capsys: pytest.CaptureFixture[str]):
    assert main([word]) == 2
    assert capsys.readouterr().err == f"dino-fast: unknown command {word!r}. {hint}\n"


def print_help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the longest help text of a command."""
    try:
        status = main([command, "--help-all" if command == "train" else "--help"])
    except SystemExit as ended:  # argparse's way
        status = int(ended.code or 0)
    assert status == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]):
    assert f"usage: dino-fast {command}" in print_help(command, capsys)


# Completion


def test_the_completed_flags_are_those_of_the_commands(capsys: pytest.CaptureFixture[str]):
    """Compare with the help texts. That of train names all settings of a recipe, those of plan and doctor do not."""
    [commands] = [action.choices for action in build_command_parser(COMMANDS)._actions if action.dest == "==SUPPRESS=="]
    settings = {f"--{name}" for name in list_settings(Recipe)} | {"--config"}
    for name, parser in commands.items():
        flags = {flag for action in parser._actions for flag in action.option_strings} - {"--help"}
        completed = {flag for flag in flags if flag.startswith("--")}
        helped = set(re.findall(r"(?<![\w`])--[\w.-]*\w", print_help(name, capsys))) - {"--help"}
        if name in ("train", "plan", "doctor"):
            assert settings <= completed
        if name == "train":
            assert completed <= helped
        else:
            assert completed - settings == helped - settings - {"--SETTING"}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("joined", [False, True])
def test_it_prints_the_completion_of_a_shell(shell: str, joined: bool, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("shtab")
    assert main([f"--print-completion={shell}"] if joined else ["--print-completion", shell]) == 0
    assert set(COMMANDS) <= set(re.findall(r"\w+", capsys.readouterr().out))


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_a_wrong_call(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["--print-completion", *arguments]) == 2
    given = " ".join(arguments)
    assert capsys.readouterr().err == f"dino-fast: --print-completion expects one of bash, zsh, tcsh, not {given!r}.\n"


def test_without_shtab_it_says_how_to_install_it(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dino-fast: ")
    assert line.endswith("pip install shtab")


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["d"], {"doctor"}),
        (["train", "--data.dec"], {"--data.decode", "--data.decode_device"}),
        (["train", "--precision", ""], {"fp32", "bf16", "fp16"}),
        (["train", "--dump_crops", ""], {"true", "false"}),
        (["train", "--config", "rec"], {"recipe.yaml"}),
        (["doctor", "--data", ""], {"shards"}),
        (["plan", "--images"], {"--images", "--images-per-s"}),
        (["knn", "--network", "t"], {"teacher"}),
        (["linear", "--lr"], {"--lrs"}),
        (["finetune", "--recipe", "r"], {"resnet"}),
    ],
)
def test_bash_completes_commands_flags_values_and_paths(
    words: list[str], expected: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out)
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "shards").mkdir()
    typed = " ".join(f"'{word}'" for word in ["dino-fast", *words])
    program = f"""
        source completion.sh
        COMP_WORDS=({typed}) COMP_CWORD={len(words)}
        _shtab_dino_fast dino-fast '{words[-1]}' '{["dino-fast", *words][-2]}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert {word.strip().rstrip("/") for word in done.stdout.splitlines()} == expected, done.stderr
