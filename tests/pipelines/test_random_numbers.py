import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.random_numbers import AUGMENT_STREAM, WINDOW_STREAM, draw_uniform, philox

# Known answers that the authors of Philox publish with Random123 (kat_vectors, philox4x32, 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = tuple(np.array([word], np.uint64) for word in counter)
    assert tuple(int(word[0]) for word in philox(words, key)) == expected


@given(
    seed=st.integers(0, 2**48),
    epoch=st.integers(0, 2**32 - 1),
    samples=st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
    view=st.integers(0, 65535),
    draws=st.integers(1, 30),
)
def test_a_sample_draws_the_same_alone_and_in_a_batch(seed, epoch, samples, view, draws):
    batch = draw_uniform(seed, WINDOW_STREAM, epoch, samples, view, draws)
    assert batch.shape == (len(samples), draws)
    for row, sample in zip(batch, samples, strict=True):
        assert np.array_equal(draw_uniform(seed, WINDOW_STREAM, epoch, sample, view, draws), row)
        assert np.array_equal(draw_uniform(seed, WINDOW_STREAM, epoch, sample, view, draws + 3)[:draws], row)
    assert ((batch > 0) & (batch < 1)).all()


def test_every_part_of_the_counter_changes_the_draw():
    base = {"seed": 1, "stream": WINDOW_STREAM, "epoch": 2, "samples": 3, "views": 4, "draws": 8}
    others = [
        {"seed": 2},
        {"seed": 1 + 2**40},
        {"stream": AUGMENT_STREAM},
        {"epoch": 3},
        {"samples": 4},
        {"samples": 3 + 2**33},
    ]
    others.append({"views": 5})
    draws = [draw_uniform(**base)] + [draw_uniform(**{**base, **other}) for other in others]
    assert len({tuple(draw) for draw in draws}) == len(draws)
    assert len(set(np.concatenate(draws).tolist())) == 8 * len(draws)


def test_draws_are_uniform_and_uncorrelated():
    draws = draw_uniform(0, AUGMENT_STREAM, 0, np.arange(20000), 0, 4)
    counts = np.histogram(draws, bins=50, range=(0, 1))[0]
    expected = draws.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 95  # chi-squared, 49 degrees of freedom: p = 1e-4
    correlation = np.corrcoef(np.concatenate([draws[:-1].T, draws[1:].T]))
    assert np.abs(correlation - np.eye(8)).max() < 0.03
