import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import Order, permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**48), epoch=st.integers(0, 10**6))
def test_permute_is_a_permutation(size, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


@given(size=st.integers(2, 10**12), data=st.data())
def test_permute_is_elementwise(size, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    together = permute(positions, size, 7, 3)
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute([position], size, 7, 3)[0]) for position in positions] == together.tolist()


def test_permute_differs_by_epoch_and_seed_and_looks_random():
    size = 10007
    orders = [permute(np.arange(size), size, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
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
    order = Order(samples, batch, seed=5)
    shares = [order.ids(step, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {batch // world}
    assert np.array_equal(np.concatenate(shares), order.ids(step))


@given(samples=st.integers(10, 300), batch=st.integers(1, 10), epoch=st.integers(0, 50))
def test_an_epoch_visits_each_sample_at_most_once_and_drops_less_than_a_batch(samples, batch, epoch):
    order = Order(samples, batch, seed=1)
    first = epoch * order.steps_per_epoch
    seen = np.concatenate([order.ids(step) for step in range(first, first + order.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen)
    assert 0 <= samples - len(seen) < batch
    assert order.epoch(first) == order.epoch(first + order.steps_per_epoch - 1) == epoch


def test_the_remainder_falls_on_other_samples_each_epoch():
    order = Order(17, 5, seed=0)
    dropped = [
        frozenset(range(17)) - set(np.concatenate([order.ids(step) for step in range(first, first + 3)]).tolist())
        for first in range(0, 30, 3)
    ]
    assert len(set(dropped)) > 5


@given(step=st.integers(0, 1000), attempt=st.integers(1, 5))
def test_substitutes_of_one_step_differ(step, attempt):
    order = Order(100, 10, seed=2)
    substitutes = [order.substitute(step, place, attempt) for place in range(10)]
    assert len(set(substitutes)) == 10
    if attempt < 9:
        assert not set(substitutes) & set(order.ids(step).tolist())


def test_every_sample_gets_its_turn_as_a_substitute_even_where_a_batch_is_the_whole_set():
    order = Order(16, 16, seed=0)
    assert {order.substitute(3, 4, attempt) for attempt in range(1, 17)} == set(range(16))


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="lower --batch_size"):
        Order(7, 8, 0)
