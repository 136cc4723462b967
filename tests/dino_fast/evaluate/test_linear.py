"""Heads trained side by side against torch's own layer, loss, SGD and cosine, one head at a time; the command."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_fast.__main__ import main as dino_fast
from dino_fast.distributed import Ranks
from dino_fast.evaluate import features, linear_heads
from dino_fast.evaluate.linear_cached import evaluate_linear, train_heads
from dino_fast.evaluate.linear_heads import (
    Heads,
    LinearProtocol,
    LinearScore,
    find_best_end,
    initialize_heads,
    pick_best,
    score_heads,
)
from pipelines.labeled import CenterCrop
from pipelines.photometric import MEAN, STD
from shards.__main__ import main as make_shards
from shards.errors import UserError
from shards.index import ShardIndex

CPU = torch.device("cpu")
PACK = ("--workers", "1", "--format")


def _data(samples: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    r = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, width, dtype=torch.float64, generator=r)
    return x, torch.randint(classes, (samples,), generator=r)


def _separable(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return features at one corner for each class, with a little noise."""
    y = torch.arange(samples) % classes
    noise = torch.randn(samples, classes, generator=torch.Generator().manual_seed(1))
    return 3 * torch.eye(classes)[y] + 0.1 * noise, y


def _train_as_published(x: Tensor, y: Tensor, layer: nn.Linear, protocol: LinearProtocol, lr: float) -> nn.Linear:
    """Train one head as the published code does it, in the protocol's order."""
    sgd = torch.optim.SGD(layer.parameters(), lr * protocol.batch / 256, momentum=0.9, weight_decay=0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, protocol.epochs, eta_min=0)
    for epoch in range(protocol.epochs):
        for rows in protocol.shuffle(epoch, len(y)).split(protocol.batch):
            sgd.zero_grad()
            nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            sgd.step()
        cosine.step()
    return layer


@settings(max_examples=20, deadline=None)
@given(
    samples=st.integers(1, 60),
    width=st.integers(1, 12),
    classes=st.integers(1, 8),
    batch=st.integers(1, 70),
    epochs=st.integers(1, 6),
    lrs=st.lists(st.floats(1e-4, 10), min_size=1, max_size=4),
    seed=st.integers(0, 2**62),
)
def test_each_head_equals_the_published_training_of_that_head_alone(samples, width, classes, batch, epochs, lrs, seed):
    protocol = LinearProtocol(tuple(lrs), epochs, batch, seed)
    x, y = _data(samples, width, classes)
    start = initialize_heads(width, classes, protocol, CPU, torch.float64)
    heads = train_heads(x, y, classes, protocol, CPU)
    for r, lr in enumerate(lrs):
        layer = nn.Linear(width, classes, dtype=torch.float64)
        layer.load_state_dict({"weight": start.weights[r], "bias": start.biases[r]})
        layer = _train_as_published(x, y, layer, protocol, lr)
        torch.testing.assert_close(heads.weights[r], layer.weight.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(heads.biases[r], layer.bias.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(heads.compute_logits(x)[:, r], layer(x).detach(), rtol=1e-8, atol=1e-9)


def test_all_heads_have_the_same_published_initial_weights():
    heads = initialize_heads(512, 100, LinearProtocol(lrs=(1, 2)), CPU)
    assert torch.equal(heads.weights[0], heads.weights[1])
    assert heads.weights.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(heads.weights.mean().item()) < 2e-4
    assert not heads.biases.any()
    other = initialize_heads(512, 100, LinearProtocol(lrs=(1, 2), seed=1), CPU)
    assert not torch.equal(heads.weights, other.weights)


def test_every_order_is_a_permutation_of_seed_and_epoch():
    orders = [LinearProtocol(seed=seed).shuffle(epoch, 50).tolist() for seed in (0, 1, 2**62) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 9
    assert LinearProtocol(seed=1).shuffle(2, 50).tolist() == orders[5]


def test_two_trainings_give_the_same_heads_to_the_bit():
    x, y = _separable(300, 7)
    first, second = (train_heads(x, y, 7, LinearProtocol(epochs=5, batch=64), CPU) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.biases, second.biases)


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 9])
def test_separable_data_reach_100_percent(classes: int):
    x, y = _separable(20 * classes, classes)
    heads = train_heads(x, y, classes, LinearProtocol(), CPU)
    scores = score_heads(heads, x, y)
    assert scores[-3:] == [(100, 100)] * 3
    assert all(top1 <= top5 for top1, top5 in scores)
    if classes <= 5:
        assert all(top5 == 100 for _, top5 in scores)


@pytest.mark.parametrize("max_logits", [1, 100, 2**26])
def test_scores_equal_a_count_by_loops(max_logits: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_heads, "_MAX_LOGITS", max_logits)
    x, y = _data(40, 6, 8)
    r = torch.Generator().manual_seed(3)
    heads = Heads(*(torch.randn(3, 8, *rest, dtype=torch.float64, generator=r) for rest in ((6,), ())))
    for head, (top1, top5) in enumerate(score_heads(heads, x, y)):
        hits = [0, 0]
        for row, label in zip(x, y.tolist(), strict=True):
            logits = heads.weights[head] @ row + heads.biases[head]
            place = int((logits > logits[label]).sum())  # how many classes are ahead of the right one
            hits[0] += place < 1
            hits[1] += place < 5
        assert (top1, top5) == pytest.approx((hits[0] / 0.4, hits[1] / 0.4))
        assert 0 < top1 < top5 < 100


def test_a_head_that_overflows_has_no_hits_and_leaves_the_others_alone():
    x, y = _separable(40, 2)
    small, huge = score_heads(train_heads(x, y, 2, LinearProtocol((0.1, 3e38), 3, 256), CPU), x, y)
    assert small == (100, 100)
    assert huge == (0, 0)


def test_the_best_learning_rate_and_whether_it_is_at_an_end():
    def sweep(*top1: float) -> list[LinearScore]:
        return [LinearScore(10.0**n, score, 90) for n, score in enumerate(top1)]

    assert pick_best(sweep(1, 3, 2)).lr == 10
    assert pick_best([LinearScore(1, 50, 80), LinearScore(2, 50, 90), LinearScore(3, 50, 90)]).lr == 2
    assert [find_best_end(sweep(*top1)) for top1 in [(1, 3, 2), (3, 1, 2), (1, 2, 3), (3, 3, 1), (3,)]] == [
        None, "lowest", "highest", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lrs": ()}, "learning rates must be"),
        ({"lrs": (0.1, 0.0)}, "learning rates must be"),
        ({"lrs": (float("nan"),)}, "learning rates must be"),
        ({"epochs": 0}, "1 or more"),
        ({"batch": 0}, "1 or more"),
        ({"seed": -1}, "0 or more"),
    ],
)
def test_a_protocol_with_wrong_values_is_refused(wrong, message: str):
    with pytest.raises(ValueError, match=message):
        LinearProtocol(**wrong)


def test_labels_that_do_not_fit_are_refused():
    x, y = _data(4, 3, 2)
    heads = initialize_heads(3, 2, LinearProtocol(), CPU, x.dtype)
    with pytest.raises(ValueError, match="train labels do not lie in 0 to 1"):
        train_heads(x, y + 2, 2, LinearProtocol(), CPU)
    with pytest.raises(ValueError, match="test labels do not lie in 0 to 1"):
        score_heads(heads, x, y - 2)
    with pytest.raises(ValueError, match="4 train features with 3 labels"):
        train_heads(x, y[:3], 2, LinearProtocol(), CPU)


def test_features_that_do_not_fit_on_a_gpu_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 4 * 10 * 7 - 1, 10**9))
    found = torch.zeros(10, 7)
    assert features.move_if_it_fits(found, torch.device("cuda")) is found


@pytest.mark.gpu
def test_a_gpu_gives_the_same_heads_from_features_on_either_side():
    x, y = _data(300, 40, 7)
    protocol = LinearProtocol(epochs=5, batch=64)
    expected = train_heads(x, y, 7, protocol, CPU)
    gpu = torch.device("cuda")
    for here in (x, y), (x.to(gpu), y.to(gpu)):
        heads = train_heads(*here, 7, protocol, gpu)
        torch.testing.assert_close(heads.weights.cpu(), expected.weights, rtol=1e-9, atol=1e-10)
        assert score_heads(heads, *here) == score_heads(expected, x, y)


class Brightness(nn.Module):
    """[N, 3, H, W] → [N, 3]."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean((2, 3))


def how(cache: Path) -> features.Extraction:
    """Return how features of 32 pixels are computed by one rank, and kept in a folder."""
    return features.Extraction("brightness", CenterCrop(37, 32), Ranks(0, 1, CPU), cache / "features")


def test_val_may_have_a_subset_of_the_classes(labeled_shards: Path, bright_only: Path, tmp_path: Path):
    protocol = LinearProtocol((0.1, 0.3))
    with ShardIndex(labeled_shards) as both, ShardIndex(bright_only) as bright:
        assert bright.classes == ("class_1",)
        found = features.compute_features(Brightness(), both, bright, how(tmp_path))
        assert (found.classes, found.val_labels.tolist()) == (2, [1] * 20)
        scores = evaluate_linear(Brightness(), both, bright, how(tmp_path), protocol)
        assert scores == [LinearScore(lr, 100, 100) for lr in protocol.lrs]
        with pytest.raises(UserError, match=r"has classes that .* lacks: class_0"):
            evaluate_linear(Brightness(), bright, both, how(tmp_path), protocol)


def test_a_single_class_is_always_right(bright_only: Path, tmp_path: Path):
    with ShardIndex(bright_only) as bright:
        assert evaluate_linear(Brightness(), bright, bright, how(tmp_path), LinearProtocol((0.1,))) == [
            LinearScore(0.1, 100, 100)
        ]


def test_a_diverged_backbone_is_refused(labeled_shards: Path, tmp_path: Path):
    with (
        ShardIndex(labeled_shards) as index,
        pytest.raises(UserError, match="features of its backbone are not finite"),
    ):
        evaluate_linear(Brightness(float("nan")), index, index, how(tmp_path), LinearProtocol())


def test_the_command_scores_a_run(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "2") == 0
    capsys.readouterr()
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards), "--device", "cpu"]
    command = ["linear", "--checkpoint", str(tmp_path / "run"), *data, "--batch", "16", "--lrs", "0.001,0.03,1"]
    command += ["--epochs", "10", "--seed", "5"]
    for file in "once.json", "again.json":
        assert dino_fast([*command, "--json", str(tmp_path / file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "once.json").read_text() == (tmp_path / "again.json").read_text()
    result = json.loads((tmp_path / "once.json").read_text())
    sweep, best = result.pop("linear"), result.pop("best")
    assert result == {
        "checkpoint": str(tmp_path / "run"), "backbone": "resnet18", "step": 2, "network": "teacher",
        "resize": 37, "crop": 32,
        "mean": list(MEAN), "std": list(STD), "train": 40, "val": 40, "classes": 2, "protocol": "cached",
        "epochs": 10, "batch": 16, "seed": 5,
    }  # fmt: skip
    assert [score["lr"] for score in sweep] == [0.001, 0.03, 1]
    assert best in sweep
    assert best["top1"] == max(score["top1"] for score in sweep) > 90  # dark and bright images
    assert all(score["top5"] == 100 for score in sweep)  # two classes
    half = len(printed) // 2
    assert printed[:half] == printed[half:]
    assert f"lr = 0.03   : top-1 {sweep[1]['top1']:6.2f} %   top-5 100.00 %" in printed
    assert printed[-1].startswith(f"best lr = {best['lr']:g}: top-1 {best['top1']:.2f} %")


@pytest.fixture
def refused(labeled_shards: Path, capsys):
    """Return a function that expects the command to fail, and returns its one line."""

    def refuse(*arguments: str, status: int = 1) -> str:
        try:
            found = dino_fast(["linear", "--train", str(labeled_shards), "--val", str(labeled_shards), *arguments])
        except SystemExit as error:
            found = error.code
        assert found == status
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("dino-fast linear: ")
        return lines[0]

    return refuse


def test_wrong_calls_are_one_line(refused):
    assert "--checkpoint" in refused(status=2)
    for flag, value in [
        ("--lrs", "0.1,-1"), ("--lrs", "fast"), ("--lrs", ""), ("--lrs", "inf"), ("--epochs", "0"), ("--batch", "1.5"),
        ("--seed", "-1"), ("--seed", str(2**63)), ("--crop", "8"),
    ]:  # fmt: skip
        line = refused("--checkpoint", "x.pt", f"{flag}={value}", status=2)
        assert f"dino-fast linear: {flag} expects " in line
        assert repr(value) in line


def test_a_misspelled_flag_gets_a_suggestion(refused):
    """Although the flag that was meant is missing, too."""
    assert "unknown flag --chekpoint. Did you mean --checkpoint?" in refused("--chekpoint", "x.pt", status=2)
    assert "unknown flag --epoch-count. Did you mean --epochs?" in refused(
        "--checkpoint=x.pt", "--epoch-count=3", status=2
    )
    assert "--arch. Did you mean --backbone?" in refused("--checkpoint", "x.pt", "--arch", "resnet50", status=2)
    assert "Did you mean --blocks?" in refused("--checkpoint", "x.pt", "--n_last_blocks=4", status=2)
    assert "unknown flag --zzz. See dino-fast linear --help." in refused("--checkpoint", "x.pt", "--zzz", status=2)


def test_failures_are_one_line(refused, train_here, labeled_shards: Path, bright_only: Path, tmp_path: Path, capsys):
    assert "nowhere.pt: No such file or directory." in refused("--checkpoint", str(tmp_path / "nowhere.pt"))
    assert "does not exist. Create it first." in refused(
        "--checkpoint", "x.pt", "--json", str(tmp_path / "no" / "score.json")
    )
    assert "is a folder. Name a file in it." in refused("--checkpoint", "x.pt", "--json", str(tmp_path))
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    unlabeled = tmp_path / "unlabeled"
    assert make_shards(["pack", str(labeled_shards.parent / "images"), str(unlabeled), *PACK, "flat"]) == 0
    capsys.readouterr()
    run = ["--checkpoint", str(tmp_path / "run")]
    assert "--resize 32 is smaller" in refused(*run, "--resize", "32", "--crop", "40")
    assert "has samples without labels" in refused(*run, "--val", str(unlabeled))
    assert "has a single class, class_1" in refused(*run, "--train", str(bright_only))
    assert "void" in refused(*run, "--val", str(tmp_path / "void"))
