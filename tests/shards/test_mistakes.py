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


def inline(function: Callable[..., Any], make_task: Callable[[int], Any], count: int, *_: object) -> list[Any]:
    """`workers.run_tasks` in this process."""
    return [function(make_task(number), lambda done: None) for number in range(count)]


def make_image(seed: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def numbered(folder: str, count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{folder}/{number}.jpg": make_image(first + number) for number in range(count)}


def class_folders(folder: str, count: int, first: int = 0) -> dict[str, bytes]:
    return numbered(f"{folder}/cat", count, first) | numbered(f"{folder}/dog", count, first + count)


IN_CLASSES = {name.removeprefix("x/"): data for name, data in class_folders("x", 3).items()}
SAMPLES = {"1.jpg": make_image(1), "1.cls": b"1", "2.jpg": make_image(2), "3.jpg": make_image(3), "3.cls": b"0"}

TREES = {
    **class_folders("set/train", 4),
    **class_folders("set/val", 2, 50),
    **class_folders("above/x/train", 1),
    **numbered("coco/unlabeled2017", 2),
    "coco/annotations/instances.json": b"{}",
    **numbered("splits/train2017", 2),
    **numbered("splits/val2017", 1, 9),
    **numbered("loose/cat", 1),
    "loose/3.jpg": make_image(3),
    **numbered("other/cat", 1),
    **numbered("other/eel", 1, 1),
    **class_folders("literal/[ab]*?", 1),
    **class_folders("-dash", 1),
    **class_folders("sp ace", 1),
    "single.jpg": make_image(1),
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
    "both/1.jpg": make_image(1),
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
    "bad/label.tar": tar_of({"2.jpg": make_image(2), "2.cls": b"\xff"} | SAMPLES),
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
    (root / "dead").mkdir()
    (root / "dead" / "cat.jpg").symlink_to("/nowhere.jpg")
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
    "pack set OUT": "set holds train, val, which are not classes. Pack each by itself (set/train, …), or use --format",
    "pack above OUT": "above: all images are in x/train. Give above/x/train, or use --format folders to take x as the",
    "pack coco OUT": "coco: all images are in unlabeled2017. Give coco/unlabeled2017, or use --format folders to take",
    "pack splits OUT": "train2017, val2017, which are not classes. Pack each by itself (splits/train2017, …), or",
    "pack level.tar OUT": "level.tar holds train, val, which are not classes. Unpack it and pack each by itself",
    "pack split OUT": "archives of train, val. To pack one of them, give a pattern in quotes ('split/*train*')",
    "pack loose OUT": "loose: some images are in folders, others (3.jpg, …) are not. Use --format flat to pack all of",
    "pack set/train/cat OUT --format folders": "0.jpg is not in a class folder. Move it into one, or use --format flat",
    "pack single.jpg OUT": "single.jpg is not a tar, zip or parquet file, or it is damaged. Give the folder, archive",
    # ---- nothing to pack
    "pack nowhere OUT": "nowhere: no such folder or file. Give the folder, archive or URL that holds the images as",
    "pack nowhere/*.tar OUT": "nowhere/*.tar: no such folder or file",
    "pack notes OUT": "notes: no images",
    "pack heic OUT": "heic: none of 1 images can be decoded (1.HEIC: HEIF image; shards hold JPEG, PNG and",
    "pack broken OUT": "broken: none of 2 images can be decoded (a/1.jpg: not a JPEG, PNG or WebP image, or its first",
    "pack pipe OUT": "pipe is neither a folder nor a file",
    "pack '' OUT": "argument SRC: the path is empty. Perhaps a shell variable is not set.",
    "pack set/train ''": "argument OUT: the path is empty. Perhaps a shell variable is not set.",
    "pack set/train": "the following arguments are required: OUT. See 'make-shards pack --help'.",
    "pack set/train set/val OUT": "Put a pattern in quotes, or the shell expands it. See 'make-shards pack --help'",
    "pack set/train OUT --fast": "unknown option --fast. See 'make-shards pack --help'.",
    # ---- links
    **{
        f"pack {source} OUT --strict": "--strict: 1 image cannot be listed. Repair or remove them, or leave --strict"
        for source in ("loop", "self", "lost", "gone")
    },
    "pack dead OUT": "in it that can be read: cat.jpg is a link to '/nowhere.jpg': No such file or directory. Give",
    # ---- archives
    "pack bad/zero.tar OUT": "bad/zero.tar is empty. Download it again.",
    "pack bad/zero.zip OUT": "bad/zero.zip is empty. Download it again.",
    "pack bad/zero.parquet OUT": "bad/zero.parquet is empty. Download it again.",
    "pack bad/half.tar OUT": "bad/half.tar: damaged at offset ",
    "pack bad/half.tar.gz OUT": "bad/half.tar.gz: damaged compressed data",
    "pack bad/half.zip OUT": "bad/half.zip is not a zip archive, or is damaged or cut off (File is not a zip file).",
    "pack bad/half.parquet OUT": "bad/half.parquet",
    "pack bad/page.zip OUT": "bad/page.zip is not a tar, zip or parquet file, or it is damaged. Give the folder,",
    "pack bad/pointer.parquet OUT": "in Git LFS. Fetch the archive with 'git lfs pull'.",
    "pack bad/label.tar OUT": "bad/label.tar: the label of sample 2 cannot be read ('utf-8' codec can't decode byte",
    "pack both OUT": "both holds 1 images and 1 archives (w.tar, …). Say which to pack: with --format folders or flat",
    "pack bad OUT": "bad/",
    # ---- formats that do not fit
    "pack good.tar OUT --format parquet": "is a tar file, which --format parquet does not fit. Leave --format out.",
    "pack good.zip OUT --format webdataset": "a zip file, which --format webdataset does not fit. Leave --format out.",
    "pack bad/half.parquet OUT --format folders": "is a parquet file, which --format folders does not fit.",
    "pack set/train OUT --format webdataset": "set/train: no archives in it. Leave --format webdataset out to pack",
    "pack several OUT": "several holds shards of several packings, whose classes differ. Pack each by itself.",
    "pack samples.tar OUT --format folders": "samples.tar: 1.jpg is not in a class folder. Move it into one, or use",
    # ---- fewer images
    "pack set/train OUT --limit 0": "argument --limit: '0' is not a count. Give a whole number from 1 to",
    "pack set/train OUT --limit -3": "argument --limit: ",
    "pack set/train OUT --limit all": "argument --limit: 'all' is not a count. Give a whole number from 1 to",
    "pack set/train OUT --split-val 0": "argument --split-val: '0' is not a fraction. Give a number between 0 and 1.",
    "pack set/train OUT --split-val 1": "argument --split-val: '1' is not a fraction. Give a number between 0 and 1.",
    "pack set/train OUT --split-val 1.5": "argument --split-val: '1.5' is not a fraction. Give a number between 0 and",
    "pack set/train OUT --split-val 10%": "argument --split-val: '10%' is not a fraction. Give a number between 0 and",
    "pack set/train OUT --split-val nan": "argument --split-val: 'nan' is not a fraction. Give a number between 0 and",
    "pack set/train OUT --split-val 0.01": "--split-val 0.01 leaves no images for val of 8. Choose another fraction.",
    "pack set/train OUT --split-val 0.99": "--split-val 0.99 leaves no images for train of 8. Choose another fraction.",
    "pack set/train OUT --split-val 0.5 --name a": "--name does not go with --split-val, which names the two sets",
    "pack set/train OUT --subset-classes dgo": "'dgo' is not a class of set/train (cat, dog). Correct the name.",
    "pack set/train OUT --subset-classes Cat": "--subset-classes: 'Cat' is not a class of set/train (cat, dog).",
    "pack set/train OUT --subset-classes names/comma": "--subset-classes: 'eel, electric' is not a class of set/train",
    "pack set/train OUT --subset-classes ''": "--subset-classes '' has no class names. Give names between commas, or",
    "pack set/train OUT --subset-classes csv/empty": "--subset-classes 'csv/empty' has no class names. Give names",
    "pack set/train/cat OUT --subset-classes cat": "'cat' is not a class of set/train/cat (it has no labels)",
    # ---- re-encoding
    "pack set/train OUT --quality 90": "images that --max-short-side, --upright or --convert jpeg encodes. Give one",
    "pack set/train OUT --quality 0 --max-short-side 64": "argument --quality: '0' is not a JPEG quality. Give a",
    "pack set/train OUT --max-short-side 1": "argument --max-short-side: '1' is not a number of pixels. Give a whole",
    # ---- other sets' classes
    "pack other OUT --classes packed": "other: class 'eel' is not one of the 2 classes in packed (cat, dog). Give the",
    "pack set/val OUT --classes flat": "--classes flat: this set has no labels. Give the manifest of a set with",
    "pack set/val/cat OUT --classes packed": "set/val/cat has no labels, so --classes cannot number them. Leave it out",
    "pack set/val OUT --classes set/train": "--classes set/train: no manifest.json there. Give the manifest.json of",
    "pack set/val OUT --classes nowhere": "--classes nowhere: no manifest.json there",
    "pack set/val OUT --classes packed/index.npy": "--classes packed/index.npy: no manifest.json there",
    "pack set/val OUT --classes coco/annotations/instances.json": "(not a make-shards manifest). Give",
    "pack set/val OUT --classes ''": "argument --classes: the path is empty. Perhaps a shell variable is not set. See",
    # ---- files of labels
    "pack set/train/cat OUT --labels 'csv/lines missing'": "has no line for 2 of 4 images, such as 2.jpg.",
    "pack set/train/cat OUT --labels csv/blanks": "line '0.jpg a' begins with an image. Put commas between",
    "pack set/train/cat OUT --labels 'csv/blanks and a header'": "begins with an image. Put commas between",
    "pack set/train/cat OUT --labels 'csv/too many'": "has 5 labels for 4 images. Give the file that belongs",
    "pack set/train/cat OUT --labels 'csv/two classes'": "'0.jpg' two classes, 'a' and 'b'. Remove one",
    "pack set/train/cat OUT --labels 'csv/half a line'": "line '1.jpg' is not of the form IMAGE,CLASS. Correct it.",
    "pack set/train/cat OUT --labels 'csv/open quote'": "csv/open quote is not a CSV file (field larger than field",
    "pack set/train/cat OUT --labels csv/empty": "csv/empty holds no labels. Give a CSV file of image and class, or a",
    "pack set/train/cat OUT --labels csv/utf-16": "csv/utf-16 is not text in UTF-8 (",
    "pack set/train/cat OUT --labels csv/kit.tar.gz": "csv/kit.tar.gz: damaged or cut off",
    "pack set/train/cat OUT --labels csv/nowhere": "cannot read --labels csv/nowhere (no such file). Give a CSV file",
    "pack set/train/cat OUT --labels csv": "cannot read --labels csv (it is a folder). Give a CSV file of image and",
    "pack set/train/cat OUT --labels good.tar": "good.tar holds no ILSVRC2012_validation_ground_truth.txt",
    "pack set/train/cat OUT --labels ''": "argument --labels: the path is empty. Perhaps a shell variable is not set.",
    "pack set/train OUT --labels csv/right": "'0.jpg' may be cat/0.jpg or dog/0.jpg. Give the paths of the images in",
    # ---- OUT
    "pack set/train set/train/out": "SRC set/train and OUT set/train/out must not contain each other. Choose an OUT",
    "pack set/train set": "SRC set/train and OUT set must not contain each other. Choose an OUT beside SRC.",
    "pack set/train .": "SRC set/train and OUT . must not contain each other. Choose an OUT beside SRC.",
    "pack set/train single.jpg": "cannot write to single.jpg: File exists. Choose a folder, or a name that does not",
    "pack set/train single.jpg/out": "cannot write to single.jpg/out: Not a directory. Choose a folder, or a name",
    "pack packed set/val": "set/val holds cat, which does not belong to this packing. Choose a new or empty OUT.",
    "pack set/train packed --seed 1": "packed holds another packing, of other sources or options. Choose another OUT,",
    "pack set/val packed": "packed holds another packing, of other sources or options. Choose another OUT, or remove",
    "pack set/train packed --split-val 0.5": "packed holds another packing, without --split-val. Choose another OUT,",
    "pack set/train unfinished": "unfinished holds another packing, not finished, of other sources or options. Choose",
    # ---- the other commands
    "check set": "set: no shards in it. Give a folder that 'make-shards pack' made (with",
    "check set/train/cat": "set/train/cat: not a shard folder (no manifest.json in it). Give a folder that",
    "check unfinished": "packing is not finished (no manifest.json yet). Run the same make-shards command again.",
    "check packed/manifest.json": "packed/manifest.json is a file. Give the folder that it lies in.",
    "check packed --report nowhere/report.json": "nowhere/report.json: its folder does not exist. Make it first.",
    "info nowhere": "nowhere: no such folder in /",
    "show unfinished --grid x.png": "packing is not finished (no manifest.json yet). Run the same make",
    "show packed": "the following arguments are required: --grid. See 'make-shards show --help'.",
    "show packed --grid x.jpg": "argument --grid: 'x.jpg' is not a PNG file. Use a name that ends in .png. See",
    "show packed --grid nowhere/x.png": "cannot write nowhere/x.png: No such file or directory. Give --grid a file in",
    "index nowhere": "nowhere holds no tars. Give the folder that does, or pack its images into another folder.",
    "index set/train/cat": "set/train/cat holds no tars. Give the folder that does, or pack its images into another",
    "index packed": "packed was made by make-shards pack, which also wrote its index. There is nothing to do.",
    "index good.tar": "good.tar is a file. Give the folder that it lies in.",
    "pak set/train OUT": "invalid choice: 'pak'",
}


@pytest.mark.parametrize(("line", "words"), REFUSED.items(), ids=list(REFUSED))
def test_one_line_to_act_on(line: str, words: str, refused: Call) -> None:
    assert words in refused(line)


RIGHT = {
    "pack set/train OUT": ("set/train: 8 images (format folders), 2 classes (cat, dog)", {"cat": 4, "dog": 4}),
    "pack set/train/ OUT/": ("set/train/: 8 images (format folders)", {"cat": 4, "dog": 4}),
    "pack ./set//val/../train OUT": ("./set//val/../train: 8 images (format folders)", {"cat": 4, "dog": 4}),
    "pack set OUT --format folders": (
        "set: 12 images (format folders), 2 classes (train, val)",
        {"train": 8, "val": 4},
    ),
    "pack set OUT --format flat": ("set: 12 images (format flat), no labels", {None: 12}),
    "pack set/train/cat OUT": ("set/train/cat: 4 images (format flat), no labels", {None: 4}),
    "pack coco OUT --format flat": ("coco: 2 images (format flat), no labels, 1 other file ignored", {None: 2}),
    "pack 'literal/[ab]*?' OUT": ("literal/[ab]*?: 2 images (format folders)", {"cat": 1, "dog": 1}),
    "pack ./-dash OUT": ("./-dash: 2 images (format folders)", {"cat": 1, "dog": 1}),
    "pack 'sp ace' OUT": ("sp ace: 2 images (format folders)", {"cat": 1, "dog": 1}),
    "pack gzipped.tar OUT": ("gzipped.tar: 6 images (format folders)", {"cat": 3, "dog": 3}),
    "pack 'g[o]?d.tar' OUT": ("g[o]?d.tar: 6 images (format folders)", {"cat": 3, "dog": 3}),
    "pack split OUT --format webdataset": ("split: 12 images (format webdataset), no labels", {None: 12}),
    "pack 'one class.tar' OUT --format folders": (
        "one class.tar: 2 images (format folders), 1 class (cat)",
        {"cat": 2},
    ),
    "pack samples.tar OUT": (
        "samples.tar: 3 images (format webdataset), 2 classes (0, 1), 1 image without a label",
        {"0": 1, "1": 1, None: 1},
    ),
    "pack samples.tar OUT --format flat": ("samples.tar: 3 images (format flat), no labels", {None: 3}),
    "pack packed OUT": ("packed: 8 images (format webdataset), 2 classes (cat, dog)", {"cat": 4, "dog": 4}),
    "pack set/train OUT --limit 100": ("set/train: 8 images (format folders)", {"cat": 4, "dog": 4}),
    "pack set/train OUT --subset-classes ' dog ,'": ("set/train: 4 images (format folders), 1 class (dog)", {"dog": 4}),
    "pack set/train OUT --subset-classes names/typed": (
        "set/train: 4 images (format folders), 1 class (dog)",
        {"dog": 4},
    ),
    "pack set/val OUT --classes packed/": ("set/val: 4 images (format folders), 2 classes", {"cat": 2, "dog": 2}),
    "pack set/val/cat OUT --classes packed --labels csv/c": (
        "set/val/cat: 2 images (format flat), 2 classes",
        {"cat": 2},
    ),
    **{
        f"pack set/train/cat OUT --labels '{name}'": (
            "set/train/cat: 4 images (format flat), 2 classes (a, b)",
            {"a": 2, "b": 2},
        )
        for name in list(LABELS)[:6]
    },
    "pack set/train/cat OUT --labels csv/numbers": (
        "set/train/cat: 4 images (format flat), 11 classes",
        {"2": 2, "10": 2},
    ),
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
    """As classes, as images and as broken images; nothing that a terminal would obey is printed."""
    source, out = tmp_path / "a 'src'\n\x1b[1m", tmp_path / 'an "out"\n\x1b[1m'
    for seed, name in enumerate(NAMES):
        file = Path(os.fsdecode(os.path.join(os.fsencode(source), b"c" + name[:200], name)))
        file.parent.mkdir(parents=True)
        file.write_bytes(make_image(seed))
        file.with_name("broken " + file.name[-200:]).write_text("<html>")
    deep = source / "deep" / LONG_FOLDERS
    deep.mkdir(parents=True)
    (deep / "1.PNG").write_bytes(make_image(99, "PNG"))
    (deep / "2.JPG").write_bytes(make_image(98, "PNG"))
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
    (source / "deep" / "gone\x1b[31m.jpg").symlink_to("no\x1b[31mwhere")
    assert main(["pack", str(source), str(tmp_path / "new"), "--strict"]) == 1
    printed = capsys.readouterr()
    assert printed.err[:-1].isprintable()
    assert all(line.isprintable() for line in printed.out.split("\n"))


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
    put(tmp_path / "src", {f"a/1.{extension}": make_image(1, format) for extension, format in formats.items()})
    put(
        tmp_path / "src",
        {"b/html.jpg": b"<!DOCTYPE html>", "b/empty.jpg": b"", "b/1.JPG": make_image(2), "b/x.JPG.txt": b""},
    )
    assert main(["pack", str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].endswith("src: 10 images (format folders), 2 classes (a, b), 1 other file ignored")
    assert lines[1].endswith("out: 6 images, 2 classes, 1 shard, 15,872 bytes")
    assert lines[2].startswith("4 images rejected, listed with the reasons in ")
    assert lines[3] == "  a/1.Gif: GIF image; shards hold JPEG, PNG and WebP. Pack with --convert to include it"
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


def test_links_that_lead_nowhere_are_left_out_by_reason(
    typed: Typed, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    for name in ("loop", "self", "lost", "gone"):
        status, printed, errors = typed(f"pack {name} OUT/{name}")
        assert (status, errors) == (0, "")
        assert printed.split("\n")[1] == "1 image cannot be listed, and will be left out:"
        assert balance(tmp_path / "out" / name) == {"cat": 1, "dog": 1}
    reason = "link to '/nowhere.jpg': No such file or directory"
    assert (tmp_path / "out" / "gone" / REJECTED_FILE).read_text() == f"image,reason\ncat/x.jpg,{reason}\n"
    assert f"  cat/x.jpg: {reason}" in printed.split("\n")[2]
    assert "1 image rejected, listed with the reasons in " in printed
    before = contents(tmp_path / "out" / "gone")
    assert "already complete" in typed("pack gone OUT/gone")[1]
    assert contents(tmp_path / "out" / "gone") == before


def test_strict_lists_all_that_it_refuses_and_the_same_call_without_it_goes_on(tmp_path: Path, capsys) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    put(source, class_folders(".", 1) | {f"cat/broken{number}.jpg": b"<html>" for number in range(7)})
    call = ["pack", str(source), str(out), "--workers", "1"]
    for _ in range(2):
        assert main([*call, "--strict"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("make-shards: --strict: 7 images cannot be packed (cat/broken0.jpg: not a JPEG, PNG")
        assert error.count("\n") == 1
        assert not (out / MANIFEST_FILE).exists()
        assert (out / REJECTED_FILE).read_text().count("\n") == 8
    assert main(call) == 0
    assert "1 shard kept from an earlier run" in capsys.readouterr().out
    assert balance(out) == {"cat": 1, "dog": 1}
    assert main([*call, "--strict"]) == 1
    assert "--strict: 7 images cannot be packed" in capsys.readouterr().err
    for number in range(8):
        (source / f"gone{number}").symlink_to("nowhere")
    assert main(["pack", str(source), str(tmp_path / "new"), "--strict"]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        "make-shards: --strict: 8 images cannot be listed. Repair or remove them, or leave --strict out.\n"
    )
    assert printed.out.split("\n")[1:-1] == [
        "8 images cannot be listed, and will be left out:",
        *(f"  gone{number}: link to 'nowhere': No such file or directory" for number in range(8)),
    ]


def test_a_split_lists_what_was_left_out_once(typed: Typed, tmp_path: Path) -> None:
    typed("pack gone OUT --split-val 0.5 --format flat")
    counts = [len(ShardIndex(tmp_path / "out" / name).manifest.rejected) for name in ("train", "val")]
    assert counts == [1, 0]


def test_a_source_that_changes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "grown", str(tmp_path / "out"), "--format", "folders", "--workers", "1"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("make-shards: grown/cat/x.jpg changed while it was being packed. Leave SRC alone and run ")
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
        assert "holds another packing, of other sources or options. Choose another OUT, or remove it first" in errors
    assert "out: already complete" in typed("pack set/train/ OUT/")[1]
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    assert "holds duplicates.csv, which does not belong to this packing" in typed("pack set/train OUT")[2]


def test_a_home_that_the_shell_did_not_expand(
    typed: Typed, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").symlink_to(world / "set" / "train")
    assert typed("pack '~/images' '~/out'")[0] == 0
    assert balance(tmp_path / "out") == {"cat": 4, "dog": 4}


def test_a_split_is_two_folders(typed: Typed, tmp_path: Path) -> None:
    assert typed("pack set/train OUT --split-val 0.25")[0] == 0
    assert balance(tmp_path / "out" / "train") == {"cat": 3, "dog": 3}
    assert balance(tmp_path / "out" / "val") == {"cat": 1, "dog": 1}
    assert typed("pack set/train OUT --split-val 0.25")[1].count("already complete") == 2
    assert "train holds another packing" in typed("pack set/train OUT --split-val 0.5")[2]
    assert "out holds train, which does not belong to this packing" in typed("pack set/train OUT")[2]
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
    advice = f"To index it again, remove {', '.join(tables)}, .parts"
    for line in (f"index {theirs}", f"index {theirs} --check header"):
        assert f"{theirs} holds another packing, of other sources or options. {advice}" in typed(line)[2]
    for table in tables:
        (theirs / table).unlink()
    assert typed(f"index {theirs}")[0] == 0
    assert balance(theirs) == {"0": 2, "1": 2, None: 2}
    assert "a.tar: damaged at offset 0 (cut off)" in typed(f"index {tmp_path}/cut")[2]
    assert "a.tar is a zip file, which cannot be read by offsets. Pack it instead." in typed(f"index {tmp_path}/zip")[2]
    assert [path.name for path in (tmp_path / "zip").iterdir()] == ["a.tar"]


@pytest.mark.parametrize("command", ["", "pack", "index", "check", "info", "show", "stats"])
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
    words = f"too many arguments ({tmp_path}/out). Put a pattern in quotes, or the shell expands it"
    assert (run.returncode, run.stderr) == (2, f"make-shards pack: {words}. See 'make-shards pack --help'.\n")
    run = shell("$make pack split/*.tar")  # OUT forgotten as well: the second archive is taken for it
    assert run.stderr.startswith("make-shards: cannot write to split/a-val.tar: File exists. Choose a folder, ")


def test_output_that_nobody_reads(shell: Shell, tmp_path: Path) -> None:
    run = shell("$make pack set/train $out | true; $make info $out | head -n 1")
    assert (run.returncode, run.stdout, run.stderr) == (0, "name        train\n", "")
    run = shell("$make pack set/val $out/closed --workers 1 <&- >&- 2>&-")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert balance(tmp_path / "out" / "closed") == {"cat": 2, "dog": 2}
    run = shell("$make info packed > /dev/full")
    assert (run.returncode, run.stderr) == (
        1,
        "make-shards: cannot print: No space left on device. Send the output elsewhere.\n",
    )


def test_terminals_of_other_locales(
    shell: Shell, world: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    put(tmp_path, class_folders("\u00e9/\u00fc", 1) | {"\u00e9/x/\u00e4.jpg": make_image(1)})
    source = shlex.quote(f"{tmp_path}/\u00e9")
    plain = {"LC_ALL": "C", "LANG": "C"}
    assert shell(f"$make pack {source} $out --format folders").returncode == 0
    assert shell(f"$make pack {source} $out-c --format folders", **plain).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "out-c")
    run = shell(f"$make pack {source} $out-ascii", **plain, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (run.returncode, run.stderr) == (
        1,
        "make-shards: file names are decoded as ascii in this locale. Set PYTHONUTF8=1, and run it again.\n",
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
    assert b"packed: no problems in 8 images, 1 shard, " in printed
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
    words = "another make-shards is writing into it. Wait, or choose another folder."
    assert (second.returncode, second.stdout, second.stderr) == (1, "", f"make-shards: {out}: {words}\n")
    assert "holds another packing, not finished, of other sources or options." in run("--check", "header").stderr
    assert main(["check", str(out)]) == 1
    again = run()
    assert (again.returncode, again.stderr) == (0, "")
    assert balance(out) == {"cat": 42, "dog": 1}
    assert not list(out.glob(".[!.]*"))
