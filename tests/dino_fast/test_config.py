import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.advise import doctor, plan
from dino_fast.config import Recipe, UsageError, build_parser, check, list_settings, read_recipe
from dino_fast.run.recipe_changes import add_defaults, find_differences, to_plain_data

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))

ROOT = Path(__file__).resolve().parents[2]


def refusal(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        read_recipe(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_in_configs_is_valid_and_headed(path: Path):
    recipe = read_recipe(["--config", str(path)])
    assert recipe.output == f"runs/{path.stem}" or path.stem == "cpu_demo"
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for name in ("Command:", "Hardware:", "Time:", "Score:"):
        assert any(name in line for line in header), name


def test_the_100_epoch_recipe_is_the_published_one():
    recipe = read_recipe(["--config", str(CONFIGS[0].parent / "resnet50_100ep.yaml")])
    assert (recipe.batch_size, recipe.epochs, recipe.backbone) == (512, 100, "resnet50")
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("sgd", 0.03, 1e-4)
    assert (recipe.crops.global_scale, recipe.crops.local_scale, recipe.crops.locals) == ((0.14, 1.0), (0.05, 0.14), 8)
    assert (recipe.head.out_dim, recipe.loss.teacher_temp, recipe.optim.ema_momentum) == (65536, 0.04, 0.996)


def test_flags_override_the_file_and_sections_keep_their_defaults(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 17\ncrops: {locals: 3}\noptim: {lr: 1e-3}\n")
    recipe = read_recipe(["--config", str(file), "--crops.locals", "5", "--crops.global_scale=[0.2, 1]"])
    assert (recipe.epochs, recipe.crops.locals, recipe.optim.lr) == (17, 5, 1e-3)
    assert read_recipe(["--epochs", "5000 steps", "--optim.warmup_epochs", "0.5"]).epochs == "5000 steps"
    assert recipe.crops.global_scale == (0.2, 1.0)
    assert recipe.crops.global_size == 224


@pytest.mark.parametrize(
    "arguments",
    [
        "{file} --output A --batch_size 8 --crops.locals 5",
        "--output A --batch_size 8 --crops.locals 5 {file}",
        "--output A {file} --batch-size=8 --crops.locals 5",
        "--output=A --batch_size=8 --crops.locals=5 {file}",
        "--dump-crops --output A --batch_size 8 {file} --crops.locals 5",
    ],
)
@pytest.mark.parametrize("how", ["--config {}", "--config={}"])
def test_flags_override_the_file_wherever_they_stand(tmp_path: Path, arguments: str, how: str):
    file = tmp_path / "c.yaml"
    file.write_text("output: C\nbatch_size: 64\nepochs: 17\ncrops: {locals: 3, local_size: 48}\ndump_crops: false\n")
    words = arguments.format(file=how.format(file)).split()
    for recipe in (read_recipe(words), plan.parse_arguments(words)[1], doctor.parse_arguments(words)[1]):
        assert (recipe.output, recipe.batch_size, recipe.epochs) == ("A", 8, 17)
        assert (recipe.crops.locals, recipe.crops.local_size) == (5, 48)
        assert recipe.dump_crops == ("--dump-crops" in words)


def test_of_several_files_later_ones_override_single_settings(tmp_path: Path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("epochs: 17\nseed: 1\ncrops: {locals: 3, local_size: 48}\n")
    other.write_text("seed: 2\ncrops: {locals: 4}\n")
    recipe = read_recipe(["--config", str(one), "--batch_size=8", f"--config={other}"])
    assert (recipe.epochs, recipe.seed, recipe.batch_size) == (17, 2, 8)
    assert (recipe.crops.locals, recipe.crops.local_size) == (4, 48)
    swapped = read_recipe(["--seed", "3", "--config", str(other), "--config", str(one)])
    assert (swapped.epochs, swapped.seed, swapped.crops.locals) == (17, 3, 3)


def test_a_config_without_a_file_takes_no_other_flag():
    for arguments in (["--seed", "3", "--config"], ["--config", "--seed", "3"]):
        assert "--config: expected one argument" in refusal(*arguments)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--crops.lcals=3", "unknown setting crops.lcals: did you mean crops.locals?"),
        ("--opt.name=lars", "did you mean optim.name?"),
        ("--epoch=3", "did you mean epochs?"),
        ("--crops.locals=99", "crops.locals = 99: expected a whole number, at least 0, at most 64"),
        ("--crops.locals=1.5", "crops.locals = 1.5: expected a whole number"),
        ("--optim.name=sgdd", "optim.name = sgdd: expected one of sgd, adamw, lars"),
        ("--optim.lr=-1", ": expected a number, at least 0"),
        ("--optim.lr=nan", "optim.lr = nan: expected a number"),
        ("--precision=fp8", "precision = fp8: expected one of fp32, bf16, fp16"),
        ("--crops.local_scale=[0.5,0.1]", "0 < least <= most <= 1"),
        ("--crops.local_scale=0.5", "expected two numbers in brackets"),
        ("--augment.blur_sigma=[0,2]", "augment.blur_sigma"),
        ("--loss.teacher_temp=0.2", "the teacher must be sharper than the student"),
        ("--data={decode: torch, decode_device: gpu}", "needs data.decode = dali or auto"),
        ("--data={decode: torch, decode_device: split}", "needs data.decode = dali or auto"),
        (
            "--optim.freeze_last_layer_epochs=5 stepz",
            "optim.freeze_last_layer_epochs: expected epochs, such as 100, or a",
        ),
        ("--epochs=0", "a run without a length"),
        ("--optim.warmup_epochs=200", "optim.warmup_epochs = 200 is more than epochs = 100"),
        ("--config=nowhere.yaml", "nowhere.yaml: no such file"),
        ("--lrr=3", "did you mean optim.lr?"),
        ("--arch=vit_small", "unknown setting arch: did you mean backbone?"),
        ("--momentum_teacher=0.9", "did you mean optim.ema_momentum?"),
        ("--num-workers=4", "did you mean data.threads?"),
        ("--learning_rate=1", "did you mean optim.lr?"),
        ("--teacher_temp=0.04", "did you mean loss.teacher_temp?"),
        ("--resume=run", "unknown setting resume: there is none. The same command again resumes"),
        ("--gpus=8", "torchrun --nproc_per_node N -m dino_fast.train uses N GPUs"),
        ("--frobnicate=1", "unknown setting frobnicate: --help-all lists all settings"),
        ("--data=shards/train", "unknown setting data: it is a group. Did you mean data.train?"),
        ("--crops=5", "unknown setting crops: it is a group. Did you mean crops.global_size?"),
        ("--config=/", "--config /: this is a folder. Give a recipe in YAML"),
        ("mine.yaml", "mine.yaml stands alone, and settings are flags. Did you mean --config mine.yaml?"),
        ("shards/train", "Did you mean --data.train shards/train?"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(argument: str, words: str):
    assert words in refusal(argument)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("crops:\n  lcals: 3\n", "did you mean crops.locals?"),
        ("epoks: 3\n", "did you mean epochs?"),
        ("crops: [\n", "yaml"),
        ("epochs: !!python/object/apply:os.system ['touch owned']\n", "tag"),
    ],
)
def test_wrong_files_are_refused_and_run_nothing(tmp_path: Path, monkeypatch, text: str, words: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    assert words in refusal("--config", "bad.yaml").lower()
    assert not (tmp_path / "owned").exists()


def test_each_setting_says_what_it_is():
    text = " ".join(build_parser("train").format_help().split())
    names = list_settings(Recipe)
    assert len(names) > 50
    for name in names:
        said = text.split(f"--{name} ")[-1].split("(type:")[0].split("]")[-1]
        assert len(said.split()) >= 4, f"{name}: {said!r}"


@settings(max_examples=40)  # a parser is built for each
@given(st.sampled_from(sorted(list_settings(Recipe))), st.floats(-1e3, 1e3))
def test_numbers_are_taken_or_refused_but_nothing_else_happens(name: str, value: float):
    try:
        recipe = read_recipe([f"--{name}={value}"])
    except UsageError:
        assert refusal(f"--{name}={value}")
    else:
        check(recipe)


def test_a_recipe_survives_yaml(tmp_path: Path):
    recipe = read_recipe(["--config", str(CONFIGS[0])])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_plain_data(recipe)))
    assert read_recipe(["--config", str(tmp_path / "again.yaml")]) == recipe


def test_differences_name_what_changes_the_result():
    recipe = Recipe()
    moved = dataclasses.replace(
        recipe, output="elsewhere", max_steps=5, data=dataclasses.replace(recipe.data, threads=3)
    )
    assert list(find_differences(to_plain_data(recipe), to_plain_data(moved))) == []
    other = dataclasses.replace(moved, seed=1, crops=dataclasses.replace(recipe.crops, locals=2))
    assert list(find_differences(to_plain_data(recipe), to_plain_data(other))) == [
        "crops.locals: 8 -> 2",
        "seed: 0 -> 1",
    ]


def test_a_setting_that_a_recipe_did_not_have_yet_is_no_difference():
    new = {"a": 1, "data": {"order": "global", "shuffle_window": 8}}
    old = add_defaults({"a": 2, "data": {"order": "global"}, "gone": 3}, new)
    assert list(find_differences(old, new)) == ["a: 2 -> 1", "gone: 3 -> None"]


def test_every_argument_of_the_published_code_leads_to_the_setting_that_the_docs_name():
    """docs/from-main-dino.md has them all. Some have the last part of a setting's name, and a few have no setting."""
    page = (ROOT / "docs" / "from-main-dino.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--(\w+)` \| `([\w.]+)`", page, re.MULTILINE)
    assert len(rows) > 20
    for name, setting in rows:
        if name != setting:
            assert f"did you mean {setting}?" in refusal(f"--{name}=1"), name
