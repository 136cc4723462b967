"""The published protocol against torch's own layer, SGD and cosine over the same crops; resumed runs; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_fast.__main__ import main as dino_fast
from dino_fast.distributed import Ranks
from dino_fast.evaluate import linear_published
from dino_fast.evaluate.features import Extraction
from dino_fast.evaluate.linear_heads import LinearProtocol, initialize_heads
from dino_fast.evaluate.linear_published import EpochScores, HeadTrainer, gather_shares, summarize
from dino_fast.evaluate.resumable import Progress
from pipelines.labeled import CenterCrop
from pipelines.labeled_crops import LabeledCropLoader, LabeledCrops
from pipelines.order import WholeOrder
from shards.errors import UserError
from shards.index import ShardIndex
from tests.dino_fast.evaluate.test_linear import CPU

ALONE = Ranks(0, 1, CPU)
PROTOCOL = LinearProtocol((0.01, 0.3), epochs=3, batch=16, seed=4)


class Pixels(nn.Module):
    """[N, 3, H, W] → [N, 48]: the image in 4×4 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


@pytest.fixture
def index(labeled_shards: Path):
    with ShardIndex(labeled_shards) as index:
        yield index


def train(index: ShardIndex, folder: Path, protocol: LinearProtocol = PROTOCOL) -> list[EpochScores]:
    how = Extraction("pixels", CenterCrop(37, 32), ALONE, folder / "features")
    with Progress.open(folder / "progress", {"seed": protocol.seed}, ALONE) as progress:
        return HeadTrainer(Pixels(), index, index, how, protocol).train(progress)


def read_heads(folder: Path) -> dict[str, list[Tensor]]:
    [file] = (folder / "progress").glob("step-*.pt")
    state = torch.load(file, weights_only=True)
    return {name: state[name] for name in ("heads", "velocity")}


def test_each_head_is_trained_as_published(index: ShardIndex, tmp_path: Path):
    history = train(index, tmp_path)
    weights, biases = read_heads(tmp_path)["heads"]
    order = WholeOrder(len(index), 16, 4)
    assert order.steps_per_epoch == 3  # the last batch has 8 images
    for number, lr in enumerate(PROTOCOL.lrs):
        layer, start = nn.Linear(48, 2), initialize_heads(48, 2, PROTOCOL, CPU)
        layer.load_state_dict({"weight": start.weights[number], "bias": start.biases[number]})
        sgd = torch.optim.SGD(layer.parameters(), lr * 16 / 256, momentum=0.9, weight_decay=0)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 3, eta_min=0)
        loader = LabeledCropLoader(index, "shards", order, LabeledCrops(32), CPU, torch.float32, 1)
        for epoch in range(3):
            losses = []
            for batch in loader.load_batches(range(3 * epoch, 3 * epoch + 3)):
                loss = nn.functional.cross_entropy(layer(Pixels()(batch.images)), batch.labels)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                losses.append(loss.item())
            cosine.step()
            assert history[epoch].losses[number] == pytest.approx(np.dot(losses, [16, 16, 8]) / 40, rel=1e-5)
        torch.testing.assert_close(weights[number], layer.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(biases[number], layer.bias.detach(), rtol=1e-4, atol=1e-6)
    assert max(score.top1 for score in history[-1].scores) > 90  # dark and bright images


def test_a_killed_run_goes_on_to_the_same_bits(index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = train(index, tmp_path / "whole")
    trained = HeadTrainer._train_epoch

    def stop(self: HeadTrainer, epoch: int, state) -> list[float]:
        if epoch == 1:
            raise KeyboardInterrupt
        return trained(self, epoch, state)

    with monkeypatch.context() as patch:
        patch.setattr(HeadTrainer, "_train_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train(index, tmp_path / "killed")
    assert train(index, tmp_path / "killed") == expected
    before, after = (read_heads(tmp_path / name) for name in ("whole", "killed"))
    for name in before:
        assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
    monkeypatch.setattr(HeadTrainer, "_train_epoch", None)  # nothing is left to do
    assert train(index, tmp_path / "killed") == expected


def test_other_settings_are_refused_and_damage_is_noticed(index: ShardIndex, tmp_path: Path):
    train(index, tmp_path)
    with pytest.raises(UserError, match=r"--output .* with other settings \(seed: 4 -> 5\)\. Undo that, or choose"):
        train(index, tmp_path, LinearProtocol((0.1,), 1, 16, 5))
    [file] = (tmp_path / "progress").glob("step-*.pt")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step-.*\.pt is damaged\. Remove it to start from scratch\."):
        train(index, tmp_path)


def test_folders_of_other_things_are_refused(index: ShardIndex, labeled_shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds shards"), Progress.open(labeled_shards, {}, ALONE):
        pass
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="holds a training run"), Progress.open(tmp_path, {}, ALONE):
        pass
    with pytest.raises(RuntimeError), Progress.open(tmp_path / "new", {}, ALONE):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("count", "world"), [(16, 3), (5, 4), (1, 2), (8, 4)])
def test_shares_are_joined_in_order(count: int, world: int, monkeypatch: pytest.MonkeyPatch):
    order = WholeOrder(count, 16, seed=0)
    shares = [torch.from_numpy(order.ids(0, rank, world)) for rank in range(world)]
    most = max(map(len, shares))

    def gather(out: Tensor, mine: Tensor) -> None:
        out.copy_(torch.cat([torch.cat([share, share.new_zeros(most - len(share))]) for share in shares]))
        assert len(mine) == most

    monkeypatch.setattr(linear_published.dist, "all_gather_into_tensor", gather)
    for rank in range(world):
        joined = gather_shares(shares[rank], count, Ranks(rank, world, CPU))
        assert joined.tolist() == order.ids(0).tolist()


def test_the_last_and_the_best_epoch_of_each_head():
    def done(epoch: int, *tops: float) -> EpochScores:
        scores = [linear_published.LinearScore(lr, top1, 90) for lr, top1 in zip((1, 2), tops, strict=True)]
        return EpochScores(epoch, [0, 0], scores)

    first, second = summarize([done(1, 50, 10), done(2, 60, 30), done(3, 60, 20)])
    assert (first.top1, first.best_top1, first.best_epoch) == (60, 60, 2)
    assert (second.top1, second.best_top1, second.best_epoch) == (20, 30, 2)


def test_the_command_follows_the_published_protocol(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    command = ["linear", "--checkpoint", str(tmp_path / "run"), "--train", str(labeled_shards), "--device", "cpu"]
    command += ["--val", str(labeled_shards), "--batch", "16", "--lrs", "0.01,0.3", "--epochs", "2", "--limit", "30"]
    command += ["--protocol", "published", "--output", str(tmp_path / "heads"), "--json", str(tmp_path / "scores.json")]
    capsys.readouterr()
    assert dino_fast(command) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    assert (result["protocol"], result["train"], result["val"], result["epochs"]) == ("published", 30, 30, 2)
    assert [score["lr"] for score in result["linear"]] == [0.01, 0.3]
    best = max(score["best_top1"] for score in result["linear"])
    assert result["best"]["best_top1"] == best
    assert [len(losses) for losses in result["losses"]] == [2, 2]
    assert "epoch 2/2: best lr = " in printed
    assert f"best epoch: top-1 {best:.2f} %, with lr = {result['best']['lr']:g} after epoch " in printed
    assert dino_fast(command) == 0
    assert "epoch 2/2" not in capsys.readouterr().out
    assert dino_fast([*command, "--epochs", "3", "--crop", "48"]) == 1
    assert "(crop: 32 -> 48; epochs: 2 -> 3; resize: 37 -> 55)" in capsys.readouterr().err


def test_wrong_calls_are_one_line(tmp_path: Path, capsys):
    needed = ["linear", "--checkpoint", "x", "--train", "x", "--val", "x"]
    for flags, words in [
        (["--protocol", "published"], "keeps its progress in a folder: pass --output DIR"),
        (["--output", str(tmp_path)], "--output is for --protocol published: leave it out"),
        (["--lrs", "0.1,0.1"], "--lrs expects numbers that differ from each other"),
    ]:
        with pytest.raises(SystemExit) as caught:
            dino_fast([*needed, *flags])
        [line] = capsys.readouterr().err.splitlines()
        assert (caught.value.code, words in line) == (2, True)
