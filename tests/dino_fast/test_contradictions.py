"""Settings that cannot go together are refused in one line, with the mend; what is next to them is taken."""

import pytest
import yaml

from dino_fast.config import UsageError, read_recipe


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.lr=inf"], "optim.lr = inf: expected a number, at least 0"),
        (["--loss.student_temp=inf"], "loss.student_temp = inf: expected a number, above 0"),
        (["--output="], "output is empty: name a folder"),
        (["--crops.local_size=256"], "crops.local_size = 256 is larger than crops.global_size = 224"),
        (["--data.hw_decoder_load=-0.5"], "data.hw_decoder_load = -0.5: expected a share from 0 to 1, or -1"),
        (["--data.std=[0.2,0.2,0]"], "data.std = [0.2, 0.2, 0.0]: expected three finite numbers above 0"),
        (["--data.mean=[.inf,0,0]"], "data.mean = [inf, 0.0, 0.0]: expected three finite numbers"),
        (["--head.batch_norm=true", "--head.layers=1"], "head.batch_norm = True does nothing with head.layers = 1"),
        (["--loss.teacher_temp=0.07"], "loss.warmup_teacher_temp = 0.04 is never used. Give loss.warm"),
        (["--loss.warmup_teacher_temp=0.02"], "or set it to loss.teacher_temp = 0.04"),
        (
            ["--loss.warmup_teacher_temp=0.02", "--loss.warmup_teacher_temp_epochs=0 steps"],
            "loss.warmup_teacher_temp = 0.02 is never used",
        ),
        (["--optim.min_lr=0.07"], "optim.min_lr = 0.07 is above the peak learning rate of 0.06"),
        (["--optim.lr=0"], "optim.lr = 0 is below optim.min_lr = 1e-06, so the learning rate would rise to that. Give"),
        (["--optim.min_lr=0.001", "--batch_size=8"], "above the peak learning rate of 0.0009375"),
        (
            ["--precision=fp16", "--health.max_skipped=3"],
            "health.max_skipped = 3: fp16 may skip up to 25 steps",
        ),
        (["--optim.ema_momentum=1"], "optim.ema_momentum = 1.0: the teacher would stay as it was at first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradictions_are_refused_in_one_line(arguments: list[str], words: str):
    with pytest.raises(UsageError) as caught:
        read_recipe(arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--crops.local_size=224"],
        ["--crops.local_size=256", "--crops.locals=0"],
        ["--data.hw_decoder_load=0"],
        ["--data.hw_decoder_load=-1"],
        ["--head.layers=1"],
        ["--head.batch_norm=true", "--head.layers=2"],
        ["--loss.teacher_temp=0.02"],  # the remedy for a collapse is one flag
        ["--loss.teacher_temp=0.07", "--loss.warmup_teacher_temp=0.07"],
        ["--loss.teacher_temp=0.07", "--loss.warmup_teacher_temp_epochs=30"],
        ["--optim.min_lr=0.06"],
        ["--optim.lr=0", "--optim.min_lr=0"],
        ["--optim.ema_momentum=0.9999"],
        ["--precision=bf16", "--health.max_skipped=1"],
    ],
    ids=" ".join,
)
def test_what_only_looks_like_one_is_taken(arguments: list[str]):
    assert read_recipe(arguments)


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
def test_the_recipe_is_printed_by_either_name(flag: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        read_recipe(["--epochs", "7", flag])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["epochs"] == 7
    assert printed["optim"]["name"] == "sgd"


def test_dashes_in_names_are_understood_but_values_stay():
    recipe = read_recipe(["--batch-size", "64", "--crops.local-size=48", "--output", "runs/a-b", "--data.train=x--y-z"])
    assert (recipe.batch_size, recipe.crops.local_size) == (64, 48)
    assert (recipe.output, recipe.data.train) == ("runs/a-b", "x--y-z")
    bare = read_recipe(["--dump-crops", "--seed", "3", "--accept_changes"])
    assert (bare.dump_crops, bare.seed, bare.accept_changes) == (True, 3, True)
    assert not read_recipe(["--dump-crops", "false"]).dump_crops
    with pytest.raises(UsageError, match=r"did you mean batch_size\?"):
        read_recipe(["--batch-sise", "64"])
