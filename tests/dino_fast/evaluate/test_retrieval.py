"""The command `dino-fast retrieval`, on small drawn sets."""

import csv
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dino_fast.__main__ import main as dino_fast

PLACES = ("red", "lime", "blue", "white")


def draw(color: str, number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A block of one color with something dark in another place each time."""
    image = Image.new("RGB", size, color)
    ImageDraw.Draw(image).rectangle((5 * number, 5, 5 * number + 4, 9), "black")
    return image


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """A set of four places: an easy, a hard and a junk image of each. Queries show the place in their box only."""
    (tmp_path / "jpg").mkdir()
    names, rows = [], []
    for place, color in enumerate(PLACES):
        for number, level in enumerate(("easy", "hard", "junk")):
            names.append(f"{color}_{level}")
            draw(color, number).save(tmp_path / "jpg" / f"{names[-1]}.jpg", quality=95)
        query = draw(PLACES[place - 1], 4, (96, 96))
        query.paste(draw(color, 3, (40, 40)), (10, 20))
        query.save(tmp_path / "jpg" / f"q_{color}.jpg", quality=95)
        first = 3 * place
        rows.append({"bbx": [10, 20, 50, 60], "easy": [first], "hard": np.array([first + 1]), "junk": [first + 2]})
    truth = {"imlist": names, "qimlist": [f"q_{color}" for color in PLACES], "gnd": rows}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth, 2))
    return tmp_path


@pytest.fixture
def score(small_network: tuple[str, ...], tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """A function that runs the command; it returns the exit status and the JSON."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "scores.json"
        status = dino_fast(["retrieval", *small_network, "--size", "64", "--json", str(file), *arguments])
        return status, json.loads(file.read_text()) if status == 0 else {}

    return run


def test_cropped_queries_find_their_place_and_whole_ones_another(views: Path, score, capsys):
    status, result = score("--ground-truth", str(views / "gnd.pkl"), "--crop-queries", "--ks", "1,2,50")
    assert status == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("small.pth: 4 queries, 12 images")
    assert printed[1] == "longer side 64, cropped queries, [CLS] or pooled features, 1 scale"
    assert re.sub(" +", " ", printed[2]) == ("easy : mAP 100.00 % mP@1 100.00 % mP@2 100.00 % mP@50 100.00 % 4 queries")
    assert printed[5] == "--ks 50: there are 12 images, and a larger k means all of them."
    assert (result["images"], result["queries"], result["cropped_queries"]) == (12, 4, True)
    for level in ("easy", "medium", "hard"):
        assert result["retrieval"][level] == {"queries": 4, "map": 100, "precision": {"1": 100, "2": 100, "50": 100}}
        assert result["average_precision"][level] == [100] * 4
    whole = score("--ground-truth", str(views / "gnd.pkl"), "--multi-scale")[1]
    assert whole["cropped_queries"] is False
    assert len(whole["scales"]) == 3
    assert whole["retrieval"]["medium"]["map"] < 60


def test_queries_without_positives_are_left_out_and_named(views: Path, score, capsys):
    truth = pickle.loads((views / "gnd.pkl").read_bytes())
    truth["gnd"][1] = {"bbx": None, "easy": [], "hard": [], "junk": [0]}
    truth["gnd"][2]["hard"] = []
    truth["gnd"] = [{name: np.asarray(value).tolist() for name, value in row.items()} for row in truth["gnd"]]
    file = views / "gnd.json"
    file.write_text(json.dumps(truth))
    status, result = score("--ground-truth", str(file), "--crop-queries")
    assert status == 0
    assert "queries without positives count nowhere: 1 (q_lime)" in capsys.readouterr().out
    assert [result["retrieval"][level]["queries"] for level in ("easy", "medium", "hard")] == [3, 3, 2]
    assert result["average_precision"]["hard"][1:3] == [None, None]
    truth["gnd"] = [{"easy": [], "hard": [], "junk": []}] * 4
    file.write_text(json.dumps(truth))
    assert score("--ground-truth", str(file))[0] == 1
    assert "--ground-truth: no query has a positive" in capsys.readouterr().err


def test_an_own_set_whitened_by_gem(views: Path, score, capsys):
    file = views / "own.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("query", "positives", "ignored", "box"))
        for color in PLACES:
            images = [f"{color}_{level}.jpg" for level in ("easy", "hard", "junk")]
            writer.writerow((images[0], ";".join(images[1:]), "", ""))
            writer.writerow((f"q_{color}.jpg", ";".join(images), ";".join(f"q_{c}.jpg" for c in PLACES), "10;20;50;60"))
    status, result = score("--ground-truth", str(file), "--whiten", str(views / "jpg"), "--gem", "2")
    assert status == 0
    printed = capsys.readouterr().out
    assert "whitening learnt on 16 images of" in printed
    assert "fewer than the" in printed
    assert "cropped queries, with GeM (p = 2)" in printed
    assert list(result["retrieval"]) == ["all"]
    assert result["retrieval"]["all"]["map"] > 30  # of a whitening on 16 images
    status, few = score("--ground-truth", str(file), "--limit", "2")
    assert (status, few["queries"]) == (0, 2)
    assert few["images"] < 16
    assert few["retrieval"]["all"]["map"] == 100


def test_what_is_wrong_is_named_in_one_line(views: Path, score, capsys, tmp_path: Path):
    truth = ("--ground-truth", str(views / "gnd.pkl"))
    (views / "empty").mkdir()
    odd = {"imlist": ["/"], "qimlist": ["\0"], "gnd": [{"easy": [0]}]}
    (views / "odd.json").write_text(json.dumps(odd))
    broken = views / "jpg" / "blue_hard.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    for arguments, line in (
        (truth, f"cannot read the image {broken}: Truncated File Read. Replace it"),
        (("--ground-truth", str(views / "no.json")), "no.json: No such file"),
        ((*truth, "--images", str(views / "no")), "there is no such folder"),
        ((*truth, "--images", str(views / "empty")), "12 of 12 images of --ground-truth are not in --images"),
        ((*truth, "--whiten", str(views / "empty")), "--whiten"),
        (("--ground-truth", str(views / "odd.json"), "--images", str(views)), "1 of 1 image of --ground-truth are not"),
    ):
        assert score(*arguments)[0] == 1
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    for arguments in (
        (*truth, "--ks", "0"),
        (*truth, "--size", "8"),
        truth[:1],
        (*truth, "--crop-queries", "--whole-q"),
    ):
        with pytest.raises(SystemExit) as ended:
            score(*arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow  # two processes of torch
def test_two_ranks_give_the_scores_of_one(views: Path, small_network: tuple[str, ...], tmp_path: Path, score):
    truth = ["--ground-truth", str(views / "gnd.pkl"), "--whiten", str(views / "jpg")]
    status, one = score(*truth)
    assert status == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call = ["retrieval", *small_network, "--size", "64", "--json", str(tmp_path / "two.json"), *truth]
    ranks = subprocess.run(
        [*torchrun, "-m", "dino_fast", *call],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ranks.returncode == 0, ranks.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert ranks.stdout.count("4 queries, 12 images") == 1
