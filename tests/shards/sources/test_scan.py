"""What SRC is and what is found in it: folders, and archives of every kind."""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.sources import folder_walk
from shards.sources.listing import Listing
from shards.sources.read_image import read_image
from shards.sources.scan import scan
from tests.shards.archives import tar_of, zip_of

Files = dict[str, bytes]


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., Listing]:
    """`scan` with a folder of its own to stage in."""
    return lambda source, format="auto": scan(source, format, tmp_path / "stage")


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())


def found(listing: Listing) -> list[tuple[str, str | None]]:
    """(name, class or None) of every image."""
    classes = [*listing.classes, None]
    return [(listing.read_name(place), classes[label]) for place, label in enumerate(listing.labels.tolist())]


def contents(listing: Listing) -> list[bytes]:
    return [read_image(listing.get_source(place)) for place in range(len(listing))]


def test_class_folders(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "b/2.JPG", "b/1.png", "a/x/y.WebP", "B/3.jfif", "a/notes.txt", "LICENSE", ".git/4.jpg")
    (tmp_path / "src" / "c").mkdir()  # a class without images keeps its number: train and val then agree
    listing = look(tmp_path / "src")
    assert listing.classes == ("B", "a", "b", "c")
    assert found(listing) == [("B/3.jfif", "B"), ("a/x/y.WebP", "a"), ("b/1.png", "b"), ("b/2.JPG", "b")]
    assert (listing.format, listing.ignored, listing.sizes.tolist()) == ("folders", 3, [8, 10, 7, 7])
    assert contents(listing) == [b"B/3.jfif", b"a/x/y.WebP", b"b/1.png", b"b/2.JPG"]


def test_flat_folder_has_no_labels(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "2.jpeg", "10.gif", "3.TIFF", "notes.txt")
    (tmp_path / "src" / "sub").mkdir()
    listing = look(tmp_path / "src")
    assert found(listing) == [("10.gif", None), ("2.jpeg", None), ("3.TIFF", None)]
    assert (listing.format, listing.classes, listing.ignored) == ("flat", (), 1)


def test_flat_takes_all_depths_when_told(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "b/c/2.jpg", "b/1.jpg", "0.jpg")
    assert found(look(tmp_path / "src", "flat")) == [("0.jpg", None), ("b/1.jpg", None), ("b/c/2.jpg", None)]


@pytest.mark.parametrize("format", ["auto", "folders"])
def test_mixture_is_refused(tmp_path: Path, look: Callable[..., Listing], format: str) -> None:
    put(tmp_path / "src", "b/2.jpg", "loose.jpg")
    with pytest.raises(UserError, match=r"loose\.jpg.*--format flat"):
        look(tmp_path / "src", format)


def test_order_is_by_bytes_and_names_need_not_be_text(tmp_path: Path, look: Callable[..., Listing]) -> None:
    names = [b"\xff.jpg", "\u00e9.jpg".encode(), b"z.jpg", b"Z.jpg", b"new\nline.jpg", b"a b'\".jpg"]
    (tmp_path / "src").mkdir()
    for name in names:
        (Path(os.fsdecode(os.fsencode(tmp_path / "src") + b"/" + name))).write_bytes(b"")
    assert [os.fsencode(name) for name, _ in found(look(tmp_path / "src"))] == sorted(names)


def test_runs_are_merged_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_walk, "_RUN", 700)
    monkeypatch.setattr(folder_walk, "_BLOCK", 64)
    entries = [(b"%d" % (number * 7919 % 5003), number) for number in range(5003)]
    assert list(folder_walk.sort_entries(entries)) == sorted(entries)
    assert list(folder_walk.sort_entries(entries[:1400])) == sorted(entries[:1400])


def test_links_are_followed_but_not_in_circles(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path, "store/1.jpg", "src/b/2.jpg")
    (tmp_path / "src" / "a").symlink_to(tmp_path / "store")
    assert [name for name, _ in found(look(tmp_path / "src"))] == ["a/1.jpg", "b/2.jpg"]
    (tmp_path / "src" / "b" / "up").symlink_to(tmp_path / "src")
    listing = look(tmp_path / "src")
    assert [name for name, _ in found(listing)] == ["a/1.jpg", "b/2.jpg"]
    assert listing.left_out == (("b/up", f"link to '{tmp_path}/src', a folder that it lies in"),)


def test_links_that_lead_nowhere_are_all_found_at_once(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "b/1.jpg", "c/1.jpg")
    for name, target in (("gone.jpg", "nowhere"), ("eel", "/nowhere/eel"), ("b/me.png", "me.png"), ("a.tar", "x")):
        (tmp_path / "src" / name).symlink_to(target)
    (tmp_path / "src" / ".hidden.jpg").symlink_to("nowhere")
    listing = look(tmp_path / "src")
    assert [name for name, _ in found(listing)] == ["b/1.jpg", "c/1.jpg"]
    assert listing.left_out == (
        ("a.tar", "link to 'x': No such file or directory"),
        ("b/me.png", "link to 'me.png': Too many levels of symbolic links"),
        ("eel", "link to '/nowhere/eel': No such file or directory"),
        ("gone.jpg", "link to 'nowhere': No such file or directory"),
    )
    assert listing.ignored == 1


def test_a_folder_of_dead_links_says_so(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "1.jpg").symlink_to("../.git/annex/1.jpg")
    words = r"in it that can be read: 1\.jpg is a link to '\.\./\.git/annex/1\.jpg': No such file or directory\."
    with pytest.raises(UserError, match=words):
        look(tmp_path / "src")


def test_a_source_that_changed_stops_the_run(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "1.jpg")
    source = look(tmp_path / "src").get_source(0)
    (tmp_path / "src" / "1.jpg").write_bytes(b"longer than before")
    with pytest.raises(UserError, match=r"1\.jpg changed"):
        read_image(source)
    (tmp_path / "src" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*1\.jpg"):
        read_image(source)


@pytest.mark.parametrize("wrong", ["train val", "imagenet"])
def test_the_wrong_folder_level_is_noticed(tmp_path: Path, look: Callable[..., Listing], wrong: str) -> None:
    for top in wrong.split():
        put(tmp_path / "src", f"{top}/cat/1.jpg", f"{top}/dog/2.jpg")
    with pytest.raises(UserError, match=rf"src/{wrong.split()[0]}"):
        look(tmp_path / "src")
    assert look(tmp_path / "src", "folders").classes == tuple(wrong.split())
    assert look(tmp_path / "src" / wrong.split()[0]).classes == ("cat", "dog")


IN_CLASSES = {"set/b/1.jpg": b"one", "set/a/2.png": b"two" * 400, "set/a/.3.jpg": b"hidden", "set/read me.txt": b"x"}
EXPECTED = [("set/b/1.jpg", "b"), ("set/a/2.png", "a")]


def archives() -> Iterator[tuple[str, bytes]]:
    yield "s.tar", tar_of(IN_CLASSES)
    yield "s.tgz", tar_of(IN_CLASSES, "w:gz")
    yield "s.tar.xz", tar_of(IN_CLASSES, "w:xz")
    yield "s.zip", zip_of(IN_CLASSES)
    yield "stored.zip", zip_of(IN_CLASSES, zipfile.ZIP_STORED)


@pytest.mark.parametrize(("name", "data"), list(archives()), ids=lambda value: value if isinstance(value, str) else "")
def test_an_archive_of_class_folders(tmp_path: Path, look: Callable[..., Listing], name: str, data: bytes) -> None:
    """The folder that all members share is no class."""
    (tmp_path / name).write_bytes(data)
    listing = look(tmp_path / name)
    assert found(listing) == EXPECTED
    assert contents(listing) == [b"one", b"two" * 400]
    assert (listing.format, listing.classes, listing.ignored) == ("folders", ("a", "b"), 2)
    assert found(look(tmp_path / name, "flat")) == [(image, None) for image, _ in EXPECTED]


def test_an_archive_without_class_folders_has_no_labels(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "unlabeled2017.zip").write_bytes(zip_of({"unlabeled2017/1.jpg": b"1", "unlabeled2017/2.jpg": b"2"}))
    listing = look(tmp_path / "unlabeled2017.zip")
    assert (listing.format, listing.classes, contents(listing)) == ("flat", (), [b"1", b"2"])


SYNSETS = {name: {f"{name}_{n}.JPEG": f"{name} {n}".encode() for n in range(3)} for name in ("n02", "n01", "n03")}
OF_SYNSETS = [(f"{name}/{image}", name) for name, images in SYNSETS.items() for image in images]


def test_ilsvrc_train_is_read_through_both_tars(tmp_path: Path, look: Callable[..., Listing]) -> None:
    outer = tar_of({f"{name}.tar": tar_of(images) for name, images in SYNSETS.items()})
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(outer)
    listing = look(tmp_path / "ILSVRC2012_img_train.tar")
    assert found(listing) == OF_SYNSETS
    assert listing.classes == ("n01", "n02", "n03")
    assert contents(listing) == [data for images in SYNSETS.values() for data in images.values()]
    assert not (tmp_path / "stage").exists()  # nothing is unpacked


def test_a_folder_of_synset_tars_is_one_class_a_tar(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "train").mkdir()
    for name, images in SYNSETS.items():
        (tmp_path / "train" / f"{name}.tar").write_bytes(tar_of(images))
    listing = look(tmp_path / "train")
    assert found(listing) == sorted(OF_SYNSETS)
    assert read_image(listing.get_source(3)) == b"n02 0"


def samples(first: int, count: int, extension: str = "jpg", label: Callable[[int], bytes] = b"%d".__mod__) -> Files:
    pairs = ((f"{n:05d}.{extension}", f"{n:05d}.cls", n) for n in range(first, first + count))
    return {name: data for image, cls, n in pairs for name, data in ((image, b"p%d" % n), (cls, label(n % 3)))}


def test_webdataset_tars(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "t-1.tar").write_bytes(tar_of(samples(4, 4, "JPEG")))
    (tmp_path / "w" / "t-0.tar").write_bytes(tar_of(samples(0, 4)))
    listing = look(tmp_path / "w")
    assert (listing.format, listing.classes) == ("webdataset", ("0", "1", "2"))
    assert found(listing) == [(f"t-{n // 4}/{n:05d}.{'JPEG' if n > 3 else 'jpg'}", str(n % 3)) for n in range(8)]
    assert contents(listing) == [b"p%d" % n for n in range(8)]
    assert found(look(f"{tmp_path}/w/t-0*")) == [(f"{n:05d}.jpg", str(n % 3)) for n in range(4)]  # a pattern


def test_webdataset_labels_may_be_names_json_or_absent(tmp_path: Path, look: Callable[..., Listing]) -> None:
    names = [b"dog\n", b"cat\n", b"eel\n"]
    files = samples(0, 3, label=names.__getitem__)
    files |= {"x.jpg": b"x", "x.json": b'{"label": "dog", "caption": "no"}', "y.jpg": b"y"}
    (tmp_path / "w.tar").write_bytes(tar_of(files))
    listing = look(tmp_path / "w.tar")
    assert listing.classes == ("cat", "dog", "eel")
    assert [label for _, label in found(listing)] == ["dog", "cat", "eel", "dog", None]


def test_webdataset_with_an_unreadable_label_names_the_sample(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "w.tar").write_bytes(tar_of({"a.jpg": b"", "a.json": b"{oh", "b.jpg": b"", "b.cls": b"1"}))
    with pytest.raises(UserError, match=r"w\.tar: the label of sample a cannot be read"):
        look(tmp_path / "w.tar")


def parquet_of(path: Path, labels: list[int | None], names: list[str] | None = None) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": b"image %d" % n, "path": None} for n in range(len(labels))]
    feature = {"_type": "ClassLabel", "names": names}
    metadata = {b"huggingface": json.dumps({"info": {"features": {"label": feature}}}).encode()} if names else None
    table = pyarrow.table({"image": images, "label": pyarrow.array(labels, pyarrow.int64())})
    tables.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)


def test_parquet_of_a_hub(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "data").mkdir()
    for number in range(2):
        parquet_of(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", [2, 0, None, 1, -1], ["x", "y", "z"])
    listing = look(tmp_path / "data")
    assert (listing.format, listing.classes) == ("parquet", ("x", "y", "z"))
    assert [label for _, label in found(listing)] == ["z", "x", None, "y", None] * 2
    assert contents(listing) == [b"image %d" % n for n in range(5)] * 2
    before = {path: path.stat().st_ino for path in (tmp_path / "stage").iterdir()}
    assert found(look(tmp_path / "data")) == found(listing)  # a restart finds what was staged
    assert {path: path.stat().st_ino for path in (tmp_path / "stage").iterdir()} == before
    parquet_of(tmp_path / "data" / "validation-00000-of-00001.parquet", [0], ["x", "y", "z"])
    with pytest.raises(UserError, match=r"archives of train, val\. .*'.*/data/\*train\*'"):
        look(tmp_path / "data")
    assert len(look(f"{tmp_path}/data/train-*.parquet")) == 10


def test_parquet_without_names_numbers_its_classes(tmp_path: Path, look: Callable[..., Listing]) -> None:
    parquet_of(tmp_path / "t.parquet", [3, 0, 3])
    assert look(tmp_path / "t.parquet").classes == ("0", "1", "2", "3")
    parquet_of(tmp_path / "bad.parquet", [7], ["x"])
    with pytest.raises(UserError, match="label 7, but only 1 class names"):
        look(tmp_path / "bad.parquet")


def test_images_beside_archives_are_refused_until_told_which(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "1.jpg")
    (tmp_path / "src" / "w.tar").write_bytes(tar_of(samples(0, 2)))
    with pytest.raises(UserError, match=r"1 images and 1 archives \(w\.tar, …\)\. Say which to pack: with --format"):
        look(tmp_path / "src")
    assert found(look(tmp_path / "src", "flat")) == [("1.jpg", None)]
    assert len(look(tmp_path / "src", "webdataset")) == 2


def test_archives_of_several_kinds_are_refused(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "w.tar").write_bytes(tar_of(samples(0, 2)))
    (tmp_path / "src" / "x.zip").write_bytes(zip_of(IN_CLASSES))
    with pytest.raises(UserError, match=r"w\.tar is a tar file, .*x\.zip is a zip file"):
        look(tmp_path / "src")


def test_archives_that_are_none(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "text.tar").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"text\.tar is not a tar, zip or parquet file"):
        look(tmp_path / "text.tar")
    (tmp_path / "cut.tar").write_bytes(tar_of(IN_CLASSES)[:1800])
    with pytest.raises(UserError, match=r"cut\.tar"):
        look(tmp_path / "cut.tar")
    (tmp_path / "empty.zip").write_bytes(zip_of({"notes.txt": b""}))
    with pytest.raises(UserError, match=r"empty\.zip: no images"):
        look(tmp_path / "empty.zip")
    with pytest.raises(UserError, match="no such folder or file"):
        look(tmp_path / "train-*.tar")


def test_numbered_tables_are_one_set_and_splits_in_folders_are_not(
    tmp_path: Path, look: Callable[..., Listing]
) -> None:
    """The layout of a hub's converted tables."""
    for split in ("train", "test"):
        (tmp_path / "default" / split).mkdir(parents=True)
        for number in range(2):
            parquet_of(tmp_path / "default" / split / f"{number:04d}.parquet", [0, 1], ["x", "y"])
    listing = look(tmp_path / "default" / "train")
    assert [name for name, _ in found(listing)] == [f"000{n}/{row:09d}.jpg" for n in range(2) for row in range(2)]
    with pytest.raises(UserError, match=r"archives of test, train\. .*give .*/default/test\."):
        look(tmp_path / "default")
    listing = look(tmp_path / "default", "parquet")  # asked for: names tell them apart
    assert len({name for name, _ in found(listing)}) == 8


def test_splits_of_webdataset_tars_in_folders_are_noticed(tmp_path: Path, look: Callable[..., Listing]) -> None:
    for split in ("train", "val"):
        (tmp_path / "w" / split).mkdir(parents=True)
        (tmp_path / "w" / split / "shard-0000.tar").write_bytes(tar_of(samples(0, 3)))
    with pytest.raises(UserError, match=r"archives of train, val\. .*/w/train\."):
        look(tmp_path / "w")


def test_tables_with_other_labels_are_not_joined(tmp_path: Path, look: Callable[..., Listing]) -> None:
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "t").mkdir()
    image = [{"bytes": b"1", "path": None}]
    tables.write_table(pyarrow.table({"image": image, "label": [1]}), tmp_path / "t" / "0.parquet")
    for other in ({"label": ["one"]}, {}):
        tables.write_table(pyarrow.table({"image": image, **other}), tmp_path / "t" / "1.parquet")
        with pytest.raises(UserError, match=r"1\.parquet has another label column"):
            look(tmp_path / "t")


def test_archives_as_classes_keep_the_dots_of_their_names(tmp_path: Path, look: Callable[..., Listing]) -> None:
    (tmp_path / "dogs").mkdir()
    for name in ("St. Bernard.zip", "St. John.ZIP", "Collie.zip"):
        (tmp_path / "dogs" / name).write_bytes(zip_of({"1.jpg": name.encode()}))
    assert look(tmp_path / "dogs", "folders").classes == ("Collie", "St. Bernard", "St. John")


def test_json_without_a_label_makes_no_webdataset(tmp_path: Path, look: Callable[..., Listing]) -> None:
    images = {f"F/{c}/{c}{n}.jpg": b"x" for c in "ab" for n in range(2)}
    notes = {name.replace(".jpg", ".json"): b'{"shapes": []}' for name in images}
    (tmp_path / "F.tar").write_bytes(tar_of(dict(sorted((images | notes).items()))))
    listing = look(tmp_path / "F.tar")
    assert (listing.format, listing.classes, len(listing)) == ("folders", ("a", "b"), 4)


def test_zip_of_windows_and_tar_of_a_parent_folder(tmp_path: Path, look: Callable[..., Listing]) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in (r"cat\1.jpg", r"dog\2.jpg"):
            entry = zipfile.ZipInfo(name)
            entry.filename, entry.create_system = name, 0
            archive.writestr(entry, b"x")
    (tmp_path / "w.zip").write_bytes(buffer.getvalue())
    assert look(tmp_path / "w.zip").classes == ("cat", "dog")
    (tmp_path / "up.tar").write_bytes(tar_of({"../photos/a/1.jpg": b"1", "../photos/b/2.jpg": b"2"}))
    assert look(tmp_path / "up.tar").classes == ("a", "b")


def test_images_of_other_formats_are_found_to_be_named(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "1.HEIC", "2.avif", "3.jxl", "4.jpg")
    assert len(look(tmp_path / "src")) == 4


def test_the_folder_that_macos_adds_is_no_class(tmp_path: Path, look: Callable[..., Listing]) -> None:
    put(tmp_path / "src", "a/1.jpg", "b/1.jpg", "__MACOSX/a/._1.jpg")
    assert look(tmp_path / "src").classes == ("a", "b")
