"""Packing without the command."""

from collections.abc import Callable
from pathlib import Path

from shards.packing.pack import PackResult, pack
from shards.packing.plan import Options
from shards.sources.scan import scan
from shards.storage.folders import open_folder


def pack_tree(
    source: Path,
    out: Path,
    options: Options,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """What ``make-shards pack SOURCE OUT`` does."""
    folder = open_folder(str(out))
    with folder.lock("taken"):
        return pack(scan(source, "auto", folder.work_folder), folder, options, workers, progress)
