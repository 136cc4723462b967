"""What a run says of itself: figures against numpy, ranks, rollback, log writers, display, and the arithmetic of MFU.

Run as a program, this file is one of two ranks: `test_monitor.py RANK FOLDER`.
"""

import contextlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino_fast.distributed import Ranks
from dino_fast.model import flops
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run import monitor
from dino_fast.run.display import Display
from dino_fast.run.log_writers import JsonLines, TensorBoard, open_log_writers
from dino_fast.run.metrics import OF_STEPS
from dino_fast.run.monitor import Monitor
from dino_fast.step.hyper import Hyper
from dino_fast.step.train_step import StepOutput
from pipelines.loader import LoaderFigures
from shards.errors import UserError

CPU = torch.device("cpu")
FIGURES = LoaderFigures(stall=0.25, read_bytes=3_000_000, requests_ready=1.5, batches_ready=2.0)
AT = Hyper(lr=0.1, weight_decay=1e-4, momentum=0.996, teacher_temp=0.04, freeze_last_layer=True)
STUDENT = ["backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias", "head.mlp.0.weight", "head.mlp.0.bias"]
STUDENT += ["head.last_layer.weight_g", "head.last_layer.weight_v"]
MEANS = ("loss", "teacher_entropy", "grad_norm", "grad_norm_first_layer", "grad_norm_last_layer", "grad_norm_head")


@dataclass
class FakeLoader:
    """What the monitor asks of a loader."""

    done: LoaderFigures = FIGURES
    bad_samples: dict[int, str] = field(default_factory=dict)

    def read_figures(self) -> LoaderFigures:
        return self.done


def output(values: np.ndarray, skipped: bool = False) -> StepOutput:
    """values: loss, entropy, norm, and a norm for each name of STUDENT."""
    figures = torch.tensor(values, dtype=torch.float32)
    return StepOutput(*figures[:3], torch.tensor(float(skipped)), figures[3:])


def good(seed: int = 0) -> StepOutput:
    return output(np.random.default_rng(seed).uniform(0.1, 5, 3 + len(STUDENT)))


def poisoned() -> StepOutput:
    return output(np.full(3 + len(STUDENT), [math.nan, math.inf][len(STUDENT) % 2]), skipped=True)


def build(folder: Path, ranks: Ranks | None = None, **changed: Any) -> Monitor:
    settings: dict[str, Any] = {
        "batch": 8, "steps_per_epoch": 5, "start": 0, "stop": 100, "log_every": 1, "parameters": STUDENT,
        "flops_per_image": 1e9, "wandb": "",
    }  # fmt: skip
    return Monitor(folder, ranks or Ranks(0, 1, CPU), **(settings | changed))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def explained() -> set[str]:
    """All keys that the module's docstring names."""
    return set(re.findall(r"`(\w+)`", monitor.__doc__ or ""))


def wait_for_the_next_event_file() -> None:
    """TensorBoard reads files in the order of their names, which begin with the second."""
    time.sleep(1.1)


# Figures


@pytest.mark.parametrize("seed", range(4))
def test_means_leave_out_skipped_steps(tmp_path: Path, seed: int):
    """Against numpy, over windows of 7 steps with random skips whose figures are NaN or infinite."""
    draws, window = np.random.default_rng(seed), 7
    values = draws.uniform(0.1, 10, (42, 3 + len(STUDENT))).astype(np.float32)
    skips = draws.random(42) < [0.2, 0.5, 0.9, 0.0][seed]
    values[skips] = draws.choice([math.nan, math.inf, -math.inf], values[skips].shape)
    with build(tmp_path, log_every=window) as watched:
        found = [
            watched.tick(step, AT, output(figures, skip), FakeLoader())
            for step, (figures, skip) in enumerate(zip(values, skips, strict=True))
        ]
    norms = values[:, 3:].astype(np.float64)
    head = np.sqrt((norms[:, 3:] ** 2).sum(1))
    truth = np.stack([*values[:, :3].T, norms[:, 0], norms[:, 6], head], axis=1).astype(np.float64)
    for step, row in enumerate(found):
        assert (row is not None) == ((step + 1) % window == 0)
        if row is None:
            continue
        mine = slice(step - window + 1, step + 1)
        kept = truth[mine][~skips[mine]]
        assert row["skipped"] == skips[mine].sum()
        assert row["skipped_total"] == skips[: step + 1].sum()
        assert row["skipped_in_a_row"] == next((n for n, skip in enumerate(skips[step::-1]) if not skip), step + 1)
        for name, mean in zip(MEANS, kept.mean(0) if len(kept) else [None] * len(MEANS), strict=True):
            assert row[name] == (None if mean is None else pytest.approx(mean, rel=1e-6)), name
    assert [row for row in found if row is not None] == rows_of(tmp_path)


def test_all_skipped_is_no_figure_and_the_counter_goes_on_over_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with build(tmp_path, log_every=2) as watched:
        outs = [good(), poisoned(), poisoned(), poisoned(), poisoned(), good()]
        rows = [watched.tick(step, AT, out, FakeLoader()) for step, out in enumerate(outs)][1::2]
    assert [row["skipped_in_a_row"] for row in rows] == [1, 3, 0]
    assert [row["skipped"] for row in rows] == [1, 2, 1]
    assert [row["skipped_total"] for row in rows] == [1, 3, 4]
    assert all(rows[1][name] is None for name in MEANS)
    assert all(math.isfinite(rows[n][name]) for n in (0, 2) for name in MEANS)
    assert "skipped 3" in capsys.readouterr().out.splitlines()[1]


def test_parameters_without_a_gradient_are_found_after_enough_good_steps(tmp_path: Path):
    """The second parameter never has one, the fourth has one in a single step between logs."""
    with build(tmp_path, log_every=2) as watched:
        found = []
        for step in range(8):
            norms = np.ones(3 + len(STUDENT))
            norms[3 + 1] = 0
            norms[3 + 3] = step == 2
            watched.tick(step, AT, poisoned() if step in (0, 1, 5) else output(norms), FakeLoader())
            found.append(watched.find_without_gradient(3))
    assert found == [[]] * 5 + [[STUDENT[1]]] * 3  # steps 2, 3 and 4 are good, and read at the log of step 5


def test_the_layers_are_those_of_the_student(tmp_path: Path):
    student, _ = build_student_teacher("resnet18", HeadRecipe(out_dim=32, hidden_dim=16, bottleneck_dim=8))
    names = [name for name, _ in student.named_parameters()]
    norms = torch.rand(len(names))
    of = dict(zip(names, norms.tolist(), strict=True))
    scalar = torch.tensor(1.0)
    with build(tmp_path, parameters=names) as watched:
        row = watched.tick(0, AT, StepOutput(scalar, scalar, scalar, torch.tensor(0.0), norms), FakeLoader())
    assert row["grad_norm_first_layer"] == pytest.approx(of["backbone.conv1.weight"])
    assert row["grad_norm_last_layer"] == pytest.approx(of["head.last_layer.weight_v"])
    head = [norm for name, norm in of.items() if name.startswith("head.")]
    assert row["grad_norm_head"] == pytest.approx(math.hypot(*head))


def test_a_row_has_the_documented_keys_and_no_others(tmp_path: Path):
    with build(tmp_path) as watched:
        row = watched.tick(0, AT, good(), FakeLoader())
        further = watched.tick(1, AT, good(), FakeLoader(), {"feature_rank": torch.tensor(12.5), "forward_ms": 3.0})
    assert sorted(row) == sorted(OF_STEPS)
    assert further.keys() - row.keys() == {"feature_rank", "forward_ms"}
    assert (further["feature_rank"], further["forward_ms"]) == (12.5, 3.0)
    assert [sorted(row) for row in rows_of(tmp_path)] == [sorted(row), sorted(further)]


def test_speeds_are_by_the_clock_without_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with build(tmp_path, log_every=4) as watched:
        for step in range(4):
            now[0] += 0.5
            with watched.paused():
                now[0] += 30
            row = watched.tick(step, AT, good(), FakeLoader())
    expected = {
        "seconds": 2.0, "images_per_s": 16.0, "images_per_s_per_gpu": 16.0, "step_ms": 500.0, "data_ms": 62.5,
        "stall": 0.125, "read_mb_per_s": 1.5, "requests_ready": 1.5, "batches_ready": 2.0, "mfu": None,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected
    assert (row["step"], row["epoch"], row["bad_samples"]) == (3, 0, 0)
    assert (row["lr"], row["weight_decay"], row["ema_momentum"], row["teacher_temp"]) == (0.1, 1e-4, 0.996, 0.04)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert row["memory_mb"] == pytest.approx(used * 1024 / 1e6, rel=0.05) or sys.platform == "darwin"


def test_a_score_is_a_row_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with build(tmp_path) as watched, build(tmp_path / "other", Ranks(1, 2, CPU)) as other:
        watched.tick(0, AT, good(), FakeLoader())
        for each in (watched, other):
            each.record(0, {"knn_top1": 43.21, "more": math.nan})
    row, score = rows_of(tmp_path)
    assert score == {"step": 0, "time": pytest.approx(row["time"], abs=60), "knn_top1": 43.21, "more": None}
    assert not (tmp_path / "other").exists()
    assert len(capsys.readouterr().out.splitlines()) == 1  # of the step: who records says what there is to say
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("knn_top1")] == [0]


def test_due_is_every_so_many_steps_and_at_the_end(tmp_path: Path):
    with build(tmp_path, stop=11, log_every=4) as watched:
        assert [step for step in range(11) if watched.is_due(step)] == [3, 7, 10]
        rows = [watched.tick(step, AT, good(), FakeLoader()) for step in range(11)]
    assert [row["step"] for row in rows if row] == [3, 7, 10]
    assert [row["epoch"] for row in rows if row] == [0, 1, 2]


@pytest.mark.gpu
def test_between_logs_the_host_waits_for_nothing(tmp_path: Path):
    gpu = torch.device("cuda", torch.cuda.current_device())
    with build(tmp_path, Ranks(0, 1, gpu), log_every=10) as watched:
        out = StepOutput(*(figure.to(gpu) for figure in good()))
        bad = StepOutput(*(figure.to(gpu) for figure in poisoned()))
        watched.tick(0, AT, out, FakeLoader())
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 9):
                watched.tick(step, AT, bad if step % 2 else out, FakeLoader())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        row = watched.tick(9, AT, out, FakeLoader())
    assert row["skipped"] == 4
    assert row["loss"] == pytest.approx(out.loss.item())
    assert row["memory_mb"] > 0


# Ranks


def _of_rank(rank: int, step: int) -> tuple[StepOutput, FakeLoader, dict[str, Any]]:
    """What a rank has of its own, steps 2 and 3 being skipped on both."""
    out = poisoned() if step in (2, 3) else good(10 * rank + step)
    figures = LoaderFigures(0.1 * (rank + 1), 1000, 1.0 + rank, 2.0)
    loader = FakeLoader(figures, {n: f"bad {n}" for n in range(2 * rank)})
    return out, loader, {"rank": torch.tensor(float(rank)), "twice_ms": 2.0 * rank}


def _be_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    (folder / str(rank)).mkdir()
    found = []
    with build(folder / str(rank), Ranks(rank, 2, CPU), log_every=2) as watched:
        for step in range(6):
            out, loader, more = _of_rank(rank, step)
            found.append(watched.tick(step, AT, out, loader, more if rank else dict(reversed(more.items()))))
    (folder / f"{rank}.json").write_text(json.dumps([row for row in found if row is not None]))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_same_rows_and_the_first_writes_them(tmp_path: Path):
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    rows, others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert rows == others == rows_of(tmp_path / "0")
    assert not (tmp_path / "1" / "metrics.jsonl").exists()
    assert [line for line in errors[1].splitlines() if "replaced" in line] == [
        "rank 1: replaced: bad 0", "rank 1: replaced: bad 1",
    ]  # fmt: skip
    assert [row["step"] for row in rows] == [1, 3, 5]
    assert [row["skipped"] for row in rows] == [0, 2, 0]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 2, 0]
    losses = [[_of_rank(rank, step)[0].loss.item() for rank in range(2)] for step in range(6)]
    assert rows[0]["loss"] == pytest.approx(np.mean(losses[:2]))
    assert rows[1]["loss"] is None
    assert rows[2]["loss"] == pytest.approx(np.mean(losses[4:]))
    for row in rows:
        assert (row["rank"], row["twice_ms"], row["requests_ready"], row["bad_samples"]) == (0.5, 1.0, 1.5, 2)
        assert row["images_per_s"] == pytest.approx(16 / row["seconds"])
        assert row["images_per_s_per_gpu"] == row["images_per_s"] / 2
        assert row["data_ms"] == pytest.approx(75)


# Going back


def test_going_back_forgets_the_steps_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with build(tmp_path, log_every=2, stop=8) as watched:
        outs = [good(0), good(1), good(2), good(3), poisoned(), poisoned(), poisoned()]
        before = [watched.tick(step, AT, out, FakeLoader()) for step, out in enumerate(outs)]
        assert before[5]["skipped_in_a_row"] == 2
        wait_for_the_next_event_file()
        watched.restart(3)
        assert [row["step"] for row in rows_of(tmp_path)] == [1]
        after = [watched.tick(step, AT, good(step), FakeLoader()) for step in range(3, 8)]
    assert after[0]["loss"] == pytest.approx(good(3).loss.item())  # of step 3 alone
    assert (after[0]["skipped"], after[0]["skipped_in_a_row"], after[0]["skipped_total"]) == (0, 0, 3)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 3, 5, 7]
    assert re.findall(r"step (\d)/8", capsys.readouterr().out) == ["2", "4", "6", "4", "6", "8"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 3, 5, 7]


def test_a_sitting_begins_without_what_comes_after_its_start(tmp_path: Path):
    with build(tmp_path) as watched:
        for step in range(4):
            watched.tick(step, AT, good(), FakeLoader())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"note": "mine"}\n{"step": 1, "lo')
    with build(tmp_path, start=2) as watched:
        watched.tick(2, AT, good(), FakeLoader())
    assert [row.get("note", row.get("step")) for row in rows_of(tmp_path)] == [0, 1, "mine", 2]


# Writers


def test_json_has_null_for_what_is_no_number(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 0, "nan": math.nan, "inf": -math.inf, "none": None, "number": 0.1, "count": 3})
    lines.close()
    assert rows_of(tmp_path) == [{"step": 0, "nan": None, "inf": None, "none": None, "number": 0.1, "count": 3}]


def test_tensorboard_has_a_curve_of_each_figure(tmp_path: Path):
    with build(tmp_path) as watched:
        row = watched.tick(0, AT, poisoned(), FakeLoader())
        watched.tick(1, AT, good(), FakeLoader())
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == row.keys() - {"step", "time", "seconds", "paused_s", "mfu"}
    assert [(event.step, event.value) for event in board.Scalars("skipped")] == [(0, 1), (1, 0)]
    assert [event.step for event in board.Scalars("loss")] == [1]


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond so many bytes: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path: Path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 0})
    with files_up_to((tmp_path / "metrics.jsonl").stat().st_size + 5):
        for step in (1, 2):
            with pytest.raises(OSError, match="large"):
                lines.write({"step": step})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"ste'
    lines.write({"step": 3})
    lines.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tensorboard_goes_on_after_a_full_disk(tmp_path: Path):
    board = TensorBoard(tmp_path, 0)

    def fill() -> None:
        for step in range(1, 1000):  # the thread that writes fails some rows later
            board.write({"step": step, "loss": 1.0})

    with files_up_to(1000), pytest.raises(OSError, match="large"):
        fill()
    wait_for_the_next_event_file()
    board.write({"step": 1000, "loss": 1.0})
    board.close()
    steps = [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]
    assert steps[0] == 1
    assert steps[-1] == 1000


def test_a_run_outlives_a_disk_that_refuses_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Refusing:
        def write(self, row: dict[str, Any]) -> None:
            raise OSError(28, "No space left on device", "metrics.jsonl")

        def restart(self, start: int) -> None: ...

        def close(self) -> None: ...

    with build(tmp_path) as watched:
        for writer in watched._writers:
            writer.close()
        watched._writers = [Refusing()]
        row = watched.tick(0, AT, good(), FakeLoader())
    assert row["step"] == 0
    assert "the figures of step 0 could not be written yet: " in capsys.readouterr().out


class StubError(Exception):
    pass


@dataclass
class StubConfig:
    shown: dict[str, Any] = field(default_factory=dict)

    def update(self, settings: dict[str, Any], *, allow_val_change: bool = False) -> None:
        """As W&B's: a value that is there already is not changed by accident."""
        assert allow_val_change or not self.shown.keys() & settings.keys()
        self.shown.update(settings)


@dataclass
class StubRun:
    id: str
    config: StubConfig = field(default_factory=StubConfig)
    rows: list[dict[str, Any]] = field(default_factory=list)
    defined: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def define_metric(self, name: str, **settings: Any) -> None:
        self.defined[name] = settings

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module of that name in place of W&B's: `runs` by id, `calls` of init, `error` that init raises."""
    seen = types.SimpleNamespace(runs={}, calls=[], error=None)

    def init(**settings: Any) -> StubRun:
        seen.calls.append(settings)
        if seen.error:
            raise seen.error
        made = StubRun(settings["id"] or f"made-{len(seen.calls)}")
        return seen.runs.setdefault(made.id, made)

    stub: Any = types.ModuleType("wandb")
    stub.init, stub.Error, stub.Settings = init, StubError, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return seen


def test_wandb_gets_the_rows_and_all_sittings_are_one_run(tmp_path: Path, wandb: types.SimpleNamespace):
    folder = str(tmp_path)
    with build(tmp_path, wandb="photos", settings={"epochs": 100}) as watched:
        first = watched.tick(0, AT, poisoned(), FakeLoader())
    with build(tmp_path, wandb="photos", start=1, settings={"epochs": 200}) as watched:
        second = watched.tick(1, AT, good(), FakeLoader())
        watched.restart(1)
        watched.tick(1, AT, good(), FakeLoader())
    [run] = wandb.runs.values()
    assert [call["id"] for call in wandb.calls] == [None, "made-1"]
    assert all((call["project"], call["dir"], call["resume"]) == ("photos", folder, "allow") for call in wandb.calls)
    assert run.rows[0] == {name: value for name, value in first.items() if value is not None}
    assert run.rows[1] == {name: value for name, value in second.items() if value is not None}
    assert [row["step"] for row in run.rows] == [0, 1, 1]
    assert run.defined == {"*": {"step_metric": "step"}}
    assert run.config.shown == {"epochs": 200}
    assert run.finished


def test_wandb_that_is_missing_or_refuses_is_one_clear_line(
    tmp_path: Path, wandb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    wandb.error = StubError("api_key not configured\n(no-tty).")
    with pytest.raises(UserError, match=r"^--wandb photos: api_key not configured \(no-tty\)\. Log in, set"):
        build(tmp_path, wandb="photos")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--wandb photos: .* not installed\. Run pip install -e '\.\[wandb\]', or"):
        build(tmp_path, wandb="photos")
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a folder of that name, that runs leave
    with pytest.raises(UserError, match="not installed"):
        build(tmp_path, wandb="photos")
    assert not list(tmp_path.iterdir())


def test_without_a_project_wandb_is_not_asked(tmp_path: Path, wandb: types.SimpleNamespace):
    for writer in open_log_writers(tmp_path, 0):
        writer.close()
    assert not wandb.calls


# Display


def test_without_a_terminal_each_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with build(tmp_path, log_every=3, stop=10) as watched:
        watched.say("a note with [brackets] as they are")
        for step in range(10):
            loader = FakeLoader(bad_samples={7: "x.tar"} if step > 8 else {})
            watched.tick(step, AT, poisoned() if step == 4 else good(), loader)
    note, *lines, bad = capsys.readouterr().out.splitlines()
    assert note == "a note with [brackets] as they are"
    assert bad == "replaced: x.tar"
    number = r"[\d.e+-]+"
    shape = (
        rf"epoch \d/2  step (\d+)/10  loss {number}  {number} img/s per GPU  {number} total  stall {number} %  "
        rf"lr 1.00e-01  entropy {number}  grad norm {number}(  skipped 1)?  ETA {number} min"
    )
    matches = [re.fullmatch(shape, line) for line in lines]
    assert all(matches), lines
    assert [match[1] for match in matches] == ["3", "6", "9", "10"]
    assert [match[2] is not None for match in matches] == [False, True, True, True]


def test_on_a_terminal_the_lines_fit_and_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: as on a terminal
    monkeypatch.setenv("COLUMNS", "80")
    row = dict.fromkeys(OF_STEPS, 1234.5678) | {"mfu": 0.4321, "stall": 1.0, "lr": 1.5e-3, "skipped_total": 12345}
    display = Display(0, 1000)
    display.show(900, "9/10", row)
    display._progress.refresh()
    display.restart(300)
    display.show(301, "4/10", row | {"loss": None, "teacher_entropy": None, "grad_norm": None, "mfu": None})
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).replace("\r", "\n").splitlines()
    assert all(len(line.rstrip()) <= 80 for line in shown)
    assert any(line.startswith("epoch 9/10  step  900/1000") for line in shown)
    assert any(line.startswith("epoch 4/10  step  301/1000") for line in shown)
    first = "lr 1.50e-03  entropy 1234.568  grad norm 1.23e+03  MFU 43.2 %  skipped 12345"
    assert {first, "lr 1.50e-03  entropy –  grad norm –  skipped 12345"} <= {line.rstrip() for line in shown}


# MFU


@pytest.mark.parametrize(
    ("name", "teraflops"),
    {
        "NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA GH200 480GB": 989.4, "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835.5, "NVIDIA H200 NVL": 835.5, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA A10": 125, "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362, "Tesla T4": 65,
        "Tesla V100-SXM2-32GB": 125, "Tesla V100-PCIE-16GB": 112, "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA A10G": None, "NVIDIA H20": None, "NVIDIA GeForce RTX 4090 D": None, "NVIDIA T400": None,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA GeForce RTX 3090 Ti": None, "somebody's": None,
    }.items(),
)  # fmt: skip
def test_peaks_of_gpus_by_their_names(name: str, teraflops: float | None):
    assert flops.peak_by_name(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_mfu_is_flops_over_the_data_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """128 images of 93 GFLOP in 50 ms on a GPU of 989.4 TFLOP/s."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(monitor, "peak_flops", lambda device: 989.4e12)
    with build(tmp_path, batch=128, flops_per_image=93e9) as watched:
        now[0] += 0.05
        row = watched.tick(0, AT, good(), FakeLoader())
    assert row["mfu"] == pytest.approx(128 * 93e9 / 0.05 / 989.4e12)
    assert flops.peak_flops(CPU) is None


@pytest.mark.gpu
def test_the_peak_is_of_the_gpu_at_hand():
    gpu = torch.device("cuda", 0)
    assert flops.peak_flops(gpu) == flops.peak_by_name(torch.cuda.get_device_name(gpu))


if __name__ == "__main__":
    _be_rank(int(sys.argv[1]), Path(sys.argv[2]))
