"""An arm that fails is left out alone, and what was measured is saved."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from bench.records import make_records, partial_file, report, save_partial
from bench.timing import attempt, run_interleaved

UNITS = {"images": "img/s"}


class Arm:
    """Counts its calls, and raises at some of them."""

    def __init__(self, raises: dict[int, BaseException] | None = None) -> None:
        self.calls, self._raises = 0, raises or {}

    def __call__(self) -> dict[str, float]:
        self.calls += 1
        if self.calls in self._raises:
            raise self._raises[self.calls]
        return {"images": float(self.calls)}


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_first_round_is_not_counted():
    assert run_interleaved({"a": Arm(), "b": Arm()}, 2) == {
        "a": [{"images": 2.0}, {"images": 3.0}],
        "b": [{"images": 2.0}, {"images": 3.0}],
    }
    assert run_interleaved({"a": Arm()}, 1, uncounted=0) == {"a": [{"images": 1.0}]}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_arm_that_raises_is_left_out_and_the_others_go_on(call: int, capsys: pytest.CaptureFixture[str]):
    bad, good = Arm({call: RuntimeError("\n no memory \n at all")}), Arm()
    assert run_interleaved({"bad": bad, "good": good}, 3) == {
        "good": [{"images": 2.0}, {"images": 3.0}, {"images": 4.0}]
    }
    assert bad.calls == call
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["left out: bad (RuntimeError: no memory)"]
    assert printed.err.startswith("Traceback")
    assert "at all" in printed.err


def test_without_an_arm_left_the_command_fails():
    with pytest.raises(SystemExit, match="no arm is left"):
        run_interleaved({"a": Arm({1: ValueError()}), "b": Arm({2: ValueError()})}, 2)


def test_an_error_without_a_text_is_named(capsys: pytest.CaptureFixture[str]):
    assert attempt("x", lambda: [][0]) is None
    assert attempt("y", Arm({1: ValueError()})) is None
    assert capsys.readouterr().out.splitlines() == [
        "left out: x (IndexError: list index out of range)",
        "left out: y (ValueError)",
    ]


def test_sigint_leaves_the_complete_rounds(capsys: pytest.CaptureFixture[str]):
    def interrupt() -> dict[str, float]:
        if second.calls == 3:
            signal.raise_signal(signal.SIGINT)
        return {"images": 1.0}

    second = Arm()
    found = run_interleaved({"first": interrupt, "second": second}, 5)
    assert found == {"first": [{"images": 1.0}] * 2, "second": [{"images": 2.0}, {"images": 3.0}]}
    assert capsys.readouterr().out == "interrupted after 2 of 5 rounds\n"


@pytest.mark.parametrize("call", [1, 2])
def test_sigint_before_the_first_complete_round_ends_the_command(call: int):
    with pytest.raises(KeyboardInterrupt):
        run_interleaved({"a": Arm(), "b": Arm({call: KeyboardInterrupt()})}, 5)


def test_a_process_that_is_killed_leaves_its_rounds_so_far(tmp_path: Path):
    file = tmp_path / "new" / "out.jsonl"
    saved: list[list[tuple[str, int]]] = []

    def save(rounds: dict[str, list[dict[str, float]]]) -> None:
        save_partial("mine", UNITS, file, rounds)
        saved.append([(row["arm"], row["n"]) for row in read_rows(partial_file(file))])

    rounds = run_interleaved({"a": Arm(), "b": Arm({3: ValueError()})}, 3, save)
    assert saved == [[("a", 1), ("b", 1)], [("a", 1), ("b", 1)], [("a", 2)], [("a", 3)]]
    assert [path.name for path in file.parent.iterdir()] == ["out.jsonl.partial"]
    report(make_records("mine", UNITS, rounds), file)
    assert [path.name for path in file.parent.iterdir()] == ["out.jsonl"]
    [row] = read_rows(file)
    assert (row["bench"], row["arm"], row["median"], row["n"]) == ("mine", "a", 3, 3)


def test_nothing_is_saved_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save_partial("mine", UNITS, None, {"a": [{"images": 1.0}]})
    report(make_records("mine", UNITS, {"a": [{"images": 1.0}]}), None)
    assert not list(tmp_path.iterdir())
