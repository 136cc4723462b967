"""What a new user gets wrong, each tried as typed: it ends in a right result, or in one line to act on."""

import contextlib
import io
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.index import ShardIndex
from shards.layout import DUPLICATES_FILE, INDEX_FILE, MANIFEST_FILE, REJECTED_FILE
from shards.packing import workers
from tests.shards.archives import tar_of, zip_of

ROOT = Path(__file__).resolve().parents[2]
LONG_FOLDERS = "/".join(["d" * 120] * 4)
Typed = Callable[[str], tuple[int, str, str]]
Call = Callable[[str], str]


def inline(function: Callable[..., Any], task_of: Callable[[int], Any], count: int, *_: object) -> list[Any]:
    """`workers.run_tasks` in this process."""
    return [function(task_of(number), lambda done: None) for number in range(count)]


def picture(seed: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def numbered(folder: str, count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{folder}/{number}.jpg": picture(first + number) for number in range(count)}


def class_folders(folder: str, count: int, first: int = 0) -> dict[str, bytes]:
    return numbered(f"{folder}/cat", count, first) | numbered(f"{folder}/dog", count, first + count)


IN_CLASSES = {name.removeprefix("x/"): data for name, data in class_folders("x", 3).items()}
SAMPLES = {"1.jpg": picture(1), "1.cls": b"1", "2.jpg": picture(2), "3.jpg": picture(3), "3.cls": b"0"}

TREES = {
    **class_folders("set/train", 4),
    **class_folders("set/val", 2, 50),
    **class_folders("above/x/train", 1),
    **numbered("coco/unlabeled2017", 2),
    "coco/annotations/instances.json": b"{}",
    **numbered("splits/train2017", 2),
    **numbered("splits/val2017", 1, 9),
    **numbered("loose/cat", 1),
    "loose/3.jpg": picture(3),
    **numbered("other/cat", 1),
    **numbered("other/eel", 1, 1),
    **class_folders("literal/[ab]*?", 1),
    **class_folders("-dash", 1),
    **class_folders("sp ace", 1),
    "single.jpg": picture(1),
    "notes/readme.txt": b"words",
    "heic/1.HEIC": b"\0\0\0\x1cftypheic",
    "broken/a/1.jpg": b"<!DOCTYPE html>",
    "broken/b/2.jpg": b"",
}
LABELS = {
    "csv/right": b"0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n",
    "csv/header, more lines, CRLF": b"file,label\r\n0.jpg,a\r\n1.jpg,b\r\n2.jpg,a\r\n3.jpg,b\r\n9.jpg,c\r\n\r\n",
    "csv/byte order mark": b"\xef\xbb\xbf0.jpg,a\n1.jpg,b\n2.jpg,a\n3.jpg,b\n",
    "csv/semicolons": b"file;label\n0.jpg;a\n1.jpg;b\n2.jpg;a\n3.jpg;b\n",
    "csv/tabs": b"0\ta\n1\tb\n2\ta\n3\tb\n",
    "csv/a line each": b"a\nb\na\nb\n",
    "csv/lines missing": b"0.jpg,a\n1.jpg,b\n",
    "csv/blanks": b"0.jpg a\n1.jpg b\n2.jpg a\n3.jpg b\n",
    "csv/blanks and a header": b"file label\n0.jpg a\n1.jpg b\n2.jpg a\n3.jpg b\n",
    "csv/too many": b"a\nb\na\nb\na\n",
    "csv/two classes": b"0.jpg,a\n0.jpg,b\n1.jpg,b\n2.jpg,a\n3.jpg,b\n",
    "csv/half a line": b"0.jpg,a\n1.jpg\n",
    "csv/open quote": b'0.jpg,a\n1.jpg,"' + b"x\n" * 200_000,
    "csv/empty": b"\n\n",
    "csv/utf-16": "0.jpg,a\n1.jpg,b\n".encode("utf-16"),
    "csv/numbers": b"0.jpg,10\n1.jpg,2\n2.jpg,10\n3.jpg,2\n",
    "csv/kit.tar.gz": tar_of({"kit/readme": bytes(range(256)) * 99}, "w:gz")[:200],
    "names/typed": b"dog\r\n\r\n",
    "names/comma": b"eel, electric\ncat\n",
}
GZIPPED, TARRED, ZIPPED = tar_of(IN_CLASSES, "w:gz"), tar_of(IN_CLASSES), zip_of(IN_CLASSES)
ARCHIVES = {
    "good.tar": TARRED,
    "good.zip": ZIPPED,
    "gzipped.tar": GZIPPED,
    "samples.tar": tar_of(SAMPLES),
    "one class.tar": tar_of(numbered("cat", 2)),
    "level.tar": tar_of(class_folders("set/train", 1) | class_folders("set/val", 1)),
    "split/a-train.tar": TARRED,
    "split/a-val.tar": TARRED,
    "both/1.jpg": picture(1),
    "both/w.tar": TARRED,
    "bad/zero.tar": b"",
    "bad/zero.zip": b"",
    "bad/zero.parquet": b"",
    "bad/half.tar": TARRED[: len(TARRED) // 2],
    "bad/half.tar.gz": GZIPPED[: len(GZIPPED) // 2],
    "bad/half.zip": ZIPPED[: len(ZIPPED) // 2],
    "bad/half.parquet": b"PAR1" + bytes(2000),
    "bad/page.zip": b"<html>404</html>",
    "bad/pointer.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "bad/label.tar": tar_of({"2.jpg": picture(2), "2.cls": b"\xff"} | SAMPLES),
}


@pytest.fixture(scope="module")
def world_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    put(root, TREES | LABELS | ARCHIVES)
    for name in ("loop", "self", "lost", "gone"):
        put(root / name, class_folders(".", 1))
    (root / "loop" / "cat" / "up").symlink_to("..")
    (root / "self" / "cat" / "me.jpg").symlink_to("me.jpg")
    (root / "lost" / "eel").symlink_to("/nowhere/eel")
    (root / "gone" / "cat" / "x.jpg").symlink_to("/nowhere.jpg")
    (root / "grown" / "cat").mkdir(parents=True)
    (root / "grown" / "cat" / "x.jpg").symlink_to("/proc/version")  # listed with 0 bytes, read with more
    os.mkfifo(root / "pipe")
    packings = {"packed": "set/train", "flat": "set/train/cat", "several/1": "set/train", "several/2": "other"}
    for name, source in packings.items():
        assert main(["pack", str(root / source), str(root / name), "--workers", "1"]) == 0
    (root / "unfinished" / ".parts").mkdir(parents=True)
    (root / "unfinished" / ".parts" / "plan.json").write_text("{}")
    return root


@pytest.fixture
def world(world_once: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder to be in, with all the sources; a test leaves it as it was."""
    monkeypatch.chdir(world_once)
    before = sorted(world_once.rglob("*"))
    yield world_once
    assert sorted(world_once.rglob("*")) == before


@pytest.fixture
def typed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    """What becomes of a line typed after make-shards: status, stdout, stderr. OUT in it is a new folder.

    Here without worker processes, which take longer to start than these sources to pack.
    """
    monkeypatch.setattr(workers, "run_tasks", inline)

    def run(line: str) -> tuple[int, str, str]:
        try:
            status = main([re.sub("^OUT", f"{tmp_path}/out", word) for word in shlex.split(line)])
        except SystemExit as exit:
            status = int(exit.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def refused(typed: Typed, tmp_path: Path) -> Call:
    """The one line that a call ends in, and nothing is left of it."""

    def run(line: str) -> str:
        status, _, errors = typed(line)
        assert status in (1, 2)
        assert errors.startswith("make-shards")
        assert errors.endswith("\n")
        assert errors[:-1].isprintable()
        assert not (tmp_path / "out").exists()
        return errors[:-1]

    return run


@pytest.fixture
def packed(typed: Typed, tmp_path: Path) -> Call:
    """The first line that a call prints which packs."""

    def run(line: str) -> str:
        status, printed, errors = typed(line)
        assert (status, errors) == (0, "")
        assert all(text.isprintable() for text in printed.split("\n"))
        return printed.split("\n")[0]

    return run


def balance(out: Path) -> dict[str | None, int]:
    """Samples by class; all of them are read."""
    with ShardIndex(out) as index:
        index.read(range(len(index)))
        return dict(Counter([*index.classes, None][label] for label in index.labels.tolist()))


REFUSED = {
    # ---- the wrong level
    "pack set OUT": "set holds train, val, which are no classes; pack each by itself (set/train, …), or use --format",
    "pack above OUT": "above: all pictures lie in x/train; give above/x/train, or use --format folders to take x as",
    "pack coco OUT": "all pictures lie in unlabeled2017; give coco/unlabeled2017, or",
    "pack splits OUT": "splits holds train2017, val2017, which are no classes; pack each by itself (splits/train2017",
    "pack level.tar OUT": "level.tar holds train, val, which are no classes; unpack it and pack each by itself",
    "pack split OUT": "split holds archives of train, val; keep them apart: to pack one, give a pattern in",
    "pack loose OUT": "loose: pictures (3.jpg, …) beside folders of pictures; use --format flat",
    "pack set/train/cat OUT --format folders": "0.jpg lies in no class folder; move it into one, or use --format flat",
    "pack single.jpg OUT": "single.jpg: neither tar, zip nor parquet, or damaged; give the folder",
    # ---- nothing to pack
    "pack nowhere OUT": "nowhere: no such folder or file; give the folder",
    "pack nowhere/*.tar OUT": "nowhere/*.tar: no such folder or file",
    "pack notes OUT": "notes: no pictures",
    "pack heic OUT": "heic: not one of 1 pictures decodes (1.HEIC: AVIF or HEIF picture",
    "pack broken OUT": "not one of 2 pictures decodes (a/1.jpg: no JPEG, PNG or WebP picture",
    "pack pipe OUT": "pipe is neither a folder nor a file",
    "pack '' OUT": "argument SRC: an empty path; perhaps a shell variable is not set",
    "pack set/train ''": "argument OUT: an empty path; perhaps a shell variable is not set",
    "pack set/train": "arguments are required: OUT; see make-shards pack --help",
    "pack set/train set/val OUT": "too many arguments: ",
    "pack set/train OUT --fast": "no such option: --fast",
    # ---- links
    "pack loop OUT": "loop/cat/up links to a folder that it lies in; take the link out of SRC",
    "pack self OUT": "cannot read self/cat/me.jpg: Too many levels of symbolic links; make it readable or take it out",
    "pack lost OUT": "cannot read lost/eel: No such file or directory; make it readable or take it out of SRC",
    "pack gone OUT": "cannot read gone/cat/x.jpg: No such file or directory; make it readable or take it out of SRC",
    # ---- archives
    "pack bad/zero.tar OUT": "bad/zero.tar is empty; get it anew",
    "pack bad/zero.zip OUT": "bad/zero.zip is empty; get it anew",
    "pack bad/zero.parquet OUT": "bad/zero.parquet is empty; get it anew",
    "pack bad/half.tar OUT": "bad/half.tar: damaged at offset ",
    "pack bad/half.tar.gz OUT": "bad/half.tar.gz: damaged compressed data",
    "pack bad/half.zip OUT": "bad/half.zip is no zip archive, or damaged or cut off",
    "pack bad/half.parquet OUT": "bad/half.parquet",
    "pack bad/page.zip OUT": "bad/page.zip: neither tar, zip nor parquet, or damaged",
    "pack bad/pointer.parquet OUT": "get that with 'git lfs pull'",
    "pack bad/label.tar OUT": "bad/label.tar: sample 2: label unreadable",
    "pack both OUT": "both holds 1 pictures and 1 archives (w.tar, …); say which with --format",
    "pack bad OUT": "bad/",
    # ---- formats that do not fit
    "pack good.tar OUT --format parquet": "good.tar is tar, which --format parquet does not fit; leave --format out",
    "pack good.zip OUT --format webdataset": "good.zip is zip, which --format webdataset does not fit",
    "pack bad/half.parquet OUT --format folders": "is parquet, which --format folders does not fit",
    "pack set/train OUT --format webdataset": "set/train: no archives in it; leave --format webdataset out",
    "pack several OUT": "several holds shards of several packings, whose classes differ; pack each by itself",
    "pack samples.tar OUT --format folders": "samples.tar: 1.jpg lies in no class folder",
    # ---- fewer pictures
    "pack set/train OUT --limit 0": "'0' is no count; give a whole number from 1",
    "pack set/train OUT --limit -3": "argument --limit: ",
    "pack set/train OUT --limit all": "'all' is no count",
    "pack set/train OUT --split-val 0": "'0' is no fraction; give a number between 0 and 1",
    "pack set/train OUT --split-val 1": "'1' is no fraction",
    "pack set/train OUT --split-val 1.5": "'1.5' is no fraction",
    "pack set/train OUT --split-val 10%": "'10%' is no fraction",
    "pack set/train OUT --split-val nan": "'nan' is no fraction",
    "pack set/train OUT --split-val 0.01": "--split-val 0.01 leaves no pictures for val of 8; choose another",
    "pack set/train OUT --split-val 0.99": "--split-val 0.99 leaves no pictures for train of 8; choose another",
    "pack set/train OUT --split-val 0.5 --name a": "--name and --split-val: ",
    "pack set/train OUT --subset-classes dgo": "'dgo' is no class of set/train (cat, dog); mend the name",
    "pack set/train OUT --subset-classes Cat": "'Cat' is no class of set/train (cat, dog)",
    "pack set/train OUT --subset-classes names/comma": "'eel, electric' is no class of set/train",
    "pack set/train OUT --subset-classes ''": "'' names no class; give some between commas, or a file",
    "pack set/train OUT --subset-classes csv/empty": "names no class",
    "pack set/train/cat OUT --subset-classes cat": "'cat' is no class of set/train/cat (which has no labels)",
    # ---- re-encoding
    "pack set/train OUT --quality 90": "--quality is for the pictures that --max-short-side re-encodes; give that too",
    "pack set/train OUT --quality 0 --max-short-side 64": "'0' is no JPEG quality",
    "pack set/train OUT --max-short-side 1": "'1' is no number of pixels",
    # ---- other sets' classes
    "pack other OUT --classes packed": "class 'eel' is none of the 2 in packed (cat, dog); give the manifest of the",
    "pack set/val OUT --classes flat": "--classes flat: packed without labels; give the manifest of a labelled set",
    "pack set/val/cat OUT --classes packed": "set/val/cat has no labels to number by packed; leave --classes out",
    "pack set/val OUT --classes set/train": "--classes set/train: no manifest.json there; give the manifest.json of",
    "pack set/val OUT --classes nowhere": "--classes nowhere: no manifest.json there",
    "pack set/val OUT --classes packed/index.npy": "--classes packed/index.npy: no manifest.json there",
    "pack set/val OUT --classes coco/annotations/instances.json": "instances.json: no manifest of make-shards",
    "pack set/val OUT --classes ''": "argument --classes: an empty path",
    # ---- files of labels
    "pack set/train/cat OUT --labels 'csv/lines missing'": "has no line for 2.jpg (2 of 4 pictures have none)",
    "pack set/train/cat OUT --labels csv/blanks": "line '0.jpg a' names a picture; put commas between",
    "pack set/train/cat OUT --labels 'csv/blanks and a header'": "line '0.jpg a' names a picture; put commas between",
    "pack set/train/cat OUT --labels 'csv/too many'": "has 5 labels for 4 pictures; give the file that belongs to them",
    "pack set/train/cat OUT --labels 'csv/two classes'": "gives '0.jpg' two classes, 'a' and 'b'; take one out",
    "pack set/train/cat OUT --labels 'csv/half a line'": "line '1.jpg' is not PICTURE,CLASS; mend it",
    "pack set/train/cat OUT --labels 'csv/open quote'": "csv/open quote is no CSV (field larger than field limit",
    "pack set/train/cat OUT --labels csv/empty": "csv/empty holds no labels; give a CSV of picture and class",
    "pack set/train/cat OUT --labels csv/utf-16": "csv/utf-16 is no text in UTF-8",
    "pack set/train/cat OUT --labels csv/kit.tar.gz": "csv/kit.tar.gz: damaged or cut off",
    "pack set/train/cat OUT --labels csv/nowhere": "cannot read --labels csv/nowhere: no such file; give a CSV",
    "pack set/train/cat OUT --labels csv": "cannot read --labels csv: a folder; give a CSV",
    "pack set/train/cat OUT --labels good.tar": "good.tar holds no ILSVRC2012_validation_ground_truth.txt",
    "pack set/train/cat OUT --labels ''": "argument --labels: an empty path",
    "pack set/train OUT --labels csv/right": "'0.jpg' is both cat/0.jpg and dog/0.jpg; give their paths in SRC",
    # ---- OUT
    "pack set/train set/train/out": "lie in one another; choose an OUT beside SRC",
    "pack set/train set": "lie in one another; choose an OUT beside SRC",
    "pack set/train .": "lie in one another",
    "pack set/train single.jpg": "cannot write to single.jpg: File exists; choose a folder, or a name that",
    "pack set/train single.jpg/out": "cannot write to single.jpg/out: Not a directory; choose a folder",
    "pack packed set/val": "set/val holds cat, which is no part of this packing; choose a new or empty OUT",
    "pack set/train packed --seed 1": "packed holds another packing (other sources or options); choose another OUT",
    "pack set/val packed": "packed holds another packing (other sources or options); choose another OUT",
    "pack set/train packed --split-val 0.5": "packed holds another packing, without --split-val; choose another OUT",
    "pack set/train unfinished": "unfinished holds another, unfinished packing (other sources or options); choose",
    # ---- the other commands
    "check set": "set: no such folder, or no shards in it; give a folder that 'make-shards pack' made",
    "check set/train/cat": "set/train/cat: no manifest.json in it, so no shards; give a folder that",
    "check unfinished": "unfinished: no manifest.json yet, so unfinished; run the same make-shards command again",
    "check packed/manifest.json": "packed/manifest.json is a file; give the folder that it lies in",
    "check packed --report nowhere/report.json": "--report nowhere/report.json: no such folder; make it first",
    "info nowhere": "nowhere: no such folder, or no shards in it",
    "show unfinished --grid x.png": "run the same make-shards command again to finish it",
    "show packed": "arguments are required: --grid; see make-shards show --help",
    "show packed --grid x.jpg": "'x.jpg' is no PNG file; give a name that ends in .png",
    "show packed --grid nowhere/x.png": "cannot write nowhere/x.png: No such file or directory; give --grid a file in",
    "index nowhere": "nowhere holds no tars; give the folder that does",
    "index set/train/cat": "set/train/cat holds no tars; give the folder that does",
    "index packed": "packed holds another packing, of make-shards itself and with its index; nothing is to be done",
    "index good.tar": "good.tar is a file; give the folder that it lies in",
    "pak set/train OUT": "invalid choice: 'pak'",
}


@pytest.mark.parametrize(("line", "words"), REFUSED.items(), ids=list(REFUSED))
def test_one_line_to_act_on(line: str, words: str, refused: Call) -> None:
    assert words in refused(line)


RIGHT = {
    "pack set/train OUT": ("set/train: folders: 8 pictures, 2 classes (cat, dog)", {"cat": 4, "dog": 4}),
    "pack set/train/ OUT/": ("set/train/: folders: 8 pictures", {"cat": 4, "dog": 4}),
    "pack ./set//val/../train OUT": ("./set//val/../train: folders: 8", {"cat": 4, "dog": 4}),
    "pack set OUT --format folders": ("set: folders: 12 pictures, 2 classes (train, val)", {"train": 8, "val": 4}),
    "pack set OUT --format flat": ("set: flat: 12 pictures, no labels", {None: 12}),
    "pack set/train/cat OUT": ("set/train/cat: flat: 4 pictures, no labels", {None: 4}),
    "pack coco OUT --format flat": ("coco: flat: 2 pictures, no labels; 1 other file ignored", {None: 2}),
    "pack 'literal/[ab]*?' OUT": ("literal/[ab]*?: folders: 2 pictures", {"cat": 1, "dog": 1}),
    "pack ./-dash OUT": ("./-dash: folders: 2 pictures", {"cat": 1, "dog": 1}),
    "pack 'sp ace' OUT": ("sp ace: folders: 2 pictures", {"cat": 1, "dog": 1}),
    "pack gzipped.tar OUT": ("gzipped.tar: folders: 6 pictures", {"cat": 3, "dog": 3}),
    "pack 'g[o]?d.tar' OUT": ("g[o]?d.tar: folders: 6 pictures", {"cat": 3, "dog": 3}),
    "pack split OUT --format webdataset": ("split: webdataset: 12 pictures, no labels", {None: 12}),
    "pack 'one class.tar' OUT --format folders": ("one class.tar: folders: 2 pictures, 1 class (cat)", {"cat": 2}),
    "pack samples.tar OUT": (
        "samples.tar: webdataset: 3 pictures, 2 classes (0, 1), 1 picture without a label",
        {"0": 1, "1": 1, None: 1},
    ),
    "pack samples.tar OUT --format flat": ("samples.tar: flat: 3 pictures, no labels", {None: 3}),
    "pack packed OUT": ("packed: webdataset: 8 pictures, 2 classes (cat, dog)", {"cat": 4, "dog": 4}),
    "pack set/train OUT --limit 100": ("set/train: folders: 8 pictures", {"cat": 4, "dog": 4}),
    "pack set/train OUT --subset-classes ' dog ,'": ("set/train: folders: 4 pictures, 1 class (dog)", {"dog": 4}),
    "pack set/train OUT --subset-classes names/typed": ("set/train: folders: 4 pictures, 1 class (dog)", {"dog": 4}),
    "pack set/val OUT --classes packed/": ("set/val: folders: 4 pictures, 2 classes", {"cat": 2, "dog": 2}),
    "pack set/val/cat OUT --classes packed --labels csv/c": ("set/val/cat: flat: 2 pictures, 2 classes", {"cat": 2}),
    **{
        f"pack set/train/cat OUT --labels '{name}'": (
            "set/train/cat: flat: 4 pictures, 2 classes (a, b)",
            {"a": 2, "b": 2},
        )
        for name in list(LABELS)[:6]
    },
    "pack set/train/cat OUT --labels csv/numbers": ("set/train/cat: flat: 4 pictures, 11 classes", {"2": 2, "10": 2}),
}
LABELS["csv/c"] = b"0.jpg,cat\n1.jpg,cat\n"


@pytest.mark.parametrize(("line", "expected"), RIGHT.items(), ids=list(RIGHT))
def test_a_right_result(line: str, expected: tuple[str, dict[str | None, int]], packed: Call, tmp_path: Path) -> None:
    words, classes = expected
    assert words in packed(line)
    assert balance(tmp_path / "out") == classes


def test_numbers_in_a_file_of_labels_are_the_labels(packed: Call, tmp_path: Path) -> None:
    packed("pack set/train/cat OUT --labels csv/numbers")
    with ShardIndex(tmp_path / "out") as index:
        assert set(index.labels.tolist()) == {2, 10}


NAMES = (
    b"sp ace.JPG",
    b"quo'te\".Jpeg",
    b"new\nline.jpg",
    b"red\x1b[31m.jpg",
    b"latin\xe9.jpg",
    "\u202egpj.\u00e9.jpg".encode(),
    b"l" * 251 + b".jpg",
    b"-rf.jpg",
    b"[ab]*?.jpg",
    b"back\\slash.jpeg",
    b"%s{0}$HOME~.jfif",
    b"a.b.c.JPEG",
)


def test_names_of_any_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As classes, as pictures and as broken pictures; nothing that a terminal would obey is printed."""
    source, out = tmp_path / "a 'src'\n\x1b[1m", tmp_path / 'an "out"\n\x1b[1m'
    for seed, name in enumerate(NAMES):
        file = Path(os.fsdecode(os.path.join(os.fsencode(source), b"c" + name[:200], name)))
        file.parent.mkdir(parents=True)
        file.write_bytes(picture(seed))
        file.with_name("broken " + file.name[-200:]).write_text("<html>")
    deep = source / "deep" / LONG_FOLDERS
    deep.mkdir(parents=True)
    (deep / "1.PNG").write_bytes(picture(99, "PNG"))
    (deep / "2.JPG").write_bytes(picture(98, "PNG"))
    assert main(["pack", str(source), str(out), "--workers", "1"]) == 0
    assert main(["check", str(out), "--workers", "1"]) == 0
    assert main(["info", str(out)]) == 0
    assert main(["show", str(out), "--grid", str(tmp_path / "grid.png")]) == 0
    with ShardIndex(out) as index:
        assert set(map(os.fsencode, index.classes)) == {b"deep", *(b"c" + name[:200] for name in NAMES)}
        assert len(index) == len(NAMES) + 2
        assert {os.fsencode(entry.source) for entry in index.manifest.rejected} == {
            b"c" + name[:200] + b"/broken " + name[-200:] for name in NAMES
        }
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(line.isprintable() for line in printed.out.split("\n"))
    (source / "deep" / "gone\x1b[31m.jpg").symlink_to("nowhere")
    assert main(["pack", str(source), str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err[:-1].isprintable()


def test_extensions_of_any_case_and_of_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats = {
        "JPG": "JPEG",
        "Jpeg": "PNG",
        "jfif": "JPEG",
        "PnG": "WEBP",
        "WEBP": "JPEG",
        "TIFF": "TIFF",
        "Gif": "GIF",
    }
    put(tmp_path / "src", {f"a/1.{extension}": picture(1, format) for extension, format in formats.items()})
    put(
        tmp_path / "src",
        {"b/html.jpg": b"<!DOCTYPE html>", "b/empty.jpg": b"", "b/1.JPG": picture(2), "b/x.JPG.txt": b""},
    )
    assert main(["pack", str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].endswith("src: folders: 10 pictures, 2 classes (a, b); 1 other file ignored")
    assert lines[1].endswith("out: 6 pictures, 2 classes, 1 shard, 15,872 bytes")
    assert lines[2].startswith("4 pictures left out, with the reason in ")
    assert lines[3] == "  a/1.Gif: GIF picture; shards hold JPEG, PNG and WebP"
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        kinds = Counter(name.rpartition(".")[2] for name in tar.getnames())
    assert kinds == {"jpg": 4, "png": 1, "webp": 1, "cls": 6}


def test_what_is_no_file_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "src", class_folders(".", 1) | {".hidden/1.jpg": b"", "cat/._1.jpg": b"", "cat/.DS_Store": b""})
    (tmp_path / "src" / "eel").mkdir()
    os.mkfifo(tmp_path / "src" / "cat" / "pipe.jpg")
    (tmp_path / "src" / "cat" / "zero.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path / "src" / "dog")  # the names of sockets have to be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
    assert main(["pack", str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert balance(tmp_path / "out") == {"cat": 1, "dog": 1}
    with ShardIndex(tmp_path / "out") as index:
        assert index.classes == ("cat", "dog", "eel")  # an empty folder is a class, so that val and train agree
        assert index.manifest.ignored == 6


def test_a_link_to_another_folder_is_followed(tmp_path: Path) -> None:
    put(tmp_path, class_folders("src", 1) | numbered("elsewhere", 2, 5))
    (tmp_path / "src" / "eel").symlink_to("../elsewhere")
    (tmp_path / "link").symlink_to("src")
    assert main(["pack", str(tmp_path / "link"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert balance(tmp_path / "out") == {"cat": 1, "dog": 1, "eel": 2}


def test_a_source_that_changes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "grown", str(tmp_path / "out"), "--format", "folders", "--workers", "1"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("make-shards: grown/cat/x.jpg changed while it was being packed; leave SRC alone and run ")
    assert line.count("\n") == 1
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_pieces_of_an_out_are_not_packed_over(
    typed: Typed, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    assert typed("pack set/train OUT")[0] == 0
    before = contents(tmp_path / "out")
    for line in ("pack set/train OUT --limit 3", "pack set/train OUT --check header", "pack set/val OUT"):
        status, _, errors = typed(line)
        assert (status, errors.count("\n")) == (1, 1)
        assert "holds another packing (other sources or options); choose another OUT, or remove it first" in errors
    assert "out: already complete" in typed("pack set/train/ OUT/")[1]
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    assert "holds duplicates.csv, which is no part of this packing" in typed("pack set/train OUT")[2]


def test_a_home_that_the_shell_did_not_expand(
    typed: Typed, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").symlink_to(world / "set" / "train")
    assert typed("pack '~/pictures' '~/out'")[0] == 0
    assert balance(tmp_path / "out") == {"cat": 4, "dog": 4}


def test_a_split_is_two_folders(typed: Typed, tmp_path: Path) -> None:
    assert typed("pack set/train OUT --split-val 0.25")[0] == 0
    assert balance(tmp_path / "out" / "train") == {"cat": 3, "dog": 3}
    assert balance(tmp_path / "out" / "val") == {"cat": 1, "dog": 1}
    assert typed("pack set/train OUT --split-val 0.25")[1].count("already complete") == 2
    assert "train holds another packing" in typed("pack set/train OUT --split-val 0.5")[2]
    assert "out holds train, which is no part of this packing" in typed("pack set/train OUT")[2]
    for command in ("check OUT", "info OUT", "show OUT --grid x.png"):
        assert "(with --split-val: its train or val)" in typed(command)[2]


def test_indexing_again_after_a_change(typed: Typed, tmp_path: Path) -> None:
    put(tmp_path, {"theirs/A.TAR": tar_of(SAMPLES), "cut/a.tar": tar_of(SAMPLES)[:1000], "zip/a.tar": ZIPPED})
    theirs = tmp_path / "theirs"
    assert typed(f"index {theirs}")[0] == 0
    assert balance(theirs) == {"0": 1, "1": 1, None: 1}
    assert typed(f"index {theirs}")[0] == 0
    (theirs / "b.tar").write_bytes(tar_of(SAMPLES))
    tables = (MANIFEST_FILE, INDEX_FILE, REJECTED_FILE, DUPLICATES_FILE)
    advice = f"to index it anew, remove {', '.join(tables)}, .parts"
    for line in (f"index {theirs}", f"index {theirs} --check header"):
        assert f"{theirs} holds another packing (other sources or options); {advice}" in typed(line)[2]
    for table in tables:
        (theirs / table).unlink()
    assert typed(f"index {theirs}")[0] == 0
    assert balance(theirs) == {"0": 2, "1": 2, None: 2}
    assert "a.tar: damaged at offset 0: cut off" in typed(f"index {tmp_path}/cut")[2]
    assert "a.tar: zip, which cannot be read by offsets; pack it instead" in typed(f"index {tmp_path}/zip")[2]
    assert [path.name for path in (tmp_path / "zip").iterdir()] == ["a.tar"]


@pytest.mark.parametrize("command", ["", "pack", "index", "check", "info", "show"])
def test_help_fits_a_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert max(map(len, text.splitlines())) < 80


# ---- as processes of their own --------------------------------------------------------------------------------------


@pytest.fixture
def shell(world: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a line of bash, in which $make is make-shards and $out a new folder."""

    def run(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        python = f"{shlex.quote(sys.executable)} -m shards"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "make": python, "out": str(tmp_path / "out")} | variables
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], env=environment, capture_output=True, text=True, timeout=60
        )

    return run


Shell = Callable[..., subprocess.CompletedProcess[str]]


def test_a_pattern_without_quotes(shell: Shell, tmp_path: Path) -> None:
    run = shell("$make pack split/*.tar $out")
    words = f"too many arguments: {tmp_path}/out; put a pattern in quotes, or the shell expands it"
    assert (run.returncode, run.stderr) == (2, f"make-shards: {words}; see make-shards --help\n")
    run = shell("$make pack split/*.tar")  # OUT forgotten as well: the second archive is taken for it
    assert run.stderr.startswith("make-shards: cannot write to split/a-val.tar: File exists; choose a folder, ")


def test_output_that_nobody_reads(shell: Shell, tmp_path: Path) -> None:
    run = shell("$make pack set/train $out | true; $make info $out | head -n 1")
    assert (run.returncode, run.stdout, run.stderr) == (0, "name        train\n", "")
    run = shell("$make pack set/val $out/closed --workers 1 <&- >&- 2>&-")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert balance(tmp_path / "out" / "closed") == {"cat": 2, "dog": 2}
    run = shell("$make info packed > /dev/full")
    assert (run.returncode, run.stderr) == (
        1,
        "make-shards: cannot print: No space left on device; send the output elsewhere\n",
    )


def test_terminals_of_other_locales(
    shell: Shell, world: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    put(tmp_path, class_folders("\u00e9/\u00fc", 1) | {"\u00e9/x/\u00e4.jpg": picture(1)})
    source = shlex.quote(f"{tmp_path}/\u00e9")
    plain = {"LC_ALL": "C", "LANG": "C"}
    assert shell(f"$make pack {source} $out --format folders").returncode == 0
    assert shell(f"$make pack {source} $out-c --format folders", **plain).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "out-c")
    run = shell(f"$make pack {source} $out-ascii", **plain, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (run.returncode, run.stderr) == (
        1,
        "make-shards: file names are taken as ascii in this locale; set PYTHONUTF8=1, and run it again\n",
    )


@pytest.mark.parametrize("terminal", ["dumb", "xterm", ""])
def test_terminals_without_a_size(world: Path, terminal: str) -> None:
    ours, theirs = pty.openpty()
    call = [sys.executable, "-m", "shards", "check", "packed", "--workers", "1"]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": terminal}
    process = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal_:  # EIO: the end
        while data := terminal_.read(1 << 16):
            printed += data
    assert process.wait(60) == 0
    assert b"packed: all is well: 8 pictures, 1 shard, " in printed
    assert b"Traceback" not in printed


def test_the_second_of_two_is_refused_and_goes_on_when_the_first_is_killed(tmp_path: Path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    put(source, class_folders(".", 1))
    Image.new("RGB", (5000, 4000)).save(source / "cat" / "large.jpg")
    for copy in range(40):
        os.link(source / "cat" / "large.jpg", source / "cat" / f"{copy}.large.jpg")
    call = [sys.executable, "-m", "shards", "pack", str(source), str(out), "--shard-size", "2MB", "--workers", "2"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*call, *options], cwd=ROOT, capture_output=True, text=True, timeout=60)

    first = subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list(out.glob(".parts/train*.tmp")):
        assert first.poll() is None
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGSTOP)
    second = run()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(60)
    words = "another make-shards is at work in it; wait, or choose another folder"
    assert (second.returncode, second.stdout, second.stderr) == (1, "", f"make-shards: {out}: {words}\n")
    assert "holds another, unfinished packing (other sources or options)" in run("--check", "header").stderr
    assert main(["check", str(out)]) == 1
    again = run()
    assert (again.returncode, again.stderr) == (0, "")
    assert balance(out) == {"cat": 42, "dog": 1}
    assert not list(out.glob(".[!.]*"))
