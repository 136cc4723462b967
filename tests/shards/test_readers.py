"""Readers that others wrote see every sample of our shards."""

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shards.index import ShardIndex

EXTENSIONS = ("jpg", "png", "webp")


def expected(folder: Path) -> Counter[tuple[bytes, bytes]]:
    index = ShardIndex(folder)
    labels = [str(label).encode() for label in index.labels.tolist()]
    return Counter(zip(index.read(range(len(index))), labels, strict=True))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage builder
def test_webdataset(packed: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    paths = sorted(map(str, packed.glob("*.tar")))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    found = [(next(sample[e] for e in EXTENSIONS if e in sample), sample["cls"]) for sample in samples]
    assert Counter(found) == expected(packed)
    index = ShardIndex(packed)
    assert [sample["__key__"] for sample in samples] == [index.read_key(id) for id in range(len(index))]


def dali_index(tar_path: str, folder: Path) -> str:
    """DALI's index of one tar: a line a sample, of extension, offset, size and name of its members."""
    lines: dict[str, list[str]] = {}
    with tarfile.open(tar_path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            entry = f"{extension} {member.offset_data} {member.size} {member.name}"
            lines.setdefault(key, []).append(entry)
    path = folder / (Path(tar_path).name + ".idx")
    path.write_text(f"v1.2 {len(lines)}\n" + "".join(" ".join(entries) + "\n" for entries in lines.values()))
    return str(path)


@pytest.mark.parametrize("indexed", [False, True])
def test_dali(packed: Path, tmp_path: Path, indexed: bool) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    paths = sorted(map(str, packed.glob("*.tar")))
    indices = {"index_paths": [dali_index(path, tmp_path) for path in paths]} if indexed else {}

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reading() -> tuple[object, ...]:
        read = fn.readers.webdataset(
            paths=paths, ext=[";".join(EXTENSIONS), "cls"], missing_component_behavior="error", **indices
        )
        return tuple(read)

    pipe = reading()
    pipe.build()
    (meta,) = pipe.reader_meta().values()
    wanted = expected(packed)
    assert meta["epoch_size"] == wanted.total()
    runs = [pipe.run() for _ in range(wanted.total())]
    found = [(np.array(image[0]).tobytes(), np.array(label[0]).tobytes()) for image, label in runs]
    assert Counter(found) == wanted
