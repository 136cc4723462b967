"""The flags that the evaluation commands share, and the backbone that they name.

Other commands use the parsers of flags and of numbers, too.
"""

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from dino_fast.distributed import Ranks
from dino_fast.evaluate.features import Extraction, find_default_cache
from dino_fast.evaluate.trained_backbone import TrainedBackbone, load_backbone, load_pretrained_backbone
from dino_fast.model.backbones import BACKBONES
from dino_fast.model.trial import check_size
from pipelines.labeled import CenterCrop, choose_resize
from shards.argument_types import Parser
from shards.argument_types import parse_path as parse_path_or_url
from shards.errors import UserError
from shards.storage.atomic_write import write_text
from shards.text import escape_unprintable

PUBLISHED_CROP = 224  # pixels


class FlagParser(Parser):
    """Suggests the nearest flag for a misspelled one. A wrong call prints one line and exits with status 2."""

    other_names: Mapping[str, str] = {}
    """what other programs call a flag, and what to give here"""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report a misspelled flag before a missing one: it is often the same flag."""
        self._refuse_unknown_flags(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown_flags(self, arguments: Sequence[str]) -> None:
        known = list(self._option_string_actions)
        for argument in arguments:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and not any(name.startswith(flag) for name in known):
                other = self.other_names.get(flag, "")
                near = [other] if other.split(" ")[0] in known else difflib.get_close_matches(flag, known, n=1)
                meant = near[0] if near else ""
                self.error(f"unknown flag {flag}" + (f". Did you mean {meant}?" if meant else ""))

    def error(self, message: str) -> NoReturn:
        """Print what is wrong in one line, and exit with status 2."""
        line = explain_argument_error(escape_unprintable(message))
        self.exit(
            2, f"{self.prog}: {line}\n" if line.endswith("?") else f"{self.prog}: {line}. See {self.prog} --help.\n"
        )


def explain_argument_error(message: str) -> str:
    """Rewrite a message of argparse about a flag, such as "argument --lrs: expected …", as a plain sentence."""
    message = re.sub(r"^argument (.+?): expected ", r"\1 expects ", message)
    message = re.sub(
        r"^argument (.+?): invalid choice: (.+) \(choose from (.+)\)$", r"\1 expects one of \3, not \2", message
    )
    return re.sub(r"^the following arguments are required: ", "missing flags: ", message)


def parse_whole_number(least: int) -> Callable[[str], int]:
    """Return a function that reads a flag's whole number, `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, not {text!r}")
        return int(text)

    return parse


def parse_positive_number(text: str) -> float:
    """Read a flag's number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return number


class BackboneParser(FlagParser):
    """Has the flags of a command that looks at a trained backbone: which one, and how images are prepared for it."""

    # Those of the published evaluation scripts.
    other_names = {  # noqa: RUF012  # it is not changed
        "--pretrained_weights": "--checkpoint", "--data_path": "--train DIR --val DIR", "--arch": "--backbone",
        "--patch_size": "--backbone", "--checkpoint_key": "--network", "--n_last_blocks": "--blocks",
        "--avgpool_patchtokens": "--mean-patch", "--batch_size_per_gpu": "--batch", "--lr": "--lrs",
    }  # fmt: skip

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=f"dino-fast {command}", description=description, epilog=epilog)
        self.weights = self.add_mutually_exclusive_group(required=True)
        self.weights.add_argument(
            "--checkpoint", type=Path, metavar="FILE",
            help="a step-….pt file, or the output folder of a run, which means its newest checkpoint; or weights that "
            "other programs saved, as for --init_from of dino-fast train",
        )  # fmt: skip
        self.weights.add_argument(
            "--pretrained", action="store_true",
            help="in place of a checkpoint: the weights that timm downloads for --backbone timm/NAME, such as "
            "timm/vit_small_patch16_224.dino",
        )  # fmt: skip
        add_network_flags(self)
        self.add_argument("--json", type=Path, metavar="FILE", help="also write the scores to this file")


class EvaluationParser(BackboneParser):
    """Has the flags of a command that scores a backbone on labeled shards, too."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(command, description, epilog)
        self.add_argument(
            "--train", type=parse_path_or_url, required=True, metavar="DIR",
            help="folder or URL of labeled shards to learn from",
        )  # fmt: skip
        self.add_argument(
            "--val", type=parse_path_or_url, required=True, metavar="DIR",
            help="folder or URL of labeled shards to classify",
        )  # fmt: skip
        self.add_argument(
            "--resize", type=parse_pixels, metavar="PIXELS",
            help="short side of the resized images (default: crop · 256 / 224)",
        )  # fmt: skip
        add_crop_flag(self)
        self.add_argument(
            "--limit", type=parse_whole_number(1), metavar="N",
            help="use at most N images of each set, at even distances (default: all)",
        )  # fmt: skip
        add_cache_flag(self)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say whose backbone is looked at, and where it computes."""
    parser.add_argument(
        "--backbone", metavar="NAME",
        help="backbone of weights that other programs saved, such as timm/NAME (default: the one of "
        f"{', '.join(BACKBONES)} whose shapes they have)",
    )  # fmt: skip
    parser.add_argument(
        "--network", choices=("teacher", "student"), default="teacher",
        help="whose backbone to take (default: teacher)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to compute; auto means the GPU if there is one (default: auto)",
    )  # fmt: skip


def add_crop_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `choose_crop` reads."""
    parser.add_argument(
        "--crop", type=parse_pixels, metavar="PIXELS",
        help="side of the center crop (default: crops.global_size of the checkpoint's recipe, or else "
        f"{PUBLISHED_CROP})",
    )  # fmt: skip


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the folder in which features are kept."""
    parser.add_argument(
        "--cache", type=Path, default=find_default_cache(), metavar="DIR",
        help="folder in which features are kept, so that other commands need not compute them again; it can be "
        "deleted at any time (default: ~/.cache/dino_fast/features)",
    )  # fmt: skip


def parse_pixels(text: str) -> int:
    """Read a flag's number of pixels, 16 to 4096."""
    if not text.isdecimal() or not 16 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"expected a number of pixels from 16 to 4096, not {text!r}")
    return int(text)


def load_network_from(options: argparse.Namespace) -> tuple[TrainedBackbone, dict[str, Any]]:
    """Load the backbone that the flags of a `BackboneParser` name.

    Return it with what a result's JSON begins with: checkpoint, backbone, step, network, mean, std. Raises UserError
    for flags that do not fit each other or the files.
    """
    check_json_file(options.json)
    if options.pretrained:
        found = load_pretrained_backbone(options.backbone)
    else:
        found = load_backbone(options.checkpoint, options.network, options.backbone)
    return found, {
        "checkpoint": str(options.checkpoint or "pretrained"), "backbone": found.name, "step": found.step,
        "network": options.network, "mean": found.normalization.mean, "std": found.normalization.std,
    }  # fmt: skip


def choose_crop(asked: int | None, found: TrainedBackbone) -> int:
    """Return the side of center crops: the one that is asked for, or that of the training, or the published one."""
    return asked or (found.recipe["crops"]["global_size"] if found.recipe else PUBLISHED_CROP)


def load_backbone_from(options: argparse.Namespace) -> tuple[nn.Module, CenterCrop, dict[str, Any]]:
    """Load the backbone that the flags of an `EvaluationParser` name.

    Return it with how images are prepared for it, and what a result's JSON begins with: what `load_network_from`
    returns, resize and crop. Raises UserError for flags that do not fit each other or the files.
    """
    found, evaluation = load_network_from(options)
    crop = choose_crop(options.crop, found)
    resize = options.resize or choose_resize(crop)
    if resize < crop:
        raise UserError(f"--resize {resize} is smaller than the crop of {crop} pixels. Raise it, or lower --crop.")
    check_size(found.name, crop, "--crop")
    return found.network, CenterCrop(resize, crop, found.normalization), {
        **evaluation, "resize": resize, "crop": crop,
    }  # fmt: skip


def build_extraction(
    options: argparse.Namespace, evaluation: dict[str, Any], center: CenterCrop, ranks: Ranks
) -> Extraction:
    """Return how features are computed, by the flags of an `EvaluationParser` and `load_backbone_from`'s results."""
    return Extraction(evaluation["backbone"], center, ranks, options.cache, options.limit)


def name_network(evaluation: dict[str, Any]) -> str:
    """Return in words what is scored, from what `load_backbone_from` returned."""
    if evaluation["step"] is None:
        return f"{evaluation['backbone']} of {escape_unprintable(evaluation['checkpoint'])}"
    return f"{evaluation['network']} after {evaluation['step']} steps"


def write_json(file: Path | None, result: dict[str, Any]) -> None:
    """Write a result to the file of --json, if there is one: whole, or not at all."""
    if file:
        write_text(file, json.dumps(result, indent=1) + "\n")


def check_json_file(file: Path | None) -> None:
    """Raise UserError before the work begins if its result could not be written to `file`."""
    if file and not file.parent.is_dir():
        raise UserError(f"--json {file}: the folder {file.parent} does not exist. Create it first.")
    if file and file.is_dir():
        raise UserError(f"--json {file} is a folder. Name a file in it.")
