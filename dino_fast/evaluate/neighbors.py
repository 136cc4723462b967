"""The nearest images of some queries, by the cosine of a backbone's features. `dino-fast neighbors` is at the end."""

import argparse
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import (
    BackboneParser,
    add_cache_flag,
    add_crop_flag,
    choose_crop,
    load_network_from,
    name_network,
    parse_whole_number,
    write_json,
)
from dino_fast.evaluate.features import Extraction, extract_features, spread_evenly
from dino_fast.evaluate.nearest import find_nearest
from dino_fast.evaluate.search.describer import Described, Describer
from dino_fast.evaluate.search.descriptor_flags import print_unreadable
from dino_fast.evaluate.search.images import (
    ImageFiles,
    Images,
    ShardImages,
    UnreadableImage,
    open_images,
    read_image_file,
)
from dino_fast.evaluate.search.neighbor_sheet import MOST_NEIGHBORS, MOST_ROWS, SheetCell, save_neighbor_sheet
from dino_fast.model.trial import check_size
from pipelines.labeled import CenterCrop, choose_resize, resize_and_crop
from shards.argument_types import parse_path, parse_png_path
from shards.errors import UserError
from shards.storage.atomic_write import write_text
from shards.text import format_count

K = 10
RANDOM = 8  # queries, where none are named


@dataclass(frozen=True)
class Neighbors:
    """The nearest images of a query."""

    query: str
    """the query's name, or its path"""
    numbers: list[int]
    """numbers of the nearest images in their set, nearest first"""
    cosines: list[float]
    """their similarities, −1 to 1"""


@dataclass(frozen=True)
class Queries:
    """Queries: images of the set that is searched, or files."""

    names: list[str]
    """what they are called"""
    features: Tensor
    """[Q, D]"""
    rows: list[int | None]
    """the row of each in the features that are searched, which is not its own neighbor; None for other images"""


def find_neighbors(queries: Queries, features: Tensor, numbers: Sequence[int], k: int) -> list[Neighbors]:
    """Find the k nearest images of each query among features [N, D] of the images with these numbers.

    A query is not its own neighbor.
    """
    cosines, rows = find_nearest(queries.features, features, k + 1)
    found = []
    for name, own, row, cosine in zip(queries.names, queries.rows, rows.tolist(), cosines.tolist(), strict=True):
        kept = [(numbers[place], value) for place, value in zip(row, cosine, strict=True) if place != own][:k]
        found.append(Neighbors(name, [number for number, _ in kept], [value for _, value in kept]))
    return found


def choose_at_random(count: int, wanted: int, seed: int) -> list[int]:
    """Return `wanted` different numbers of range(count), or all of them where there are fewer, sorted."""
    chosen = np.random.default_rng(seed).choice(count, min(wanted, count), replace=False)
    return sorted(chosen.tolist())


def write_csv(path: Path, neighbors: Sequence[Neighbors], names: Sequence[str]) -> None:
    """Write a line for each neighbor: query, rank from 1, neighbor, cosine. The file is written whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("query", "rank", "neighbor", "cosine"))
    for found in neighbors:
        for rank, (number, cosine) in enumerate(zip(found.numbers, found.cosines, strict=True), 1):
            writer.writerow((found.query, rank, names[number], f"{cosine:.6f}"))
    write_text(path, text.getvalue())


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast neighbors`: write the nearest images of some queries to the files that are asked for."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not (options.output or options.csv or options.json):
        parser.error("missing flags: one of --output, --csv, --json")
    _check_files(options)
    found, evaluation = load_network_from(options)
    crop = choose_crop(options.crop, found)
    check_size(found.name, crop, "--crop")
    images = open_images(options.images, "--images")
    chosen = spread_evenly(len(images.names), options.limit).tolist()
    with join_ranks(options.device) as ranks:
        describer = Describer(found.network, found.normalization, ranks, found.name, options.cache)
        database = _describe_images(describer, images, chosen, crop, options.limit)
        numbers = [chosen[place] for place in database.numbers]
        queries = _describe_queries(options, describer, crop, images, numbers, database.descriptors)
        neighbors = find_neighbors(queries, database.descriptors, numbers, options.k)
    if ranks.first:
        print(f"{name_network(evaluation)}: {len(neighbors)} queries among {format_count(len(numbers), 'image')}")
        print_unreadable(options.images, database.unreadable)
        if (fewest := min(len(found.numbers) for found in neighbors)) < options.k:
            print(f"-k {options.k}: there are {fewest} other images, and all of them are listed.")
        _write_tables(options, {**evaluation, "crop": crop}, neighbors, images)
        if options.output:
            save_neighbor_sheet(_make_rows(neighbors, queries, images, numbers), options.output)
        if options.output and (len(neighbors) > MOST_ROWS or options.k > MOST_NEIGHBORS):
            print(f"{options.output} shows at most {MOST_ROWS} queries and {MOST_NEIGHBORS} neighbors of each.")
    return 0


def cut_center(image: Image.Image, crop: int) -> Image.Image:
    """Resize the short side, and cut out the center: a square of `crop` pixels, as for the k-NN score."""
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return Image.fromarray(resize_and_crop(levels, choose_resize(crop), crop).numpy())


def _check_files(options: argparse.Namespace) -> None:
    """Raise UserError before the work begins for a file that could not be written."""
    for flag in ("output", "csv"):
        file = getattr(options, flag)
        if file and not file.parent.is_dir():
            raise UserError(f"--{flag} {file}: the folder {file.parent} does not exist. Create it first.")
        if file and file.is_dir():
            raise UserError(f"--{flag} {file} is a folder. Name a file in it.")


def _describe_images(
    describer: Describer, images: Images, chosen: list[int], crop: int, limit: int | None
) -> Described:
    """Return the features of the images with the numbers `chosen`. Those of shards are the ones that k-NN keeps."""
    if isinstance(images, ShardImages) and describer.cache:
        center = CenterCrop(choose_resize(crop), crop, describer.normalization)
        how = Extraction(describer.backbone, center, describer.ranks, describer.cache)
        features = extract_features(describer.network, images.index, np.array(chosen, np.int64), how)
        return Described(features, list(range(len(chosen))))
    about = {"images": images.compute_fingerprint(), "limit": limit, "prepared": f"center crop of {crop}"}
    return describer.describe(
        lambda n: cut_center(images.read(chosen[n]), crop), len(chosen), images.where, about, skip_unreadable=True
    )


def _describe_queries(
    options: argparse.Namespace,
    describer: Describer,
    crop: int,
    images: Images,
    numbers: Sequence[int],
    features: Tensor,
) -> Queries:
    """Return the queries that the flags name, or random ones of the set. `numbers`: of the images with features."""
    if not options.queries:
        rows = choose_at_random(len(numbers), options.random, options.seed)
        return Queries([images.names[numbers[row]] for row in rows], features[rows], list(rows))
    files = options.queries
    described = describer.describe(lambda n: cut_center(read_image_file(files[n]), crop), len(files), "--queries")
    row_of: dict[str, int] = {}
    if isinstance(images, ImageFiles):  # a query may be one of them
        row_of = {os.path.realpath(images.folder / images.names[number]): row for row, number in enumerate(numbers)}
    rows_or_none = [row_of.get(os.path.realpath(file)) for file in files]
    return Queries(list(map(str, files)), described.descriptors, rows_or_none)


def _read_cell(read: Callable[[], Image.Image], name: str, details: str) -> SheetCell:
    """Return a cell of the sheet. An image that cannot be read a second time has the reason in its place."""
    try:
        return SheetCell(read(), name, details)
    except UnreadableImage as error:
        return SheetCell(str(error), name, details)


def _make_rows(
    neighbors: Sequence[Neighbors], queries: Queries, images: Images, numbers: Sequence[int]
) -> Iterator[list[SheetCell]]:
    """Yield the cells of the sheet's rows: the query, then its neighbors."""
    for found, row in zip(neighbors[:MOST_ROWS], queries.rows, strict=False):
        if row is None:
            query = partial(read_image_file, Path(found.query))
        else:
            query = partial(images.read, numbers[row])
        cells = [_read_cell(query, found.query, "query")]
        for number, cosine in zip(found.numbers[:MOST_NEIGHBORS], found.cosines, strict=False):
            cells.append(_read_cell(partial(images.read, number), images.names[number], f"{cosine:.3f}"))
        yield cells


def _write_tables(
    options: argparse.Namespace,
    evaluation: dict[str, Any],
    neighbors: Sequence[Neighbors],
    images: Images,
) -> None:
    if options.csv:
        write_csv(options.csv, neighbors, images.names)
    rows = [
        {
            "query": found.query,
            "neighbors": [images.names[number] for number in found.numbers],
            "cosines": found.cosines,
        }
        for found in neighbors
    ]
    write_json(options.json, {**evaluation, "neighbors": rows})


_DESCRIPTION = (
    "Find the nearest images of some queries, by the cosine of a trained backbone's features, and write them as a "
    "contact sheet, a CSV file or JSON. It shows what a backbone takes for alike."
)
_EPILOG = (
    "Images are prepared as for the k-NN score: the short side is resized, and the center is cut out. An image file "
    "that cannot be read is left out, and named. A query of the searched images is not its own neighbor."
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    parser = BackboneParser("neighbors", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--images", type=parse_path, required=True, metavar="DIR",
        help="images to search: a folder of image files or of shards",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--queries", type=Path, nargs="+", metavar="FILE", help="image files to find neighbors of")
    which.add_argument(
        "--random", type=parse_whole_number(1), default=RANDOM, metavar="N",
        help="find the neighbors of N random images of --images (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "-k", type=parse_whole_number(1), default=K, metavar="K",
        help="how many neighbors each query has (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=parse_png_path, metavar="FILE.png",
        help="write a contact sheet: a row for each query, with its nearest images from left to right",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each neighbor, with its cosine")
    add_crop_flag(parser)
    parser.add_argument(
        "--seed", type=parse_whole_number(0), default=0, metavar="N",
        help="seed of --random (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=parse_whole_number(1), metavar="N",
        help="search at most N of the images, at even distances (default: all)",
    )  # fmt: skip
    add_cache_flag(parser)
    return parser
