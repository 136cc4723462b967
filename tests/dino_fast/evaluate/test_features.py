"""Features: computed once, by any number of ranks, kept on the disk, and right whenever a pass was killed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_fast.__main__ import main as dino_fast
from dino_fast.distributed import Ranks
from dino_fast.evaluate import feature_file
from dino_fast.evaluate.feature_file import FeatureFile
from dino_fast.evaluate.features import Extraction, choose_samples, extract_features
from dino_fast.evaluate.nearest import find_nearest
from pipelines.labeled import CenterCrop, load_labeled_batches
from pipelines.photometric import Normalization
from shards.errors import UserError
from shards.index import ShardIndex

ALONE = Ranks(0, 1, torch.device("cpu"))


class Colors(nn.Module):
    """Maps images to their mean colors, and counts them. Raises RuntimeError when it would pass `last` images."""

    def __init__(self, last: int = 10**9) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.images, self.last = 0, last

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        if self.images > self.last:
            raise RuntimeError("killed")
        return images.mean((2, 3)) * self.scale


@pytest.fixture
def how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extraction:
    """Chunks have 16 images here, in batches of 8."""
    monkeypatch.setattr("dino_fast.evaluate.feature_file.CHUNK", 16)
    monkeypatch.setattr("dino_fast.evaluate.features.CHUNK", 16)
    monkeypatch.setattr("dino_fast.evaluate.features.BATCH_SIZE", 8)
    return Extraction("colors", CenterCrop(37, 32), ALONE, tmp_path / "cache")


def expected_features(index: ShardIndex, ids: np.ndarray) -> Tensor:
    [(images, _)] = load_labeled_batches(index, 1000, CenterCrop(37, 32), 1, ids)
    return images.mean((2, 3))


@settings(max_examples=30)
@given(rows=st.integers(1, 90), width=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_a_file_has_the_chunks_that_were_written(
    rows: int, width: int, seed: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chunk = 16
    folder = tmp_path_factory.mktemp("features") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_file, "CHUNK", chunk)
        chunks = -(-rows // chunk)
        done = data.draw(st.lists(st.integers(0, chunks - 1), unique=True))
        features = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32))
        for number in done:
            file = FeatureFile(folder, (rows, width), np.float32, {})  # opened again, as by another rank
            for row in range(number * chunk, min(rows, (number + 1) * chunk), 5):
                file.write(row, features[row : min(row + 5, (number + 1) * chunk)])
        file = FeatureFile(folder, (rows, width), np.float32, {})
        assert file.find_missing_chunks() == sorted(set(range(chunks)) - set(done))
        found = file.read()
        for number in range(chunks):
            part = slice(number * chunk, (number + 1) * chunk)
            assert torch.equal(found[part], features[part] if number in done else torch.zeros_like(features[part]))


@pytest.mark.parametrize("limit", [None, 21])
def test_the_features_are_the_networks(limit: int | None, how: Extraction, labeled_shards: Path) -> None:
    with ShardIndex(labeled_shards) as index:
        ids = choose_samples(index, limit)
        assert len(set(ids.tolist())) == (limit or 40)
        found = extract_features(Colors(), index, ids, how)
        torch.testing.assert_close(found, expected_features(index, ids), rtol=0, atol=0)


def test_a_second_pass_computes_nothing(how: Extraction, labeled_shards: Path) -> None:
    with ShardIndex(labeled_shards) as index:
        first = extract_features(Colors(), index, np.arange(40), how)
        network = Colors()
        assert torch.equal(extract_features(network, index, np.arange(40), how), first)
    assert network.images == 1  # one image of zeros tells the width


def test_a_killed_pass_goes_on(how: Extraction, labeled_shards: Path) -> None:
    with ShardIndex(labeled_shards) as index:
        with pytest.raises(RuntimeError, match="killed"):
            extract_features(Colors(last=1 + 24), index, np.arange(40), how)
        network = Colors()
        found = extract_features(network, index, np.arange(40), how)
        assert network.images == 1 + 24  # of 24 images, 16 were a whole chunk
        assert torch.equal(found, expected_features(index, np.arange(40)))


def test_ranks_share_the_chunks(how: Extraction, labeled_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_fast.evaluate.features.wait_for_all", lambda _: None)
    with ShardIndex(labeled_shards) as index:
        counts, both = [], [Colors(), Colors()]
        file = None
        monkeypatch.setattr(FeatureFile, "find_missing_chunks", lambda _: [0, 1, 2])  # both look before either writes
        for rank, network in enumerate(both):
            file = extract_features(network, index, np.arange(40), replace(how, ranks=Ranks(rank, 2, ALONE.device)))
            counts.append(network.images - 1)
        assert counts == [16 + 8, 16]
        assert file is not None
        assert torch.equal(file, expected_features(index, np.arange(40)))


def test_other_weights_images_or_preparations_are_kept_apart(how: Extraction, labeled_shards: Path) -> None:
    other = Colors()
    with torch.no_grad():
        other.scale[0] = 2
    with ShardIndex(labeled_shards) as index:
        for network, ids, change in [
            (Colors(), range(40), {}),
            (other, range(40), {}),
            (Colors(), range(39), {}),
            (Colors(), range(40), {"backbone": "other"}),
            (Colors(), range(40), {"center": CenterCrop(40, 32)}),
            (Colors(), range(40), {"center": CenterCrop(37, 32, Normalization((0, 0, 0), (1, 1, 1)))}),
        ]:
            extract_features(network, index, np.array(ids), replace(how, **change))
    assert len(list(how.cache.iterdir())) == 6
    about = json.loads(next(how.cache.glob("*/about.json")).read_text())
    assert about["images"] == str(labeled_shards)


def test_a_damaged_file_and_a_folder_that_is_none_are_named(how: Extraction, labeled_shards: Path) -> None:
    with ShardIndex(labeled_shards) as index:
        extract_features(Colors(), index, np.arange(40), how)
        [file] = how.cache.glob("*/features.npy")
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(UserError, match=r"features\.npy is damaged .* Delete the folder .*, and run again\."):
            extract_features(Colors(), index, np.arange(40), how)
        with pytest.raises(UserError, match=r"--cache: .* cannot be written .* Pass --cache with a folder"):
            extract_features(Colors(), index, np.arange(40), replace(how, cache=file))


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 30), database=st.integers(1, 60), width=st.integers(1, 6), k=st.integers(1, 70),
    similarities=st.integers(1, 400), part=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_nearest_are_those_of_one_sort(
    queries: int, database: int, width: int, k: int, similarities: int, part: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q, d = (torch.from_numpy(rng.standard_normal((n, width))) for n in (queries, database))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino_fast.evaluate.nearest.MAX_SIMILARITIES", similarities)
        patch.setattr("dino_fast.evaluate.nearest._PART", part)
        cosines, numbers = find_nearest(q, d, k)
    every = torch.cosine_similarity(q[:, None], d[None], dim=2)
    torch.testing.assert_close(cosines, every.sort(dim=1, descending=True).values[:, :k], rtol=0, atol=1e-12)
    torch.testing.assert_close(every.gather(1, numbers), cosines, rtol=0, atol=1e-12)  # of equal ones any may come
    assert all(len(set(row)) == min(k, database) for row in numbers.tolist())


@pytest.mark.slow  # two processes of torch
def test_two_ranks_give_the_scores_of_one(
    train_here: Callable[..., int], labeled_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    data = ["--checkpoint", str(tmp_path / "run"), "--train", str(labeled_shards), "--val", str(labeled_shards)]
    for command, flags in ("knn", []), ("linear", ["--epochs", "3", "--lrs", "0.01,0.1,1"]):
        call = [command, *data, "--device", "cpu", *flags]
        assert dino_fast([*call, "--cache", str(tmp_path / "one"), "--json", str(tmp_path / "one.json")]) == 0
        capsys.readouterr()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        here = ["--cache", str(tmp_path / "two"), "--json", str(tmp_path / "two.json")]
        ranks = subprocess.run(
            [*torchrun, "-m", "dino_fast", *call, *here],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert ranks.returncode == 0, ranks.stderr
        one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
        assert one == two
        assert ranks.stdout.count("train and 40 val images") == 1
