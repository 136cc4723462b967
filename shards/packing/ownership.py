"""Find out which packing a folder belongs to, and refuse to mix two packings, or a packing with other files."""

import json
import os
from collections.abc import Sequence

from shards.errors import UserError
from shards.layout import DUPLICATES_FILE, INDEX_FILE, MANIFEST_FILE, PLAN_FILE, REJECTED_FILE
from shards.manifest import Manifest, find_size_problem, load_manifest
from shards.storage.files import is_url
from shards.storage.folders import Folder

CHOOSE_OUT = "Choose another OUT, or remove it first."


def is_claimed(out: Folder, fingerprint: str, fix: str = CHOOSE_OUT) -> bool:
    """Return whether this packing was begun in `out`. Raises UserError, with `fix`, where another one was."""
    try:
        owner = json.loads(out.read(PLAN_FILE))["fingerprint"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        owner = None
    if owner != fingerprint:
        raise UserError(f"{out} holds another packing, not finished, of other sources or options. {fix}")
    return True


def claim(out: Folder, fingerprint: str) -> None:
    """Mark `out` as the folder of this packing."""
    with out.write_file(PLAN_FILE) as file:
        file.write(json.dumps({"fingerprint": fingerprint}).encode())


def load_finished(out: Folder, fingerprint: str, fix: str = CHOOSE_OUT) -> Manifest | None:
    """Return the manifest where `out` holds this packing, finished. Return None where there is no manifest.

    Raises UserError where `out` holds another packing, with `fix`, or where its shards have a wrong length.
    """
    if out.get_size(MANIFEST_FILE) is None:
        return None
    manifest = load_manifest(out)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{out} holds another packing, of other sources or options. {fix}")
    problem = next(filter(None, (find_size_problem(out, shard) for shard in manifest.shards)), None)
    if problem:
        raise UserError(f"{problem}. Remove {out} and pack again.")
    return manifest


def refuse_other_files(out: Folder, allowed: Sequence[str] = ()) -> None:
    """Raise UserError where anything but the `allowed` names lies in `out`: perhaps it is SRC."""
    names = out.list_files() if is_url(str(out)) else sorted(os.listdir(str(out)), key=os.fsencode)
    visible = [name for name in names if not name.startswith(".") and name not in allowed]
    if visible:
        raise UserError(f"{out} holds {visible[0]}, which does not belong to this packing. Choose a new or empty OUT.")


def refuse_index_files(out: Folder, fix: str) -> None:
    """Raise UserError, with `fix`, where files lie in `out` that an index would replace."""
    for name in (DUPLICATES_FILE, INDEX_FILE, REJECTED_FILE):
        if out.get_size(name) is not None:
            raise UserError(f"{out} holds {name}, but no {MANIFEST_FILE}. {fix}")
