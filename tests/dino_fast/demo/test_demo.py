"""The demo, small: it ends well, prints its scores, leaves the user's folder alone; one line where it cannot go on."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.config import Recipe
from dino_fast.demo import own
from dino_fast.demo.__main__ import DRAWN, RECIPE, fitted, main, recipe_of, steps_of
from dino_fast.demo.draw import PATTERNS
from dino_fast.run.schedules import Schedules
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dino_fast.demo", "--output", str(folder / "demo"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def pictures(folder: Path, names: list[str], count: int, size: tuple[int, int] = (60, 50)) -> Path:
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            levels = np.random.default_rng([place, number]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / name / f"{number}.jpg")
    return folder


@pytest.mark.slow
def test_the_drawn_demo_twice(tmp_path: Path) -> None:
    for _ in range(2):
        done = demo(tmp_path, "--pictures", "6", "--steps", "3")
        assert done.returncode == 0, done.stderr
        assert re.search(r"before training +\d+\.\d %\n +after training +\d+\.\d %", done.stdout)
        assert "torchrun --nproc_per_node 8" in done.stdout
    home = tmp_path / "demo" / "drawn"
    assert len(list((home / "pictures" / "train").rglob("*.jpg"))) == 6 * len(PATTERNS)
    assert len(list((home / "run").glob("step-*.pt"))) == 1
    assert (home / "run" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_ones_own_class_folders(tmp_path: Path) -> None:
    mine = pictures(tmp_path / "my pictures", ["a", "b", "c"], 10)
    (mine / "a" / "broken.jpg").write_bytes(b"\xff\xd8 not much of a picture")
    before = contents(mine)
    done = demo(tmp_path, "--steps", "2", "--images", str(mine))
    assert done.returncode == 0, done.stderr
    assert "left out: a/broken.jpg" in done.stdout
    assert "after training" in done.stdout
    assert "6 pictures in 3 classes" in done.stdout
    assert "photographs are not" in done.stdout
    assert contents(mine) == before


@pytest.mark.slow
def test_a_flat_folder_has_no_score(tmp_path: Path) -> None:
    mine = pictures(tmp_path / "flat", ["."], 20)
    done = demo(tmp_path, "--steps", "2", "--images", str(mine))
    assert done.returncode == 0, done.stderr
    assert "No k-NN score" in done.stdout
    assert "before training" not in done.stdout


@pytest.mark.parametrize("case", ["missing", "empty", "few", "broken", "around", "inside"])
def test_what_it_cannot_do_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, images = tmp_path / "demo", tmp_path / case
    if case == "empty":
        images.mkdir()
    elif case in ("few", "around"):
        pictures(images, ["a", "b"], 3)
    elif case == "broken":
        images.mkdir()
        (images / "1.jpg").write_bytes(b"nothing")
    if case == "around":
        output = images / "demo"
    if case == "inside":
        images = pictures(output / "own" / "pictures", ["a", "b"], 3)
    assert main(["--output", str(output), "--images", str(images)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("demo: ")
    assert "SRC" not in lines[0]
    assert str(images) in lines[0]
    assert not (images / "demo").exists()


def test_what_it_did_not_make_it_does_not_clear(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not made by the demo"):
        own.cleared(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"
    made = own.cleared(tmp_path / "other")
    (made / "step.pt").touch()
    own.cleared(made)
    assert [path.name for path in made.iterdir()] == [own.MARK]


def test_one_in_five_of_each_class_is_set_aside(make_class_folders: Callable[..., Path], tmp_path: Path) -> None:
    found = own.survey(make_class_folders(classes=3, per_class=10), tmp_path / "demo", most=1000)
    assert [found.found, found.classes, len(found.chosen)] == [30, 3, 30]
    val = [choice for choice in found.chosen if choice.target.startswith("val/")]
    assert sorted(choice.target.split("/")[1] for choice in val) == sorted(["class_0", "class_1", "class_2"] * 2)
    assert len({choice.source for choice in found.chosen}) == len({choice.target for choice in found.chosen}) == 30


def test_the_limit_takes_evenly_from_the_classes(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name, count in (("few", 3), ("many", 50), ("more", 80)):
        pictures(mine, [name], count, (8, 8))
    found = own.survey(mine, tmp_path / "demo", most=43)
    taken = [choice.source.split("/")[0] for choice in found.chosen]
    assert {name: taken.count(name) for name in set(taken)} == {"few": 3, "many": 20, "more": 20}
    assert "taking 43" in found.text()


def test_copies_are_small_upright_rgb(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (900, 600), (200, 10, 10)).save(mine / "a.jpg", exif=exif)
    Image.new("RGBA", (90, 70)).save(mine / "b.png")
    found = own.survey(mine, tmp_path / "demo", most=10)
    assert own.stage(found, tmp_path / "copies", lambda: None) == []
    sizes = []
    for path in sorted((tmp_path / "copies").rglob("*.jpg")):
        with Image.open(path) as image:
            sizes.append((image.mode, image.size))
    assert sizes == [("RGB", (160, 240)), ("RGB", (90, 70))]


def test_the_recipe_is_fitted_to_the_number_of_pictures(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    whole = DRAWN * len(PATTERNS)
    wanted = steps_of(recipe, whole)
    for pictures_ in (16, 40, 100, 700, 1600):
        fit = fitted(recipe, pictures_, None)
        assert fit.batch_size <= pictures_
        assert steps_of(fit, pictures_) == wanted
        schedules = Schedules(fit, pictures_ // fit.batch_size)
        assert schedules.warmup_steps == Schedules(recipe, whole // recipe.batch_size).warmup_steps
    assert steps_of(fitted(recipe, 100, 7), 100) == 7


def read(home: Path) -> Recipe:
    import argparse

    assert RECIPE == ROOT / "configs" / "cpu_demo.yaml"
    return recipe_of(home, argparse.Namespace(seed=0))
