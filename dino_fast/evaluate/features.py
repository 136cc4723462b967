"""Frozen features of labeled shards, computed once by all ranks and kept on the disk for every protocol."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dino_fast.distributed import Ranks, show_progress_once, wait_for_all
from dino_fast.evaluate.feature_file import CHUNK, FeatureFile
from dino_fast.evaluate.token_features import TokenFeatures
from pipelines.labeled import CenterCrop, load_labeled_batches
from pipelines.loader import count_default_threads
from shards.errors import UserError
from shards.index import ShardIndex

BATCH_SIZE = 64  # images that go through the backbone at once; CHUNK is a multiple of it

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Extraction:
    """How features are computed, by whom, and where they are kept."""

    backbone: str
    """what the features are of, in words: two networks of equal weights may differ"""
    center: CenterCrop
    """how images are prepared"""
    ranks: Ranks
    """they share the images; all of them see the folder `cache`"""
    cache: Path
    """folder with a subfolder for each set of features"""
    limit: int | None = None
    """how many images of a set are used at most, at even distances; None: all"""

    @property
    def half(self) -> bool:
        """Whether features are computed and kept in half precision, as they are on a GPU."""
        return self.ranks.device.type == "cuda"


@dataclass(frozen=True)
class Features:
    """The features that a classifier learns from and those that it classifies, memory-mapped."""

    train: Tensor
    """[N, D], float32 or float16"""
    train_labels: Tensor
    """[N], int64, 0 to classes − 1"""
    val: Tensor
    """[M, D], float32 or float16"""
    val_labels: Tensor
    """[M], int64, 0 to classes − 1. They number the classes as the training set does."""
    classes: int
    """number of classes in the training set"""


def find_default_cache() -> Path:
    """Return the folder that features are kept in where no other is named: it is the user's, on this machine."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dino_fast" / "features"


def compute_features(network: nn.Module, train: ShardIndex, val: ShardIndex, how: Extraction) -> Features:
    """Compute a network's features of both sets, or read them where they are kept.

    Raises UserError, before it computes anything, for samples without labels and for classes that only `val` has.
    """
    train_numbers = match_classes(train, val)
    kept = [choose_samples(index, how.limit) for index in (train, val)]
    features = [extract_features(network, index, ids, how) for index, ids in zip((train, val), kept, strict=True)]
    labels = [index.labels[ids].astype(np.int64) for index, ids in zip((train, val), kept, strict=True)]
    return Features(
        features[0], torch.from_numpy(labels[0]), features[1], torch.from_numpy(train_numbers[labels[1]]),
        len(train.classes),
    )  # fmt: skip


def choose_samples(index: ShardIndex, limit: int | None) -> Numbers:
    """Return the numbers of at most `limit` samples, at even distances, sorted."""
    return spread_evenly(len(index), limit)


def spread_evenly(count: int, limit: int | None) -> Numbers:
    """Return at most `limit` numbers of range(count), at even distances, sorted; all of them where it is None."""
    kept = min(count, limit or count)
    return np.arange(kept) * count // max(1, kept)


def match_classes(train: ShardIndex, val: ShardIndex) -> Numbers:
    """Return, for each class of `val`, its number in `train`. Raises UserError where `train` lacks it."""
    for index in (train, val):
        if not len(index) or not index.classes or (index.labels < 0).any():
            raise UserError(
                f"{index.folder} has samples without labels, or no samples. Pass shards packed from class folders."
            )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{val.folder} has classes that {train.folder} lacks: {', '.join(unknown[:5])}. Pass two sets of the same "
            "classes."
        )
    numbers = {name: number for number, name in enumerate(train.classes)}
    return np.array([numbers[name] for name in val.classes])


@torch.inference_mode()
def extract_features(network: nn.Module, index: ShardIndex, ids: Numbers, how: Extraction) -> Tensor:
    """Return a network's features [N, D] of the samples with these numbers, memory-mapped.

    What an earlier pass has computed is read; the ranks share the rest. The network stays in evaluation mode: batch
    norms use their running statistics. Raises UserError for a sample that cannot be read.
    """
    network.to(how.ranks.device).to(memory_format=torch.channels_last).eval()
    file = _open_file(network, index, ids, how)
    missing = file.find_missing_chunks()
    wait_for_all(how.ranks)  # until each rank has seen the same chunks missing
    rows = _list_rows(missing[how.ranks.rank :: how.ranks.world], len(ids))
    for row, features in _compute_rows(network, index, ids, rows, how):
        file.write(row, features)
    wait_for_all(how.ranks)
    return file.read()


def _open_file(network: nn.Module, index: ShardIndex, ids: Numbers, how: Extraction) -> FeatureFile:
    """Open the file of the features that this network has of these samples. Its folder's name tells them apart."""
    width = _compute(network, torch.zeros(1, 3, how.center.crop, how.center.crop), how).shape[1]
    center = how.center
    about = {
        "backbone": how.backbone,
        "features": str(network) if isinstance(network, TokenFeatures) else "pooled",
        "weights": hash_weights(network.state_dict()),
        "images": str(index.folder),
        "resize": center.resize, "crop": center.crop,
        "mean": list(center.normalization.mean), "std": list(center.normalization.std),
        "device": how.ranks.device.type,
    }  # fmt: skip
    key = {**about, "images": index.fingerprint, "samples": hashlib.sha256(ids.tobytes()).hexdigest()}
    return FeatureFile(how.cache / hash_key(key), (len(ids), width), np.float16 if how.half else np.float32, about)


def hash_key(key: Mapping[str, Any]) -> str:
    """Return the name of the folder of features that are told from all others by this plain data."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of the names, shapes and values of a state dict, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _list_rows(chunks: list[int], count: int) -> Numbers:
    """Return the rows of these chunks among `count` rows."""
    rows = (np.array(chunks, np.int64)[:, None] * CHUNK + np.arange(CHUNK)).ravel()
    return rows[rows < count]


def _compute_rows(
    network: nn.Module, index: ShardIndex, ids: Numbers, rows: Numbers, how: Extraction
) -> Iterator[tuple[int, Tensor]]:
    """Yield batches of features of the samples `ids[rows]`, each with the row of its first. Progress is shown."""
    done, ranks = 0, how.ranks
    with show_progress_once(f"features of {index.folder}", ranks) as report:
        for images in _load_images(index, ids[rows], how):
            yield int(rows[done]), _compute(network, images, how)
            done += len(images)
            report(min(done * ranks.world, len(ids)), min(len(rows) * ranks.world, len(ids)))


def _load_images(index: ShardIndex, ids: Numbers, how: Extraction) -> Iterator[Tensor]:
    """Yield batches of prepared images. For a GPU DALI makes them, where it is there and the images were checked."""
    threads, device = count_default_threads(), how.ranks.device
    if device.type == "cuda" and index.fully_decoded and importlib.util.find_spec("nvidia.dali"):
        from pipelines.labeled_dali import load_dali_batches

        yield from load_dali_batches(index, BATCH_SIZE, how.center, threads, ids, device)
    else:
        yield from (images for images, _ in load_labeled_batches(index, BATCH_SIZE, how.center, threads, ids))


def _compute(network: nn.Module, images: Tensor, how: Extraction) -> Tensor:
    device = how.ranks.device
    with torch.autocast(device.type, torch.float16, enabled=how.half):
        features: Tensor = network(images.to(device, non_blocking=True))
    return features.float()


def move_if_it_fits(features: Tensor, device: torch.device) -> Tensor:
    """Return the features on the device, or where they are if they would fill more than half of a GPU's free memory."""
    if device.type == "cuda" and features.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return features
    return features.to(device)


def are_finite(features: Tensor) -> bool:
    """Return whether all features [N, D] are finite numbers."""
    return all(bool(part.float().sum().isfinite()) for part in features.split(2**16))


def check_labels(name: str, features: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless each feature vector has one label in 0 to classes − 1, and there is at least one."""
    if not len(labels) or len(features) != len(labels):
        raise ValueError(f"{len(features)} {name} features with {len(labels)} labels cannot be classified")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"the {name} labels do not lie in 0 to {classes - 1}")
