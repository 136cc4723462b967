"""timm's models as backbones: their names, their sizes, and that nothing in them is random or fetched."""

import copy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dino_fast.__main__ import main as dino_fast
from dino_fast.advise.memory import count_half_weights
from dino_fast.config import UsageError, read_recipe
from dino_fast.model import trial
from dino_fast.model.backbones import build_backbone
from dino_fast.model.half_weights import keep_half_weights
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.model.timm_backbones import find_classifiers
from dino_fast.model.trial import check_size, count_positions
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError
from tests.interpreted import kernels

MAXVIT, SWIN = "timm/maxvit_tiny_tf_224", "timm/swin_tiny_patch4_window7_224"


# ---- Names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm/convnext_ato", "Did you mean timm/convnext_atto? timm.list_models() lists all."),
        ("timm/resnet18.a1_in1k", "Did you mean timm/resnet18?"),  # with weights, which are not downloaded
        ("timm/hf-hub:timm/resnet18.a1_in1k", "timm has no model of this name"),
        ("timm/", "timm has no model of this name. timm.list"),
        ("resnet5O", "Did you mean 'resnet50'? The choices are resnet18, "),
        ("nothing", "or timm/NAME for a model of timm."),
    ],
)
@pytest.mark.parametrize("how", ["flag", "file"])
def test_an_unknown_name_is_one_line(tmp_path: Path, name: str, words: str, how: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"backbone: '{name}'\n")
    with pytest.raises(UsageError) as caught:
        read_recipe(["--backbone", name] if how == "flag" else ["--config", str(file)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_is_no_text_is_one_line(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("backbone: [3]\n")
    with pytest.raises(UsageError, match=r"^backbone = \[3\]: expected one of resnet18, .*, or timm/NAME$"):
        read_recipe(["--config", str(tmp_path / "recipe.yaml")])


def test_a_name_of_timm_is_taken_from_flags_and_files(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("backbone: timm/convnext_atto\n")
    assert read_recipe(["--config", str(tmp_path / "recipe.yaml")]).backbone == "timm/convnext_atto"
    assert read_recipe(["--backbone=timm/test_vit"]).backbone == "timm/test_vit"


def test_without_timm_one_line_names_the_extra(train_here, labeled_shards: Path, tmp_path: Path, capsys, monkeypatch):
    assert train_here(tmp_path / "run", "--backbone", "timm/test_resnet", "--max_steps", "1") == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert train_here(tmp_path / "other", "--backbone", "timm/test_resnet") == 2
    shards = str(labeled_shards)
    assert dino_fast(["knn", "--checkpoint", str(tmp_path / "run"), "--train", shards, "--val", shards]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert "the package timm is not installed. Run pip install -e '.[timm]', or" in line
    assert read_recipe([]).backbone == "resnet50"


# ---- Sizes


@pytest.mark.parametrize("size", [(224, 96), (48, 32)])
def test_a_swin_takes_all_sizes_and_a_maxvit_is_refused_with_the_way_out(size: tuple[int, int]):
    for side in size:
        check_size(SWIN, side, "--crops.local_size")
    with pytest.raises(UserError) as caught:
        check_size(MAXVIT, size[1], "--crops.local_size")
    line = str(caught.value)
    assert line.startswith(
        f"--crops.local_size {size[1]}: backbone {MAXVIT} cannot train on images of this size (height ("
    )
    assert "must be divisible by window (7)). Give a size that it takes, or another model: conv" in line
    assert "timm/convnext_atto" in line
    check_size(MAXVIT, 224, "--crops.local_size")


def test_commands_refuse_a_size_in_one_line(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    vit = ("--backbone", "timm/test_vit", "--crops.global_size", "48", "--crops.local_size", "32")
    assert train_here(tmp_path / "run", *vit, "--max_steps", "1") == 0
    capsys.readouterr()
    words = "backbone timm/test_vit cannot train on images of this size (Input height (24) should be divisible by patch"
    shards = str(labeled_shards)
    scores = ("--knn.train", shards, "--knn.val", shards, "--knn.crop", "24")
    for flag, flags in (("--crops.local_size", (*vit, "--crops.local_size", "24")), ("--knn.crop", (*vit, *scores))):
        assert train_here(tmp_path / "other", *flags) == 1
        assert f"dino-fast train: {flag} 24: {words}" in capsys.readouterr().err
    assert dino_fast(["plan", *vit, "--crops.local_size=24", "--images=1000", "--batch_size=8"]) == 1
    assert f"dino-fast plan: --crops.local_size 24: {words}" in capsys.readouterr().err
    sets = ["--train", shards, "--val", shards, "--crop", "24"]
    assert dino_fast(["knn", "--checkpoint", str(tmp_path / "run"), *sets]) == 1
    assert f"--crop 24: {words}" in capsys.readouterr().err


def test_the_smallest_map_of_a_batch_norm_is_counted():
    for side in (32, 33, 96):
        assert count_positions("resnet18", side, "") == (-(-side // 32)) ** 2
        assert count_positions("timm/test_byobnet", side, "") == (-(-side // 32)) ** 2
    assert count_positions("timm/mobilenetv4_conv_small_035", 224, "") == 1  # its last batch norm is after the pooling
    assert count_positions("timm/test_convnext", 224, "") is None
    assert count_positions("vit_tiny_patch16", 224, "") is None


class Odd(nn.Module):
    """A backbone that the trial must refuse: [N, 3, H, W] → [N, 3]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.used, self.idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=kind == "idle")

    def forward(self, x: Tensor) -> Any:
        features = x.mean((2, 3)) * self.used
        if self.kind == "random":
            return nn.functional.dropout(features, 0.5, self.training)
        return {"idle": features, "fine": features, "pair": (features, features), "map": x * features[..., None, None]}[
            self.kind
        ]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("random", "it draws random numbers in training"),
        ("idle", "its features do not depend on idle, which would not be trained"),
        ("pair", "its output is not one vector of features for each image"),
        ("map", "its output is not one vector of features for each image"),
        ("fine", ""),
    ],
)
def test_what_cannot_be_trained_or_resumed_is_refused(monkeypatch, kind: str, words: str):
    monkeypatch.setattr(trial, "build_backbone", lambda name: (Odd(kind), 3))
    if not words:
        assert count_positions(f"odd/{kind}", 32, "--crop") is None
        return
    with pytest.raises(UserError, match=words):
        check_size(f"odd/{kind}", 32, "--crop")


# ---- Models


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("timm/convnext_atto", "timm/test_vit3", "timm/efficientnet_lite0"):
        torch.manual_seed(0)
        one = build_backbone(name)[0].state_dict()
        torch.manual_seed(1)
        other = build_backbone(name)[0].state_dict()
        assert any(not torch.equal(value, other[key]) for key, value in one.items()), "not drawn"


# timm builds the first with dropout, the second with drop path, and the last with dropout that is no module.
@pytest.mark.parametrize("name", ["timm/rexnet_100", "timm/fasternet_t1", "timm/ghostnet_050"])
def test_dropout_and_drop_path_are_off(name: str):
    theirs = timm.create_model(name.removeprefix("timm/"), pretrained=False, num_classes=0)
    rates = [getattr(module, rate, 0) for module in theirs.modules() for rate in ("p", "drop_prob", "drop_rate")]
    assert any(rates)
    network, width = build_backbone(name)
    before, x = torch.get_rng_state(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one, other = (copy.deepcopy(network).train()(x) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape == (2, width)


@pytest.mark.parametrize("name", ["test_vit4", "test_efficientnet", "test_byobnet", "mambaout_femto"])
def test_names_and_features_are_timms(name: str):
    network, width = build_backbone(f"timm/{name}")
    theirs = timm.create_model(name, pretrained=False, num_classes=0)
    theirs.load_state_dict(network.state_dict(), strict=True)
    side = theirs.pretrained_cfg["input_size"][1]
    x = torch.randn(1, 3, side, side)
    features = network.eval()(x)
    assert features.shape == (1, width)
    torch.testing.assert_close(features, theirs.eval()(x))


def test_classifiers_are_known_by_timms_names():
    assert find_classifiers(build_backbone("timm/test_convnext")[0]) == ("head.fc",)
    assert find_classifiers(timm.create_model("deit_tiny_distilled_patch16_224")) == ("head", "head_dist")
    assert find_classifiers(build_backbone("resnet18")[0]) is None


# One has layers that are derived from nn.Conv2d, and pad or standardize first: those keep their float32 weights alone.
@pytest.mark.parametrize("name", ["timm/test_vit2", "timm/test_nfnet", "timm/test_convnext"])
def test_half_weights_compute_what_autocast_computes(name: str):
    torch.manual_seed(0)
    plain, _ = build_backbone(name)
    keeping, x = copy.deepcopy(plain), torch.randn(2, 3, 64, 64)
    expected = count_half_weights(keeping)
    halves = keep_half_weights(keeping, torch.bfloat16)
    assert halves
    assert sum(half.nbytes for half in halves.values()) == expected
    grads = []
    for network in (plain, keeping):
        with torch.autocast("cpu", torch.bfloat16):
            out = network(x)
        out.float().square().sum().backward()
        grads.append([out.detach(), *(weight.grad for weight in network.parameters() if weight.grad is not None)])
    assert len(grads[0]) == len(grads[1])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [pytest.param("timm/test_convnext", marks=pytest.mark.slow), "timm/test_efficientnet"])
def test_a_step_by_kernels_is_the_one_by_torch(monkeypatch, name: str):
    if torch.cuda.is_available():
        pytest.skip("its tensors are on the CPU, where compiled kernels do not work")
    kernels("dino_fast.step.kernels.dino_loss")
    update = kernels("dino_fast.step.kernels.update")
    for block in ("BLOCK", "CHUNK"):  # interpreted, kernels are slow by the block: a few large ones do
        monkeypatch.setattr(update, block, update.tl.constexpr(1 << 16))
    hyper = Hyper(lr=0.01, weight_decay=1e-2, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
    globals_, locals_ = (torch.randn(n, 3, side, side) for n, side in ((8, 48), (8, 32)))
    states = []
    for by_kernels in (False, True):
        torch.manual_seed(0)
        student, teacher = build_student_teacher(name, HeadRecipe(out_dim=64, hidden_dim=32, bottleneck_dim=16))
        optimizer = build_optimizer(OptimRecipe(), student)
        step = TrainStep(student, teacher, optimizer, LossRecipe(), 3.0, kernels=by_kernels)
        for _ in range(2):
            output = step(globals_, locals_, hyper)
        states.append([output.loss, output.grad_norm, *student.state_dict().values(), *teacher.state_dict().values()])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
