"""The k-NN score during training, against a plain reference, and on two real gloo processes.

Run as a program, this file is one rank: `test_online_knn.py RANK FOLDER TRAIN VAL DAMAGED`.
"""

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torchvision import transforms

from dino_fast.distributed import Ranks
from dino_fast.evaluate.features import Extraction
from dino_fast.evaluate.knn import evaluate_knn
from dino_fast.evaluate.online_knn import KnnRecipe, OnlineKnn, divide_evenly, select_evenly, take_share
from dino_fast.run.metrics import METRICS
from dino_fast.run.signals import STOPPED_BY_SIGNAL, StopSignal
from pipelines.labeled import CenterCrop
from pipelines.photometric import MEAN, STD
from shards.__main__ import main as make_shards
from shards.errors import UserError
from shards.index import ShardIndex
from tests.chain import Chain
from tests.dino_fast.test_train import rows_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
CROP = 32


def _pack(folder: Path, name: str, sizes: dict[str, int], seed: int) -> Path:
    """Pack noise whose mean color depends a little on the class, `sizes` images of each."""
    for label, (kind, size) in enumerate(sizes.items()):
        (folder / name / kind).mkdir(parents=True)
        for number in range(size):
            rng = np.random.default_rng([seed, label, number])
            color = 128 + 25 * np.sin(2.1 * ord(kind[0]) + np.arange(3)) + rng.normal(0, 18, 3)
            levels = color + rng.normal(0, 40, (*rng.integers(36, 70, 2), 3))
            Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / name / kind / f"{number}.png")
    out = folder / f"{name}-shards"
    assert make_shards(["pack", str(folder / name), str(out), "--shard-size", "100kB", "--workers", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return voting shards of 3 classes and 61 images, and others of two of these classes and 19 images."""
    folder = tmp_path_factory.mktemp("online")
    return _pack(folder, "train", {"a": 30, "b": 20, "c": 11}, 0), _pack(folder, "val", {"b": 12, "c": 7}, 1)


def _recipe(shards: tuple[Path, Path], **changes: Any) -> KnnRecipe:
    return KnnRecipe(**{"train": str(shards[0]), "val": str(shards[1]), "images": 500, "k": 5, **changes})


def _backbone() -> nn.Module:
    torch.manual_seed(0)
    backbone = Chain(
        nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(),
    )  # fmt: skip
    backbone(torch.randn(16, 3, CROP, CROP) + 0.2)  # running statistics of its own
    return backbone.to(memory_format=torch.channels_last)


def _score_by_reference(backbone: nn.Module, shards: tuple[Path, Path], recipe: KnnRecipe) -> float:
    """Score the selected samples with Pillow, torchvision's transforms and a vote in float64."""
    backbone = backbone.eval()
    chain = transforms.Compose([
        transforms.Resize(round(CROP * 256 / 224), transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(CROP),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    sets = []
    for folder, total in zip(shards, (recipe.images, recipe.images // 5), strict=True):
        with ShardIndex(folder) as index, torch.no_grad():
            ids = select_evenly(index.labels, total)
            images = [chain(Image.open(io.BytesIO(sample))) for sample in index.read(ids)]
            features = backbone(torch.stack(images)).double().numpy()
            names = [index.classes[label] for label in index.labels[ids]]
            sets.append((features / np.linalg.norm(features, axis=1, keepdims=True), names))
    (train, voters), (val, expected) = sets
    hits = 0
    for row, name in zip(val @ train.T, expected, strict=True):
        votes = dict.fromkeys(voters, 0.0)
        for place in np.argsort(-row)[: recipe.k]:
            votes[voters[place]] += math.exp(row[place] / 0.07)
        hits += max(votes, key=votes.__getitem__) == name
    return 100 * hits / len(expected)


@pytest.mark.parametrize("changes", [{}, {"images": 35}, {"images": 7, "k": 1}, {"k": 20}])
def test_the_score_is_that_of_the_reference(shards: tuple[Path, Path], changes: dict[str, int]) -> None:
    recipe = _recipe(shards, **changes)
    score = OnlineKnn(recipe, CROP, ALONE).score(_backbone())
    assert score == pytest.approx(_score_by_reference(_backbone(), shards, recipe))
    if not changes:
        assert 20 < score < 90  # neither everything nor nothing, so that a mistake would show


def test_over_all_images_it_is_the_score_of_the_command(shards: tuple[Path, Path], tmp_path: Path) -> None:
    how = Extraction("resnet18", CenterCrop(50, 40), ALONE, tmp_path)
    with ShardIndex(shards[0]) as train, ShardIndex(shards[1]) as val:
        expected = evaluate_knn(_backbone(), train, val, how)[20].top1
    recipe = _recipe(shards, k=20, crop=40, resize=50)
    assert OnlineKnn(recipe, CROP, ALONE).score(_backbone()) == pytest.approx(expected)


class _Recorder(nn.Module):
    """Returns mean colors as features, and keeps its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.seen.append(x)
        return x.mean((2, 3))


def test_it_takes_a_fifth_as_many_of_val_and_the_same_every_time(shards: tuple[Path, Path]) -> None:
    knn, recorder = OnlineKnn(_recipe(shards, images=35), CROP, ALONE), _Recorder()
    for _ in range(2):
        knn.score(recorder)
    train, val, *again = recorder.seen
    assert (len(train), len(val)) == (35, 7)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in recorder.seen)
    torch.testing.assert_close(again, [train, val], rtol=0, atol=0)


# Which samples are selected

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(np.array)


@given(LABELS, st.integers(1, 90))
def test_classes_give_equally_many_samples_if_they_have_them(labels: np.ndarray, total: int) -> None:
    sizes = np.bincount(labels)
    counts = divide_evenly(sizes, min(total, len(labels)))
    assert counts.sum() == min(total, len(labels))
    assert (counts <= sizes).all()
    assert counts[counts < sizes].min(initial=counts.max()) >= counts.max() - 1


@given(LABELS, st.integers(1, 90))
def test_a_class_gives_samples_at_even_distances_and_always_the_same(labels: np.ndarray, total: int) -> None:
    ids = select_evenly(labels, total)
    assert np.array_equal(ids, np.unique(ids))  # sorted, none twice
    assert np.array_equal(ids, select_evenly(labels.copy(), total))
    sizes = np.bincount(labels)
    assert np.array_equal(np.bincount(labels[ids], minlength=len(sizes)), divide_evenly(sizes, min(total, len(labels))))
    for label in np.unique(labels[ids]):
        places = np.flatnonzero(np.isin(np.flatnonzero(labels == label), ids))
        distance = sizes[label] / len(places)
        assert (np.abs(places - (np.arange(len(places)) + 0.5) * distance) <= 1).all()


def test_few_images_of_many_classes_come_from_classes_at_even_distances() -> None:
    picked = select_evenly(np.repeat(np.arange(1000), 50), 200) // 50
    assert np.array_equal(picked, np.arange(2, 1000, 5))


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_shares_of_the_ranks_make_up_the_whole(samples: int, world: int) -> None:
    ids = np.arange(samples) * 3
    shares = [take_share(ids, Ranks(rank, world, CPU)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-samples // world)}
    assert np.array_equal(np.stack(shares, 1).ravel()[:samples], ids)


# Nothing else is changed


def _snapshot(backbone: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in backbone.state_dict().items()},
        "places": [value.data_ptr() for value in backbone.state_dict().values()],
        "modes": [module.training for module in backbone.modules()],
        "gradients": [p.grad.clone() for p in backbone.parameters() if p.grad is not None],
        "needed": [p.requires_grad for p in backbone.parameters()],
        "chance": [torch.get_rng_state(), np.array(random.getstate()[1]), np.random.get_state()[1]],  # noqa: NPY002
        "recording": torch.is_grad_enabled(),
    }


def test_nothing_is_changed(shards: tuple[Path, Path]) -> None:
    knn = OnlineKnn(_recipe(shards), CROP, ALONE)
    backbone = _backbone().train()
    backbone[1].eval()  # what was in evaluation mode before stays there
    backbone(torch.randn(4, 3, CROP, CROP)).sum().backward()
    before = _snapshot(backbone)
    first = knn.score(backbone)
    torch.testing.assert_close(_snapshot(backbone), before, rtol=0, atol=0)
    assert knn.score(backbone) == first


def test_nothing_is_changed_by_a_failure(shards: tuple[Path, Path], tmp_path: Path) -> None:
    train, _ = _damage_copy(shards[0], tmp_path)
    backbone = _backbone()
    before = _snapshot(backbone)
    with pytest.raises(UserError, match=r"key .*crc32 differs"):
        OnlineKnn(_recipe((train, shards[1])), CROP, ALONE).score(backbone)
    torch.testing.assert_close(_snapshot(backbone), before, rtol=0, atol=0)


def test_a_compiled_backbone_gets_no_other_graph(shards: tuple[Path, Path]) -> None:
    plain, backbone = _backbone().train(), _backbone().train()
    knn, views = OnlineKnn(_recipe(shards), CROP, ALONE), torch.randn(4, 3, CROP, CROP)
    torch._dynamo.reset()
    counters.clear()
    try:
        backbone.compile(dynamic=False, backend="aot_eager")
        for network in (plain, backbone):
            network(views).sum().backward()
        assert knn.score(backbone) == knn.score(plain)
        backbone(views).sum().backward()
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()


def test_features_that_are_not_finite_have_no_score(shards: tuple[Path, Path]) -> None:
    backbone = _backbone()
    with torch.no_grad():
        backbone[0].weight.fill_(torch.nan)
    assert math.isnan(OnlineKnn(_recipe(shards), CROP, ALONE).score(backbone))


# What is refused before training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ""}, "--knn.train is missing"),
        ({"val": ""}, "--knn.val is missing"),
        ({"train": "nowhere"}, "--knn.train: nowhere"),
        ({"val": "nowhere"}, "--knn.val: nowhere"),
        ({"train": "SELF"}, "--knn.val .* each image would find itself"),
        ({"train": "VAL", "val": "TRAIN"}, r"--knn.val .* lacks \(a\)"),
        ({"val": "UNLABELED"}, "--knn.val .* without labels"),
        ({"images": 2}, "--knn.images 2 is less than one image for each class"),
        ({"resize": 20}, "--knn.resize 20 is smaller than the crop of 32"),
    ],
)  # fmt: skip
def test_a_recipe_that_could_give_no_score_is_refused(
    shards: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    names = {"TRAIN": str(shards[0]), "VAL": str(shards[1]), "SELF": str(shards[1]), "nowhere": "nowhere", "": ""}
    if changes.get("val") == "UNLABELED":
        (tmp_path / "flat").mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / "flat" / "one.png")
        assert make_shards(["pack", str(tmp_path / "flat"), str(tmp_path / "out"), "--workers", "1"]) == 0
        names["UNLABELED"] = str(tmp_path / "out")
    given = {name: names[value] if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        OnlineKnn(_recipe(shards, **given), CROP, ALONE)


def test_it_is_enabled_where_shards_are_named() -> None:
    assert not KnnRecipe().enabled
    assert KnnRecipe(val="somewhere").enabled  # and refused by OnlineKnn


# Two ranks


def _damage_copy(folder: Path, tmp_path: Path) -> tuple[Path, int]:
    """Copy shards, change a byte in the middle of the last sample, and return the copy and that sample's number."""
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    with ShardIndex(copy) as index:
        last = len(index) - 1
        record = index.records[last]
        path = copy / index.manifest.shards[int(record["shard"])].file
    with open(path, "r+b") as file:
        file.seek(int(record["offset"] + record["size"] // 2))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    return copy, last


def _rank(rank: int, folder: Path, train: Path, val: Path, damaged: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    ranks, recipe = Ranks(rank, 2, CPU), _recipe((train, val))
    few = replace(recipe, images=5, k=1)  # a single image is classified
    scores = [OnlineKnn(each, CROP, ranks).score(_backbone()) for each in (recipe, few)]
    error = None
    try:
        OnlineKnn(replace(recipe, train=str(damaged)), CROP, ranks).score(_backbone())
    except UserError as refusal:
        error = str(refusal)
    scores.append(OnlineKnn(recipe, CROP, ranks).score(_backbone()))  # the ranks still agree where they are
    (folder / f"{rank}.json").write_text(json.dumps({"scores": scores, "error": error}))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_have_the_score_of_one_and_fail_together(shards: tuple[Path, Path], tmp_path: Path) -> None:
    damaged, sample = _damage_copy(shards[0], tmp_path)
    root = str(Path(__file__).parents[3])
    arguments = [sys.executable, "-W", "error", __file__]
    environment = {**os.environ, "PYTHONPATH": root}
    given = [str(path) for path in (tmp_path, *shards, damaged)]
    running = [subprocess.Popen([*arguments, str(rank), *given], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    recipe = _recipe(shards)
    alone = [OnlineKnn(each, CROP, ALONE).score(_backbone()) for each in (recipe, replace(recipe, images=5, k=1))]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["scores"] == pytest.approx([*alone, alone[0]])
        assert f"sample {sample} " in found["error"]


if __name__ == "__main__":
    _rank(int(sys.argv[1]), *map(Path, sys.argv[2:]))


def test_a_signal_in_the_last_step_changes_nothing(train_here, shards, tmp_path: Path, monkeypatch, capsys):
    """The run has its score and ends with status 0."""
    train, val = shards
    monkeypatch.setattr(StopSignal, "all_ranks_stop", lambda self: True)
    options = ("--knn.train", str(train), "--knn.val", str(val), "--max_steps", "1")
    assert train_here(tmp_path / "run", *options) == 0
    assert rows_of(tmp_path / "run")[-1].keys() == {"step", "time", "knn_top1", "knn_s"}
    for row in rows_of(tmp_path / "run"):
        assert row.keys() <= METRICS.keys()
    assert " % of 19 images, in " in capsys.readouterr().out
    assert train_here(tmp_path / "other", *options[:-1], "2") == STOPPED_BY_SIGNAL
    assert not any("knn_top1" in row for row in rows_of(tmp_path / "other"))
