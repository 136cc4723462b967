"""A small demo ends well, prints its scores and leaves the user's folder alone. A failure is one line."""

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.demo import user_images
from dino_fast.demo.__main__ import main
from dino_fast.demo.draw import PATTERNS
from dino_fast.demo.image_sets import IMAGES_PER_CLASS
from dino_fast.demo.recipe import RECIPE_FILE, count_steps, fit_recipe, read_demo_recipe
from dino_fast.run.schedules import Schedules
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dino_fast.demo", "--output", str(folder / "demo"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def hash_files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def write_images(folder: Path, names: list[str], count: int, size: tuple[int, int] = (60, 50)) -> Path:
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            levels = np.random.default_rng([place, number]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / name / f"{number}.jpg")
    return folder


@pytest.mark.slow
def test_the_drawn_demo_can_run_twice(tmp_path: Path) -> None:
    for _ in range(2):
        done = run_demo(tmp_path, "--images-per-class", "6", "--steps", "3")
        assert done.returncode == 0, done.stderr
        assert re.search(r"before training +\d+\.\d %\n +after training +\d+\.\d %", done.stdout)
        assert "torchrun --nproc_per_node 8" in done.stdout
    home = tmp_path / "demo" / "drawn"
    assert len(list((home / "images" / "train").rglob("*.jpg"))) == 6 * len(PATTERNS)
    assert len(list((home / "run").glob("step-*.pt"))) == 1
    assert (home / "run" / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_the_users_own_class_folders(tmp_path: Path) -> None:
    mine = write_images(tmp_path / "my images", ["a", "b", "c"], 10)
    (mine / "a" / "broken.jpg").write_bytes(b"\xff\xd8 not much of an image")
    before = hash_files(mine)
    done = run_demo(tmp_path, "--steps", "2", "--images", str(mine))
    assert done.returncode == 0, done.stderr
    assert "a/broken.jpg is left out" in done.stdout
    assert "after training" in done.stdout
    assert "6 images in 3 classes" in done.stdout
    assert "photographs are not" in done.stdout
    assert hash_files(mine) == before


@pytest.mark.slow
def test_a_flat_folder_has_no_score(tmp_path: Path) -> None:
    mine = write_images(tmp_path / "flat", ["."], 20)
    done = run_demo(tmp_path, "--steps", "2", "--images", str(mine))
    assert done.returncode == 0, done.stderr
    assert "There is no k-NN score" in done.stdout
    assert "before training" not in done.stdout


@pytest.mark.parametrize("case", ["missing", "empty", "few", "broken", "around", "inside"])
def test_a_failure_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, images = tmp_path / "demo", tmp_path / case
    if case == "empty":
        images.mkdir()
    elif case in ("few", "around"):
        write_images(images, ["a", "b"], 3)
    elif case == "broken":
        images.mkdir()
        (images / "1.jpg").write_bytes(b"nothing")
    if case == "around":
        output = images / "demo"
    if case == "inside":
        images = write_images(output / "user" / "images", ["a", "b"], 3)
    assert main(["--output", str(output), "--images", str(images)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("demo: ")
    assert "SRC" not in lines[0]
    assert str(images) in lines[0]
    assert not (images / "demo").exists()


def test_a_folder_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="was not made by the demo"):
        user_images.make_empty_folder(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"
    made = user_images.make_empty_folder(tmp_path / "other")
    (made / "step.pt").touch()
    user_images.make_empty_folder(made)
    assert [path.name for path in made.iterdir()] == [user_images.MARKER_FILE]


def test_one_in_five_of_each_class_is_set_aside(make_class_folders: Callable[..., Path], tmp_path: Path) -> None:
    found = user_images.select_images(make_class_folders(classes=3, per_class=10), tmp_path / "demo", limit=1000)
    assert [found.found, found.classes, len(found.copies)] == [30, 3, 30]
    val = [copy for copy in found.copies if copy.target.startswith("val/")]
    assert sorted(copy.target.split("/")[1] for copy in val) == sorted(["class_0", "class_1", "class_2"] * 2)
    assert len({copy.source for copy in found.copies}) == len({copy.target for copy in found.copies}) == 30


def test_the_limit_takes_evenly_from_the_classes(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for name, count in (("few", 3), ("many", 50), ("more", 80)):
        write_images(mine, [name], count, (8, 8))
    found = user_images.select_images(mine, tmp_path / "demo", limit=43)
    taken = [copy.source.split("/")[0] for copy in found.copies]
    assert {name: taken.count(name) for name in set(taken)} == {"few": 3, "many": 20, "more": 20}
    assert "The demo takes 43" in found.describe()


def test_copies_are_small_upright_rgb(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (900, 600), (200, 10, 10)).save(mine / "a.jpg", exif=exif)
    Image.new("RGBA", (90, 70)).save(mine / "b.png")
    found = user_images.select_images(mine, tmp_path / "demo", limit=10)
    assert user_images.copy_images(found, tmp_path / "copies", lambda: None) == []
    sizes = []
    for path in sorted((tmp_path / "copies").rglob("*.jpg")):
        with Image.open(path) as image:
            sizes.append((image.mode, image.size))
    assert sizes == [("RGB", (160, 240)), ("RGB", (90, 70))]


def test_the_recipe_is_fitted_to_the_number_of_images(tmp_path: Path) -> None:
    assert RECIPE_FILE == ROOT / "configs" / "cpu_demo.yaml"
    recipe = read_demo_recipe(tmp_path, seed=0)
    whole = IMAGES_PER_CLASS * len(PATTERNS)
    wanted = count_steps(recipe, whole)
    for images in (16, 40, 100, 700, 1600):
        fit = fit_recipe(recipe, images, None)
        assert fit.batch_size <= images
        assert count_steps(fit, images) == wanted
        schedules = Schedules(fit, images // fit.batch_size)
        assert schedules.warmup_steps == Schedules(recipe, whole // recipe.batch_size).warmup_steps
    assert count_steps(fit_recipe(recipe, 100, 7), 100) == 7


def test_a_wrong_flag_is_one_line_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--image-per-class", "3"])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "unknown flag --image-per-class. Did you mean --images-per-class?" in line
