"""The plan: a pure function that loses nothing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import pack as pack_module
from shards.errors import UserError
from shards.layout import TAR_END, member_bytes
from shards.pack import Options, plan
from shards.sources import Listing, Source


def listing_of(sizes: list[int], labelled: bool) -> Listing:
    sources = [Source(f"a/{place}.jpg", size, 11 if labelled else -1) for place, size in enumerate(sizes)]
    return Listing("/src", "folders", sources, ("a",) * 12 if labelled else (), 0)


@given(
    st.lists(st.integers(0, 9000), min_size=1, max_size=80), st.integers(1, 40_000), st.integers(0, 99), st.booleans()
)
def test_every_source_once_in_bounded_shards(sizes: list[int], shard_size: int, seed: int, labelled: bool) -> None:
    listing, options = listing_of(sizes, labelled), Options(seed, shard_size)
    planned = plan(listing, options)
    assert sorted(planned.order.tolist()) == list(range(len(sizes)))
    assert planned.cuts[0] == 0
    assert planned.cuts[-1] == len(sizes)
    cost = [member_bytes(size) + (member_bytes(2) if labelled else 0) for size in sizes]
    tars = [planned.order[a:b].tolist() for a, b in zip(planned.cuts, planned.cuts[1:], strict=False)]
    for number, tar in enumerate(tars):
        length = sum(cost[place] for place in tar) + len(TAR_END)
        assert len(tar) == 1 or (tar and length <= shard_size)
        if number + 1 < len(tars):  # and no shard stops early
            assert length + cost[tars[number + 1][0]] > shard_size
    again = plan(listing, options)
    assert np.array_equal(again.order, planned.order)
    assert np.array_equal(again.cuts, planned.cuts)
    assert again.fingerprint == planned.fingerprint


def test_the_order_is_pinned() -> None:
    """A restart under another numpy must find the same plan: these numbers may never change."""
    assert plan(listing_of([1] * 8, True), Options(seed=0)).order.tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_seeds_shuffle_differently() -> None:
    orders = [plan(listing_of([1] * 50, True), Options(seed)).order.tolist() for seed in range(5)]
    assert all(a != b for place, a in enumerate(orders) for b in [*orders[:place], list(range(50))])


def test_fingerprint_tells_every_difference() -> None:
    base, options = listing_of([5, 6, 7], True), Options()
    renamed = [*base.sources[:2], Source("a/new.jpg", 7, 11)]
    regrown = [*base.sources[:2], Source("a/2.jpg", 8, 11)]
    relabelled = [*base.sources[:2], Source("a/2.jpg", 7, 3)]
    prints = [
        plan(base, options).fingerprint,
        *(plan(dataclasses.replace(base, sources=s), options).fingerprint for s in (renamed, regrown, relabelled)),
        plan(dataclasses.replace(base, classes=("b",) * 12), options).fingerprint,
        *(plan(base, o).fingerprint for o in (Options(seed=1), Options(shard_size=9999), Options(name="val"))),
    ]
    assert len(set(prints)) == len(prints)
    assert plan(dataclasses.replace(base, root="/elsewhere", ignored=3), options).fingerprint == prints[0]


def test_more_shards_than_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "MAX_SHARDS", 3)
    assert plan(listing_of([1] * 3, False), Options(shard_size=1)).shards == 3
    with pytest.raises(UserError, match="larger --shard-size"):
        plan(listing_of([1] * 4, False), Options(shard_size=1))
