"""Packing without the command."""

from collections.abc import Callable
from pathlib import Path

from shards.packing.pack import Options, Packed, pack
from shards.sources.scan import scan
from shards.storage.output import out_folder


def pack_tree(
    source: Path,
    out: Path,
    options: Options,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """What ``make-shards pack SOURCE OUT`` does."""
    folder = out_folder(str(out))
    with folder.held("taken"):
        return pack(scan(source, "auto", folder.work), folder, options, workers, progress)
