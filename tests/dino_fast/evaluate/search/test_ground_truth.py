"""Ground truths of retrieval sets: published pickles, JSON and CSV files, and those that are refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_fast.evaluate.search.ground_truth import GroundTruth, Query, limit_ground_truth, read_ground_truth
from shards.errors import UserError

PUBLISHED: dict[str, Any] = {
    "imlist": ["a", "b", "c", "d"],
    "qimlist": ["q0", "q1"],
    "gnd": [
        {"bbx": [1.5, 2, 30, 40.25], "easy": np.array([0]), "hard": [1, 2], "junk": np.array([], int)},
        {"bbx": None, "easy": [], "hard": [], "junk": [3]},
    ],
}


def _as_json(value: Any) -> str:
    return json.dumps(value, default=lambda array: array.tolist())


@pytest.mark.parametrize("name", ["gnd.pkl", "gnd.pickle", "gnd.JSON"])
def test_a_published_file(name: str, tmp_path: Path):
    file = tmp_path / name
    file.write_bytes(_as_json(PUBLISHED).encode() if "JSON" in name else pickle.dumps(PUBLISHED, 2))
    truth = read_ground_truth(file)
    first, second = truth.queries
    assert truth.images == ("a", "b", "c", "d")
    assert (first.name, first.box) == ("q0", (1.5, 2, 30, 40.25))
    assert second.box is None
    levels = [[ids.tolist() for ids in (query.easy, query.hard, query.junk)] for query in truth.queries]
    assert levels == [[[0], [1, 2], []], [[], [], [3]]]
    assert truth.find_queries_without_positives() == ["q1"]
    choices = {
        name: [[sorted(ids.tolist()) for ids in part] for part in choice]
        for name, choice in truth.list_choices().items()
    }
    assert choices == {
        "easy": [[[0], []], [[1, 2], [3]]],
        "medium": [[[0, 1, 2], []], [[], [3]]],
        "hard": [[[1, 2], []], [[0], [3]]],
    }


def test_the_two_files_of_the_shared_set_are_equal(shared_data: Path):
    of_json, of_pickle = (
        read_ground_truth(shared_data / "evaluations" / "views" / f"gnd_views.{kind}") for kind in ("json", "pkl")
    )
    assert (len(of_json.images), len(of_json.queries)) == (100, 20)
    assert of_json.images == of_pickle.images
    for query, other in zip(of_json.queries, of_pickle.queries, strict=True):
        assert (query.name, query.box) == (other.name, other.box)
        assert all(np.array_equal(getattr(query, level), getattr(other, level)) for level in ("easy", "hard", "junk"))


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.pkl", pickle.dumps({**PUBLISHED, "x": _Hostile()}), r"the pickle is refused, .*mkdir'. Nothing in it was"),
        ("x.pkl", pickle.dumps(PUBLISHED)[:-30], "the pickle is refused, because it holds more than data, or is dam"),
        ("x.pkl", pickle.dumps([1, 2]), "it has not the lists imlist, qimlist and gnd"),
        ("x.pkl", b"", "the pickle is refused"),
        ("x.json", b"{", "it is no JSON file"),
        ("x.json", b"[" * 100_000, "it is no JSON file"),
        ("x.json", b"\xff", "it is no JSON file"),
        ("x.json", b"{}", "it has not the lists imlist, qimlist and gnd"),
        ("x.json", _as_json({**PUBLISHED, "imlist": [1]}), "are to hold names of images"),
        ("x.json", _as_json({**PUBLISHED, "gnd": []}), "it has 2 queries, but 0 entries of gnd"),
        ("x.txt", b"", r"pass a \.pkl, \.json or \.csv file"),
        ("x.csv", b"\xff", "it is no CSV file in UTF-8"),
        ("x.csv", b"", "its first line has no column query"),
        ("x.csv", b"query,ignored\na,b", "its first line has no column positives"),
        ("x.csv", b"query,positives\n", "it has no queries"),
        ("x.csv", b"query,positives\na,a\n,b", "line 3 has no query"),
        ("x.csv", b"query,positives\na,b,c", "line 2 has more cells than the first line"),
        ("x.csv", b"query,positives\na,b;no.jpg", r"line 2 names no\.jpg, which is not in --images"),
        ("x.csv", b"query,positives,box\na,b,1;2;3", "the box of query a is not left, top, right, bottom"),
        ("x.csv", b'query,positives\na,"b', "it is no CSV file"),
        ("x.csv", b"query,positives\na,b\0" + b"x" * 200_000, "it is no CSV file|which is not in --images"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(name: str, content: bytes | str, line: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=line) as refused:
        read_ground_truth(file, ["a", "b"])
    assert str(refused.value).startswith(f"--ground-truth {file}: ")
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "row",
    [
        {"easy": [4]}, {"easy": [-1]}, {"hard": [0.5]}, {"junk": ["a"]}, {"easy": 3}, {"easy": [[1], [1, 2]]},
        {"easy": [[0, 1]]}, {"hard": [2**70]}, {"junk": [True]}, {"easy": "0"}, {"junk": {}}, {"easy": None},
        {"bbx": [1, 2, 3]}, {"bbx": [5, 0, 2, 9]}, {"bbx": [0, 0, float("inf"), 1]}, {"bbx": "abcd"}, {"bbx": 7},
    ],
    ids=str,
)  # fmt: skip
def test_a_query_of_another_form_is_refused(row: dict[str, Any], tmp_path: Path):
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps({**PUBLISHED, "gnd": [row, PUBLISHED["gnd"][1]]}, 2))
    with pytest.raises(UserError, match=r"(easy|hard|junk|the box) of query q0 is "):
        read_ground_truth(file)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no\.pkl: No such file or directory\. Pass the file"):
        read_ground_truth(tmp_path / "no.pkl")


def test_an_own_set(tmp_path: Path):
    file = tmp_path / "own.csv"
    file.write_bytes(
        "\ufeffquery,positives,ignored,box\r\n"
        'a.jpg,"b.jpg; sub/ü.png",c.jpg,1;2;30.5;40\r\n'
        "elsewhere/q.jpg,a.jpg;a.jpg,,\r\n"
        "c.jpg,c.jpg,\r\n".encode()
    )
    truth = read_ground_truth(file, ["a.jpg", "b.jpg", "c.jpg", "sub/ü.png"])
    first, second, third = truth.queries
    assert (first.easy.tolist(), first.junk.tolist(), first.box) == ([1, 3], [2, 0], (1, 2, 30.5, 40))
    assert (second.name, second.easy.tolist(), second.junk.tolist()) == ("elsewhere/q.jpg", [0, 0], [])
    assert third.easy.tolist() == []  # a query does not find itself
    assert list(truth.list_choices()) == ["all"]
    assert truth.find_queries_without_positives() == ["c.jpg"]


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 40), st.data())
def test_a_limited_set_keeps_what_belongs_to_its_queries(images: int, queries: int, limit: int, data: st.DataObject):
    ids = st.lists(st.integers(0, images - 1), unique=True, max_size=5).map(lambda found: np.array(found, np.int64))
    names = tuple(f"image {number}" for number in range(images))
    rows = tuple(Query(f"q{number}", *(data.draw(ids) for _ in range(3))) for number in range(queries))
    few = limit_ground_truth(GroundTruth(names, rows), limit)
    assert len(few.queries) == min(limit, queries)
    theirs = set()
    for query in few.queries:
        whole = rows[int(query.name[1:])]
        for level in ("easy", "hard", "junk"):
            kept, all_ids = getattr(query, level), getattr(whole, level)
            assert [few.images[number] for number in kept] == [names[number] for number in all_ids]
            theirs |= set(all_ids.tolist())
    assert len(few.images) == len(theirs) + min(limit, images - len(theirs))
    assert limit_ground_truth(few, None) is few
