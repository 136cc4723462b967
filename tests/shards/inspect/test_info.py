"""What `make-shards info` says of a folder."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from shards.inspect import statistics
from shards.inspect.info import describe, group_rejected
from shards.inspect.statistics import compute_percentiles, count_in_bins
from shards.layout import RECORD
from shards.manifest import Manifest, Rejected, Shard
from shards.text import escape_unprintable, shorten

SIDES = st.integers(1, 6000)
SAMPLES = st.lists(st.tuples(st.integers(1, 2**30), SIDES, SIDES, st.integers(-1, 3)), min_size=1, max_size=40)
AWKWARD = st.text(
    alphabet="ab/ '\"\\\n\r\t\0\x1b[\x7f\x9bé猫🙂\u0301\u202e\u200b\u2028\udce9\udc80\ud800", max_size=120
)


def records_of(samples: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Records of (bytes, height, width, label)."""
    records = np.zeros(len(samples), RECORD)
    for record, (size, height, width, label) in zip(records, samples, strict=True):
        record["size"], record["height"], record["width"], record["label"] = size, height, width, label
    return records


def manifest_of(samples: int, classes: tuple[str, ...] = (), **fields: object) -> Manifest:
    made = {
        "name": "train",
        "options": {"format": "folders", "seed": 3, "limit": None},
        "shards": (Shard("train-000000.tar", samples, 1_234_567, ""),),
        "ignored": 7,
        "rejected": (),
        **fields,
    }
    return Manifest(fingerprint="", samples=samples, classes=classes, index_sha256="", **made)  # type: ignore[arg-type]


def section(lines: list[str], head: str) -> list[str]:
    """The lines from the one that starts with `head` to the next empty one."""
    start = next(place for place, line in enumerate(lines) if line.startswith(head))
    return lines[start : lines.index("", start) if "" in lines[start:] else None]


def bars(lines: list[str]) -> dict[str, int]:
    """Bin → count."""
    found = (re.fullmatch(r"  +(\S.*\S|\S) +([\d,]+) +(?:< 0\.1|[\d.]+) %(?:  #+)?", line) for line in lines)
    return {match[1]: int(match[2].replace(",", "")) for match in found if match}


@given(SAMPLES, st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_percentiles_are_numpys(samples: list[tuple[int, int, int, int]], percents: list[int]) -> None:
    records = records_of(samples)
    found = compute_percentiles(records, lambda chunk: chunk["size"], percents)
    ranked = np.sort(records["size"]).astype(np.float32)
    # The rank in integers: numpy's own in floats is one off for some shares.
    assert found == [ranked[max(-(-percent * len(ranked) // 100) - 1, 0)] for percent in percents]
    assert compute_percentiles(records, lambda chunk: chunk["size"], [50]) == [
        np.percentile(ranked, 50, method="inverted_cdf")
    ]


@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 100), min_size=1, max_size=5, unique=True))
def test_bins_hold_what_python_counts(numbers: list[float], edges: list[float]) -> None:
    edges = sorted(edges)
    bounds = list(zip([float("-inf"), *edges], [*edges, float("inf")], strict=True))
    expected = [sum(low <= number < high for number in numbers) for low, high in bounds]
    records = np.zeros(len(numbers), RECORD)
    values = iter(np.array_split(np.array(numbers), 1))
    assert count_in_bins(records, lambda chunk: next(values), edges).tolist() == expected


@given(SAMPLES, st.integers(1, 50))
def test_every_histogram_counts_every_sample_once(samples: list[tuple[int, int, int, int]], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_CHUNK", chunk)
        lines = list(describe(manifest_of(len(samples), ("a", "b", "c", "d")), records_of(samples)))
    for head in ("Bytes per image", "Short side", "Width to height"):
        assert sum(bars(section(lines, head)).values()) == len(samples), head
    labeled = sum(label >= 0 for *_, label in samples)
    assert sum(int(line.split()[0]) for line in section(lines, "Labels")[2:]) == labeled
    assert f"{len(samples) - labeled} samples unlabeled" in section(lines, "Labels")[0]


def test_images_fall_into_the_bins_that_are_named() -> None:
    samples = [
        (999, 95, 200, 0),
        (1000, 96, 96, 0),
        (1999, 1000, 223, 0),
        (2000, 224, 298, 0),
        (30_000_000, 31, 999, 0),
    ]
    lines = list(describe(manifest_of(5, ("a",)), records_of(samples)))
    assert bars(section(lines, "Bytes per image"))["under 1 kB"] == 1
    assert bars(section(lines, "Bytes per image"))["1 kB - 2 kB"] == 2
    assert bars(section(lines, "Bytes per image"))["2 kB - 5 kB"] == 1
    assert bars(section(lines, "Bytes per image"))["from 20 MB"] == 1
    assert section(lines, "Bytes per image")[0] == "Bytes per image: min 999 B, median 2 kB, p90 30 MB, max 30 MB"
    assert section(lines, "Bytes per image")[-1] == "  total: 30 MB (30,005,998 bytes)"
    sides = section(lines, "Short side")
    assert sides[0] == "Short side in pixels: min 31, median 96, max 224"
    assert {bin for bin, count in bars(sides).items() if count} == {
        *("under 32", "64 - 95", "96 - 127", "160 - 223", "224 - 255")
    }
    assert sides[-2:] == [
        "  under 96, so that every local crop is upscaled: 2 (40.0 %)",
        "  under 224, so that every global crop is upscaled: 4 (80.0 %)",
    ]
    shapes = bars(section(lines, "Width to height"))
    assert {bin: count for bin, count in shapes.items() if count} == {
        "1:3 or narrower": 1,
        "1:1": 1,
        "4:3": 1,
        "2:1": 1,
        "3:1 or wider": 1,
    }
    assert section(lines, "Width to height")[-1] == "  megapixels: min 0.00922, median 0.031, max 0.223"


def test_the_overview_says_what_the_manifest_says() -> None:
    text = "\n".join(describe(manifest_of(1, rejected=(Rejected("a.jpg", "empty file"),)), records_of([(5, 9, 9, -1)])))
    for line in (
        "name        train",
        "samples     1",
        "classes     none (no labels)",
        "shards      1, 1.23 MB (1,234,567 bytes)",
        "rejected    1",
        "ignored     7 files whose names are not those of images",
        "duplicates  0",
        "options     format folders\n            limit none\n            seed 3",
    ):
        assert line in text
    foreign = "\n".join(describe(manifest_of(1, duplicates=1200, foreign=True), records_of([(5, 9, 9, -1)])))
    assert "duplicates  1,200 (kept, listed in duplicates.csv)" in foreign
    assert "tars of another program" in foreign


def test_a_folder_without_samples_is_described() -> None:
    assert "samples     0" in list(describe(manifest_of(0), np.zeros(0, RECORD)))


def test_classes_are_named_from_both_ends() -> None:
    samples = [(5, 9, 9, label) for label in range(20) for _ in range(label + 1)]
    lines = section(
        list(describe(manifest_of(210, tuple(f"class {n}" for n in range(20))), records_of(samples))), "Lab"
    )
    assert lines[1] == "  samples per class: min 1, median 10, max 20"
    named = [(int(line.split()[0]), line.split("  ")[-1]) for line in lines[2:] if "class" in line]
    assert named == [(n + 1, f"class {n}") for n in (19, 18, 17, 16, 15, 4, 3, 2, 1, 0)]
    assert lines[7].strip() == "..."


def test_classes_without_samples_are_named() -> None:
    classes = tuple(f"class{n}" for n in range(12))
    lines = section(list(describe(manifest_of(3, classes), records_of([(5, 9, 9, n) for n in (2, 2, -1)]))), "Labels")
    assert lines[0] == "Labels: 1 classes with samples, 11 without; 1 samples unlabeled"
    assert [line.split() for line in lines[2:]] == [
        ["2", "66.7", "%", "class2"],
        *(["0", "0", "%", f"class{n}"] for n in (0, 1, 3, 4, 5)),
        ["...", "and", "6", "more", "without", "samples"],
    ]


def test_reasons_are_one_where_only_numbers_and_quotes_differ() -> None:
    reasons = [
        "empty file",
        "20x30 pixels, more than 500",
        "1000x30 pixels, more than 500",
        "broken PNG file (chunk b'abc')",
        "broken PNG file (chunk b'\\x01d')",
        "broken PNG file (chunk b'7')",
        "image file is truncated (12.5 bytes not processed)",
    ]
    rejected = [Rejected(f"{place}.jpg", reason) for place, reason in enumerate(reasons)]
    assert [(reason, [entry.source for entry in entries]) for reason, entries in group_rejected(rejected)] == [
        ("broken PNG file (chunk '...')", ["3.jpg", "4.jpg", "5.jpg"]),
        ("Nx30 pixels, more than 500", ["1.jpg", "2.jpg"]),
        ("empty file", ["0.jpg"]),
        ("image file is truncated (12.5 bytes not processed)", ["6.jpg"]),
    ]


@given(st.lists(st.text("ab 1'\0", max_size=8), max_size=12))
def test_every_rejected_image_is_in_one_group(reasons: list[str]) -> None:
    rejected = [Rejected(f"{place}", reason) for place, reason in enumerate(reasons)]
    groups = group_rejected(rejected)
    assert (
        sorted((entry for _, entries in groups for entry in entries), key=lambda entry: int(entry.source)) == rejected
    )
    assert len({reason for reason, _ in groups}) <= len({re.sub(r"\d+", "1", reason) for reason in reasons})


def test_the_ten_commonest_reasons_are_shown_with_an_example() -> None:
    rejected = tuple(Rejected(f"{n}.{k}.jpg", "x" * (n + 1)) for n in range(13) for k in range(20 - n))
    lines = section(list(describe(manifest_of(1, rejected=rejected), records_of([(5, 9, 9, -1)]))), "Rejected: ")
    assert lines[0] == f"Rejected: {len(rejected)} images, all listed in rejected.csv. Their reasons:"
    assert [line.split() for line in lines[1:-1:2]] == [[f"{20 - n}", "x" * (n + 1)] for n in range(10)]
    assert [line.strip() for line in lines[2:-1:2]] == [f"such as {n}.0.jpg" for n in range(10)]
    assert lines[-1].split(maxsplit=1) == ["27", "for 3 other reasons"]


@given(AWKWARD, st.lists(AWKWARD, min_size=1, max_size=4))
def test_names_of_any_kind_fit_a_line_and_do_a_terminal_no_harm(name: str, classes: list[str]) -> None:
    manifest = manifest_of(
        1,
        tuple(classes),
        name=name,
        options={"format": name, "subset": classes},
        rejected=tuple(Rejected(name, reason) for reason in classes),
    )
    for line in describe(manifest, records_of([(5, 9, 9, 0)])):
        assert line.isprintable()
        assert cell_len(line) <= 80
        line.encode()


def test_what_cannot_be_printed_is_escaped() -> None:
    assert escape_unprintable("a\n\x1b[2J\udce9\u202eé猫\\") == "a\\n\\x1b[2J\\xe9\\u202eé猫\\"


@given(AWKWARD, st.integers(5, 40))
def test_a_shortened_text_keeps_both_its_ends(text: str, columns: int) -> None:
    short, whole = shorten(text, columns), escape_unprintable(text)
    assert cell_len(short) <= columns
    if short != whole:
        head, _, tail = short.partition("...") if "..." not in whole else ("", "", "")
        assert whole.startswith(head)
        assert whole.endswith(tail)
        assert cell_len(whole) > columns
        assert cell_len(short) >= columns - 2  # as much as fits, but for halves of wide letters


def test_memory_is_flat_for_ten_million_samples() -> None:
    records = np.broadcast_to(records_of([(100_000, 375, 500, 0)]), 10_000_000)
    manifest = manifest_of(len(records), ("a",))
    tracemalloc.start()
    try:
        lines = list(describe(manifest, records))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bars(section(lines, "Short side")) == {"320 - 383": 10_000_000}
    assert peak < 24e6  # a single column of them would take 40 MB
