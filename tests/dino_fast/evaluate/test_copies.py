"""The layout of Copydays, and the command `dino-fast copies`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.__main__ import main as dino_fast
from dino_fast.evaluate.search.copydays import find_copies, limit_copies, match_copies
from shards.errors import UserError


def draw(number: int) -> Image.Image:
    """Blocks of random colors."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST)


@pytest.fixture
def copydays(tmp_path: Path) -> Path:
    """Five originals with copies of them: brighter ones, small ones, two strong ones of each, and distractors."""
    folder = tmp_path / "copydays"
    for number in range(5):
        image = draw(number)
        copies = {
            f"original/{2000 + number}00.jpg": image,
            f"jpegqual/10/{2000 + number}00.jpg": image,
            f"jpegqual/3/{2000 + number}00.jpg": image,
            f"resize/{2000 + number}00.png": image.resize((16, 16)),
            f"strong/{2000 + number}01.jpg": image.point(lambda level: level // 2 + 60),
            f"strong/{2000 + number}02.jpg": draw(70 + number),  # of nothing
            f"distractors/{number}.jpg": draw(50 + number),
        }
        for name, copy in copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy.save(folder / name)
    return folder


def test_copies_belong_to_the_original_of_their_name(copydays: Path):
    found = find_copies(copydays)
    assert list(found.blocks) == ["original", "strong", "jpegqual/3", "jpegqual/10", "resize"]
    assert found.blocks["strong"].originals == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.blocks["resize"].files[4] == "resize/200400.png"
    assert found.has_distractors
    (copydays / "resize" / "200300.png").rename(copydays / "resize" / "999900.png")
    found = find_copies(copydays)
    assert found.blocks["resize"].originals == [0, 1, 2, 4]
    assert found.without_original == ["resize/999900.png"]
    few = limit_copies(found, 2)
    assert few.originals == ["original/200000.jpg", "original/200200.jpg"]
    assert few.blocks["strong"].originals == [0, 0, 1, 1]
    assert few.blocks["strong"].files[2:] == ["strong/200201.jpg", "strong/200202.jpg"]


def test_strong_copies_of_copydays_match_by_four_characters():
    originals = [f"original/{2000 + number}00.jpg" for number in range(157)]
    strong = [f"strong/{2000 + number}{1 + times:02d}.jpg" for number in range(157) for times in range(2)]
    assert list(match_copies("strong", strong, originals).values()) == [number // 2 for number in range(314)]
    assert match_copies("crops/10", ["crops/10/200101.jpg"], originals) == {}


def test_another_folder_is_refused(tmp_path: Path, copydays: Path):
    with pytest.raises(UserError, match="is no folder of copies: it needs a folder original"):
        find_copies(copydays / "jpegqual")
    (tmp_path / "only" / "original").mkdir(parents=True)
    draw(0).save(tmp_path / "only" / "original" / "a.png")
    with pytest.raises(UserError, match="make-attacks SRC OUT` makes such a folder"):
        find_copies(tmp_path / "only")
    with pytest.raises(UserError, match="cannot list"):
        find_copies(tmp_path / "none")


def test_the_command(copydays: Path, small_network: tuple[str, ...], tmp_path: Path, capsys):
    (copydays / "distractors" / "broken.jpg").write_bytes(b"")
    file = tmp_path / "copies.json"
    call = ["copies", *small_network, "--images", str(copydays), "--size", "64", "--json", str(file)]
    assert dino_fast(call) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"{copydays / 'distractors'}: 1 image could not be read" in printed[0]
    assert printed[1].endswith("small.pth: 5 originals, 5 distractors")
    assert printed[2] == "squashed to 64 x 64, with GeM (p = 4), 1 scale"
    assert printed[3].split() == ["original", ":", "mAP", "100.00", "%", "found", "first", "100.00", "%", "5", "images"]
    result = json.loads(file.read_text())
    assert result["copies"]["jpegqual/10"] == {"images": 5, "map": 100, "first": 100}
    assert result["copies"]["strong"]["images"] == 10
    assert 20 < result["copies"]["strong"]["map"] < 90
    assert (result["gem"], result["whiten"], result["distractors"]) == (4, None, 5)
    more = ["--distractors", str(copydays / "strong"), "--whiten", str(copydays / "distractors"), "--limit", "4"]
    assert dino_fast([*call, *more]) == 0
    printed = capsys.readouterr().out
    assert "whitening learnt on 4 images" in printed
    assert "did not even find themselves" not in printed
    result = json.loads(file.read_text())
    assert (result["originals"], result["distractors"], result["copies"]["strong"]["images"]) == (4, 4, 8)
    assert dino_fast([*call, "--distractors", str(copydays / "original")]) == 0
    assert re.search(r"[1-5] originals? did not even find themselves: they are among", capsys.readouterr().out)


def test_what_is_wrong_is_named_in_one_line(copydays: Path, small_network: tuple[str, ...], capsys):
    call = ["copies", *small_network, "--size", "64"]
    broken = copydays / "resize" / "200100.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for arguments, line in (
        (("--images", str(copydays)), f"cannot read the image {broken}: "),
        (("--images", str(copydays / "strong")), "is no folder of copies"),
        (("--images", str(copydays), "--distractors", str(copydays / "no")), "--distractors"),
    ):
        assert dino_fast([*call, *arguments]) == 1
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    for wrong in (call, ["copies"], ["copies", "--make-attacks", "x"]):
        with pytest.raises(SystemExit) as ended:
            dino_fast(wrong)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
