"""The plan: a pure function that loses nothing, whatever the number of images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.images.reencode import Changes
from shards.images.rules import ImageRules
from shards.layout import TAR_END, count_member_bytes
from shards.packing import plan as plan_module
from shards.packing.plan import Options, make_plan
from shards.sources.listing import Listing, ListingBuilder

ROOT = Path(__file__).resolve().parents[3]


def listing_of(
    sizes: list[int], label: int = -1, names: list[str] | None = None, classes: tuple[str, ...] = ("a",) * 12
) -> Listing:
    builder = ListingBuilder(in_containers=False)
    for place, size in enumerate(sizes):
        builder.add((names[place] if names else f"a/{place}.jpg").encode(), size)
    listing = builder.finish("/src", "folders", "/src", (), 0)
    return listing.with_labels(() if label < 0 else classes, np.full(len(sizes), label, np.int32))


@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=80), st.integers(1, 40_000), st.integers(0, 99), st.booleans()
)
def test_every_source_once_in_bounded_shards(sizes: list[int], shard_size: int, seed: int, labeled: bool) -> None:
    listing, options = listing_of(sizes, 11 if labeled else -1), Options(seed, shard_size)
    planned = make_plan(listing, options)
    assert sorted(planned.order.tolist()) == list(range(len(sizes)))
    assert planned.cuts[0] == 0
    assert planned.cuts[-1] == len(sizes)
    cost = [count_member_bytes(size) + (count_member_bytes(2) if labeled else 0) for size in sizes]
    tars = [planned.order[a:b].tolist() for a, b in zip(planned.cuts, planned.cuts[1:], strict=False)]
    for number, tar in enumerate(tars):
        length = sum(cost[place] for place in tar) + len(TAR_END)
        assert len(tar) == 1 or (tar and length <= shard_size)
        if number + 1 < len(tars):  # and no shard stops early
            assert length + cost[tars[number + 1][0]] > shard_size
    again = make_plan(listing, options)
    assert np.array_equal(again.order, planned.order)
    assert np.array_equal(again.cuts, planned.cuts)
    assert again.fingerprint == planned.fingerprint


def test_the_order_is_pinned() -> None:
    """A restart under another numpy must find the same plan: these numbers may never change."""
    assert make_plan(listing_of([1] * 8), Options(seed=0)).order.tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_seeds_shuffle_differently() -> None:
    orders = [make_plan(listing_of([1] * 50), Options(seed)).order.tolist() for seed in range(5)]
    assert all(a != b for place, a in enumerate(orders) for b in [*orders[:place], list(range(50))])


def test_fingerprint_tells_every_difference() -> None:
    base, options = [5, 6, 7], Options()
    listings = [
        listing_of(base, 11),
        listing_of(base, 11, ["a/0.jpg", "a/1.jpg", "a/new.jpg"]),
        listing_of(base, 11, ["a/0.jpga", "/1.jpg", "a/2.jpg"]),
        listing_of([5, 6, 8], 11),
        listing_of(base, 3),
        listing_of(base),
        listing_of(base, 11, classes=("b",) * 12),
    ]
    others = [Options(seed=1), Options(shard_size=9999), Options(name="val"), Options(rules=ImageRules(check="header"))]
    others += [Options(rules=ImageRules(max_pixels=9)), Options(changes=Changes(max_short_side=512))]
    others += [Options(changes=Changes(quality=91)), Options(changes=Changes(upright=True))]
    prints = [make_plan(listing, options).fingerprint for listing in listings]
    prints += [make_plan(listings[0], other).fingerprint for other in others]
    assert len(set(prints)) == len(prints)
    assert make_plan(listing_of(base, 11), options).fingerprint == prints[0]


def test_the_fingerprint_is_pinned() -> None:
    """A folder that an older program packed is known again: these hashes may never change."""
    plain, small = (
        make_plan(listing_of([5, 6, 7], 11), options).fingerprint
        for options in (
            Options(),
            Options(changes=Changes(max_short_side=512, quality=80)),
        )
    )
    assert plain == "0e9a0c42d02b51b96d9ba6c2cd64ecb0ca16a970af5ee587dfd2cd175e3a0f20"
    assert small == "d49fa76674576f05aadb160077a0257a941b4ddbd694472c2d39876d12dc8bf4"


def test_more_shards_than_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "MAX_SHARDS", 3)
    assert make_plan(listing_of([1] * 3), Options(shard_size=1)).shard_count == 3
    with pytest.raises(UserError, match="larger --shard-size"):
        make_plan(listing_of([1] * 4), Options(shard_size=1))


# A listing of N images in class folders, its plan, and every task of it, one at a time; prints the peak in MiB.
MEASURE = r"""
import re, sys
from pathlib import Path
from shards.storage.folders import open_folder
from shards.packing.pack import make_task
from shards.packing.plan import Options, make_plan
from shards.sources import labels
from shards.sources.listing import ListingBuilder
from shards.sources.folder_walk import sort_entries

count = int(sys.argv[1])
entries = ((b"class_%03d/some_photograph_%08d.jpg" % (n % 1000, n * 7919 % count), 90_000 + n % 50_000)
           for n in range(count))
builder = ListingBuilder(in_containers=False)
for name, size in sort_entries(entries):
    builder.add(name, size)
listing = labels.label_by_folder(builder.finish("/src", "flat", "/src", (), 0), "auto", 0, ())
planned = make_plan(listing, Options())
places = 0
for number in range(0, planned.shard_count, 16):
    places += len(make_task(listing, open_folder("/out"), Options(), planned, number).sources)
assert len(listing) == count and len(listing.classes) == 1000 and places > count // 17
# Not ru_maxrss, which a process inherits from the one that started it.
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def peak_of(count: int) -> int:
    run = subprocess.run([sys.executable, "-c", MEASURE, str(count)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.slow
def test_ten_million_images_are_planned_in_a_gibibyte() -> None:
    assert peak_of(10_000_000) < 1024


def test_memory_grows_by_less_than_a_hundred_bytes_an_image() -> None:
    small, large = peak_of(1000), peak_of(400_000)
    assert (large - small) * 2**20 < 250 * 400_000  # a list of names alone takes 100 bytes an image; sorting holds it
