"""Changed copies of images, and the folder that they are written to."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.__main__ import main as dino_fast
from dino_fast.evaluate.search import attacks
from dino_fast.evaluate.search.attacks import ATTACKS, make_copy
from dino_fast.evaluate.search.copydays import find_copies
from tests.conftest import class_image

SIZE = (120, 80)


def change(name: str, image: Image.Image, number: int = 0, seed: int = 0) -> Image.Image:
    return ATTACKS[name].change(image, np.random.default_rng([seed, number]))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_copy_is_a_function_of_seed_number_and_attack(name: str):
    image = class_image(1, 2, SIZE)
    copy = make_copy(image, 3, 4, name)
    assert copy == make_copy(image, 3, 4, name)
    decoded = Image.open(io.BytesIO(copy))
    assert (decoded.format, decoded.mode) == ("JPEG", "RGB")
    drawn = name.startswith(("crops", "text", "strong"))
    assert (copy != make_copy(image, 3, 5, name)) == drawn
    assert (copy != make_copy(image, 4, 4, name)) == drawn
    tiny = Image.open(io.BytesIO(make_copy(Image.new("RGB", (1, 1)), 0, 0, name)))
    assert min(tiny.size) >= 1


@pytest.mark.parametrize("percent", [10, 50, 80])
def test_a_crop_is_a_part_of_the_image_and_lacks_this_share(percent: int):
    levels = np.arange(120 * 80, dtype=np.int32).reshape(80, 120)
    image = Image.fromarray(np.stack([levels % 256, levels // 256, 0 * levels], -1).astype(np.uint8))
    places = set()
    for number in range(20):
        cropped = np.asarray(change(f"crops/{percent}", image, number)).astype(int)
        height, width = cropped.shape[:2]
        assert height * width / levels.size == pytest.approx(1 - percent / 100, rel=0.04)
        assert width / height == pytest.approx(1.5, rel=0.05)
        top, left = divmod(cropped[0, 0, 0] + 256 * cropped[0, 0, 1], 120)
        places.add((top, left))
        assert np.array_equal(cropped, np.asarray(image)[top : top + height, left : left + width])
    assert len(places) > 10


def test_what_the_attacks_do():
    image = class_image(1, 2, SIZE)
    levels = np.asarray(image)
    assert change("resize/25", image).size == (30, 20)
    assert np.array_equal(change("flip/horizontal", image), levels[:, ::-1])
    assert np.array_equal(change("flip/vertical", image), levels[::-1])
    assert np.array_equal(change("jpegqual/3", image), levels)
    sizes = [len(make_copy(image, 0, 0, f"jpegqual/{quality}")) for quality in (3, 20, 75)]
    assert sizes == sorted(sizes)
    edges = [float(np.abs(np.diff(np.asarray(change(f"blur/{n}", image)).astype(int))).mean()) for n in (1, 4)]
    assert edges[1] < edges[0] < np.abs(np.diff(levels.astype(int))).mean()
    written = (np.asarray(change("text/3", image)) != levels).any(2)
    assert 0.005 < written.mean() < 0.4
    gray = np.asarray(attacks.remove_color(image, np.random.default_rng(0)))
    assert (gray == gray[..., :1]).all()
    strong = {change("strong", image, number).size for number in range(8)}
    assert all(width * height <= 0.72 * 120 * 80 for width, height in strong)


def read_rows(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def test_a_folder_of_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = tmp_path / "mine", tmp_path / "out"
    (source / "b").mkdir(parents=True)
    class_image(0, 0, SIZE).save(source / "b" / "z.png")
    class_image(0, 1, SIZE).save(source / "ä x.jpg")
    class_image(0, 2, SIZE).convert("L").save(source / "c.jpeg")
    (source / "broken.jpg").write_bytes(b"no image")
    (source / "notes.txt").write_text("no image")
    call = ["copies", "--make-attacks", str(source), str(out)]
    assert dino_fast(call) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{source}: 1 image could not be read: {source / 'broken.jpg'}: ")
    assert printed[1] == f"{out}: 3 originals, and {3 * len(ATTACKS)} changed images of them"
    rows = read_rows(out / "origin.csv")
    assert rows[0] == ["original", "source"]
    assert [row[1] for row in rows[1:]] == sorted(["b/z.png", "ä x.jpg", "c.jpeg"])
    for original, name in rows[1:]:
        assert (out / original).read_bytes() == (source / name).read_bytes()
    found = find_copies(out)
    assert list(found.blocks)[:2] == ["original", "strong"]
    assert set(found.blocks) == {"original", *ATTACKS}
    assert all(block.originals == [0, 1, 2] for block in found.blocks.values())
    assert not found.without_original
    assert sorted(tmp_path.iterdir()) == [source, out]
    # An image gets the same copies alone.
    number = [row[1] for row in rows[1:]].index("c.jpeg")
    copy = out / "crops/50" / f"{Path(rows[1:][number][0]).stem}.jpg"
    with Image.open(source / "c.jpeg") as image:
        place = int(copy.stem[:-2])
        assert copy.read_bytes() == make_copy(image.convert("RGB"), 0, place, "crops/50")
    # And what is there is not overwritten.
    assert dino_fast(call) == 1
    assert "exists already. Name a folder that does not exist yet." in capsys.readouterr().err


def test_copies_of_shards_and_of_some_images(labeled_shards: Path, tmp_path: Path, capsys):
    call = ["copies", "--make-attacks", str(labeled_shards), str(tmp_path / "out"), "--limit", "3", "--seed", "5"]
    assert dino_fast(call) == 0
    assert "3 originals" in capsys.readouterr().out
    rows = read_rows(tmp_path / "out" / "origin.csv")
    assert [row[0][-4:] for row in rows[1:]] == [".jpg"] * 3
    assert all(".tar/" in row[1] for row in rows[1:])


@pytest.mark.parametrize(
    ("source", "out", "line"),
    [
        ("none", "out", "there is no such folder"),
        ("empty", "out", "there are no images in it"),
        ("bad", "out", "no image can be read. The first is"),
        ("good", "no/out", "cannot write"),
        ("good", "good", "exists already"),
    ],
)
def test_a_wrong_call_is_one_line_and_leaves_nothing(source: str, out: str, line: str, tmp_path: Path, capsys):
    for name in ("empty", "bad", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"")
    class_image(0, 0, SIZE).save(tmp_path / "good" / "x.jpg")
    (tmp_path / "no").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    assert dino_fast(["copies", "--make-attacks", str(tmp_path / source), str(tmp_path / out)]) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
