"""Scores of rankings and whitening, against the figures of the published code (tests/golden/retrieval.json)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dino_fast.evaluate.search.copydays import score_copies
from dino_fast.evaluate.search.ground_truth import GroundTruth, Query
from dino_fast.evaluate.search.ranking import (
    Choice,
    RankingScore,
    compute_average_precision,
    compute_precision,
    compute_similarities,
    rank_images,
    score_rankings,
)
from dino_fast.evaluate.search.whitening import learn_whitening
from tests.dino_fast.model.test_vit import assert_digest

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "retrieval.json").read_text())
EXACT = {"rel": 1e-12, "abs": 1e-12}


# Revisited Oxford and Paris


def _draw_revisited() -> tuple[GroundTruth, Tensor, Tensor]:
    r = np.random.default_rng(70)
    mu = r.standard_normal((12, 32))
    label, level = r.integers(0, 16, 200), r.integers(0, 3, 200)
    x = r.standard_normal((200, 32)) * np.array([0.9, 1.6, 1.2])[level][:, None]
    x[label < 12] += mu[label[label < 12]]
    queries = mu + 0.5 * r.standard_normal((12, 32))
    level[label == 11] = 1
    found = [[np.flatnonzero((label == i) & (level == of)) for of in range(3)] for i in range(12)]
    rows = tuple(Query(str(i), *ids) for i, ids in enumerate(found))
    return GroundTruth(tuple(map(str, range(200))), rows), torch.from_numpy(queries), torch.from_numpy(x)


def test_the_published_scores_of_revisited_sets():
    truth, queries, database = _draw_revisited()
    golden = GOLDEN["revisited"]
    counts = [[len(query.easy), len(query.hard), len(query.junk)] for query in truth.queries]
    assert counts == golden["counts_easy_hard_junk"]
    assert_digest(torch.cat(list(compute_similarities(queries, database))).T, golden["similarity"])
    orders, choices = list(rank_images(queries, database)), truth.list_choices()
    nothing = [np.zeros(0, np.int64)] * 12
    wrong = {name: Choice(choice.positives, nothing) for name, choice in choices.items()}
    counted_wrong = score_rankings(orders, wrong, ())
    for name, score in score_rankings(orders, choices, (1, 5, 10)).items():
        expected = golden["setups"][name]
        assert score.mean_ap == pytest.approx(expected["mAP"], **EXACT)
        assert list(score.precision.values()) == pytest.approx(expected["mP@1,5,10"], **EXACT)
        assert [value is None for value in score.average_precisions] == [value is None for value in expected["AP"]]
        each, of_each = ([value or 0 for value in values] for values in (score.average_precisions, expected["AP"]))
        assert each == pytest.approx(of_each, **EXACT)
        assert counted_wrong[name].mean_ap == pytest.approx(expected["mAP_if_junk_counted_as_wrong"], **EXACT)


@pytest.mark.parametrize("case", GOLDEN["ap_cases"], ids=lambda case: f"{case['ranks']} of {case['positives']}")
def test_the_published_average_precision(case: dict[str, Any]):
    for key in ("AP", "AP_copydays"):
        assert compute_average_precision(case["ranks"], case["positives"]) == pytest.approx(case[key], **EXACT)


@st.composite
def draw_rankings(draw: st.DrawFn) -> tuple[list[int], set[int], set[int]]:
    """Return a ranking of some images, with its positives and what is ignored. They may overlap."""
    order = draw(st.permutations(range(draw(st.integers(1, 12)))))
    subsets = st.sets(st.sampled_from(order))
    return order, draw(subsets), draw(subsets)


@given(draw_rankings(), st.integers(1, 15))
def test_equals_scores_by_a_walk_down_the_ranking(ranking: tuple[list[int], set[int], set[int]], k: int):
    order, positives, ignored = ranking
    arrays = [np.array(sorted(ids), np.int64) for ids in (positives, ignored)]
    kept = [image for image in order if image not in ignored]
    hits = [image in positives for image in kept]
    score = score_rankings([np.array(order)], {"x": Choice(arrays[:1], arrays[1:])}, (k,))["x"]
    if not any(hits):
        assert score.average_precisions == (None,)
        assert score.queries == 0
        assert np.isnan(score.mean_ap)
        assert np.isnan(score.precision[k])
        return
    last = len(hits) - hits[::-1].index(True)
    precisions = [1.0, *(sum(hits[:n]) / n for n in range(1, len(hits) + 1))]
    area = sum((precisions[n] + precisions[n + 1]) / 2 for n, hit in enumerate(hits) if hit)
    assert score.mean_ap == pytest.approx(area / sum(hits))
    assert score.precision[k] == pytest.approx(sum(hits[: min(k, last)]) / min(k, last))


def test_a_query_with_few_positives_can_reach_a_precision_of_1():
    assert compute_precision(np.array([0]), 10) == 1
    assert compute_precision(np.array([0, 4]), 10) == pytest.approx(2 / 5)
    assert compute_precision(np.array([1]), 1) == 0


def test_queries_without_positives_count_nowhere():
    order, none = np.arange(3), np.zeros(0, np.int64)
    choice = Choice([np.array([0]), none], [none, none])
    score = score_rankings([order, order], {"x": choice}, (1,))["x"]
    assert score == RankingScore(1.0, {1: 1.0}, (1.0, None))
    assert score.queries == 1


def test_equal_images_are_ranked_by_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dino_fast.evaluate.search.ranking.MAX_SIMILARITIES", 1)  # one query at a time
    database = torch.ones(9, 4)
    assert [order.tolist() for order in rank_images(torch.ones(2, 4), database)] == [list(range(9))] * 2


# Copydays


def _draw_copydays() -> tuple[dict[str, Tensor], Tensor, list[str], Tensor]:
    """Return the queries by block, the database, the names in `strong`, and the whitening set."""
    r = np.random.default_rng(71)
    originals, distractors = r.standard_normal((157, 64)), r.standard_normal((300, 64))
    strong = sorted((f"{2000 + 37 * j % 157}{1 + j // 157:02d}", 37 * j % 157) for j in range(229))
    blocks = {"original": originals}
    for block, noise in GOLDEN["copydays"]["noise"].items():
        source = originals[[number for _, number in strong]] if block == "strong" else originals
        blocks[block] = source + noise * r.standard_normal(source.shape)
    others = r.standard_normal((500, 64)) @ np.diag(np.linspace(0.2, 3, 64)) + 1.5
    queries = {name: torch.from_numpy(block) for name, block in blocks.items()}
    database = torch.from_numpy(np.concatenate([originals, distractors]))
    return queries, database, [name for name, _ in strong], torch.from_numpy(others)


def _list_positives(block: str, strong: list[str]) -> list[list[int]]:
    if block == "strong":
        return [[int(name[:4]) - 2000] for name in strong]
    return [[number] for number in range(157)]


def test_the_published_scores_of_copydays():
    queries, database, strong, _ = _draw_copydays()
    golden = GOLDEN["copydays"]
    assert_digest(torch.cat(list(queries.values())), golden["queries"])
    assert_digest(database, golden["database"])
    for block, expected in golden["mAP"].items():
        score = score_copies(queries[block], database, _list_positives(block, strong))
        assert score.mean_ap == pytest.approx(expected, **EXACT), block
    of_all = score_copies(queries["strong"], database, _list_positives("strong", strong), top=457)
    assert of_all.mean_ap == pytest.approx(golden["mAP_strong_if_top457"], **EXACT)


@pytest.mark.parametrize(
    ("name", "rows", "dims"),
    [("published", 500, None), ("published_rank_deficient_40", 40, None), ("truncated_to_16", 500, 16)],
)
def test_the_published_whitening(name: str, rows: int, dims: int | None):
    queries, database, strong, others = _draw_copydays()
    whitening = learn_whitening(others[:rows], dims)
    white, white_database = whitening.apply(queries["strong"]), whitening.apply(database)
    expected = GOLDEN["copydays"]["whitening"][name]
    # The similarities are of the first 20 queries of all, which are originals.
    (similarity,) = compute_similarities(whitening.apply(queries["original"][:20]), white_database)
    assert_digest(similarity, expected["similarity_first20_by_457"])
    score = score_copies(white, white_database, _list_positives("strong", strong))
    assert score.mean_ap == pytest.approx(expected["strong_mAP"], **EXACT)


def test_the_published_eigenvalues(monkeypatch: pytest.MonkeyPatch):
    """They are those of the second moments about zero. Those about the mean would be smaller."""
    others = _draw_copydays()[3]
    monkeypatch.setattr("dino_fast.evaluate.search.whitening._CHUNK", 33)  # in several parts, the last one smaller
    whitening = learn_whitening(others)
    values = 1 / whitening.matrix.square().sum(1)
    assert_digest(values, GOLDEN["copydays"]["covariance_eigenvalues"])
    assert torch.allclose(whitening.mean, others.mean(0))
    single = whitening.apply(others[:40].float())
    assert single.dtype == torch.float32
    assert torch.allclose(single, whitening.apply(others[:40]).float(), atol=1e-4)
