import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.order import SampleOrder, ShardOrder, permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**48), epoch=st.integers(0, 10**6))
def test_permute_is_a_permutation(size, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@given(size=st.integers(2, 10**12), data=st.data())
def test_permute_is_elementwise(size, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    together = permute(positions, size, 7, 3)
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute([position], size, 7, 3)[0]) for position in positions] == together.tolist()


def test_permute_differs_by_epoch_seed_and_part_and_looks_random():
    size = 10007
    kinds = ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))
    orders = [permute(np.arange(size), size, seed, epoch, part) for seed, epoch, part in kinds]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert (order == other).sum() < 12  # two random permutations agree in one place on average
        steps = np.diff(order)
        assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
        assert abs((steps > 0).mean() - 0.5) < 0.02


@given(
    batch=st.sampled_from([8, 16, 24]),
    samples=st.integers(24, 200),
    step=st.integers(0, 100),
    world=st.sampled_from([1, 2, 4, 8]),
)
def test_ranks_share_the_global_batch_of_every_world_size(batch, samples, step, world):
    order = SampleOrder(samples, batch, seed=5)
    shares = [order.ids(step, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {batch // world}
    assert np.array_equal(np.concatenate(shares), order.ids(step))


@given(samples=st.integers(10, 80), batch=st.integers(1, 10), epoch=st.integers(0, 50))
def test_an_epoch_visits_each_sample_at_most_once_and_drops_less_than_a_batch(samples, batch, epoch):
    order = SampleOrder(samples, batch, seed=1)
    first = epoch * order.steps_per_epoch
    seen = np.concatenate([order.ids(step) for step in range(first, first + order.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= samples - len(seen) < batch
    assert order.epoch(first) == order.epoch(first + order.steps_per_epoch - 1) == epoch


def test_each_epoch_drops_other_samples():
    order = SampleOrder(17, 5, seed=0)
    dropped = [
        frozenset(range(17)) - set(np.concatenate([order.ids(step) for step in range(first, first + 3)]).tolist())
        for first in range(0, 30, 3)
    ]
    assert len(set(dropped)) > 5


@settings(max_examples=50)
@given(step=st.integers(0, 1000), attempt=st.integers(1, 9))
def test_substitutes_of_one_step_differ(step, attempt):
    order = SampleOrder(100, 10, seed=2)
    substitutes = [order.substitute(step, place, attempt) for place in range(10)]
    assert len(set(substitutes)) == 10
    if attempt < 9:
        assert not set(substitutes) & set(order.ids(step).tolist())


def test_every_sample_gets_its_turn_as_a_substitute_even_where_a_batch_is_the_whole_set():
    order = SampleOrder(16, 16, seed=0)
    assert {order.substitute(3, 4, attempt) for attempt in range(1, 17)} == set(range(16))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="Lower --batch_size"):
        SampleOrder(7, 8, 0)


def test_the_order_never_changes():
    """A run that was started with an older version of this code sees the same samples when it resumes."""
    order = SampleOrder(1281167, 1024, 3)
    assert order.ids(12345)[:4].tolist() == [801323, 106412, 728936, 1234641]
    assert order.substitute(12345, 7, 2) == 899264


def measure_peak(work) -> int:
    """Return the most bytes that were allocated at the same time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_billion_samples_take_the_memory_of_a_thousand():
    small, large = SampleOrder(1000, 64, 0), SampleOrder(10**9, 64, 0)
    assert measure_peak(lambda: large.ids(10**10)) < 2 * measure_peak(lambda: small.ids(10**10)) < 10**5


# Shards, windows


@st.composite
def shard_orders(draw, least: int = 1) -> ShardOrder:
    """Draw some shards of 0 to 12 samples, and windows of 1 to 8 shards, which may be more than there are."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=12))
    assume(sum(sizes) >= least)
    batch = draw(st.integers(least, min(sum(sizes), 24)))
    return ShardOrder(sizes, batch, draw(st.integers(0, 2**48)), draw(st.integers(1, 8)))


def find_shards(order: ShardOrder, ids) -> np.ndarray:
    return np.searchsorted(np.cumsum(order.sizes), ids, "right")


def list_epoch(order: ShardOrder, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.ids(step) for step in range(first, first + order.steps_per_epoch)])


@given(order=shard_orders(), epoch=st.integers(0, 1000))
def test_an_epoch_of_shards_visits_each_sample_at_most_once_and_drops_less_than_a_batch(order, epoch):
    seen = list_epoch(order, epoch)
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= seen.min() <= seen.max() < order.samples
    assert 0 <= order.samples - len(seen) < order.batch


@settings(max_examples=50)
@given(order=shard_orders(), steps=st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_an_order_of_shards_does_not_depend_on_the_first_step(order, steps):
    for step in steps:
        fresh = ShardOrder(order.sizes, order.batch, order.seed, order.window)
        assert np.array_equal(order.ids(step), fresh.ids(step))
        assert order.shards(step).tolist() == fresh.shards(step).tolist()


@given(order=shard_orders(least=8), step=st.integers(0, 300), world=st.sampled_from([2, 4, 8]))
def test_ranks_share_the_batch_of_an_order_of_shards(order, step, world):
    order = ShardOrder(order.sizes, order.batch // 8 * 8, order.seed, order.window)
    shares = [order.ids(step, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {order.batch // world}
    assert np.array_equal(np.concatenate(shares), order.ids(step))


@settings(max_examples=50)
@given(order=shard_orders(), step=st.integers(0, 300))
def test_samples_and_substitutes_come_from_the_shards_of_the_step(order, step):
    shards = order.shards(step).tolist()
    assert len(set(shards)) == len(shards) <= len(order.windows(step)) * order.window
    ids = order.ids(step)
    assert set(find_shards(order, ids).tolist()) <= set(shards)
    windows = {window: set(order.shards_in_window(window).tolist()) for window in order.windows(step)}
    for attempt in (1, 2, 5):
        substitutes = [order.substitute(step, place, attempt) for place in range(order.batch)]
        assert len(set(substitutes)) == order.batch
        for home, guest in zip(find_shards(order, ids), find_shards(order, substitutes), strict=True):
            assert any({home, guest} <= window for window in windows.values())


@settings(max_examples=30)
@given(order=shard_orders(), step=st.integers(0, 300), data=st.data())
def test_every_sample_of_a_window_gets_its_turn_as_a_substitute(order, step, data):
    place = data.draw(st.integers(0, order.batch - 1))
    home = find_shards(order, order.ids(step)[place])
    sizes = [
        order.sizes[order.shards_in_window(window)]
        for window in order.windows(step)
        if home in order.shards_in_window(window)
    ]
    (size,) = (int(window.sum()) for window in sizes)
    met = {order.substitute(step, place, attempt) for attempt in range(1, 2 * size + order.batch)}
    assert len(met) == size


def test_the_first_substitutes_are_none_of_the_step():
    order = ShardOrder([100] * 6, 10, 0, 2)
    for attempt in range(1, 20):
        assert order.substitute(3, 4, attempt) not in order.ids(3)


@settings(max_examples=50)
@given(order=shard_orders(), epoch=st.integers(0, 50))
def test_windows_follow_one_another_through_the_epochs(order, epoch):
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    windows = [order.windows(step) for step in steps]
    of_epoch = range(epoch * order.windows_per_epoch, (epoch + 1) * order.windows_per_epoch)
    assert {window for step in windows for window in step} <= set(of_epoch)
    assert all(one[-1] <= next_[0] for one, next_ in itertools.pairwise(windows))
    # Each shard with samples is in one window, unless all of that falls to the remainder.
    shards = [shard for window in of_epoch for shard in order.shards_in_window(window).tolist()]
    assert len(set(shards)) == len(shards)
    assert set(find_shards(order, list_epoch(order, epoch)).tolist()) <= set(shards)
    # And no other shard is named by a step.
    assert {shard for step in steps for shard in order.shards(step).tolist()} <= set(shards)


def test_a_step_comes_from_two_windows_at_most_where_they_are_larger_than_a_batch():
    order = ShardOrder(np.random.default_rng(0).integers(90, 110, 64), 256, 3, 4)
    counts = [len(order.windows(step)) for step in range(2 * order.steps_per_epoch)]
    assert set(counts) == {1, 2}
    assert counts.count(1) > counts.count(2) / 2


def test_shards_and_their_samples_are_shuffled_again_in_each_epoch():
    order = ShardOrder([50] * 40, 100, 7, 4)
    epochs = [list_epoch(order, epoch) for epoch in range(3)]
    for number, one in enumerate(epochs):
        assert abs(np.corrcoef(np.arange(len(one)), one)[0, 1]) < 0.5  # of 40 shards
        for other in epochs[:number]:
            assert (one == other).sum() < 12
    shards = [find_shards(order, one) for one in epochs]
    windows = [{frozenset(shard[at : at + 200].tolist()) for at in range(0, 2000, 200)} for shard in shards]
    assert all(len(window) == 4 for epoch in windows for window in epoch)
    assert len(windows[0] & windows[1]) < 3  # other shards stand together
    # Within a window the four shards are mixed, not one after another.
    runs = np.flatnonzero(np.diff(shards[0]))
    assert len(runs) > 0.6 * len(shards[0])


def test_windows_of_one_epoch_and_size_have_permutations_of_their_own():
    order = ShardOrder([100] * 8, 100, 0, 1)
    within = [order.ids(step) % 100 for step in range(8)]
    for number, one in enumerate(within):
        assert all((one == other).sum() < 10 for other in within[:number])


def test_a_window_of_all_shards_is_shuffled_as_a_whole():
    order = ShardOrder([10, 0, 30], 8, 0, 99)
    assert order.window == 3
    assert order.windows(0) == range(1)
    assert sorted(order.shards(0).tolist()) == [0, 2]
    assert set(order.shards(order.steps_per_epoch)) == {0, 2}


def test_memory_grows_with_the_shards_alone():
    few, many = ShardOrder([10**6] * 500, 64, 0, 16), ShardOrder([10] * 50_000, 64, 0, 16)
    assert measure_peak(lambda: few.ids(0)) < 10**5 + 500 * 300
    assert measure_peak(lambda: many.ids(0)) < 50_000 * 300
    held = measure_peak(lambda: [many.ids(epoch * many.steps_per_epoch) for epoch in range(2, 6)])
    assert held < 50_000 * 400


@pytest.mark.parametrize(
    ("sizes", "window", "complaint"), [([3, 4], 1, "Lower --batch_size"), ([9], 0, "data.shuffle_window")]
)
def test_an_impossible_order_of_shards_is_refused(sizes, window, complaint):
    with pytest.raises(ValueError, match=complaint):
        ShardOrder(sizes, 8, 0, window)
