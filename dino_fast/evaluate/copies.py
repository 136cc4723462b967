"""Copy detection: how far a backbone's descriptors find the originals of changed copies.

The descriptors are those of `eval_copy_detection.py` in facebookresearch/dino. `dino-fast copies` is at the end. It
makes copies of any images, too, which it then can score.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import name_network, parse_pixels, parse_whole_number, write_json
from dino_fast.evaluate.search.attack_folder import ORIGIN, make_attacks
from dino_fast.evaluate.search.attacks import ATTACKS
from dino_fast.evaluate.search.copydays import (
    DISTRACTORS,
    ORIGINAL,
    TOP,
    CopyScore,
    CopySet,
    find_copies,
    limit_copies,
    score_copies,
)
from dino_fast.evaluate.search.describer import Describer
from dino_fast.evaluate.search.descriptor_flags import (
    DescriptorParser,
    build_describer,
    describe_others,
    learn_whitening_on,
    print_unreadable,
)
from dino_fast.evaluate.search.descriptors import squash
from dino_fast.evaluate.search.images import fingerprint_files, open_if_named, read_image_file
from dino_fast.evaluate.search.whitening import Whitening
from shards.argument_types import parse_path
from shards.text import format_count, list_first

SIZE = 320
POWER = 4.0  # of the generalized mean


def evaluate_copies(
    copies: CopySet, size: int, describer: Describer, distractors: Tensor | None, whitening: Whitening | None = None
) -> dict[str, CopyScore]:
    """Score each folder of copies. `size`: side of the squares that images are squashed to, pixels.

    distractors: descriptors [N, D] of further images of the database. Raises UserError for an image that cannot be
    read.
    """

    def describe(files: Sequence[str], what: str) -> Tensor:
        paths = [copies.folder / name for name in files]
        about = {"images": fingerprint_files(paths), "prepared": f"squashed to {size}"}
        found = describer.describe(lambda n: squash(read_image_file(paths[n]), size), len(paths), what, about)
        return whitening.apply(found.descriptors) if whitening else found.descriptors

    originals = describe(copies.originals, ORIGINAL)
    parts = [originals]
    if distractors is not None:
        parts.append(whitening.apply(distractors) if whitening else distractors)
    database = torch.cat(parts).to(describer.ranks.device)
    scores = {}
    for name, block in copies.blocks.items():
        queries = originals if name == ORIGINAL else describe(block.files, name)
        positives = [[number] for number in block.originals]
        scores[name] = score_copies(queries.to(database.device), database, positives)
    return scores


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast copies`: make copies, or print how far a checkpoint's backbone finds their originals."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.make_attacks:
        return _make_attacks(options)
    if options.images is None:
        parser.error("missing flags: --images")
    copies = limit_copies(find_copies(options.images), options.limit)
    own = str(options.images / DISTRACTORS) if copies.has_distractors else None
    others = open_if_named(options.distractors or own, "--distractors")
    to_whiten = open_if_named(options.whiten, "--whiten")
    with join_ranks(options.device) as ranks:
        describer, evaluation = build_describer(options, (1.0,), ranks)
        prepare = partial(squash, size=options.size), f"squashed to {options.size}"
        whitening = learn_whitening_on(to_whiten, *prepare, describer, options.limit)
        distractors = describe_others(others, *prepare, describer, options.limit) if others else None
        scores = evaluate_copies(copies, options.size, describer, distractors, whitening)
    if ranks.first:
        counts = {"originals": len(copies.originals), "distractors": 0 if distractors is None else len(distractors)}
        print(f"{name_network(evaluation)}: {counts['originals']} originals, {counts['distractors']} distractors")
        print(f"squashed to {options.size} x {options.size}, {describer.network}")
        _print_scores(scores)
        _print_notes(scores, copies.without_original)
        write_json(options.json, {**evaluation, **counts, "copies": describe_scores(scores)})
    return 0


def describe_scores(scores: dict[str, CopyScore]) -> dict[str, Any]:
    """Return the scores for a result's JSON, in percent."""
    return {
        name: {"images": score.images, "map": 100 * score.mean_ap, "first": 100 * score.first}
        for name, score in scores.items()
    }


def _print_scores(scores: dict[str, CopyScore]) -> None:
    width = max(map(len, scores))
    for name, score in scores.items():
        first = f"found first {100 * score.first:6.2f} %"
        print(f"{name:{width}s}: mAP {100 * score.mean_ap:6.2f} %   {first}   {format_count(score.images, 'image')}")


def _print_notes(scores: dict[str, CopyScore], without_original: Sequence[str]) -> None:
    """Print what the scores leave out, and why they may be too low."""
    if without_original:
        print(
            f"{format_count(len(without_original), 'image')} left out, because no original has a fitting name: "
            f"{list_first(without_original)}"
        )
    if (score := scores[ORIGINAL]).first < 1:
        lost = round((1 - score.first) * score.images)
        print(
            f"{format_count(lost, 'original')} did not even find themselves: they are among the distractors, too, or "
            "have the descriptors of others. The scores are too low."
        )


def _make_attacks(options: argparse.Namespace) -> int:
    source, out = options.make_attacks
    made = make_attacks(source, Path(out), options.seed, options.limit)
    print_unreadable(source, made.unreadable)
    print(
        f"{out}: {format_count(made.originals, 'original')}, and {format_count(made.copies, 'changed image')} of them"
    )
    print(f"Their sources are in {Path(out) / ORIGIN}. To score: dino-fast copies --images {out} --checkpoint FILE")
    return 0


_DESCRIPTION = (
    "Score a trained backbone by copy detection: for each changed copy of an image, the originals and the distractors "
    "are ranked by the cosine of their descriptors with the copy's. Scores are the mean average precision (mAP) among "
    f"the nearest {TOP} images, and the share of the copies whose nearest image is their original. The "
    "command also makes copies of your own images, so that you learn which changes your backbone sees through."
)
_EPILOG = (
    "--images is a folder in the layout of Copydays: original/, and a folder for each kind of copy (strong, "
    "jpegqual/3, crops/50, or any others), whose files have the names of their originals. In strong the last two "
    "characters differ, so that an original may have several copies there. A folder distractors/ is used where "
    "--distractors names no other. Published for DINO: strong, 10,000 distractors, whitening on 20,000 images, --size "
    "320 for ViT-B/8 and 224 for ViT-B/16. Images are squashed to a square, as published."
)


def build_parser() -> DescriptorParser:
    """Build the parser of the command's flags."""
    parser = DescriptorParser("copies", _DESCRIPTION, _EPILOG)
    parser.weights.add_argument(
        "--make-attacks", nargs=2, type=parse_path, metavar=("SRC", "OUT"),
        help="in place of scoring: write the images of SRC (a folder of image files or of shards) and copies of them "
        f"to the new folder OUT, changed in {len(ATTACKS)} ways: crops, JPEG at several qualities, smaller sizes, "
        "blur, text, flips, and several of these at once",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of originals and copies (see below)")
    parser.add_argument(
        "--distractors", type=parse_path, metavar="DIR",
        help="further images among which the originals are to be found: a folder of image files or of shards "
        "(default: the folder distractors in --images, if there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--size", "--imsize", type=parse_pixels, default=SIZE, metavar="PIXELS",
        help="side of the square that images are squashed to (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=parse_whole_number(0), default=0, metavar="N",
        help="seed of the copies that are made: another one makes other copies (default: %(default)s)",
    )  # fmt: skip
    parser.add_descriptor_flags(
        "a quick look: at most N originals with their copies, N distractors and N images of --whiten; where copies "
        "are made, those of at most N images of SRC",
        "power of the generalized mean of the patch tokens, which is joined with the [CLS] token; of a convolutional "
        "network the generalized mean of its last map is taken alone (default: %(default)s, as published)",
        POWER,
    )
    return parser
