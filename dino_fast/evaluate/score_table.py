"""The scores of several evaluations as rows of one table, beside the published ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dino_fast.evaluate.published_scores import PUBLISHED

NOTE = (
    "Published: networks trained on ImageNet without labels, on ImageNet's validation images, revisited Oxford and "
    "Paris, and Copydays with 10,000 distractors (arXiv 2104.14294)."
)


@dataclass(frozen=True)
class ScoreRow:
    """A figure of an evaluation."""

    evaluation: str
    """the name of the evaluation's result, such as knn"""
    figure: str
    """what is counted, in words"""
    score: float | None
    """percent; None where the evaluation was skipped or failed"""
    published: float | None
    """percent, of the same backbone; None where nothing is published"""
    note: str
    """how it was counted, or why there is no score"""


def list_rows(evaluation: str, result: Mapping[str, Any]) -> list[ScoreRow]:
    """Return the rows of one result, a dictionary as the commands write it to --json."""
    return [
        ScoreRow(evaluation, figure, score, PUBLISHED.get(figure, {}).get(str(result["backbone"])), note)
        for figure, score, note in _list_figures(evaluation, result)
    ]


def _list_figures(evaluation: str, result: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Yield what is counted, the score and a note."""
    if "knn" in result:
        yield "k-NN, top-1", result["knn"]["20"]["top1"], "k = 20"
    if "linear" in result:
        yield _read_linear(result["best"])
    if "finetune" in result:
        yield "fine-tuned, top-1", result["best"]["top1"], f"lr {result['best']['lr']:g}"
    for choice, score in result.get("retrieval", {}).items():
        if score["map"] is not None:
            name = evaluation.removeprefix("retrieval-")
            yield f"{name} {choice}, mAP", score["map"], f"{score['queries']} queries"
    for kind, score in result.get("copies", {}).items():
        yield f"copies {kind}, mAP", score["map"], f"{score['images']} copies"


def _read_linear(best: Mapping[str, Any]) -> tuple[str, float, str]:
    if "best_top1" in best:
        return "linear, top-1", best["best_top1"], f"of the best epoch, lr {best['lr']:g}"
    return "linear, top-1", best["top1"], f"of cached features, lr {best['lr']:g}"


def format_table(title: str, rows: Sequence[ScoreRow]) -> str:
    """Return the rows as a page of Markdown."""
    lines = [
        f"# {title}", "", "| evaluation | figure | score, % | published, % | |", "|---|---|---|---|---|",
        *(
            f"| {row.evaluation} | {row.figure} | {_format(row.score)} | {_format(row.published)} | {row.note} |"
            for row in rows
        ),
        "", NOTE,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _format(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.1f}"
