"""Labels from files, numbered by other sets, and fewer images than were listed."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.sources import labels, subset
from shards.sources.label_files import label_from_file
from shards.sources.listing import Listing, ListingBuilder


def listed(names: list[str], classes: list[str] | None = None) -> Listing:
    """Images of these names; of these classes, one each."""
    builder = ListingBuilder(in_containers=False)
    for place, name in enumerate(names):
        builder.add(name.encode(), 1, classes[place] if classes else None)
    listing = builder.finish("/src", "flat", "/src", (), 0)
    return (
        labels.number_classes(listing, listing.labels, builder.list_label_texts(), named=True) if classes else listing
    )


def classes_of(listing: Listing) -> list[str]:
    return [listing.classes[label] for label in listing.labels.tolist()]


VAL = ["x/ILSVRC2012_val_00000002.JPEG", "x/ILSVRC2012_val_00000001.JPEG", "x/ILSVRC2012_val_00000003.JPEG"]


@pytest.mark.parametrize(
    "text",
    [
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1 2 3 4\nILSVRC2012_val_00000002,n02\n"
        "ILSVRC2012_val_00000003,n01\n".replace("n0", "n0000000"),
        "x/ILSVRC2012_val_00000003.JPEG,n00000001\nILSVRC2012_val_00000002.JPEG,n00000002\n"
        "ILSVRC2012_val_00000001.JPEG, n00000001\nother.jpg,n00000009\n",
        "n00000001\nn00000002\nn00000001\n",
    ],
    ids=["kaggle", "paths", "lines"],
)
def test_labels_from_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels").write_text(text)
    listing = label_from_file(listed(VAL), str(tmp_path / "labels"))
    assert listing.classes == ("n00000001", "n00000002")
    assert classes_of(listing) == ["n00000002", "n00000001", "n00000001"]


def test_class_names_of_a_table_may_have_spaces(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('a.jpg,golden retriever\nb.jpg,"eel, electric"\n')
    listing = label_from_file(listed(["b.jpg", "a.jpg"]), str(tmp_path / "labels.csv"))
    assert classes_of(listing) == ["eel, electric", "golden retriever"]


def test_files_of_labels_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    for text, complaint in {
        "n01\nn02\n": "has 2 labels for 3 images",
        "ILSVRC2012_val_00000002,n02\n": "has no line for 2 of 3 images, such as x/ILSVRC2012_val_00000001.JPEG",
        "a,\n": "is not of the form IMAGE,CLASS",
        "\n\n": "holds no labels",
        "1\n2\n3\n": "Give ILSVRC2012_devkit_t12.tar.gz",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            label_from_file(listed(VAL), str(path))
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="is not text"):
        label_from_file(listed(VAL), str(path))
    with pytest.raises(UserError, match="cannot read"):
        label_from_file(listed(VAL), str(tmp_path / "nowhere"))


def devkit(folder: Path) -> dict[str, bytes]:
    """The two files of ILSVRC's development kit, with three classes numbered against the alphabet."""
    scipy_io = pytest.importorskip("scipy.io")
    synsets = np.zeros(3, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for row, name in enumerate(("n03", "n01", "n02")):
        synsets[row] = (row + 1, name, "kit fox")
    scipy_io.savemat(folder / "meta.mat", {"synsets": synsets})
    truth = b"1\n2\n3\n"
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_bytes(truth)
    return {"meta.mat": (folder / "meta.mat").read_bytes(), "ILSVRC2012_validation_ground_truth.txt": truth}


def test_ilsvrc_numbers_become_wordnet_ids(tmp_path: Path) -> None:
    files = devkit(tmp_path)
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as kit:
        for name, data in files.items():
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(data)
            kit.addfile(member, io.BytesIO(data))
    for path in ("kit.tar.gz", "ILSVRC2012_validation_ground_truth.txt"):
        listing = label_from_file(listed(VAL), str(tmp_path / path))
        assert classes_of(listing) == ["n01", "n03", "n02"]
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n4\n")
    with pytest.raises(UserError, match="4 is not the number of an ILSVRC class"):
        label_from_file(listed(VAL), str(tmp_path / "ILSVRC2012_validation_ground_truth.txt"))


def test_val_takes_trains_numbers() -> None:
    val = labels.number_as_in(listed(["1", "2", "3"], ["eel", "cat", "eel"]), ("ant", "cat", "dog", "eel"), "m.json")
    assert (val.classes, val.labels.tolist()) == (("ant", "cat", "dog", "eel"), [3, 1, 3])
    with pytest.raises(UserError, match=r"class 'fox' is not one of the 2 classes in m\.json \(ant, cat"):
        labels.number_as_in(listed(["1"], ["fox"]), ("ant", "cat"), "m.json")
    with pytest.raises(UserError, match="has no labels"):
        labels.number_as_in(listed(["1"]), ("ant", "cat"), "m.json")


def test_a_class_without_images_may_be_unknown_to_train() -> None:
    listing = listed(["1", "2"], ["cat", "fox"]).select(np.array([0]))
    assert labels.number_as_in(listing, ("cat",), "m.json").labels.tolist() == [0]


def test_subset_of_classes() -> None:
    listing = listed(["1", "2", "3", "4"], ["d", "a", "c", "a"])
    few = subset.select_classes(listing, ["c", "a", "a"])
    assert (few.classes, classes_of(few)) == (("a", "c"), ["a", "c", "a"])
    assert [few.read_name(place) for place in range(len(few))] == ["2", "3", "4"]
    assert list(few.read_names()) == [b"2", b"3", b"4"]
    with pytest.raises(UserError, match="'x' is not a class"):
        subset.select_classes(listing, ["a", "x"])


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 9))
def test_a_limit_draws_so_many_in_order(count: int, limit: int, seed: int) -> None:
    listing = listed([f"{place:03d}" for place in range(count)])
    few = list(subset.draw_images(listing, limit, seed).read_names())
    assert len(few) == min(count, limit) == len(set(few))
    assert few == sorted(few)
    assert few == list(subset.draw_images(listing, limit, seed).read_names())


def test_limits_of_several_seeds_differ() -> None:
    listing = listed([f"{place:03d}" for place in range(100)])
    assert len({tuple(subset.draw_images(listing, 10, seed).read_names()) for seed in range(8)}) == 8


@given(st.lists(st.sampled_from("abcde"), min_size=4, max_size=200), st.floats(0.05, 0.95), st.integers(0, 9))
def test_a_split_takes_its_share_of_every_class(texts: list[str], fraction: float, seed: int) -> None:
    listing = listed([f"{place:03d}" for place in range(len(texts))], texts)
    counts = Counter(texts)
    wanted = {text: int(np.floor(fraction * count + 0.5)) for text, count in counts.items()}
    if sum(wanted.values()) in (0, len(texts)):
        with pytest.raises(UserError, match="--split-val"):
            subset.split_train_val(listing, fraction, seed)
        return
    train, val = subset.split_train_val(listing, fraction, seed)
    assert sorted([*train.read_names(), *val.read_names()]) == list(listing.read_names())
    in_val = Counter(classes_of(val))
    assert all(in_val[text] == wanted[text] for text in counts)
    assert train.classes == val.classes == listing.classes
    assert list(subset.split_train_val(listing, fraction, seed)[1].read_names()) == list(val.read_names())


def test_splits_of_several_seeds_differ() -> None:
    listing = listed([f"{place:03d}" for place in range(60)])
    assert len({tuple(subset.split_train_val(listing, 0.2, seed)[1].read_names()) for seed in range(8)}) == 8


def test_numbers_with_leading_zeros_keep_their_names(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("0,01\n1,1\n2,007\n")
    assert label_from_file(listed(["0", "1", "2"]), str(tmp_path / "n.csv")).classes == ("007", "01", "1")


def test_tables_of_more_than_two_columns_are_refused(tmp_path: Path) -> None:
    for text in ("image,healthy,rust\n0,1,0\n", ",file,label\n0,0,cat\n"):
        (tmp_path / "n.csv").write_text(text)
        with pytest.raises(UserError, match="is not of the form IMAGE,CLASS"):
            label_from_file(listed(["0"]), str(tmp_path / "n.csv"))


def test_two_images_of_one_name_have_no_order(tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"two images have the name 1\.jpg"):
        label_from_file(listed(["a/1.jpg", "b/1.jpg"]), str(tmp_path / "n.txt"))


def test_two_classes_of_one_name_are_refused() -> None:
    listing = listed(["0"])
    with pytest.raises(UserError, match="two classes have the name 'crane'"):
        labels.number_classes(listing, np.array([0]), ["1"], named=False, names=("crane", "dog", "crane"))


def test_a_file_called_as_a_class_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("b\nc\n")
    assert subset.read_class_names("a", ("a", "b", "c")) == ["a"]
    assert subset.read_class_names("a", ("b", "c")) == ["b", "c"]
