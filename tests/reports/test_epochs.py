"""What an epoch holds, however many ranks, threads and interruptions there are."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipelines.batch import Batch
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from pipelines.order import Order, SampleOrder, ShardOrder
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex
from tests.pipelines.conftest import index, shard_folder

__all__ = ["index", "shard_folder"]  # the fixtures, which serve here, too

CROPS = CropRecipe(global_size=32, local_size=24, locals=1)


def load(index: ShardIndex, start: int, stop: int, **data) -> list[Batch]:
    loader = Loader(
        index, DataRecipe(**{"threads": 1, **data}), CROPS, PhotometricRecipe(), batch=8, seed=0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    return list(loader.batches(start, stop))


def is_same(one: Batch, other: Batch) -> bool:
    return bool((one.ids == other.ids).all()) and torch.equal(one.globals, other.globals)


ORDERS = {
    "all samples": lambda: SampleOrder(90, 8, 0),
    "by shards": lambda: ShardOrder([30, 0, 1, 40, 19], 8, 0, window=2),
    "one shard": lambda: ShardOrder([90], 8, 0, window=8),
}


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> Order:
    return ORDERS[request.param]()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_rank_has_equally_many_samples_whatever_the_shards(order: Order, world: int):
    """Lightning #20404: ranks with uneven data hang; webdataset #65: fewer shards than workers."""
    for step in range(2 * order.steps_per_epoch):
        shares = [order.ids(step, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {8 // world}
        assert len(set(np.concatenate(shares).tolist())) == 8


def test_an_interrupted_epoch_goes_on_with_other_ranks_without_loss_or_repetition(order: Order):
    """Lightning #19764, #18780: data are repeated after a resume within an epoch.

    libffcv #335 and torch's DistributedSampler: samples are given twice to make the shares of all ranks equal.
    """
    steps = order.steps_per_epoch
    ranks = [1] * 4 + [4] * 3 + [2] * (2 * steps - 7)  # two interruptions, and an epoch's end
    seen = [order.ids(step, rank, world) for step, world in enumerate(ranks) for rank in range(world)]
    for epoch in np.split(np.concatenate(seen), 2):
        assert len(epoch) == len(set(epoch.tolist())) == 8 * steps
        assert 90 - len(epoch) < 8
    assert np.array_equal(np.concatenate(seen), np.concatenate([order.ids(step) for step in range(2 * steps)]))


def test_no_epoch_is_empty_and_none_has_the_order_of_another(index: ShardIndex):
    """solo-learn #265: every other epoch ends at once; pytorch #31771: the same order, unless set_epoch is called."""
    batches = load(index, 0, 15)
    epochs = [np.concatenate([batch.ids for batch in batches[first : first + 5]]).tolist() for first in (0, 5, 10)]
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.fixture
def restore_generators() -> Iterator[None]:
    """Leave the generators of Python, numpy and torch as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])  # noqa: NPY002


def test_seeds_that_others_set_change_nothing(index: ShardIndex, restore_generators: None):
    """pytorch #5059: numpy gives every worker the same numbers; Lightning #20412: the same augmentations each epoch."""
    runs = []
    for seed in (0, 0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        before = random.random(), np.random.random(), torch.rand(())  # noqa: NPY002
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        runs.append(load(index, 0, 6))
        assert (random.random(), np.random.random(), torch.rand(())) == before  # noqa: NPY002
    for run in runs[1:]:
        assert all(is_same(one, other) for one, other in zip(runs[0], run, strict=True))
    first = {int(number): view for number, view in zip(runs[0][0].ids, runs[0][0].globals, strict=False)}
    again = {int(number): view for batch in runs[0][5:] for number, view in zip(batch.ids, batch.globals, strict=False)}
    shared = first.keys() & again.keys()
    assert shared
    assert not any(torch.equal(first[number], again[number]) for number in shared)


@pytest.mark.parametrize("decode", ["dali", "torch"])
def test_threads_and_queues_change_nothing(index: ShardIndex, decode: str):
    """NVIDIA/DALI, torch and others: "results differ with another number of workers"."""
    few = load(index, 2, 5, decode=decode, threads=1, prefetch=1)
    many = load(index, 2, 5, decode=decode, threads=3, prefetch=5)
    assert all(is_same(one, other) for one, other in zip(few, many, strict=True))
