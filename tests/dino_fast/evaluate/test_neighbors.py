"""The nearest images of some queries: against a loop, and as the command writes them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dino_fast.__main__ import main as dino_fast
from dino_fast.evaluate.neighbors import Queries, choose_at_random, find_neighbors
from dino_fast.evaluate.search.neighbor_sheet import SIDE, SheetCell, draw_neighbor_sheet
from shards.inspect.sheet_cells import CAPTION, GAP
from tests.conftest import class_image


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99), st.data())
def test_neighbors_are_the_nearest_others(images: int, queries: int, k: int, seed: int, data: st.DataObject):
    r = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 5, dtype=torch.float64, generator=r)
    rows = data.draw(st.lists(st.none() | st.integers(0, images - 1), min_size=queries, max_size=queries))
    asked = torch.stack([torch.randn(5, dtype=torch.float64, generator=r) if n is None else features[n] for n in rows])
    numbers = [10 * number for number in range(images)]
    found = find_neighbors(Queries([str(n) for n in range(queries)], asked, rows), features, numbers, k)
    for neighbors, query, own in zip(found, asked, rows, strict=True):
        cosines = torch.cosine_similarity(query[None], features)
        order = [n for n in cosines.argsort(descending=True).tolist() if n != own][:k]
        assert neighbors.numbers == [10 * number for number in order]
        assert neighbors.cosines == pytest.approx(cosines[order].tolist())


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 9))
def test_random_queries_are_different_images(count: int, wanted: int, seed: int):
    chosen = choose_at_random(count, wanted, seed)
    assert chosen == sorted(set(chosen)) == choose_at_random(count, wanted, seed)
    assert len(chosen) == min(count, wanted)
    assert set(chosen) <= set(range(count))


def test_a_sheet_has_the_query_on_the_left_and_its_neighbors_in_order():
    colors = ("red", "lime", "blue")
    cells = [SheetCell(Image.new("RGB", (30, 30), color), f"{color}.jpg", "0.9") for color in colors]
    sheet = np.asarray(draw_neighbor_sheet([cells, [SheetCell("it is broken", "x", "query"), *cells[:1]]]))
    assert sheet.shape == (GAP + 2 * (SIDE + CAPTION + GAP), 2 * GAP + 3 * (SIDE + GAP), 3)
    middle = GAP + SIDE // 2
    lefts = [GAP, 2 * GAP + SIDE + GAP, 2 * GAP + 2 * (SIDE + GAP)]
    assert [sheet[middle, left + SIDE // 2].tolist() for left in lefts] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    second = sheet[GAP + SIDE + CAPTION + GAP :]
    assert second[SIDE // 2, lefts[1] + SIDE // 2].tolist() == [255, 0, 0]
    assert (second[:SIDE, lefts[0] : lefts[0] + SIDE] == [170, 20, 20]).all(2).any()  # the reason, in red


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))


def test_the_files_that_the_command_writes(make_class_folders, small_network, tmp_path: Path, capsys):
    folder = make_class_folders(classes=2, per_class=3)
    twin = folder / "class_0" / "twin.png"
    with Image.open(folder / "class_0" / "0001.jpg") as image:
        image.save(twin)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    outside = tmp_path / "outside.jpg"
    class_image(1, 1, (50, 60)).save(outside)
    files = {flag: tmp_path / f"found.{kind}" for flag, kind in (("output", "png"), ("csv", "csv"), ("json", "json"))}
    call = ["neighbors", *small_network, "--images", str(folder), "--crop", "32"]
    call += [part for flag, file in files.items() for part in (f"--{flag}", str(file))]
    assert dino_fast([*call, "--queries", str(folder / "class_0" / "0001.jpg"), str(outside), "-k", "3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("2 queries among 7 images")
    assert "1 image could not be read: " in printed[1]
    rows = read_rows(files["csv"])
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    assert (rows[0]["neighbor"], rows[0]["cosine"]) == ("class_0/twin.png", "1.000000")
    own = [row["neighbor"] for row in rows if row["query"] != str(outside)]
    assert "class_0/0001.jpg" not in own
    result = json.loads(files["json"].read_text())
    assert [found["query"] for found in result["neighbors"]] == [rows[0]["query"], str(outside)]
    assert result["neighbors"][0]["neighbors"] == own
    with Image.open(files["output"]) as sheet:
        assert sheet.size == (2 * GAP + 4 * (SIDE + GAP), GAP + 2 * (SIDE + CAPTION + GAP))
    assert dino_fast([*call, "--random", "99", "-k", "99", "--limit", "4"]) == 0  # one of the four is broken
    printed = capsys.readouterr().out
    assert "3 queries among 3 images" in printed
    assert "-k 99: there are 2 other images, and all of them are listed." in printed
    assert "shows at most 100 queries and 20 neighbors of each." in printed


def test_neighbors_among_shards(labeled_shards: Path, small_network, tmp_path: Path, capsys):
    call = ["neighbors", *small_network, "--images", str(labeled_shards), "--crop", "32", "--random", "2"]
    assert dino_fast([*call, "--csv", str(tmp_path / "a.csv")]) == 0
    assert "2 queries among 40 images" in capsys.readouterr().out
    rows = read_rows(tmp_path / "a.csv")
    assert len(rows) == 20
    assert all(row["query"].startswith("train-") and row["neighbor"].startswith("train-") for row in rows)


def test_what_is_wrong_is_named_in_one_line(make_class_folders, small_network, tmp_path: Path, capsys):
    folder = make_class_folders(classes=1, per_class=2)
    call = ["neighbors", *small_network, "--crop", "32"]
    for arguments, line in (
        (("--images", str(tmp_path / "no"), "--csv", str(tmp_path / "x")), "--images"),
        (("--images", str(folder), "--csv", str(tmp_path / "no" / "x")), "--csv"),
        (("--images", str(folder), "--csv", str(tmp_path)), "is a folder. Name a file in it"),
        (
            ("--images", str(folder), "--csv", str(tmp_path / "x"), "--queries", "no.jpg"),
            "cannot read the image no.jpg",
        ),
    ):
        assert dino_fast([*call, *arguments]) == 1
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
    for wrong in ((), ("--output", str(tmp_path / "x.jpg"))):
        with pytest.raises(SystemExit) as ended:
            dino_fast([*call, "--images", str(folder), *wrong])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()
