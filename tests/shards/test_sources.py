"""What is found in a source folder."""

import os
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.sources import Source, read, scan


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())


def test_class_folders(tmp_path: Path) -> None:
    put(tmp_path, "b/2.JPG", "b/1.png", "a/x/y.WebP", "B/3.jfif", "a/notes.txt", "LICENSE", ".git/4.jpg")
    (tmp_path / "c").mkdir()  # a class without pictures keeps its number: train and val then agree
    listing = scan(tmp_path)
    assert listing.classes == ("B", "a", "b", "c")
    assert listing.sources == [
        Source("B/3.jfif", 8, 0),
        Source("a/x/y.WebP", 10, 1),
        Source("b/1.png", 7, 2),
        Source("b/2.JPG", 7, 2),
    ]
    assert (listing.format, listing.ignored) == ("folders", 3)
    assert read(str(tmp_path), listing.sources[1]) == b"a/x/y.WebP"


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    put(tmp_path, "2.jpeg", "10.gif", "3.TIFF", "notes.txt")
    (tmp_path / "sub").mkdir()
    listing = scan(tmp_path)
    assert [(source.path, source.label) for source in listing.sources] == [
        ("10.gif", -1),
        ("2.jpeg", -1),
        ("3.TIFF", -1),
    ]
    assert (listing.format, listing.classes, listing.ignored) == ("flat", (), 1)


def test_flat_takes_all_depths_when_told(tmp_path: Path) -> None:
    put(tmp_path, "b/c/2.jpg", "b/1.jpg", "0.jpg")
    listing = scan(tmp_path, "flat")
    assert [(source.path, source.label) for source in listing.sources] == [
        ("0.jpg", -1),
        ("b/1.jpg", -1),
        ("b/c/2.jpg", -1),
    ]


@pytest.mark.parametrize("format", ["auto", "folders"])
def test_mixture_is_refused(tmp_path: Path, format: str) -> None:
    put(tmp_path, "b/2.jpg", "loose.jpg")
    with pytest.raises(UserError, match=r"loose\.jpg.*--format flat"):
        scan(tmp_path, format)


def test_order_is_by_bytes_and_names_need_not_be_text(tmp_path: Path) -> None:
    names = [b"\xff.jpg", "\u00e9.jpg".encode(), b"z.jpg", b"Z.jpg"]
    for name in names:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(b"")
    assert [os.fsencode(source.path) for source in scan(tmp_path).sources] == sorted(names)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path, "store/1.jpg", "src/b/2.jpg")
    (tmp_path / "src" / "a").symlink_to(tmp_path / "store")
    assert [source.path for source in scan(tmp_path / "src").sources] == ["a/1.jpg", "b/2.jpg"]
    (tmp_path / "src" / "b" / "up").symlink_to(tmp_path / "src")
    with pytest.raises(UserError, match="up links to a folder that it lies in"):
        scan(tmp_path / "src")


def test_dangling_link_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot read .*gone\.jpg: No such file"):
        scan(tmp_path)


def test_a_source_that_changed_stops_the_run(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg")
    (source,) = scan(tmp_path).sources
    (tmp_path / "1.jpg").write_bytes(b"longer than before")
    with pytest.raises(UserError, match=r"1\.jpg changed"):
        read(str(tmp_path), source)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read .*1\.jpg"):
        read(str(tmp_path), source)
