"""Linear classification of frozen features: the command `dino-fast linear`.

`linear_published.py` is the published protocol, `linear_cached.py` a quick look, and `linear_heads.py` what both train.
The features are the published ones: those after the average pool of a ResNet, and tokens of a vision transformer
(`token_features.py`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import nn

from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import (
    EvaluationParser,
    build_extraction,
    load_backbone_from,
    name_network,
    parse_whole_number,
    write_json,
)
from dino_fast.evaluate.features import Extraction, choose_samples
from dino_fast.evaluate.linear_cached import evaluate_linear
from dino_fast.evaluate.linear_heads import LinearProtocol, LinearScore, find_best_end, pick_best
from dino_fast.evaluate.linear_published import HeadScore, HeadTrainer, list_losses, summarize
from dino_fast.evaluate.resumable import Progress, describe_files, describe_settings
from dino_fast.evaluate.token_features import BLOCKS, TokenFeatures, choose_features
from dino_fast.evaluate.training_flags import (
    add_output_flag,
    explain_out_of_memory,
    format_rates,
    parse_rates,
    refuse_single_class,
)
from shards.index import ShardIndex


class _Job(NamedTuple):
    """What is evaluated, and on what."""

    options: argparse.Namespace
    """the flags"""
    network: nn.Module
    """maps [N, 3, H, W] to the features [N, D]"""
    how: Extraction
    """how features are computed"""
    train: ShardIndex
    """what the heads learn from"""
    val: ShardIndex
    """what they are scored on"""
    protocol: LinearProtocol
    """how they are trained"""
    result: dict[str, Any]
    """what the JSON begins with"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast linear`: print the scores of heads on a checkpoint's backbone, and write them to --json FILE."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    _check_output(parser, options)
    protocol = LinearProtocol(options.lrs, options.epochs, options.batch, options.seed)
    backbone, center, evaluation = load_backbone_from(options)
    network = choose_features(backbone, options.blocks, options.mean_patch)
    if isinstance(network, TokenFeatures):
        evaluation |= {"blocks": network.blocks, "mean_patch": network.mean_patch}
    with join_ranks(options.device) as ranks, ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        refuse_single_class(train)
        how = build_extraction(options, evaluation, center, ranks)
        counts = {name: len(choose_samples(index, how.limit)) for name, index in (("train", train), ("val", val))}
        result = {
            **evaluation, **counts, "classes": len(train.classes), "protocol": options.protocol,
            "epochs": protocol.epochs, "batch": protocol.batch, "seed": protocol.seed,
        }  # fmt: skip
        job = _Job(options, network, how, train, val, protocol, result)
        (_run_published if options.protocol == "published" else _run_cached)(job)
    return 0


def _check_output(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the process with status 2 unless --output comes with the published protocol, and only with it."""
    if options.protocol == "published" and options.output is None:
        parser.error("--protocol published keeps its progress in a folder: pass --output DIR")
    if options.protocol == "cached" and options.output is not None:
        parser.error("--output is for --protocol published: leave it out")


def _run_cached(job: _Job) -> None:
    scores = evaluate_linear(job.network, job.train, job.val, job.how, job.protocol)
    if not job.how.ranks.first:
        return
    _print_head(job)
    for score in scores:
        print(f"lr = {score.lr:<7g}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    print(_describe_best(pick_best(scores), scores))
    found = {"best": asdict(pick_best(scores)), "linear": [asdict(score) for score in scores]}
    write_json(job.options.json, {**job.result, **found})


def _run_published(job: _Job) -> None:
    ranks, settings = job.how.ranks, _list_settings(job)
    with Progress.open(job.options.output, settings, ranks) as progress:
        if ranks.first:
            _print_head(job)
        with explain_out_of_memory():
            history = HeadTrainer(job.network, job.train, job.val, job.how, job.protocol).train(progress)
    if not ranks.first:
        return
    scores = summarize(history)
    for score in scores:
        print(
            f"lr = {score.lr:<7g}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %   best epoch "
            f"{score.best_epoch:3d}: top-1 {score.best_top1:6.2f} %"
        )
    last, best = pick_best(history[-1].scores), _pick_best_epoch(scores)
    print(_describe_best(last, history[-1].scores))
    print(f"best epoch: top-1 {best.best_top1:.2f} %, with lr = {best.lr:g} after epoch {best.best_epoch}")
    found = {"best": asdict(best), "linear": [asdict(score) for score in scores], "losses": list_losses(history)}
    write_json(job.options.json, {**job.result, **found})


def _pick_best_epoch(scores: Sequence[HeadScore]) -> HeadScore:
    """Return the head that had the highest top-1 after any epoch. The published code reports that."""
    return max(scores, key=lambda score: (score.best_top1, score.best_top5))


def _list_settings(job: _Job) -> dict[str, Any]:
    """Return what the result depends on, by the names of flags. Paths may change, and what lies there may not."""
    return {
        **describe_settings(job.result), **describe_files(job.network, job.train, job.val),
        "lrs": list(job.protocol.lrs), "limit": job.how.limit, "device": job.how.ranks.device.type,
    }  # fmt: skip


def _print_head(job: _Job) -> None:
    """Print what is evaluated and how."""
    result, protocol, center = job.result, job.protocol, job.how.center
    print(f"{name_network(result)}: {result['train']} train and {result['val']} val images")
    print(f"short side {center.resize}, center crop {center.crop}, {result['classes']} classes")
    if isinstance(job.network, TokenFeatures):
        print(f"features: {job.network}")
    print(f"{protocol.epochs} epochs, batch {protocol.batch}, seed {protocol.seed}; lr is multiplied by batch / 256")


def _describe_best(best: LinearScore, scores: Sequence[LinearScore]) -> str:
    end = find_best_end(scores)
    other = {"lowest": "lower", "highest": "higher"}
    hint = f"   (the {end} rate tried; pass {other[end]} ones with --lrs)" if end else ""
    return f"best lr = {best.lr:g}: top-1 {best.top1:.2f} %   top-5 {best.top5:.2f} %{hint}"


_DESCRIPTION = (
    "Score a trained backbone by linear classification: one linear layer is trained on its frozen features of --train "
    "and scored on --val. The layer is trained as published: by SGD with momentum 0.9 and no weight decay, at the "
    "learning rate lr · batch / 256, which falls to 0 along a cosine. Several learning rates are tried at once."
)
_EPILOG = (
    "--protocol published trains on random resized crops and flips, new ones in each epoch, and validates after each. "
    "The best epoch and learning rate are chosen by their top-1 on --val, as published, which is a little optimistic. "
    "One thing differs: the last batch of an epoch may be smaller on several GPUs, too, where the published code takes "
    "some images twice. --protocol cached computes features once, from the center crop, and is the quick look: it "
    "takes one pass over the images in place of a hundred, and its scores are those after the last epoch. The features "
    "of a ResNet are those after its average pool, as published. With fewer than five classes, top-5 counts all of "
    "them. Under torchrun -m dino_fast linear ... the GPUs share the work."
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    default = LinearProtocol()
    parser = EvaluationParser("linear", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--protocol", choices=("cached", "published"), default="cached",
        help="cached: features of center crops, computed once; published: random crops in each epoch (default: cached)",
    )  # fmt: skip
    add_output_flag(parser, False, "with --protocol published: folder in which the heads are kept after each epoch")
    parser.add_argument(
        "--epochs", type=parse_whole_number(1), default=default.epochs, metavar="N",
        help="passes over --train (default: %(default)s, as published)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=parse_whole_number(1), default=default.batch, metavar="N",
        help="images in a step of SGD, over all GPUs (default: %(default)s, as published: 8 GPUs of 128)",
    )  # fmt: skip
    parser.add_argument(
        "--lrs", type=parse_rates, default=default.lrs, metavar="LR,LR,…",
        help="learning rates of the first epoch, for a batch of 256 (default: "
        f"{format_rates(default.lrs)}; published: 0.001, to be tuned for each checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=parse_whole_number(0), default=default.seed, metavar="N",
        help="seed of the initial weights, of the order of the samples, and of random crops (default: %(default)s)",
    )  # fmt: skip
    _add_token_flags(parser)
    return parser


def _add_token_flags(parser: argparse.ArgumentParser) -> None:
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument(
        "--blocks", type=parse_whole_number(1), metavar="N",
        help="features of a vision transformer: the [CLS] tokens of its last N blocks, joined (default for ViT-Ti and "
        f"ViT-S: {BLOCKS}, as published)",
    )  # fmt: skip
    tokens.add_argument(
        "--mean-patch", action="store_true",
        help="features of a vision transformer: its last [CLS] token with the mean patch token (default for ViT-B, as "
        "published)",
    )  # fmt: skip
