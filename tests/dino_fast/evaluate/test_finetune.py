"""Fine-tuning: a training against torch's own optimizer, the command, resumed runs, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dino_fast.__main__ import main as dino_fast
from dino_fast.distributed import Ranks
from dino_fast.evaluate.finetuning.class_table import format_class_table, list_classes
from dino_fast.evaluate.finetuning.classifier import Classifier, Plan, Training, count_class_hits
from dino_fast.evaluate.finetuning.recipe import VIT
from dino_fast.evaluate.trained_backbone import load_backbone
from dino_fast.model.backbones import build_backbone
from dino_fast.step.precision import Precision
from pipelines.labeled import CenterCrop, load_labeled_batches
from pipelines.labeled_crops import LabeledCropLoader, LabeledCrops
from pipelines.order import SampleOrder
from shards.__main__ import main as make_shards
from shards.index import ShardIndex
from tests.dino_fast.evaluate.test_linear import CPU

ALONE = Ranks(0, 1, CPU)


class TwoLayers(nn.Module):
    """[N, 3, H, W] → [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 6), nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(0)
        for value in self.parameters():
            nn.init.normal_(value, std=0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)).relu())


def train_two_layers(shards: Path, ranks: Ranks, precision: Precision) -> tuple[Training, list[float], list]:
    """Return the training of four epochs of three steps, the loss of each epoch, and the batches."""
    recipe = replace(VIT, mixup=0.0, cutmix=0.0, rand_augment=0.0, warmup_epochs=1)
    plan = Plan(recipe, 0.5, epochs=4, steps_per_epoch=3, batch=12, seed=2, precision=precision)
    crops = LabeledCrops(32, interpolation=recipe.interpolation)
    with ShardIndex(shards) as index:
        loader = LabeledCropLoader(index, "shards", SampleOrder(40, 12, 2), crops, ranks.device, torch.float32, 1)
        training = Training(Classifier(TwoLayers(), 5, 2, seed=2).to(ranks.device), plan, 0.1, ranks)
        losses = [training.train_epoch(epoch, loader) for epoch in range(4)]
        return training, losses, list(loader.load_batches(range(12)))


def test_a_training_is_adamw_with_layer_decay_on_smoothed_labels(labeled_shards: Path):
    training, losses, batches = train_two_layers(labeled_shards, ALONE, "fp32")
    network = Classifier(TwoLayers(), 5, 2, seed=2)
    scales = {"backbone.first": 0.25, "backbone.second": 0.5, "head": 1}
    groups = [
        {"params": [value], "name": name, "weight_decay": 0.05 if name.endswith("weight") else 0}
        for name, value in network.named_parameters()
    ]
    optimizer, expected = torch.optim.AdamW(groups, lr=0), []
    rates = [0.1 / 3, 0.2 / 3, 0.1, *(0.05 * (1 + math.cos(math.pi * step / 9)) for step in range(9))]
    for batch, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * 12 / 256 * scales[group["name"].rpartition(".")[0]]
        smooth = nn.functional.one_hot(batch.labels, 2) * 0.9 + 0.05
        loss = -(smooth * network(batch.images).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx([sum(expected[at : at + 3]) / 3 for at in range(0, 12, 3)], rel=1e-5)
    for name, value in network.named_parameters():
        torch.testing.assert_close(training.classifier.get_parameter(name), value, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_alike(labeled_shards: Path, precision: Precision):
    _, expected, _ = train_two_layers(labeled_shards, ALONE, "fp32")
    training, losses, _ = train_two_layers(labeled_shards, Ranks(0, 1, torch.device("cuda", 0)), precision)
    assert losses == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 0.05)
    again = Training(Classifier(TwoLayers(), 5, 2, seed=3).cuda(), training._plan, 0.1, training._ranks)
    again.load_state_dict(training.state_dict())
    images = torch.randn(4, 3, 32, 32, device="cuda")
    assert torch.equal(again.classify(images), training.classify(images))


@pytest.fixture
def command(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    """A function that fine-tunes a ResNet-18 for images of 32 pixels; returns exit status and what was printed."""
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    capsys.readouterr()

    def run(*flags: str) -> tuple[int, str, str]:
        data = ["--train", str(labeled_shards), "--val", str(labeled_shards), "--device", "cpu"]
        status = dino_fast(["finetune", "--checkpoint", str(tmp_path / "run"), *data, *flags])
        return status, *capsys.readouterr()

    return run


def test_the_command_trains_scores_and_keeps_each_learning_rate(command, labeled_shards: Path, tmp_path: Path):
    flags = ["--epochs", "2", "--batch", "10", "--lrs", "0.01,0.1", "--output", str(tmp_path / "tuned")]
    flags += ["--json", str(tmp_path / "scores.json")]
    status, printed, _ = command(*flags)
    result = json.loads((tmp_path / "scores.json").read_text())
    assert (status, result["optimizer"], result["precision"], result["mixup"]) == (0, "sgd", "fp32", 0)
    assert (result["train"], result["val"], result["classes"], result["epochs"]) == (40, 40, 2, 2)
    first, second = result["finetune"]
    assert (first["lr"], second["lr"], first["epochs"], first["diverged"]) == (0.01, 0.1, 2, False)
    assert [row["epoch"] for row in first["history"]] == [1, 2]
    assert result["best"]["top1"] == max(first["top1"], second["top1"]) > 90  # dark and bright images
    assert f"best lr = {result['best']['lr']:g}: top-1 {result['best']['top1']:.2f} %" in printed
    assert "class_1" in printed

    assert load_backbone(Path(result["best"]["classifier"]), "teacher").name == "resnet18"
    state = torch.load(result["best"]["classifier"], weights_only=True)["state_dict"]
    network = Classifier(build_backbone("resnet18")[0], 512, 2, seed=1)
    network.load_state_dict(state)
    with ShardIndex(labeled_shards) as index, torch.no_grad():
        [(images, labels)] = load_labeled_batches(index, 64, CenterCrop(37, 32), 1)
        right = network.eval()(images).argmax(1) == labels
    assert result["best"]["top1"] == pytest.approx(100 * right.float().mean().item())
    expected = [100 * right[labels == label].float().mean().item() for label in (0, 1)]
    assert [row["top1"] for row in result["per_class"]] == pytest.approx(expected)

    status, again, _ = command(*flags)  # nothing is left to train
    assert (status, "epoch 2/2" in printed, "epoch 2/2" in again) == (0, True, False)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    status, _, error = command(*flags, "--epochs", "3")
    assert (status, "with other settings (epochs: 2 -> 3)" in error) == (1, True)


def test_a_killed_run_goes_on_to_the_same_bits(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With all that is drawn at random: crops, RandAugment, mixup, CutMix."""
    flags = ["--epochs", "2", "--batch", "10", "--lrs", "0.001,0.002", "--recipe", "vit"]
    trained, epochs = Training.train_epoch, []

    def stop(self: Training, epoch: int, loader: LabeledCropLoader) -> float:
        epochs.append(epoch)
        if len(epochs) in (2, 5):
            raise KeyboardInterrupt
        return trained(self, epoch, loader)

    assert command(*flags, "--output", str(tmp_path / "one"), "--json", str(tmp_path / "one.json"))[0] == 0
    monkeypatch.setattr(Training, "train_epoch", stop)
    killed = [*flags, "--output", str(tmp_path / "two"), "--json", str(tmp_path / "two.json")]
    assert [command(*killed)[0] for _ in range(3)] == [130, 130, 0]
    assert epochs == [0, 1, 1, 0, 1, 1]
    for lr in ("0.001", "0.002"):
        whole, resumed = (
            torch.load(tmp_path / name / f"classifier-lr-{lr}.pt", weights_only=True)["state_dict"]
            for name in ("one", "two")
        )
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    texts = [(tmp_path / f"{name}.json").read_text().replace(str(tmp_path / name), "") for name in ("one", "two")]
    assert texts[0] == texts[1]


def test_what_cannot_be_trained_is_one_line(command, labeled_shards: Path, bright_only: Path, tmp_path: Path):
    unlabeled = tmp_path / "unlabeled"
    images = str(labeled_shards.parent / "images")
    assert make_shards(["pack", images, str(unlabeled), "--workers", "1", "--format", "flat"]) == 0
    output = ["--output", str(tmp_path / "tuned")]
    for flags, words in [
        (["--train", str(bright_only)], "has a single class, class_1, so there is nothing to tell apart"),
        (["--val", str(unlabeled)], "has samples without labels"),
        (["--train", str(unlabeled)], "has samples without labels"),
        (["--batch", "41"], "--batch 41 is more than the images of"),
        (["--limit", "4", "--batch", "5"], "(4). Lower it."),
        (["--backbone", "resnet50"], "says resnet18. Leave the flag out."),
        (["--output", str(labeled_shards)], "holds shards"),
        (["--output", str(tmp_path / "run")], "holds a training run"),
        (
            ["--epochs", "1", "--batch", "10", "--lrs", "1e30"],
            "the loss was not finite at any learning rate. Pass lower ones",
        ),
    ]:
        status, _, error = command(*output, *flags)
        assert (status, words in error, len(error.splitlines())) == (1, True, 1), (flags, error)


def test_hits_of_each_class():
    logits = torch.eye(7)[[0, 1, 1, 3]] * 2 + torch.linspace(0.6, 0, 7)  # the first five classes lead
    logits[2, 5] = torch.nan
    hits = count_class_hits(logits, torch.tensor([0, 1, 1, 4]))
    assert hits.images.tolist() == [1, 2, 0, 0, 1, 0, 0]
    assert hits.first.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert hits.among_five.tolist() == [1, 1, 0, 0, 1, 0, 0]


def test_few_classes_are_all_printed_and_of_many_the_best_and_the_worst():
    rows = list_classes(["a", "b", "c\n"], [4, 0, 2], [3, 0, 0])
    assert [row["top1"] for row in rows] == [75, None, 0]
    assert [line.split()[-1] for line in format_class_table(rows)] == ["a", "b", r"c\n"]
    many = list_classes([f"class{n}" for n in range(30)], [30] * 30, list(range(30)))
    lines = [line.split()[-1] for line in format_class_table(many)]
    assert lines == [
        "classes:", *(f"class{n}" for n in (29, 28, 27, 26, 25)), "classes:", *(f"class{n}" for n in (4, 3, 2, 1, 0)),
    ]  # fmt: skip
