"""The plan command: what it foretells is what a run then does."""

import json
import statistics
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_fast import checkpoint
from dino_fast.advise.plan import (
    Pictures,
    after_a_step,
    amount,
    checkpoints,
    clock,
    main,
    make_plan,
    memory,
    plot,
    plots,
    size_of,
)
from dino_fast.config import CheckpointRecipe, Recipe, read_recipe
from dino_fast.distributed import Ranks
from dino_fast.run.schedules import Hyper, Schedules
from dino_fast.step.optimizers import OptimRecipe
from dino_fast.train import build_step, plain
from shards.index import ShardIndex
from tests.dino_fast.conftest import TINY

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
IMAGENET = 1_281_167
HYPER = Hyper(lr=0.01, weight_decay=1e-2, momentum=0.99, teacher_temp=0.04, freeze_last_layer=False)
CPU = Ranks(0, 1, torch.device("cpu"))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


# Steps, phases, sizes


def test_imagenet_by_hand(tmp_path: Path, monkeypatch, capsys):
    """Without shards, and without a trace in the folder."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(CONFIGS / "resnet50_800ep.yaml"), "--world", "80"]
    out = planned(capsys, *arguments, "--images", str(IMAGENET), "--images-per-s", "20000")
    for words in (
        "251,200 steps of 4,080 images: 1,024,896,000 in all",  # 1,281,167 // 4,080 = 314, times 800
        "80 ranks, 51 images each, as 2×224 + 6×96 pixels, in fp32",
        "the last layer is frozen: the first 314 steps (1 epoch)",
        "the learning rate rises to 4.781: the first 3,140 steps (10 epochs)",  # 0.3 · 4,080 / 256
        "from 0.04 to 0.07, by epochs: the first 15,700 steps (50 epochs)",
        "14 h 14 min of training at 20,000.0 img/s (--images-per-s)",
        "9 of 800 are kept",  # 100, 200 … 800, and 799
    ):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_parameters_and_json(tmp_path: Path, capsys):
    file = tmp_path / "plan.json"
    planned(
        capsys, "--config", str(CONFIGS / "resnet50_100ep.yaml"), "--images", str(IMAGENET), "--world", "8", "--json",
        str(file),
    )  # fmt: skip
    plan = json.loads(file.read_text())
    assert plan["parameters"] == {
        "backbone": 25_557_032 - (2048 * 1000 + 1000),  # torchvision's count, without its classifier
        "head": 2 * (2048 * 2048 + 2048) + (2048 * 256 + 256) + 65536 * (256 + 1),
    }
    assert plan["run"]["steps"] == plan["run"]["schedule_steps"] == 250_200
    assert plan["time"] == {"images_per_s": None, "source": "unknown", "seconds": None}
    assert plan["data"]["bytes_an_epoch"] is None
    assert plan["memory"]["total"] == sum(plan["memory"].values()) - plan["memory"]["total"]
    drawn = plan["schedules"]
    schedules = Schedules(read_recipe(["--config", str(CONFIGS / "resnet50_100ep.yaml")]), 2502)
    assert (drawn["step"][0], drawn["step"][-1], len(drawn["step"])) == (0, 250_199, 101)
    assert drawn["lr"] == [schedules.at(step).lr for step in drawn["step"]]


@pytest.mark.parametrize(
    ("name", "precision", "batch_norm"), [("sgd", "fp32", "true"), ("adamw", "bf16", "false"), ("lars", "fp16", "true")]
)
def test_a_checkpoint_is_as_large_as_foretold(tmp_path: Path, name: str, precision: str, batch_norm: str):
    recipe = read_recipe(
        [*TINY, "--optim.name", name, "--precision", precision, "--head.batch_norm", batch_norm, "--accumulate", "2"]
    )
    step = build_step(recipe, CPU)
    for parameter in step.bare_student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    step.optimizer.step()
    file = checkpoint.save(tmp_path, 1, {"recipe": plain(recipe), "data": "", "model": step.state_dict()})
    foretold = make_plan(recipe, Pictures(40, None, ""))["checkpoints"]["bytes"]
    assert foretold == pytest.approx(file.stat().st_size, rel=0.01)


@given(
    stop=st.integers(1, 40),
    every=st.integers(0, 9),
    keep=st.integers(1, 4),
    milestone=st.integers(0, 12),
    data=st.data(),
)
def test_as_many_checkpoints_are_kept_as_foretold(
    tmp_path_factory: pytest.TempPathFactory, stop: int, every: int, keep: int, milestone: int, data: st.DataObject
):
    """The loop's rule, step by step, with files that `checkpoint.prune` removes."""
    lengths = CheckpointRecipe(every=f"{every} steps", keep=keep, keep_every=f"{milestone} steps")
    recipe = Recipe(epochs="40 steps", checkpoint=lengths, optim=OptimRecipe(warmup_epochs=0))
    foretold = checkpoints(Schedules(recipe, 40), stop, 1)
    folder, written, most = tmp_path_factory.mktemp("kept"), 0, 0
    for done in range(1, stop + 1):
        if done % max(1, every) == 0 or done == stop or (milestone and done % milestone == 0):
            (folder / f"step-{done:08d}-0123456789abcdef.pt").touch()
            written, most = written + 1, max(most, len(checkpoint.checkpoints(folder)))
            checkpoint.prune(folder, keep, milestone)
    assert foretold["written"] == written
    assert foretold["kept"] == foretold["disk_bytes"] == len(checkpoint.checkpoints(folder))
    assert most <= foretold["most_disk_bytes"] <= foretold["kept"] + 1


def test_a_run_does_what_was_foretold(train_here, labelled_shards: Path, tmp_path: Path, capsys):
    options = [
        "--max_steps", "7", "--checkpoint.every", "3 steps", "--checkpoint.keep", "1", "--checkpoint.keep_every",
        "4 steps",
    ]  # fmt: skip
    file, output = tmp_path / "plan.json", tmp_path / "run"
    asked = [*TINY, "--data.train", str(labelled_shards), "--output", str(output), *options, "--json", str(file)]
    out = planned(capsys, *asked)
    assert "unknown: pass --images-per-s" in out
    assert "max_steps ends it there: the schedules are for 20 steps" in out
    assert not output.exists()
    plan = json.loads(file.read_text())
    assert train_here(output, *options) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert plan["run"]["steps"] == len(rows) == 7
    files = checkpoint.checkpoints(output)
    assert [checkpoint.step_of(path) for path in files] == [4, 7]
    assert plan["checkpoints"]["kept"] == 2
    assert plan["checkpoints"]["disk_bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.01)
    assert plan["data"]["images"] == 40
    with ShardIndex(labelled_shards) as index:
        assert plan["data"]["bytes_an_epoch"] == pytest.approx(index.records["size"].sum(), abs=1)

    # Now there is a measured speed, and a killed run's last line beside it.
    with open(output / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 7, "images_per_s_per_gpu": 1e9')
    capsys.readouterr()
    assert "metrics.jsonl: its median for a rank, times 2" in planned(capsys, *asked, "--world", "2")
    rate = 2 * statistics.median(row["images_per_s_per_gpu"] for row in rows)
    time = json.loads(file.read_text())["time"]
    assert time["images_per_s"] == pytest.approx(rate)
    assert time["seconds"] == pytest.approx(7 * 8 / rate)


# Memory


class Allocated(TorchDispatchMode):
    """Bytes of all storages that come to life inside, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "bf16", "--head.batch_norm", "true"),
        ("--accumulate", "2"),
        ("--head.out_dim", "32768", "--crops.locals", "0"),
    ],
    ids=" ".join,
)
def test_a_step_takes_the_memory_that_was_foretold(options: tuple[str, ...]):
    """Not a tenth less than the peak of a step's tensors, nor a third more."""
    sizes = ("--device", "cpu", "--batch_size", "16", "--crops.global_size", "96", "--crops.local_size", "64")
    recipe = read_recipe(["--config", str(CONFIGS / "debug.yaml"), *sizes, *options])
    step = build_step(recipe, CPU)
    views = [
        torch.randn(16 * (part.stop - part.start), 3, size, size).to(memory_format=torch.channels_last)
        for size, part in recipe.crops.resolutions
    ]
    batch = views[0], views[1] if len(views) > 1 else None
    step(*batch, HYPER)  # the optimizer's state is there from now on
    with Allocated() as allocated:
        step(*batch, HYPER)
    foretold = memory(recipe, after_a_step(recipe), 16)
    assert foretold["weights"] + foretold["optimizer"] == size_of(step.state_dict())
    taken = foretold["activations"] + foretold["gradients"] + foretold["logits"]
    assert 0.9 * allocated.peak <= taken <= 1.33 * allocated.peak


@pytest.mark.gpu
def test_a_gpu_takes_the_memory_that_was_foretold():
    sizes = ("--batch_size", "128", "--crops.global_size", "128", "--crops.local_size", "64", "--compile", "never")
    recipe = read_recipe(["--config", str(CONFIGS / "imagenette_resnet18.yaml"), *sizes, "--graph", "never"])
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    step = build_step(recipe, ranks)
    views = [
        torch.randn(128 * (part.stop - part.start), 3, size, size, device="cuda", dtype=torch.bfloat16)
        for size, part in recipe.crops.resolutions
    ]
    globals_, locals_ = (view.to(memory_format=torch.channels_last) for view in views)
    step(globals_, locals_, HYPER)
    torch.cuda.reset_peak_memory_stats()
    step(globals_, locals_, HYPER)
    foretold = memory(recipe, after_a_step(recipe), 128)
    taken = foretold["total"] - foretold["batches"] + 2 * sum(view.nbytes for view in views)
    assert 0.75 * torch.cuda.max_memory_allocated() <= taken <= 1.33 * torch.cuda.max_memory_allocated()


def test_what_memory_depends_on():
    def of(*options: str, world: int = 1) -> dict[str, int]:
        recipe = read_recipe(["--config", str(CONFIGS / "resnet50_100ep.yaml"), *options])
        return make_plan(recipe, Pictures(IMAGENET, None, ""), world)["memory"]

    whole, parts, ranks = of(), of("--accumulate", "8"), of(world=8)
    assert of("--precision", "fp32")["activations"] == pytest.approx(2 * whole["activations"], rel=0.05)
    assert parts["activations"] == ranks["activations"] == pytest.approx(whole["activations"] / 8, rel=0.05)
    assert parts["batches"] == whole["batches"] == 8 * ranks["batches"]
    assert of("--optim.name", "adamw")["optimizer"] == pytest.approx(2 * whole["optimizer"], rel=1e-4)
    assert of("--precision", "fp32")["weights"] < whole["weights"]  # no copies in half precision
    # By hand, 8-bit and bf16 crops of 5 batches of 512 images.
    assert whole["batches"] == 5 * 512 * 3 * (2 * 224**2 + 8 * 96**2) * 3


# Plots


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=80, unique=True).map(lambda many: [n / 1e5 for n in many]))
def test_a_plot_shows_its_values_to_an_eighth_of_a_row(values: list[float]):
    low, high = min(values), max(values)
    *rows, axis = plot(values, low, high)
    start = axis.index("└") + 1
    shown = [
        sum(" ▁▂▃▄▅▆▇█".index(row[start + column] if start + column < len(row) else " ") for row in rows)
        for column in range(len(values))
    ]
    exact = [(value - low) / (high - low) * 8 * len(rows) for value in values]
    assert all(abs(one - other) <= 0.5 + 1e-6 for one, other in zip(shown, exact, strict=True))
    assert axis == " " * (start - 1) + "└" + "─" * len(values)
    assert (float(rows[0].split()[0]), float(rows[-1].split()[0])) == pytest.approx((high, low), rel=1e-3)


@pytest.mark.parametrize("width", [10, 40, 80, 97, 300])
def test_plots_keep_to_the_terminal(width: int):
    recipe = read_recipe(["--config", str(CONFIGS / "resnet50_800ep.yaml")])
    lines = list(plots(Schedules(recipe, 314), width))
    assert max(map(len, lines)) == min(max(width, 40), 120)
    assert "weight decay: 1e-06 throughout" in lines
    assert {"learning rate over steps", "EMA momentum over steps", "teacher temperature over steps"} <= set(lines)
    assert lines[1].startswith("    4.781 ┤")  # the peak, though no column need fall on it
    assert sum(line.endswith(" 251,199") for line in lines) == 3


def test_the_terminal_is_asked_for_its_width(monkeypatch, capsys):
    asked = ["--config", str(CONFIGS / "debug.yaml"), "--images", "1000", "--optim.warmup_epochs", "2"]
    for columns in (50, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        plotted = planned(capsys, *asked).split("\n\n")[1]
        assert max(map(len, plotted.splitlines())) == columns


@pytest.mark.parametrize("epochs", ["1 step", "2 steps"])
def test_the_shortest_runs(epochs: str, capsys):
    out = planned(capsys, "--epochs", epochs, "--optim.warmup_epochs", "0", "--optim.freeze_last_layer_epochs", "0",
                  "--images", "1000")  # fmt: skip
    assert f"{epochs} of 512 images" in out.replace("1 steps", "1 step")


# Wrong calls


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--crops.local", "3"], 2, "did you mean crops.locals?"),
        (["--optim.lr", "-1"], 2, "optim.lr"),
        (["--loss.teacher_temp", "0.2"], 2, "the teacher must be the sharper one"),
        (["--optim.warmup_epochs", "200"], 2, "more than epochs"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--images", "0"], 2, "--images 0: expected a number above 0"),
        (["--images", "many"], 2, "--images"),
        (["--world", "-1"], 2, "--world"),
        (["--images-per-s", "nan"], 2, "--images-per-s nan: expected a number above 0"),
        (["--json", "nowhere/plan.json"], 2, "no such folder"),
        (["--images", "511"], 1, "--batch_size 512 is larger than the data (511 images)"),
        (["--images", "5120", "--world", "7"], 1, "does not divide into 7 ranks"),
        (["--images", "5120", "--optim.warmup_epochs", "1001 steps"], 1, "is more than epochs = 100, with 10 steps"),
        ([], 1, "to plan without shards pass --images N"),
    ],
)  # fmt: skip
def test_wrong_calls_end_in_a_line(tmp_path: Path, monkeypatch, capsys, arguments: list[str], status: int, words: str):
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
    assert {"--images", "--world", "--images-per-s", "--json", "--config"} <= words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"), (59, "59 s"), (90, "2 min"), (3599, "1 h 0 min"), (5 * 3600 + 720, "5 h 12 min"),
        (86399, "1 d 0 h"), (90_000, "1 d 1 h"), (1000 * 86400, "1,000 d 0 h"),
    ],
)  # fmt: skip
def test_times_in_words(seconds: float, said: str):
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (999.6e6, "1 GB"), (12_345_678_901, "12.3 GB"), (2.5e17, "250 PB")]
)
def test_sizes_in_words(size: float, said: str):
    assert amount(size) == said


def test_a_misspelt_flag_of_its_own_is_known(capsys: pytest.CaptureFixture[str]):
    assert main(["--image", "3"]) == 2
    assert capsys.readouterr().err == "dino-fast plan: unknown setting image: did you mean images?\n"
