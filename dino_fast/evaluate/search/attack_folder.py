"""Write changed copies of a folder of images, in the layout of Copydays."""

import csv
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from dino_fast.evaluate.features import spread_evenly
from dino_fast.evaluate.search.attacks import ATTACKS, make_copy
from dino_fast.evaluate.search.copydays import ORIGINAL, STRONG
from dino_fast.evaluate.search.describer import load_ahead
from dino_fast.evaluate.search.images import Images, UnreadableImage, open_images
from shards.errors import UserError, suggest_fix
from shards.progress import show_progress

ORIGIN = "origin.csv"

_LONGEST_SIDE = 65_000  # pixels; JPEG has no longer ones


@dataclass(frozen=True)
class AttackedFolder:
    """What was written."""

    originals: int
    """number of images that copies were made of"""
    copies: int
    """number of the copies, of all attacks together"""
    unreadable: list[str]
    """one line for each image that could not be read"""


def make_attacks(source: str, out: Path, seed: int, limit: int | None) -> AttackedFolder:
    """Write `limit` images of a folder or of shards as they are, and a copy of each for every attack.

    `out` must not exist. It is written under another name, and renamed when it is complete. origin.csv in it names the
    source of each original. An image that cannot be read is skipped. Raises UserError where `out` cannot be written,
    and where no image can be read.
    """
    if out.exists():
        raise UserError(f"--make-attacks: {out} exists already. Name a folder that does not exist yet.")
    images = open_images(source, "--make-attacks")
    unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        made = _write_folder(images, unfinished, seed, spread_evenly(len(images.names), limit).tolist())
        if not made.originals:
            raise UserError(f"--make-attacks {source}: no image can be read. The first is {made.unreadable[0]}")
        unfinished.rename(out)
        return made
    except OSError as error:
        raise UserError(f"--make-attacks: cannot write {out}: {error.strerror}. {suggest_fix(error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_folder(images: Images, folder: Path, seed: int, numbers: list[int]) -> AttackedFolder:
    for name in (ORIGINAL, *ATTACKS):
        (folder / name).mkdir(parents=True)
    width = max(4, len(str(len(images.names) - 1)))

    def write(number: int) -> tuple[str, str] | UnreadableImage:
        try:
            return _write_copies(images, number, folder, f"{number:0{width}d}", seed)
        except UnreadableImage as error:
            return error

    rows, unreadable = [], []
    with show_progress("making copies") as report:
        for done, written in enumerate(load_ahead(write, numbers), 1):
            if isinstance(written, UnreadableImage):
                unreadable.append(str(written))
            else:
                rows.append(written)
            report(done, len(numbers))
    with (folder / ORIGIN).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows([("original", "source"), *rows])
    return AttackedFolder(len(rows), len(rows) * len(ATTACKS), unreadable)


def _write_copies(images: Images, number: int, folder: Path, name: str, seed: int) -> tuple[str, str]:
    """Write an image and its copies. Return the original's file, relative to the folder, and its source.

    As in Copydays, files of one original have one name, but in `strong` its last two characters differ.
    """
    image = images.read(number)
    if max(image.size) > _LONGEST_SIDE:
        raise UnreadableImage(f"{images.names[number]}: a side of more than {_LONGEST_SIDE} pixels")
    data, extension = images.read_file(number)
    original = f"{ORIGINAL}/{name}00{extension}"
    (folder / original).write_bytes(data)
    for attack in ATTACKS:
        copy = f"{attack}/{name}{'01' if attack == STRONG else '00'}.jpg"
        (folder / copy).write_bytes(make_copy(image, seed, number, attack))
    return original, images.names[number]
