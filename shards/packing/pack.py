"""Pack images into tar shards: a plan, one task per shard in worker processes, then the index and, last, the manifest.

Everything written is a pure function of the listed images and the options, unless an image takes longer than
`image_seconds`. The number of workers, the engine, a kill in the middle and a restart change no byte.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from shards.errors import UserError
from shards.layout import REJECTED_FILE, make_shard_name
from shards.manifest import Manifest, Rejected
from shards.packing import ownership, workers
from shards.packing.assembly import NothingPackedError, SomeRejectedError, write_index_and_manifest
from shards.packing.plan import Options, Plan, make_plan
from shards.packing.shard_writer import ShardTask, write_shard
from shards.sources.listing import Listing
from shards.storage import files
from shards.storage.folders import Folder
from shards.text import format_count

IF_LOCKED = "another make-shards is writing into it. Wait, or choose another folder."

Engine = Callable[..., list[Any]]  # has the parameters of `workers.run_tasks`


@dataclass(frozen=True)
class PackResult:
    """What `pack` did."""

    manifest: Manifest
    """the manifest of the folder"""
    was_complete: bool
    """True where nothing was left to do"""
    kept_shards: int
    """number of shards that were already there"""
    images: int
    """number of images that this run read, rejected ones included"""


def pack(
    listing: Listing,
    out: Folder,
    options: Options,
    processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    run: Engine = workers.run_tasks,
    strict: bool = False,
) -> PackResult:
    """Pack a listing into a folder that the caller has locked, or go on where a killed run stopped.

    `progress` is called with (images done, images in total). Raises UserError for whatever the user can fix, and, where
    `strict`, for rejected images. Then there is no manifest, and the same call again goes on.
    """
    plan = make_plan(listing, options)
    manifest = ownership.load_finished(out, plan.fingerprint)
    if manifest is not None:
        if strict and manifest.rejected:
            raise _make_strict_error(out, manifest.rejected)
        out.remove_parts()  # a run may have been killed after it wrote the manifest and before this line
        return PackResult(manifest, True, plan.shard_count, 0)
    if not ownership.is_claimed(out, plan.fingerprint):
        ownership.refuse_other_files(out)
        ownership.claim(out, plan.fingerprint)
    done = run(
        write_shard,
        lambda number: make_task(listing, out, options, plan, number),
        plan.shard_count,
        processes,
        lambda images: progress(images, len(listing)),
        workers.mark_as_timed_out,
    )
    manifest = _write_index(listing, out, options, plan, strict)
    out.remove_parts()
    return PackResult(manifest, False, sum(shard.kept for shard in done), sum(shard.images for shard in done))


def make_task(listing: Listing, out: Folder, options: Options, plan: Plan, number: int) -> ShardTask:
    """Return the task for shard `number`."""
    places = plan.order[plan.cuts[number] : plan.cuts[number + 1]].tolist()
    return ShardTask(number, out, options, [(place, listing.get_source(place)) for place in places])


def refuse_overlap(source: str, out: str) -> None:
    """Raise UserError where SRC lies in OUT, or OUT in SRC, or both are the same."""
    inner, outer = map(_normalize, (source, out))
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"SRC {source} and OUT {out} must not contain each other. Choose an OUT beside SRC.")


def _normalize(path: str) -> PurePath:
    """Return one form of a path, so that two names of one place compare equal (s3a and s3, symbolic links)."""
    if not files.is_url(path):
        return Path(path).resolve()
    scheme, _, rest = path.partition("://")
    return PurePosixPath({"s3a": "s3", "gcs": "gs"}.get(scheme, scheme), rest)


def _write_index(listing: Listing, out: Folder, options: Options, plan: Plan, strict: bool) -> Manifest:
    """Write the index and the manifest. If no image could be packed, remove the shards and raise UserError.

    If some could not, and `strict` is set, keep the shards and raise UserError.
    """
    recorded = {"format": listing.format, **options.to_dict(), **dataclasses.asdict(options.rules)}
    del recorded["name"], recorded["rules"]
    try:
        return write_index_and_manifest(
            out,
            plan.shard_count,
            name=options.name,
            fingerprint=plan.fingerprint,
            classes=listing.classes,
            options=recorded,
            ignored=listing.ignored,
            left_out=listing.left_out,
            strict=strict,
        )
    except SomeRejectedError as error:
        raise _make_strict_error(out, error.rejected) from None
    except NothingPackedError as error:
        for number in range(plan.shard_count):
            out.remove(make_shard_name(options.name, number))
        out.remove_parts()
        _, name, reason = error.rejected[0]
        raise UserError(
            f"{listing.root}: none of {len(listing)} images can be decoded ({name}: {reason}). Give another SRC."
        ) from None


def _make_strict_error(out: Folder, rejected: Sequence[Rejected]) -> UserError:
    """Return the exception for images that were rejected under --strict."""
    first, count = rejected[0], format_count(len(rejected), "image")
    return UserError(
        f"--strict: {count} cannot be packed ({first.source}: {first.reason}). {out}/{REJECTED_FILE} lists them all. "
        "Leave --strict out to pack the others, or replace these and pack into another OUT."
    )
