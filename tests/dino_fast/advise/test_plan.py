"""The plan command: a run then does what the plan says."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dino_fast import checkpoint
from dino_fast.advise.estimate import TrainSet, count_checkpoints, estimate_run
from dino_fast.advise.plan import main
from dino_fast.advise.plan_text import format_duration
from dino_fast.config import CheckpointRecipe, Recipe, read_recipe
from dino_fast.distributed import Ranks
from dino_fast.run.build import build_train_step
from dino_fast.run.recipe_changes import to_plain_data
from dino_fast.run.schedules import Schedules
from dino_fast.step.optimizers import OptimRecipe
from shards.index import ShardIndex
from shards.text import format_bytes
from tests.dino_fast.conftest import TINY

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
IMAGENET = 1_281_167
CPU = Ranks(0, 1, torch.device("cpu"))


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


# What the plan says


def test_a_plan_for_imagenet_has_these_figures(tmp_path: Path, monkeypatch, capsys):
    """It needs no shards, and leaves nothing in the folder."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(CONFIGS / "resnet50_800ep.yaml"), "--ranks", "80"]
    out = run_plan(capsys, *arguments, "--images", str(IMAGENET), "--images-per-s", "20000")
    for words in (
        "251,200 steps of 4,080 images, 1,024,896,000 images in all",  # 1,281,167 // 4,080 = 314, times 800
        "80 ranks with 51 images each, each image in 2 views of 224 pixels and 6 of 96, in fp32",
        "the head's last layer is frozen during the first 314 steps (1 epoch)",
        "the learning rate rises from 0 to 4.781 during the first 3,140 steps (10 epochs)",  # 0.3 · 4,080 / 256
        "from 0.04 to 0.07 during the first 15,700 steps (50 epochs)",
        "14 h 14 min of training at 20,000.0 img/s (--images-per-s)",
        "9 of 800 are kept",  # 100, 200 … 800, and 799
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_the_json_holds_the_whole_plan(tmp_path: Path, capsys):
    file = tmp_path / "plan.json"
    run_plan(
        capsys, "--config", str(CONFIGS / "resnet50_100ep.yaml"), "--images", str(IMAGENET), "--ranks", "8", "--json",
        str(file),
    )  # fmt: skip
    plan = json.loads(file.read_text())
    assert plan["parameters"] == {
        "backbone": 25_557_032 - (2048 * 1000 + 1000),  # torchvision's count, without its classifier
        "head": 2 * (2048 * 2048 + 2048) + (2048 * 256 + 256) + 65536 * (256 + 1),
    }
    assert plan["run"]["steps"] == plan["run"]["schedule_steps"] == 250_200
    assert plan["time"] == {"images_per_s": None, "source": "unknown", "seconds": None}
    assert plan["data"]["bytes_per_epoch"] is None
    assert plan["memory"]["total"] == sum(plan["memory"].values()) - plan["memory"]["total"]
    drawn = plan["schedules"]
    schedules = Schedules(read_recipe(["--config", str(CONFIGS / "resnet50_100ep.yaml")]), 2502)
    assert (drawn["step"][0], drawn["step"][-1], len(drawn["step"])) == (0, 250_199, 101)
    assert drawn["lr"] == [schedules.at(step).lr for step in drawn["step"]]


@pytest.mark.parametrize(
    ("name", "precision", "batch_norm"), [("sgd", "fp32", "true"), ("adamw", "bf16", "false"), ("lars", "fp16", "true")]
)
def test_a_checkpoint_has_the_expected_size(tmp_path: Path, name: str, precision: str, batch_norm: str):
    recipe = read_recipe(
        [*TINY, "--optim.name", name, "--precision", precision, "--head.batch_norm", batch_norm, "--accumulate", "2"]
    )
    step = build_train_step(recipe, CPU)
    for parameter in step.bare_student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    step.optimizer.step()
    file = checkpoint.save(tmp_path, 1, {"recipe": to_plain_data(recipe), "data": "", "model": step.state_dict()})
    expected = estimate_run(recipe, TrainSet(40, None, ""))["checkpoints"]["bytes"]
    assert expected == pytest.approx(file.stat().st_size, rel=0.01)


@given(
    stop=st.integers(1, 40),
    every=st.integers(0, 9),
    keep=st.integers(1, 4),
    milestone=st.integers(0, 12),
    data=st.data(),
)
def test_the_expected_number_of_checkpoints_is_kept(
    tmp_path_factory: pytest.TempPathFactory, stop: int, every: int, keep: int, milestone: int, data: st.DataObject
):
    """Compare with the loop's rule, step by step, and with files that `checkpoint.prune` removes."""
    lengths = CheckpointRecipe(every=f"{every} steps", keep=keep, keep_every=f"{milestone} steps")
    recipe = Recipe(epochs="40 steps", checkpoint=lengths, optim=OptimRecipe(warmup_epochs=0))
    expected = count_checkpoints(Schedules(recipe, 40), stop, 1)
    folder, written, most = tmp_path_factory.mktemp("kept"), 0, 0
    for done in range(1, stop + 1):
        if done % max(1, every) == 0 or done == stop or (milestone and done % milestone == 0):
            (folder / f"step-{done:08d}-0123456789abcdef.pt").touch()
            written, most = written + 1, max(most, len(checkpoint.list_checkpoints(folder)))
            checkpoint.prune(folder, keep, milestone)
    assert expected["written"] == written
    assert expected["kept"] == expected["disk_bytes"] == len(checkpoint.list_checkpoints(folder))
    assert most <= expected["peak_disk_bytes"] <= expected["kept"] + 1


def test_a_run_does_what_the_plan_says(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    options = [
        "--max_steps", "7", "--checkpoint.every", "3 steps", "--checkpoint.keep", "1", "--checkpoint.keep_every",
        "4 steps",
    ]  # fmt: skip
    file, output = tmp_path / "plan.json", tmp_path / "run"
    asked = [*TINY, "--data.train", str(labeled_shards), "--output", str(output), *options, "--json", str(file)]
    out = run_plan(capsys, *asked)
    assert "unknown; to estimate it, pass --images-per-s" in out
    assert "max_steps ends it early: the schedules are for 20 steps" in out
    assert not output.exists()
    plan = json.loads(file.read_text())
    assert train_here(output, *options) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert plan["run"]["steps"] == len(rows) == 7
    files = checkpoint.list_checkpoints(output)
    assert [checkpoint.step_of(path) for path in files] == [4, 7]
    assert plan["checkpoints"]["kept"] == 2
    assert plan["checkpoints"]["disk_bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)
    assert plan["data"]["images"] == 40
    with ShardIndex(labeled_shards) as index:
        assert plan["data"]["bytes_per_epoch"] == pytest.approx(index.records["size"].sum(), abs=1)

    # Now there is a logged speed, and after it the cut-off last line of a killed run.
    with open(output / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 7, "images_per_s_per_gpu": 1e9')
    capsys.readouterr()
    assert "metrics.jsonl times 2 ranks)" in run_plan(capsys, *asked, "--ranks", "2")
    rate = 2 * statistics.median(row["images_per_s_per_gpu"] for row in rows)
    time = json.loads(file.read_text())["time"]
    assert time["images_per_s"] == pytest.approx(rate)
    assert time["seconds"] == pytest.approx(7 * 8 / rate)


def test_plots_are_as_wide_as_the_terminal(monkeypatch, capsys):
    asked = ["--config", str(CONFIGS / "debug.yaml"), "--images", "1000", "--optim.warmup_epochs", "2"]
    for columns in (50, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        plotted = run_plan(capsys, *asked).split("\n\n")[1]
        assert max(map(len, plotted.splitlines())) == columns


@pytest.mark.parametrize("epochs", ["1 step", "2 steps"])
def test_the_shortest_runs_have_a_plan(epochs: str, capsys):
    out = run_plan(capsys, "--epochs", epochs, "--optim.warmup_epochs", "0", "--optim.freeze_last_layer_epochs", "0",
                  "--images", "1000")  # fmt: skip
    assert f"{epochs} of 512 images" in out.replace("1 steps", "1 step")


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--crops.local", "3"], 2, "did you mean crops.locals?"),
        (["--optim.lr", "-1"], 2, "optim.lr"),
        (["--loss.teacher_temp", "0.2"], 2, "the teacher must be sharper"),
        (["--optim.warmup_epochs", "200"], 2, "more than epochs"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--images", "0"], 2, "--images expects a whole number, 1 or more, not '0'"),
        (["--images", "many"], 2, "--images"),
        (["--ranks", "-1"], 2, "--ranks"),
        (["--images-per-s", "nan"], 2, "--images-per-s expects a number above 0, not 'nan'"),
        (["--json", "nowhere/plan.json"], 2, "does not exist. Create it first."),
        (["--images", "511"], 1, "--batch_size 512 is larger than the training set (511 images)"),
        (["--images", "5120", "--ranks", "7"], 1, "cannot be split evenly among 7 ranks"),
        (["--images", "5120", "--optim.warmup_epochs", "1001 steps"], 1, "is more than epochs = 100, with 10 steps"),
        ([], 1, "To plan without shards, pass --images N."),
    ],
)  # fmt: skip
def test_wrong_calls_are_one_line(tmp_path: Path, monkeypatch, capsys, arguments: list[str], status: int, words: str):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    said = capsys.readouterr()
    [line] = said.err.strip().splitlines()
    assert line.startswith("dino-fast plan: ")
    assert words in line
    assert said.out == ""


def test_help_names_its_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    words = set(capsys.readouterr().out.replace("[", " ").split())
    assert {"--images", "--ranks", "--images-per-s", "--json", "--config"} <= words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (5 * 3600 + 720, "5 h 12 min"),
        (86399, "1 d 0 h"), (90_000, "1 d 1 h"), (1000 * 86400, "1,000 d 0 h"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds: float, said: str):
    assert format_duration(seconds) == said


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (999.6e6, "1 GB"), (12_345_678_901, "12.3 GB"), (2.5e17, "250 PB")]
)
def test_sizes_in_words(size: float, said: str):
    assert format_bytes(size) == said


def test_a_misspelled_flag_of_the_plan_itself_gets_a_suggestion(capsys: pytest.CaptureFixture[str]):
    assert main(["--image", "3"]) == 2
    assert capsys.readouterr().err == "dino-fast plan: unknown setting image: did you mean images?\n"
