"""Image retrieval as on revisited Oxford and Paris (Radenovic et al. 2018), or on an own set.

The scores are those of filipradenovic/revisitop, and the descriptors those of `eval_image_retrieval.py` in
facebookresearch/dino. `dino-fast retrieval` is at the end.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import name_network, parse_pixels, write_json
from dino_fast.evaluate.search.describer import Describer
from dino_fast.evaluate.search.descriptor_flags import DescriptorParser, build_describer, learn_whitening_on
from dino_fast.evaluate.search.descriptors import SCALES, shrink
from dino_fast.evaluate.search.ground_truth import GroundTruth, limit_ground_truth, read_ground_truth
from dino_fast.evaluate.search.images import fingerprint_files, list_image_files, open_if_named, read_image_file
from dino_fast.evaluate.search.ranking import RankingScore, rank_images, score_rankings
from dino_fast.evaluate.search.whitening import Whitening
from shards.errors import UserError
from shards.text import format_count, list_first

SIZE = 224
KS = (1, 5, 10)

_EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")


@dataclass(frozen=True)
class RetrievalProtocol:
    """How images are prepared, and what is counted."""

    size: int = SIZE
    """longer side of the shrunk images, pixels"""
    crop_queries: bool = False
    """whether queries are cropped to their boxes"""
    ks: tuple[int, ...] = KS
    """precision is counted among the first k images"""


@dataclass(frozen=True)
class RetrievalFiles:
    """The image files of a retrieval set."""

    images: list[Path]
    """those of the database"""
    queries: list[Path]
    """those of the queries"""


def evaluate_retrieval(
    truth: GroundTruth,
    files: RetrievalFiles,
    protocol: RetrievalProtocol,
    describer: Describer,
    whitening: Whitening | None = None,
) -> dict[str, RankingScore]:
    """Score a retrieval set by each choice of positives: easy, medium and hard, or all.

    Raises UserError for an image that cannot be read.
    """
    boxes = [query.box if protocol.crop_queries else None for query in truth.queries]
    about: dict[str, Any] = {"images": fingerprint_files(files.images), "prepared": f"shrunk to {protocol.size}"}
    database = describer.describe(
        lambda n: shrink(read_image_file(files.images[n]), protocol.size), len(files.images), "the database", about
    ).descriptors
    about = {**about, "images": fingerprint_files(files.queries), "boxes": boxes}
    queries = describer.describe(
        lambda n: shrink(read_image_file(files.queries[n]), protocol.size, boxes[n]), len(boxes), "the queries", about
    ).descriptors
    if whitening:
        database, queries = whitening.apply(database), whitening.apply(queries)
    device = describer.ranks.device
    with torch.inference_mode():
        orders = rank_images(queries.to(device), database.to(device))
        return score_rankings(orders, truth.list_choices(), protocol.ks)


def find_retrieval_files(truth: GroundTruth, folder: Path) -> RetrievalFiles:
    """Find the images of a retrieval set in a folder.

    Raises UserError for images that are missing, and for a set in which no query has a positive.
    """
    if len(truth.find_queries_without_positives()) == len(truth.queries):
        raise UserError("--ground-truth: no query has a positive. Name the images that belong to each query.")
    queries = [query.name for query in truth.queries]
    return RetrievalFiles(find_files(folder, truth.images), find_files(folder, queries))


def find_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the image file of each name, which may lack its extension. Raises UserError for those that are missing."""
    found = [_find_file(folder / name) for name in names]
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {format_count(len(names), 'image')} of --ground-truth are not in --images {folder}: "
            f"{list_first(missing)}. Pass the folder that they are in."
        )
    return [file for file in found if file]


def _find_file(path: Path) -> Path | None:
    candidates = (Path(f"{path}{extension}") for extension in _EXTENSIONS)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast retrieval`: print the scores of a checkpoint's backbone, and write them to --json FILE."""
    options = build_parser().parse_args(arguments)
    folder = choose_folder(options.images, options.ground_truth)
    of_csv = options.ground_truth.suffix.lower() == ".csv"
    truth = read_ground_truth(options.ground_truth, list_image_files(folder) if of_csv else ())
    truth = limit_ground_truth(truth, options.limit)
    cropped = of_csv if options.crop_queries is None else options.crop_queries
    protocol = RetrievalProtocol(options.size, cropped and any(query.box for query in truth.queries), options.ks)
    files, to_whiten = find_retrieval_files(truth, folder), open_if_named(options.whiten, "--whiten")
    with join_ranks(options.device) as ranks:
        describer, evaluation = build_describer(options, SCALES if options.multi_scale else (1.0,), ranks)
        prepare = partial(shrink, size=options.size), f"shrunk to {options.size}"
        whitening = learn_whitening_on(to_whiten, *prepare, describer, options.limit)
        scores = evaluate_retrieval(truth, files, protocol, describer, whitening)
    if ranks.first:
        _print_scores(scores, truth, protocol, name_network(evaluation), str(describer.network))
        write_json(options.json, {**evaluation, **describe_scores(scores, truth, protocol)})
    return 0


def choose_folder(images: Path | None, ground_truth: Path) -> Path:
    """Return the folder of the images: the one that is asked for, or jpg/ beside the ground truth, or that folder.

    Raises UserError where it does not exist.
    """
    beside = ground_truth.parent / "jpg"
    folder = images or (beside if beside.is_dir() else ground_truth.parent)
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder. Pass the folder that the images are in.")
    return folder


def describe_scores(scores: dict[str, RankingScore], truth: GroundTruth, protocol: RetrievalProtocol) -> dict[str, Any]:
    """Return the scores for a result's JSON, in percent."""
    return {
        "images": len(truth.images), "queries": len(truth.queries), "cropped_queries": protocol.crop_queries,
        "retrieval": {
            name: {
                "queries": score.queries, "map": 100 * score.mean_ap if score.queries else None,
                "precision": {str(k): 100 * value for k, value in score.precision.items() if score.queries},
            }
            for name, score in scores.items()
        },
        "query_names": [query.name for query in truth.queries],
        "average_precision": {
            name: [None if value is None else 100 * value for value in score.average_precisions]
            for name, score in scores.items()
        },
    }  # fmt: skip


def _print_scores(
    scores: dict[str, RankingScore], truth: GroundTruth, protocol: RetrievalProtocol, network: str, features: str
) -> None:
    images = format_count(len(truth.images), "image")
    print(f"{network}: {len(truth.queries)} queries, {images}")
    print(f"longer side {protocol.size}, {'cropped' if protocol.crop_queries else 'whole'} queries, {features}")
    for name, score in scores.items():
        precisions = "   ".join(f"mP@{k} {100 * value:6.2f} %" for k, value in score.precision.items())
        print(f"{name:6s}: mAP {100 * score.mean_ap:6.2f} %   {precisions}   {score.queries} queries")
    if missing := truth.find_queries_without_positives():
        print(f"queries without positives count nowhere: {len(missing)} ({list_first(missing)})")
    if above := [k for k in protocol.ks if k > len(truth.images)]:
        print(f"--ks {','.join(map(str, above))}: there are {images}, and a larger k means all of them.")


_DESCRIPTION = (
    "Score a trained backbone by image retrieval: for each query the images are ranked by the cosine of their "
    "descriptors with the query's. Scores are the mean average precision (mAP) and the mean precision among the first "
    "k images (mP@k). On revisited Oxford and Paris, positives are the easy images, the easy and the hard ones "
    "(medium), or the hard ones."
)
_EPILOG = (
    "An own set is a CSV file with the columns query and positives, and if needed ignored and box: paths relative to "
    "--images, with semicolons between several, and a box as left;top;right;bottom in pixels. All images of the folder "
    "are the database, and a query does not find itself. "
    "Published for DINO: Oxford with --size 224, Paris with --size 512 --multi-scale, both with whole queries. The "
    "protocol of revisited Oxford and Paris has cropped ones: pass --crop-queries to compare with other papers. Images "
    "are never enlarged, except that a side under 32 pixels is stretched to 32. Nothing in a pickle is run."
)


def build_parser() -> DescriptorParser:
    """Build the parser of the command's flags."""
    parser = DescriptorParser("retrieval", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--ground-truth", type=Path, required=True, metavar="FILE",
        help="gnd_roxford5k.pkl, gnd_rparis6k.pkl, a JSON file of the same form, or a CSV file (see below)",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help="folder of the images (default: the folder jpg beside the ground truth, or else its own)",
    )  # fmt: skip
    parser.add_argument(
        "--size", "--imsize", type=parse_pixels, default=SIZE, metavar="PIXELS",
        help="longer side that larger images are shrunk to (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--multi-scale", action="store_true",
        help="sum the features of three sizes of each image: 1, 0.71 and 0.5 times --size",
    )  # fmt: skip
    queries = parser.add_mutually_exclusive_group()
    queries.add_argument(
        "--crop-queries", action="store_true", default=None,
        help="crop queries to their boxes (default for a CSV file)",
    )  # fmt: skip
    queries.add_argument(
        "--whole-queries", action="store_false", dest="crop_queries", default=None,
        help="do not crop queries (default, as published for DINO)",
    )  # fmt: skip
    parser.add_argument(
        "--ks", type=_parse_ks, default=KS, metavar="K,K,…",
        help=f"count the precision among the first k images for these k (default: {','.join(map(str, KS))})",
    )  # fmt: skip
    parser.add_descriptor_flags(
        "a quick look: at most N queries, all images that belong to them, and at most N others; the scores are higher "
        "than those of all images",
        "add the generalized mean of the patch tokens with the power P to the [CLS] token; of a convolutional network "
        "take that of its last map (default: the [CLS] token or the pooled features alone, as published)",
    )
    return parser


def _parse_ks(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) < 2**31 for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0 with commas between them, not {text!r}")
    return tuple(dict.fromkeys(map(int, parts)))
