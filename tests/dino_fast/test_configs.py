"""The recipes in configs/ have the published values, except where their header says so. Their commands parse."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from dino_fast.__main__ import main as dino_fast
from dino_fast.advise.plan import main as plan
from dino_fast.config import Recipe, list_settings, look_up, read_recipe
from shards.__main__ import main as make_shards

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
IMAGES = {"imagenet": 1_281_167, "imagenette": 9_469, "coco": 123_403, "photos": 5_000, "train": 1_296}  # by data.train

# main_dino.py: its defaults and the constants in it; then what the published README passes for ResNet-50, the arguments
# of the released ResNet-50, and lightly's imagenette_benchmark.py (where it is silent, the defaults). For ViT-S/16 the
# published README passes nothing ("vanilla"), or a few arguments on 16 GPUs ("boosting"). The released S/8, B/16 and
# B/8 have files of arguments, which public repositories quote.
DEFAULTS: dict[str, Any] = {
    "head.out_dim": 65536, "head.hidden_dim": 2048, "head.bottleneck_dim": 256, "head.layers": 3,
    "head.batch_norm": False, "head.norm_last_layer": True,
    "loss.student_temp": 0.1, "loss.teacher_temp": 0.04, "loss.warmup_teacher_temp": 0.04,
    "loss.warmup_teacher_temp_epochs": 0, "loss.center_momentum": 0.9,
    "optim.name": "adamw", "optim.lr": 5e-4, "optim.min_lr": 1e-6, "optim.warmup_epochs": 10,
    "optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1, "optim.ema_momentum": 0.996,
    "crops.global_size": 224, "crops.global_scale": (0.4, 1.0), "crops.local_size": 96,
    "crops.local_scale": (0.05, 0.4), "crops.locals": 8,
    "augment.flip": 0.5, "augment.jitter": 0.8, "augment.brightness": 0.4, "augment.contrast": 0.4,
    "augment.saturation": 0.2, "augment.hue": 0.1, "augment.grayscale": 0.2, "augment.blur_global_1": 1.0,
    "augment.blur_global_2": 0.1, "augment.blur_locals": 0.5, "augment.blur_sigma": (0.1, 2.0),
    "augment.solarize_global_2": 0.2,
    "batch_size": 8 * 64, "epochs": 100, "precision": "fp16", "seed": 0,
}  # fmt: skip
VIT = DEFAULTS | {"backbone": "vit_small_patch16", "drop_path": 0.1}
BOOSTED = VIT | {
    "epochs": 300, "batch_size": 16 * 64, "loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 30,
    "head.norm_last_layer": False,
}  # fmt: skip
SMALL8 = VIT | {
    "backbone": "vit_small_patch8", "epochs": 800, "batch_size": 64 * 16, "precision": "fp32", "crops.locals": 10,
    "head.norm_last_layer": False, "loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 30,
}  # fmt: skip
BASE16 = VIT | {
    "backbone": "vit_base_patch16", "epochs": 400, "batch_size": 32 * 32, "precision": "fp32", "crops.locals": 10,
    "crops.global_scale": (0.25, 1.0), "crops.local_scale": (0.05, 0.25),
    "loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 50,
    "optim.lr": 7.5e-4, "optim.min_lr": 2e-6, "optim.clip_grad": 0.3, "optim.freeze_last_layer_epochs": 3,
}  # fmt: skip
BASE8 = BASE16 | {
    "backbone": "vit_base_patch8", "epochs": 300, "batch_size": 176 * 6, "loss.warmup_teacher_temp": 0.03,
    "optim.lr": 5e-4, "optim.clip_grad": 3.0,
}  # fmt: skip
README = DEFAULTS | {
    "backbone": "resnet50", "optim.name": "sgd", "optim.lr": 0.03, "optim.weight_decay": 1e-4,
    "optim.weight_decay_end": 1e-4, "crops.global_scale": (0.14, 1.0), "crops.local_scale": (0.05, 0.14),
}  # fmt: skip
RELEASED = README | {
    "batch_size": 80 * 51, "epochs": 800, "precision": "fp32", "crops.locals": 6, "optim.name": "lars",
    "optim.lr": 0.3, "optim.min_lr": 0.0048, "optim.weight_decay": 1e-6, "optim.weight_decay_end": 1e-6,
    "optim.clip_grad": 0, "head.out_dim": 60000, "head.batch_norm": True, "head.layers": 2, "head.hidden_dim": 4096,
    "loss.teacher_temp": 0.07, "loss.warmup_teacher_temp_epochs": 50,
}  # fmt: skip
LIGHTLY = DEFAULTS | {
    "backbone": "resnet18", "batch_size": 256, "epochs": 800, "precision": "fp32", "crops.global_size": 128,
    "crops.local_size": 64, "crops.locals": 6, "head.out_dim": 2048, "head.batch_norm": True, "optim.name": "sgd",
    "optim.lr": 0.06, "optim.min_lr": 0, "optim.warmup_epochs": 0, "optim.weight_decay": 5e-4,
    "optim.weight_decay_end": 5e-4, "optim.clip_grad": 0, "optim.ema_momentum": 0.99,
    "optim.freeze_last_layer_epochs": 0,
}  # fmt: skip

# The published values that each recipe follows, and all settings in which it differs.
FOLLOWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_small16_100ep": (VIT, {}),
    "vit_small16_300ep": (BOOSTED, {}),
    "vit_small8": (SMALL8, {}),
    "vit_base16": (BASE16, {}),
    "vit_base8": (BASE8, {}),
    "vit_tiny_imagenette": (
        VIT,
        {
            "backbone": "vit_tiny_patch16", "epochs": 300, "batch_size": 256, "crops.global_size": 128,
            "crops.local_size": 64, "crops.locals": 6, "head.out_dim": 2048,
        },
    ),
    "resnet50_100ep": (README, {}),
    "resnet50_800ep": (RELEASED, {}),
    "resnet50_300ep": (RELEASED, {"epochs": 300, "precision": "fp16"}),
    "resnet50_no_multicrop": (README, {"crops.locals": 0, "crops.local_scale": (0.05, 0.4)}),
    "resnet50_1gpu": (README, {"batch_size": 256, "optim.ema_momentum": 0.9995}),
    "coco_resnet18": (
        README,
        {
            "backbone": "resnet18", "head.out_dim": 4096, "epochs": 400,
            "optim.freeze_last_layer_epochs": 10,
        },
    ),
    "imagenette_resnet18": (LIGHTLY, {"precision": "fp16", "optim.freeze_last_layer_epochs": 1}),
    "own_photos": (
        LIGHTLY,
        {
            "precision": "fp16", "epochs": "30k steps", "optim.freeze_last_layer_epochs": "37 steps",
            "crops.global_size": 224, "crops.local_size": 96,
        },
    ),
}  # fmt: skip
TRIALS = {"debug", "cpu_demo"}  # follow no published run


@functools.cache
def recipe_of(stem: str) -> Recipe:
    return read_recipe(["--config", str(CONFIGS[stem])])


def commands(stem: str, title: str) -> list[list[str]]:
    """Return the commands of a recipe's header under a title, each as a list of words."""
    text = CONFIGS[stem].read_text(encoding="utf-8").replace("\\\n#", " ")
    return [shlex.split(line) for line in re.findall(rf"^# {title}:(.*)$", text, re.MULTILINE)]


def test_every_recipe_is_checked_here():
    assert set(CONFIGS) == set(FOLLOWS) | TRIALS


@pytest.mark.parametrize("stem", FOLLOWS)
def test_a_recipe_differs_from_the_published_one_only_where_it_says_so(stem: str):
    published, otherwise = FOLLOWS[stem]
    recipe = recipe_of(stem)
    differences = {name: look_up(recipe, name) for name in published if look_up(recipe, name) != published[name]}
    assert differences == otherwise
    header = CONFIGS[stem].read_text(encoding="utf-8").split("\n\n")[0]
    assert "# Differs:" in header
    assert all(line.startswith("#") for line in header.splitlines())


@pytest.mark.parametrize("stem", FOLLOWS)
def test_a_recipe_states_all_settings_that_it_depends_on(stem: str):
    """A later change of a default then does not change the recipe."""
    written = yaml.safe_load(CONFIGS[stem].read_text(encoding="utf-8"))
    named = {f"{section}.{name}" for section, part in written.items() if isinstance(part, dict) for name in part}
    published, _ = FOLLOWS[stem]
    by_default = {name for name in published if name not in named | written.keys()}
    locals_are_off = {"crops.local_size", "crops.local_scale"} if written["crops"]["locals"] == 0 else set()
    assert by_default - locals_are_off == {name for name in DEFAULTS if name.startswith("augment.")} | {
        "loss.center_momentum", "seed",
    }  # fmt: skip


def test_every_published_value_has_a_setting():
    assert {*DEFAULTS, *README, *VIT} <= list_settings(Recipe).keys()


@pytest.mark.parametrize("stem", CONFIGS)
def test_the_command_of_a_header_starts_this_recipe(stem: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    [command] = commands(stem, "Command")
    if command == ["make", "demo"]:
        assert re.search(r"^demo:.*\n\t.*-m dino_fast.demo", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    world, arguments = 1, command[2:]
    if command[0] == "torchrun":
        options = get_args_parser().parse_args(command[1:])
        assert options.module
        assert options.training_script == "dino_fast.train"
        world, arguments = int(options.nnodes.split(":")[0]) * int(options.nproc_per_node), options.training_script_args
    else:
        assert command[:2] == ["dino-fast", "train"]
    recipe = read_recipe(arguments)
    assert arguments[:2] == ["--config", f"configs/{stem}.yaml"]
    assert recipe.batch_size % (world * recipe.accumulate) == 0
    if world > 1:
        assert f"{world} GPUs, {recipe.batch_size // world} images each" in CONFIGS[stem].read_text(encoding="utf-8")


@pytest.mark.parametrize("stem", CONFIGS)
def test_the_other_commands_of_a_header_are_valid_calls(stem: str, tmp_path: Path, monkeypatch, capsys):
    """They fail because files are missing (status 1), not because a flag is wrong (status 2)."""
    monkeypatch.chdir(tmp_path)
    for program, *words in commands(stem, "Pack"):
        assert program == "make-shards"
        assert make_shards(words) == 1
        assert words[1] in capsys.readouterr().err
    for program, *words in commands(stem, "Score it"):
        assert program == "dino-fast"
        assert dino_fast(words) == 1
        assert words[2] in capsys.readouterr().err


@pytest.mark.parametrize("stem", CONFIGS)
def test_a_recipe_can_be_planned(stem: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = recipe_of(stem).data.train.split("/")[1]
    assert plan(["--config", str(CONFIGS[stem]), "--images", str(IMAGES[folder])]) == 0
    assert "checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize("stem", FOLLOWS)
def test_flags_in_a_header_are_settings(stem: str):
    """Check flags between backticks, such as `--accumulate 1`."""
    header = CONFIGS[stem].read_text(encoding="utf-8").split("\n\n")[0]
    for flags in re.findall(r"`(--[^`]*)`", header.replace("\n#", " ")):
        read_recipe(["--config", str(CONFIGS[stem]), *shlex.split(flags)])
