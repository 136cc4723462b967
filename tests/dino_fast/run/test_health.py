"""Collapse: the probe against numpy, that it leaves a run alone, and trainings that collapse and are told on."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from dino_fast.config import Recipe, list_settings
from dino_fast.model import sync_batchnorm
from dino_fast.model.half_weights import keep_half_weights
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run import health
from dino_fast.run.health import (
    CONTINUE,
    PATIENCE,
    REMEDIES,
    CollapseAlarms,
    Probe,
    measure_targets,
    probe,
    rank_me,
    unit_std,
)
from dino_fast.step.compiled import compile_backbones
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.precision import Precision
from dino_fast.step.train_step import TrainStep
from tests.dino_fast.test_train import rows_of

K = 64
BATCH = 8
HYPER = Hyper(lr=0.05, weight_decay=1e-4, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)


def _step(
    precision: Precision = "fp32",
    dtype: torch.dtype = torch.float32,
    center_momentum: float = 0.9,
    backbone: str = "resnet18",
    **head: Any,
) -> TrainStep:
    torch.manual_seed(0)
    recipe = HeadRecipe(**{"out_dim": K, "hidden_dim": 64, "bottleneck_dim": 32, **head})
    student, teacher = (network.to(dtype) for network in build_student_teacher(backbone, recipe))
    optimizer = build_optimizer(OptimRecipe(), student)
    return TrainStep(student, teacher, optimizer, LossRecipe(center_momentum=center_momentum), 3.0, precision)


def _batches() -> Iterator[Tensor]:
    """Two shifted views, with noise, of each of some random smooth images: [2·B, 3, 32, 32], without end."""
    r = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(128, 3, 6, 6, generator=r), size=(40, 40), mode="bicubic")
    while True:
        some = images[torch.randperm(len(images), generator=r)[:BATCH]]
        views = []
        for _ in range(2):
            top, left = torch.randint(8, (2,), generator=r).tolist()
            view = some[:, :, top : top + 32, left : left + 32]
            views.append(view + 0.3 * torch.randn(view.shape, generator=r))
        yield torch.cat(views).contiguous(memory_format=torch.channels_last)


# ---- Figures --------------------------------------------------------------------------------------------------------


def _with_spectrum(values: np.ndarray, rows: int, columns: int) -> Tensor:
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(columns, len(values))))
    return torch.from_numpy(left * values @ right.T)


@pytest.mark.parametrize("shape", [(24, 50), (50, 24)])
@pytest.mark.parametrize("values", [np.ones(1), np.full(12, 3.0), 0.5 ** np.arange(20), np.array([1e3, 1.0, 1e-3])])
def test_rank_is_exp_of_the_entropy_of_the_singular_values(values: np.ndarray, shape: tuple[int, int]) -> None:
    features = _with_spectrum(values, *shape)
    share = values / values.sum()
    expected = math.exp(-(share * np.log(share)).sum())
    assert rank_me(features).item() == pytest.approx(expected, rel=1e-5)
    assert rank_me(features.float()).item() == pytest.approx(expected, rel=1e-4)
    assert rank_me(features).dtype == torch.float64
    assert rank_me(features.float()).dtype == torch.float32


def test_rank_of_what_is_no_number_is_none() -> None:
    for bad in (math.nan, math.inf):
        features = torch.randn(6, 9)
        features[2, 3] = bad
        assert rank_me(features).isnan()
    assert rank_me(torch.zeros(6, 9)).isnan()


def test_std_is_that_of_features_at_length_one() -> None:
    features = torch.randn(30, 7, dtype=torch.float64).exp()
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    assert unit_std(features).item() == pytest.approx(unit.std(axis=0).mean() * math.sqrt(7), rel=1e-12)
    everywhere = torch.cat([torch.eye(5), -3 * torch.eye(5)])
    assert unit_std(everywhere).item() == pytest.approx(1.0)
    same = torch.arange(1.0, 6).expand(4, 5) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert unit_std(same).item() == pytest.approx(0.0, abs=1e-6)


def test_targets_of_known_spread() -> None:
    center = torch.zeros(1, K)
    kl, entropy = measure_targets(torch.zeros(10, K), center, 0.04)
    assert kl.item() == pytest.approx(0, abs=1e-5)
    assert entropy.item() == pytest.approx(math.log(K))
    for used in (1, 2, 8):  # prototypes, by 16 images alike
        sharp = 100 * F.one_hot(torch.arange(16) % used, K).float()
        kl, entropy = measure_targets(sharp, center, 0.04)
        assert kl.item() == pytest.approx(math.log(K / used), rel=1e-5)
        assert entropy.item() == 0
        kl, entropy = measure_targets(sharp, sharp[:1], 0.04)  # the center makes what all have in common even
        assert kl.item() == pytest.approx(0, abs=1e-5) if used == 1 else kl.item() > 1


def _numpys(features: Tensor, logits: Tensor, center: Tensor, temperature: float) -> list[float]:
    z = (logits.numpy() - center.numpy()) / temperature
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    singular = np.linalg.svd(features.numpy(), compute_uv=False)
    share = singular / singular.sum()
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    return [
        math.log(logits.shape[1]) + (mean * np.log(mean)).sum(), -(p * np.log(p)).sum(axis=1).mean(),
        math.exp(-(share * np.log(share)).sum()), unit.std(axis=0).mean() * math.sqrt(features.shape[1]),
        np.linalg.norm(center.numpy()),
    ]  # fmt: skip


@pytest.mark.parametrize("most", [5, 128])
def test_a_probe_is_of_the_teacher_by_running_statistics_over_the_first_view(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "IMAGES", most)
    step, batches = _step(dtype=torch.float64, batch_norm=True), (batch.double() for batch in _batches())
    for _ in range(2):
        step(next(batches), None, HYPER)
    globals_ = next(batches)
    twin = copy.deepcopy(step.teacher).eval()
    first = globals_[: min(most, BATCH)]
    expected = _numpys(twin.backbone(first), twin([first]), step.center, 0.05)
    assert [figure.item() for figure in probe(step, globals_, 0.05)] == pytest.approx(expected, rel=1e-6)


def test_a_probe_of_a_vision_transformer_is_of_its_cls_token() -> None:
    step, batches = _step(dtype=torch.float64, backbone="vit_tiny_patch16"), _batches()
    step(next(batches).double(), None, HYPER)
    globals_ = next(batches).double()
    first = globals_[:BATCH]
    [tokens] = step.teacher.backbone.last_tokens(first, 1)
    expected = _numpys(tokens[:, 0], step.teacher([first]), step.center, 0.05)
    assert [figure.item() for figure in probe(step, globals_, 0.05)] == pytest.approx(expected, rel=1e-6)


def test_figures_are_scalars_that_the_host_did_not_wait_for() -> None:
    step, globals_ = _step(), next(_batches())
    with _Reads() as reads:
        found = probe(step, globals_, 0.04)
        assert reads.count == 0
        assert found.feature_rank.item() >= 1
        assert reads.count == 1
    assert all(figure.shape == () and not figure.requires_grad for figure in found)


class _Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# ---- What a probe leaves alone --------------------------------------------------------------------------------------


def _everything(step: TrainStep) -> dict[str, Any]:
    networks = step.bare_student, step.teacher
    return {
        "state": copy.deepcopy(step.state_dict()),
        "buffers": [buffer.clone() for network in networks for buffer in network.buffers()],  # half weights too
        "gradients": [None if p.grad is None else p.grad.clone() for n in networks for p in n.parameters()],
        "needed": [p.requires_grad for network in networks for p in network.parameters()],
        "modes": [module.training for network in networks for module in network.modules()],
        "random": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))  # NaN equals NaN
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_probe_changes_nothing_and_the_run_goes_on_bit_for_bit(precision: Precision) -> None:
    step, other = (_step(precision, batch_norm=True) for _ in range(2))
    batches = _batches()
    for one in (step, other):
        one.teacher.backbone.layer1.eval()  # not all modules need be in one mode
        one(first := next(_batches()), None, HYPER)
    before = _everything(step)
    found = probe(step, first, 0.04)
    assert all(figure.isfinite() for figure in found)
    assert _equal(_everything(step), before)
    assert any(gradient is not None for gradient in before["gradients"])
    assert len(set(before["modes"])) == 2
    for one, batch in ((step, second := next(batches)), (other, second)):
        one(batch, None, HYPER)
    assert _equal(_everything(step), _everything(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_those_in_use(dtype: torch.dtype) -> None:
    step = _step("bf16" if dtype == torch.bfloat16 else "fp16")
    globals_ = next(_batches()).to(dtype)
    expected = probe(step, globals_, 0.04)
    copies = keep_half_weights(step.teacher, dtype)
    assert torch.equal(torch.stack(probe(step, globals_, 0.04)), torch.stack(expected))
    for half in copies.values():
        half.zero_()
    found = probe(step, globals_, 0.04)
    assert found.feature_std == 0
    assert found.feature_std < expected.feature_std


@pytest.mark.slow
def test_compiled_backbones_are_not_compiled_again() -> None:
    plain, step = _step(), _step()
    compile_backbones(step, backend="aot_eager")
    batches = _batches()
    graphs = []
    for globals_ in (next(batches), next(batches)):
        plain(globals_, None, HYPER)
        step(globals_, None, HYPER)
        graphs.append(counters["stats"]["unique_graphs"])
        for images in (globals_, globals_[:6]):  # of a batch of another size too
            found, expected = probe(step, images, 0.04), probe(plain, images, 0.04)
            graphs.append(counters["stats"]["unique_graphs"])
            torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-2, atol=1e-2)
    assert graphs == [2] * 6  # the student's and the teacher's


def test_ranks_do_not_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    step, globals_ = _step(batch_norm=True), next(_batches())
    expected = probe(step, globals_, 0.04)
    monkeypatch.setattr(sync_batchnorm, "world_size", lambda: 2)  # whom there is no way to reach
    with pytest.raises((ValueError, RuntimeError), match="process group"):
        step.teacher([globals_])
    assert torch.equal(torch.stack(probe(step, globals_, 0.04)), torch.stack(expected))


def test_modes_come_back_after_an_error() -> None:
    step = _step()
    with pytest.raises(RuntimeError):
        probe(step, torch.zeros(4, 5, 32, 32), 0.04)
    assert all(module.training for module in step.teacher.modules())


# ---- CollapseAlarms ------------------------------------------------------------------------------------------------

EVEN = math.log(K)
WELL = {
    "loss": 2.0, "teacher_entropy": 1.0, "target_kl": 2.5, "feature_rank": 20.0, "feature_std": 0.4, "center_norm": 1.0,
}  # fmt: skip
ILL = {
    "uniform collapse": {"loss": EVEN, "teacher_entropy": EVEN - 1e-3, "target_kl": 1e-3},
    "one-point collapse": {"loss": 0.01, "teacher_entropy": 1e-3, "target_kl": EVEN - 1e-3},
    "dimensional collapse": {"feature_rank": 1.2},
    "growing center": {"center_norm": 9.0},
}


def _lines(alarms: CollapseAlarms, *rows: dict[str, Any], step: int = 1000, epoch: int = 3) -> list[str]:
    return [line for row in rows for line in alarms.check({"step": step, "epoch": epoch, **WELL, **row})]


@pytest.mark.parametrize("kind", REMEDIES)
def test_an_alarm_needs_a_few_logs_and_comes_once_until_it_is_over(kind: str) -> None:
    alarms = CollapseAlarms(K)
    assert _lines(alarms, *[ILL[kind]] * (PATIENCE - 1)) == []
    (line,) = _lines(alarms, ILL[kind])
    assert line.startswith(f"{kind} at step 1000: ")
    assert line.endswith(f". {REMEDIES[kind]}. {CONTINUE}")
    assert "\n" not in line
    assert _lines(alarms, *[ILL[kind]] * 20) == []
    assert _lines(alarms, {}) == []  # over
    assert _lines(alarms, *[ILL[kind]] * (PATIENCE - 1)) == []
    assert _lines(alarms, {}, *[ILL[kind]] * (PATIENCE - 1)) == []  # it has to be in a row
    assert len(_lines(alarms, ILL[kind])) == 1


@pytest.mark.parametrize(
    ("ill", "hardly", "well"),
    [
        ({"teacher_entropy": EVEN - 0.04, "loss": EVEN + 0.04}, {"loss": EVEN - 0.09}, {"loss": EVEN - 0.11}),
        ({"teacher_entropy": 0.09, "target_kl": EVEN - 0.09}, {"teacher_entropy": 0.19}, {"teacher_entropy": 0.21}),
        ({"feature_rank": 1.9}, {"feature_rank": 3.9}, {"feature_rank": 4.1}),
        ({"feature_std": 0.019}, {"feature_std": 0.039}, {"feature_std": 0.041}),
        ({"center_norm": 8.1}, {"center_norm": 4.1}, {"center_norm": 3.9}),
    ],
)
def test_it_is_over_at_twice_the_limit(ill: dict[str, float], hardly: dict[str, float], well: dict[str, float]) -> None:
    alarms = CollapseAlarms(K)
    assert _lines(alarms, *[ill | hardly] * 20) == []  # not within it
    assert len(_lines(alarms, *[ill] * PATIENCE)) == 1
    assert _lines(alarms, ill | hardly, *[ill] * PATIENCE) == []
    assert len(_lines(alarms, ill | well, *[ill] * PATIENCE)) == 1


def test_one_sign_of_two_is_not_enough() -> None:
    signs = {"teacher_entropy": EVEN}, {"loss": EVEN}, {"teacher_entropy": 0.0}, {"target_kl": EVEN}
    for sign in signs:
        assert _lines(CollapseAlarms(K), *[sign] * 20) == []


def test_the_beginning_is_not_judged() -> None:
    alarms, ill = CollapseAlarms(K), ILL["uniform collapse"]
    assert _lines(alarms, *[ill] * 20, step=5000, epoch=0) == []  # of a large set
    assert _lines(alarms, *[ill] * 20, step=199, epoch=30) == []  # of a small one
    assert len(_lines(alarms, *[ill] * PATIENCE, step=200, epoch=1)) == 1


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_is_missing_changes_nothing(nothing: float | None) -> None:
    for kind, ill in ILL.items():
        alarms = CollapseAlarms(K)
        without = dict.fromkeys(WELL, nothing)
        rows = [row for _ in range(PATIENCE) for row in (without, ill, {**ill, "teacher_entropy": nothing})]
        other = kind in ("dimensional collapse", "growing center")  # do not ask for the entropy
        assert len(_lines(alarms, *rows[: 3 * (PATIENCE if not other else 2)])) == (0 if other else 1)
        assert len(_lines(alarms, *rows)) == (1 if other else 0)
    assert CollapseAlarms(K).check({}) == []


def test_few_images_say_nothing_of_spread() -> None:
    alarms = CollapseAlarms(K, images=4)
    assert _lines(alarms, *[ILL["one-point collapse"] | {"feature_rank": 1.0, "feature_std": 0.0}] * 20) == []
    assert len(_lines(alarms, *[ILL["uniform collapse"]] * 20)) == 1


def test_remedies_name_settings_that_there_are() -> None:
    settings = list_settings(Recipe)
    for remedy in (*REMEDIES.values(), CONTINUE):
        flags = re.findall(r"--([\w.]+\w)", remedy)
        assert flags
        assert [flag for flag in flags if flag not in settings] == []


# ---- Trainings ------------------------------------------------------------------------------------------------------


def _train(step: TrainStep, hyper: Hyper, steps: int) -> tuple[list[str], Probe]:
    """Train, log every step, judge after the fifth; the kinds of alarms in order, and the last probe."""
    alarms = CollapseAlarms(step.center.numel(), BATCH, beginning_epochs=0, beginning_steps=5)
    lines = []
    for number, globals_ in zip(range(steps), _batches(), strict=False):
        out = step(globals_, None, hyper)
        found = probe(step, globals_, hyper.teacher_temp)
        figures = {name: figure.item() for name, figure in found._asdict().items()}
        row = {"loss": out.loss.item(), "teacher_entropy": out.teacher_entropy.item(), **figures}
        lines += alarms.check({"step": number, "epoch": 0, **row})
    return [line.split(" at step")[0] for line in lines], found


@pytest.mark.slow
def test_a_hot_teacher_collapses_to_even_targets() -> None:
    kinds, last = _train(_step(), replace(HYPER, teacher_temp=0.5, momentum=0.7), 28)
    assert kinds == ["uniform collapse"]
    assert last.target_kl < 0.02


@pytest.mark.slow
def test_without_a_center_all_targets_become_one_prototype() -> None:
    kinds, last = _train(_step(center_momentum=1.0), replace(HYPER, teacher_temp=0.02), 15)
    assert kinds == ["one-point collapse"]
    assert last.target_kl > EVEN - 0.01


def test_an_enormous_rate_makes_all_features_one() -> None:
    kinds, _ = _train(_step("bf16"), replace(HYPER, lr=50.0), 12)
    assert "dimensional collapse" in kinds


@pytest.mark.slow
def test_lengths_that_are_learned_too_fast_make_the_center_grow() -> None:
    kinds, last = _train(_step(norm_last_layer=False), replace(HYPER, lr=50.0), 20)
    assert "growing center" in kinds
    assert last.center_norm > math.sqrt(K)


def test_a_run_that_learns_gives_no_alarm() -> None:
    hyper = replace(HYPER, lr=5e-3, teacher_temp=0.06)
    kinds, last = _train(_step(batch_norm=True), hyper, 30)
    assert kinds == []
    assert last.feature_std > 0.1


def test_a_run_says_its_alarms(train_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A teacher whose targets are nearly even, from the first log on."""
    monkeypatch.setattr(CollapseAlarms.__init__, "__kwdefaults__", {"beginning_epochs": 0, "beginning_steps": 0})
    warm = ("--loss.student_temp", "100", "--loss.teacher_temp", "99", "--loss.warmup_teacher_temp", "99")
    assert train_here(tmp_path / "run", *warm, "--max_steps", str(PATIENCE + 2)) == 0
    said = capsys.readouterr().out
    assert said.count("uniform collapse at step") == 1
    assert f"uniform collapse at step {PATIENCE - 1}: " in said
    assert set(Probe._fields) <= rows_of(tmp_path / "run")[0].keys()
