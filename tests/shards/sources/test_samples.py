"""Samples whose image has another extension, or whose key holds dots: labels do not vanish without a word."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.__main__ import main
from shards.errors import UserError
from shards.index import ShardIndex
from shards.sources.fields import AS_FOUND, Fields
from shards.sources.listing import Listing
from shards.sources.scan import scan
from shards.sources.tars import Member
from shards.sources.webdataset import find_other_images, group_samples
from tests.shards.archives import tar_of, zip_of
from tests.shards.fuzz import encode, photo

JPEG = encode(photo(), "JPEG")


def members(*names: str) -> list[Member]:
    return [Member(name, place, 1) for place, name in enumerate(names)]


def grouped(extensions: tuple[str, ...], *names: str) -> list[tuple[str | None, ...]]:
    found = group_samples(members(*names), extensions)
    return [(key, *(member and member.name for member in (image, label, other))) for key, image, label, other in found]


def test_an_extension_may_hold_dots() -> None:
    names = ("f/0.image.jpg", "f/0.mask.png", "f/0.cls", "f/1.IMAGE.jpg", "f/1.json", "f/.2.image.jpg", "f/3.txt")
    assert grouped(("image.jpg",), *names) == [
        ("f/0", "f/0.image.jpg", "f/0.cls", None),
        ("f/1", "f/1.IMAGE.jpg", "f/1.json", None),
    ]
    assert grouped((), *names)[:1] == [("f/0", None, "f/0.cls", "f/0.image.jpg")]


def test_a_key_may_hold_dots() -> None:
    names = ("a.1/x.v2.jpg", "a.1/x.v2.cls", "a.1/x.v3.png", "a.1/x.v3.cls", "a.1/y.jpg", "a.1/y.cls")
    assert grouped(("jpg", "png"), *names) == [
        ("a.1/x.v2", "a.1/x.v2.jpg", "a.1/x.v2.cls", None),
        ("a.1/x.v3", "a.1/x.v3.png", "a.1/x.v3.cls", None),
        ("a.1/y", "a.1/y.jpg", "a.1/y.cls", None),
    ]


def test_the_first_extension_that_a_sample_has_and_the_longest_that_a_name_ends_with() -> None:
    names = ("0.jpg", "0.image.jpg", "0.cls")
    assert grouped(("image.jpg", "jpg"), *names) == [("0", "0.image.jpg", "0.cls", None)]
    assert grouped(("jpg", "image.jpg"), *names) == [("0", "0.jpg", "0.cls", None)]


@pytest.mark.parametrize(
    ("names", "extensions"),
    [
        (["0.image.jpg", "0.cls"], ["image.jpg"]),
        (["d/0.a.jpg", "d/0.mask.PNG", "d/0.json"], ["a.jpg", "mask.png"]),
        (["x.v2.jpg", "x.v2.cls"], ["jpg"]),
        (["0.tif", "0.cls"], ["tif"]),
        (["d.1/0.jpg", "d.2/0.cls"], []),
        (["0.jpg", "1.cls", "readme"], []),
    ],
)
def test_images_beside_labels_are_found(names: list[str], extensions: list[str]) -> None:
    assert list(find_other_images(members(*names))) == extensions


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Listing]:
    def scan_tar(files: dict[str, bytes], format: str = "auto", fields: Fields = AS_FOUND) -> Listing:
        (tmp_path / "a.tar").write_bytes(tar_of(files))
        return scan(tmp_path / "a.tar", format, tmp_path / "stage", fields=fields)

    return scan_tar


TWO = {"0.image.jpg": JPEG, "0.cls": b"cat", "1.image.jpg": JPEG, "1.cls": b"dog"}
DOTS = {"x.v1.jpg": JPEG, "x.v1.cls": b"cat", "x.v2.jpg": JPEG, "x.v2.cls": b"dog"}


@pytest.mark.parametrize("format", ["auto", "webdataset"])
@pytest.mark.parametrize(("files", "extension"), [(TWO, "image.jpg"), (DOTS, "jpg")])
def test_labels_do_not_vanish(
    files: dict[str, bytes], extension: str, format: str, look: Callable[..., Listing]
) -> None:
    image, label = list(files)[:2]
    words = rf"such as {image} and {label}\. Pass --image-extension {extension} to pack them as samples, or --format"
    with pytest.raises(UserError, match=words):
        look(files, format)
    listing = look(files, format, Fields((extension,)))
    assert (listing.format, listing.classes, listing.labels.tolist()) == ("webdataset", ("cat", "dog"), [0, 1])
    assert look(files, "flat").classes == ()


def test_json_that_is_no_label_is_none(look: Callable[..., Listing]) -> None:
    files = {"cat/0.v2.jpg": JPEG, "cat/0.v2.json": b'{"width": 9}', "dog/1.jpg": JPEG}
    assert look(files).classes == ("cat", "dog")


def test_the_few_that_have_another_extension_are_left_out_by_reason(look: Callable[..., Listing]) -> None:
    listing = look({"0.jpg": JPEG, "0.cls": b"3", "1.v2.jpg": JPEG, "1.v2.cls": b"4", "2.txt": b""})
    assert len(listing) == 1
    assert listing.left_out == (("1.v2.jpg", "no image of a sample by its extension; --image-extension takes it"),)
    assert listing.ignored == 1


def test_what_lies_beside_images_without_labels_is_said(look: Callable[..., Listing]) -> None:
    listing = look({"0.jpg": JPEG, "0.txt": b"a cat", "0.label.txt": b"3"}, "webdataset")
    assert listing.hint == "labels are cls or json; beside the images lie label.txt, txt"
    assert look({"0.jpg": JPEG}, "webdataset").hint == ""


def test_flags_that_do_not_fit_are_refused(tmp_path: Path, look: Callable[..., Listing]) -> None:
    with pytest.raises(UserError, match="--image-column is for parquet files"):
        look(TWO, "auto", Fields((), "image"))
    with pytest.raises(UserError, match="--label-column is for parquet files"):
        look(TWO, "auto", Fields((), None, "label"))
    with pytest.raises(UserError, match="--image-extension is for WebDataset tars"):
        look(TWO, "flat", Fields(("image.jpg",)))
    (tmp_path / "a.zip").write_bytes(zip_of(TWO))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.jpg").write_bytes(JPEG)
    for source in ("a.zip", "folder"):
        with pytest.raises(UserError, match="--image-extension is for WebDataset tars"):
            scan(tmp_path / source, "auto", tmp_path / "stage", fields=Fields(("jpg",)))


def test_the_flags_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a.tar").write_bytes(tar_of(TWO))
    out, flags = str(tmp_path / "out"), ["--image-extension", " .IMAGE.jpg, png", "--workers", "1"]
    assert main(["pack", str(tmp_path / "theirs"), out, *flags]) == 0
    assert main(["index", str(tmp_path / "theirs"), *flags]) == 0
    for folder in (out, tmp_path / "theirs"):
        with ShardIndex(folder) as index:
            assert [index.classes[label] for label in sorted(index.labels)] == ["cat", "dog"]
    with pytest.raises(SystemExit):
        main(["pack", out, out, "--image-extension", "a,,b"])
    assert "'a,,b' has no extension. Write it like image.jpg" in capsys.readouterr().err


def test_the_columns_of_the_command_and_a_new_choice_after_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": JPEG, "path": "x"}, {"bytes": encode(photo(9, 9), "PNG"), "path": "y"}], kind)
    table = pa.table({"img": rows, "thumb": rows.take([1, 0]), "fine_label": [5, 6], "coarse_label": [1, 0]})
    classes = {"_type": "ClassLabel", "names": [f"c{number}" for number in range(9)]}
    info = {"info": {"features": {"fine_label": classes, "coarse_label": classes}}}
    pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()}), tmp_path / "a.parquet")
    call = ["pack", str(tmp_path / "a.parquet"), str(tmp_path / "out"), "--workers", "1"]
    assert main(call) == 1
    assert "several columns may hold the images ('img', 'thumb'). Pass --image-column NAME." in capsys.readouterr().err
    assert main([*call, "--image-column", "img"]) == 1
    assert "but 'fine_label', 'coarse_label' may hold the labels. Pass --label-column" in capsys.readouterr().err
    chosen: dict[str, list[str]] = {}
    for image in ("img", "thumb"):
        call[2] = str(tmp_path / image)
        assert main([*call, "--image-column", image, "--label-column", "fine_label"]) == 0
        with ShardIndex(call[2]) as index:
            jpeg = [id for id in range(2) if index.read([id])[0] == JPEG]
            chosen[image] = [index.classes[index.labels[id]] for id in jpeg]
    assert chosen == {"img": ["c5"], "thumb": ["c6"]}
