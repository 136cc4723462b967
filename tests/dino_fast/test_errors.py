"""What a user can get wrong ends in one line that names the thing and the mend, and a status."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_fast.__main__ import main as dino_fast
from dino_fast.advise.schedule_plots import ASCII, BOXES, choose_characters, plot
from dino_fast.distributed import is_lost_rank
from dino_fast.run import checkpoint_writer
from tests.dino_fast.conftest import ROOT
from tests.shards.manifests import forge


@pytest.fixture
def refused(train_here, tmp_path: Path, capsys):
    """A function that expects a tiny training run to fail, and returns its one line."""

    def refuse(*arguments: str, output: str = "run", status: int = 1) -> str:
        assert train_here(tmp_path / output, *arguments) == status
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("dino-fast train: ")
        return lines[0]

    return refuse


def test_missing_and_unfinished_data(refused, tmp_path: Path):
    assert "nowhere: no such folder. Give" in refused("--data.train", str(tmp_path / "nowhere"))
    assert f"nowhere: no such folder in {Path.cwd()}. Give" in refused("--data.train", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "make-shards pack IMAGES SHARDS" in refused("--data.train", str(tmp_path / "empty"))


def test_the_output_is_not_a_folder_of_shards(refused, labeled_shards: Path):
    line = refused("--output", str(labeled_shards))
    assert line.endswith("holds shards. Give a folder for the run, such as runs/shards.")
    assert not list(labeled_shards.glob("step-*"))


def test_stale_index(refused, labeled_shards: Path, tmp_path: Path):
    stale = shutil.copytree(labeled_shards, tmp_path / "stale")
    data = bytearray((stale / "index.npy").read_bytes())
    data[-1] ^= 1
    (stale / "index.npy").write_bytes(data)
    assert "index.npy does not belong to this manifest" in refused("--data.train", str(stale))


def test_wrong_settings(refused, tmp_path: Path):
    assert "did you mean crops.locals?" in refused("--crops.local=3", status=2)
    assert "larger than" in refused("--batch_size", "64")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_parts_and_recordings_that_cannot_be(refused):
    assert "--accumulate 3 parts each" in refused("--accumulate", "3")
    assert "--graph always takes one GPU" in refused("--graph", "always", "--device", "cpu")


ONE_PIXEL = ("--crops.locals", "1", "--crops.local_size", "32", "--crops.global_size", "64")


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch_size", "1", *ONE_PIXEL),
        ("--batch_size", "4", "--accumulate", "4", *ONE_PIXEL),
        ("--batch_size", "1", "--crops.locals", "1"),
    ],
)
def test_a_batch_with_one_value_for_batch_norm(refused, capsys, flags: tuple[str, ...]):
    line = refused(*flags)
    assert "gives batch norm a single value: the last feature map of one view of" in line
    assert "--crops.locals 2" in line
    assert dino_fast(["plan", *flags, "--crops.local_size", "24", "--images", "100"]) == 1
    assert "gives batch norm a single value" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        ("--crops.locals", "2"),
        ("--crops.local_size", "33"),
        ("--crops.locals", "0"),
        ("--batch_size", "2"),
        ("--crops.global_size", "32"),
    ],
)
def test_a_batch_with_two_values_for_batch_norm_trains(train_here, tmp_path: Path, change: tuple[str, str]):
    assert train_here(tmp_path / "run", "--batch_size", "1", *ONE_PIXEL, "--max_steps", "1", *change) == 0


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_an_output_that_lacks_characters_gets_others(encoding: str, labeled_shards: Path, tmp_path: Path):
    """Plots have other characters, and single ones become question marks. `--help` and a run have some, too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    flags = ["--config", str(ROOT / "configs" / "debug.yaml"), "--images", "1000", "--optim.warmup_epochs", "2"]
    for arguments in (["plan", *flags], ["knn", "--help"], ["train", "--config", str(tmp_path / "ü—█")]):
        command = [sys.executable, "-m", "dino_fast", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, timeout=120)
        assert b"Traceback" not in result.stderr
        assert result.returncode == (2 if arguments[0] == "train" else 0)
        text = result.stdout.decode(encoding)
        if arguments[0] == "plan":
            assert "?" not in text
            assert re.search(r"\+-{40,}\n", text)
            assert "#####" in text


def test_plots_are_of_boxes_where_the_output_has_them():
    assert [choose_characters(name) for name in ("utf-8", "UTF-8", None, "cp437")] == [BOXES] * 3 + [ASCII]
    assert [choose_characters(name) for name in ("latin-1", "ascii", "no such")] == [ASCII] * 3
    assert len(set(BOXES.blocks)) == len(set(ASCII.blocks)) == 9
    assert list(plot([0.0, 0.5, 1.0], 0, 1, ASCII)) == [
        "        1 +  #", "          |  #", "          | ##", "        0 + ##", "          +---",
    ]  # fmt: skip


def test_without_a_compiler_the_run_goes_on_and_says_so_once(
    train_here, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dino_fast.run.build.find_compile_problem", lambda device: "no C++ compiler")
    assert train_here(tmp_path / "run", "--max_steps", "2", "--compile", "always", "--accumulate", "2") == 0
    assert capsys.readouterr().out.count("not compiled, which costs speed: no C++ compiler") == 1


def test_a_gpu_that_is_not_there(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "torch sees no NVIDIA GPU" in refused("--device", "cuda")


def test_another_recipe_or_other_data_in_the_output(refused, train_here, labeled_shards: Path, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "2") == 0
    capsys.readouterr()
    line = refused("--max_steps", "3", "--optim.lr", "0.5", "--seed", "3")
    assert "optim.lr: 0.03 -> 0.5" in line
    assert "seed: 0 -> 3" in line
    assert "--accept_changes true" in line
    forge(shutil.copytree(labeled_shards, tmp_path / "other"), fingerprint="0" * 64)
    assert "holds other data" in refused("--max_steps", "3", "--data.train", str(tmp_path / "other"))
    assert train_here(tmp_path / "run", "--max_steps", "3", "--optim.lr", "0.5", "--accept_changes", "true") == 0
    assert "optim.lr: 0.03 -> 0.5" in capsys.readouterr().out


def test_two_runs_in_one_output(run, tmp_path: Path):
    first = run("--max_steps", "10000", "--epochs", "10000")
    first.wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    status, _, errors = run("--max_steps", "3").finish()
    assert status == 1
    assert "another run is writing into it" in errors
    first.kill()


def test_all_checkpoints_damaged(refused, train_here, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "2") == 0
    capsys.readouterr()
    for path in (tmp_path / "run").glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "checkpoints are damaged" in refused("--max_steps", "3")


def test_a_nan_is_no_checkpoint(refused, tmp_path: Path):
    options = ("--optim.lr", "1e38", "--optim.clip_grad", "0", "--checkpoint.every", "1 step")
    line = refused(*options)
    assert "are not finite. Lower --optim.lr" in line
    for path in (tmp_path / "run").glob("step-*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in state["model"]["student"].values())


@pytest.mark.slow
def test_a_state_that_does_not_fit_is_refused_even_if_changes_are_accepted(refused, train_here, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "2") == 0
    capsys.readouterr()
    for change in (("--optim.name", "adamw"), ("--head.out_dim", "48"), ("--backbone", "resnet34")):
        line = refused("--max_steps", "3", "--accept_changes", "true", *change)
        assert "does not fit this one. Choose another --output" in line
    assert train_here(tmp_path / "run", "--max_steps", "3", "--accept_changes", "true", "--precision", "fp16") == 0


def as_nobody(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a dino-fast command without the right to write anywhere by force."""
    command = [sys.executable, "-m", "dino_fast", *arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("running as root, and there is no setpriv to drop its rights")
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_an_output_without_permission(labeled_shards: Path, tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    config = Path(__file__).resolve().parents[2] / "configs" / "debug.yaml"
    result = as_nobody(
        ["train", "--config", str(config), "--data.train", str(labeled_shards), "--output", str(closed / "run")],
        tmp_path,
    )
    assert result.returncode == 1
    assert f"cannot write to {closed / 'run'}" in result.stderr
    assert "Choose a folder that you may write to" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_in_a_line_and_the_run_goes_on_after(
    train_here, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """The last checkpoint is tried again for minutes; here, at once. tests/faults has a disk that gets space again."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_PAUSES", (0.0,))
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        assert train_here(small / "run", "--max_steps", "3") == 0
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        (small / "ballast").write_bytes(bytes(free - 10**6))
        capsys.readouterr()
        assert train_here(small / "run", "--max_steps", "6") == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "the checkpoint of step 6 could not be written" in line
        assert "Free some space" in line
        (small / "ballast").unlink()
        assert train_here(small / "run", "--max_steps", "6") == 0
        assert "resumed from step 3" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: No such file or directory. Pass a checkpoint or a run's folder"),
        (["--checkpoint", "."], ".: no checkpoint in this folder"),
        (["--checkpoint", "text.pt"], "text.pt is damaged, or not a file of weights"),
        (["--checkpoint", "weights.pt"], "weights.pt: its backbone is none of resnet18, "),
    ],
)
def test_knn_with_a_wrong_checkpoint(labeled_shards: Path, tmp_path: Path, monkeypatch, capsys, arguments, words: str):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("hello")
    torch.save({"conv1.weight": torch.zeros(3)}, "weights.pt")
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards)]
    assert dino_fast(["knn", *arguments, *data]) == 1
    errors = capsys.readouterr().err.strip()
    assert words in errors
    assert "\n" not in errors


def test_unknown_commands(capsys):
    assert dino_fast(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err
    assert dino_fast([]) == 0
    assert "usage: dino-fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:31000", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 10000ms", True),
        ("Application timeout caused pair closure", True),
        ("shape '[2, 3]' is invalid for input of size 5", False),
    ],
)
def test_what_gloo_says_of_a_lost_rank_is_known(message: str, lost: bool):
    """It depends on the moment which of its messages comes, and not all name it."""
    assert is_lost_rank(RuntimeError(message)) is lost
