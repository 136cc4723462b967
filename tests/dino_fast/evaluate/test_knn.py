"""Weighted k-NN against the published code's scores, and in the cases in which the published code fails."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino_fast.evaluate import nearest
from dino_fast.evaluate.knn import KS, KnnScore, explain_equal_rows, score_weighted_knn

ROWS = json.loads((Path(__file__).parents[2] / "golden" / "reference_knn.json").read_text())


def _reference_features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r = np.random.default_rng(7)
    mu = r.standard_normal((10, 64))
    y_train, y_test = r.integers(0, 10, 2000), r.integers(0, 10, 500)
    x_train = mu[y_train] + 2.2 * r.standard_normal((2000, 64))
    x_test = mu[y_test] + 2.2 * r.standard_normal((500, 64))
    return torch.as_tensor(x_train), torch.as_tensor(y_train), torch.as_tensor(x_test), torch.as_tensor(y_test)


@pytest.mark.parametrize("temperature", sorted({row["temperature"] for row in ROWS}))
@pytest.mark.parametrize(("similarities", "part"), [(3000, 2**14), (3000, 100), (2**26, 2**14)])
def test_equals_the_published_scores(
    temperature: float, similarities: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test image at a time and all train images, 30 and 100 of them, all and all."""
    monkeypatch.setattr(nearest, "MAX_SIMILARITIES", similarities)
    monkeypatch.setattr(nearest, "_PART", part)
    expected = {r["k"]: KnnScore(r["top1"], r["top5"]) for r in ROWS if r["temperature"] == temperature}
    scores = score_weighted_knn(*_reference_features(), 10, tuple(expected), temperature)
    # Of 5 or 10 neighbors often fewer than five classes have votes, and the published top-5 counts others, too.
    for k in (5, 10):
        assert scores[k].top1 == expected[k].top1
        assert scores.pop(k).top5 < expected.pop(k).top5
    assert scores == expected


def _score_by_loops(
    train: Tensor, y: Tensor, test: Tensor, labels: Tensor, classes: int, k: int, t: float
) -> tuple[float, float]:
    """Return top-1 and top-5 by one loop over test images and one over neighbors."""
    hits, hits_of_five = 0, 0
    for x, label in zip(test, labels.tolist(), strict=True):
        cosines = torch.cosine_similarity(x[None], train)
        votes = [0.0] * classes
        for i in cosines.argsort(descending=True)[:k].tolist():
            votes[int(y[i])] += float(torch.exp(cosines[i] / t))
        hits += int(np.argmax(votes)) == label
        first_five = sorted(range(classes), key=lambda c: -votes[c])[:5]
        hits_of_five += label in first_five and votes[label] > 0
    return 100 * hits / len(test), 100 * hits_of_five / len(test)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    train=st.integers(1, 30),
    test=st.integers(1, 12),
    classes=st.integers(1, 9),
    k=st.integers(1, 40),
)
def test_equals_the_score_of_two_loops(seed: int, train: int, test: int, classes: int, k: int) -> None:
    r = torch.Generator().manual_seed(seed)
    x, z = (torch.randn(n, 8, dtype=torch.float64, generator=r) for n in (train, test))
    y, w = (torch.randint(classes, (n,), generator=r) for n in (train, test))
    score = score_weighted_knn(x, y, z, w, classes, (k,))[k]
    assert (score.top1, score.top5) == pytest.approx(_score_by_loops(x, y, z, w, classes, min(k, train), 0.07))


def test_three_classes_seven_test_images_and_k_above_the_train_set() -> None:
    means = 5 * torch.eye(3)
    y, w = torch.arange(9) % 3, torch.arange(7) % 3
    scores = score_weighted_knn(means[y], y, means[w], w, 3, (2, 10, 200))
    assert list(scores) == [2, 10, 200]
    assert scores[10] == scores[200] == KnnScore(100, 100)


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (30, "the rows of k = 100 and k = 200 are the same."),
        (20, "the rows of k = 20 and k = 100 and k = 200 are the same."),
        (150, "the row of k = 200 is that of k = 150."),
        (5, "the rows of k = 10 and k = 20 and k = 100 and k = 200 are the same."),
        (200, ""),
    ],
)
def test_rows_that_are_the_same_are_named(images: int, line: str) -> None:
    lines = explain_equal_rows(images, KS)
    assert lines == ([f"--train has {images} images, and a larger k means all of them: {line}"] if line else [])


def test_a_low_temperature_does_not_overflow() -> None:
    x = torch.eye(4)
    y = torch.arange(4)
    assert score_weighted_knn(x, y, x, y, 4, (4,), temperature=0.001)[4].top1 == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, "at least one k"),
        ({"ks": (0,)}, "at least one k"),
        ({"test_labels": torch.tensor([0, 3])}, "test labels do not lie in 0 to 2"),
        ({"train_labels": torch.tensor([0, -1, 1])}, "train labels do not lie in 0 to 2"),
        ({"train_labels": torch.tensor([0])}, "3 train features with 1 labels"),
        ({"test_features": torch.empty(0, 4), "test_labels": torch.empty(0)}, "0 test features"),
    ],
)
def test_refuses_inputs_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    fit = {
        "train_features": torch.eye(3, 4),
        "train_labels": torch.arange(3),
        "test_features": torch.eye(2, 4),
        "test_labels": torch.arange(2),
        "classes": 3,
    }
    with pytest.raises(ValueError, match=message):
        score_weighted_knn(**{**fit, **changes})  # type: ignore[arg-type]
