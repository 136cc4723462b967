"""The training step: grouping of crops, precisions, resuming, and two ranks against one.

Run as a program, this file is one of two ranks: `test_step.py RANK FOLDER`.
"""

import copy
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dino_fast.distributed import Ranks
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import MultiCropModel, build_student_teacher
from dino_fast.run.resume import find_non_finite_state
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe, compute_objective
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.precision import Precision
from dino_fast.step.train_step import TrainStep, split_batch
from dino_fast.step.update import INTERVAL, LossScale, TorchUpdate

HEAD = HeadRecipe(out_dim=64, hidden_dim=32, bottleneck_dim=16, batch_norm=True)
HYPER = Hyper(lr=0.05, weight_decay=1e-2, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
BATCH = 4


def _networks(dtype: torch.dtype = torch.float32) -> tuple[MultiCropModel, MultiCropModel]:
    torch.manual_seed(0)
    student, teacher = build_student_teacher("resnet18", HEAD)
    return student.to(dtype), teacher.to(dtype)


def _step(precision: Precision = "fp32", dtype: torch.dtype = torch.float32, name: Any = "sgd") -> TrainStep:
    student, teacher = _networks(dtype)
    optimizer = build_optimizer(OptimRecipe(name=name), student)
    return TrainStep(student, teacher, optimizer, LossRecipe(), 3.0, precision)


def _crops(seed: int, dtype: torch.dtype = torch.float32, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """[2, B, 3, 48, 48] and [3, B, 3, 32, 32]: views apart, so that a rank can take its images of each."""
    r = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, batch, 3, 48, 48, dtype=dtype, generator=r),
        torch.randn(3, batch, 3, 32, 32, dtype=dtype, generator=r),
    )


def _flat(crops: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    globals_, locals_ = (c.flatten(0, 1).contiguous(memory_format=torch.channels_last) for c in crops)
    return globals_, locals_


def test_each_resolution_is_one_batch_and_the_head_sees_them_all() -> None:
    model, _ = _networks(torch.float64)
    twin = copy.deepcopy(model)
    globals_, locals_ = _flat(_crops(0, torch.float64))
    out = model([globals_, locals_])
    expected = twin.head(torch.cat([twin.backbone(globals_), twin.backbone(locals_)]))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert model.state_dict()["backbone.bn1.num_batches_tracked"] == 2
    assert model.state_dict()["head.mlp.1.num_batches_tracked"] == 1


def test_neighbors_of_one_resolution_are_joined() -> None:
    model, _ = _networks(torch.float64)
    twin = copy.deepcopy(model)
    globals_, _ = _flat(_crops(0, torch.float64))
    torch.testing.assert_close(model(list(globals_.chunk(2))), twin([globals_]), rtol=1e-12, atol=1e-14)


def test_the_teacher_is_a_copy_without_gradients_in_train_mode() -> None:
    student, teacher = _networks()
    torch.testing.assert_close(teacher.state_dict(), student.state_dict(), rtol=0, atol=0)
    assert teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["head.last_layer.weight_g"]
    conv = student.get_parameter("backbone.conv1.weight")
    assert conv.is_contiguous(memory_format=torch.channels_last)


def test_without_local_crops() -> None:
    step = _step()
    globals_, _ = _flat(_crops(0))
    out = step(globals_, None, HYPER)
    assert out.loss.isfinite()
    assert step.student.state_dict()["backbone.bn1.num_batches_tracked"] == 1


def test_a_frozen_last_layer_does_not_move_and_the_rest_does() -> None:
    step = _step()
    before = copy.deepcopy(step.student.state_dict())
    step(*_flat(_crops(0)), Hyper(0.1, 0.1, 0.9, 0.04, freeze_last_layer=True))
    after = step.student.state_dict()
    assert torch.equal(before["head.last_layer.weight_v"], after["head.last_layer.weight_v"])
    assert not torch.equal(before["head.mlp.0.weight"], after["head.mlp.0.weight"])


def test_the_loss_is_of_the_center_before_the_step() -> None:
    step, other = _step(dtype=torch.float64), _step(dtype=torch.float64)
    nn.init.normal_(other.center)
    crops = _flat(_crops(0, torch.float64))
    losses = [s(*crops, HYPER).loss.item() for s in (step, other)]
    assert losses[0] != losses[1]
    teacher_mean = _networks(torch.float64)[1]([crops[0]]).mean(0, keepdim=True)
    torch.testing.assert_close(step.center, 0.1 * teacher_mean, rtol=1e-12, atol=1e-14)


class _Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("precision", "name"), [("fp32", "sgd"), ("bf16", "lars")])
def test_the_host_reads_nothing_but_whether_gradients_are_finite(precision: Precision, name: str) -> None:
    step = _step(precision, name=name)
    with _Reads() as reads:
        out = step(*_flat(_crops(0)), HYPER)
        assert reads.count == 1  # none with kernels: see the gpu tests
        out.loss.item()
        assert reads.count == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing_that_lasts(precision: Precision) -> None:
    step = _scaled_to_fit(precision) if precision == "fp16" else _step(precision)
    step(*_flat(_crops(0, batch=2)), HYPER)
    before = copy.deepcopy(step.state_dict())
    globals_, locals_ = _flat(_crops(1, batch=2))
    globals_[0, 0, 0, 0] = torch.nan
    out = step(globals_, locals_, HYPER)
    assert out.skipped.item() == 1
    after = step.state_dict()
    for name in ("student", "teacher"):
        for key, expected in before[name].items():
            if "running" not in key and "tracked" not in key:
                if name == "student":
                    assert torch.equal(after[name][key], expected), key
                else:
                    assert after[name][key].isfinite().all(), key
    assert torch.equal(after["center"], before["center"])
    torch.testing.assert_close(after["optimizer"], before["optimizer"], rtol=0, atol=0)
    out = step(*_flat(_crops(2, batch=2)), HYPER)
    assert out.skipped.item() == 0
    assert out.loss.isfinite()


def test_the_norms_are_those_of_the_parameters_in_their_order() -> None:
    step = _step()
    out = step(*_flat(_crops(0)), HYPER)
    clipped = [0.0 if p.grad is None else p.grad.norm().item() for p in step.bare_student.parameters()]
    assert out.grad_norms.max() > 3 > min(clipped) == 0
    # float32 norms of millions of values are themselves 4e-5 off.
    assert out.grad_norms.clamp(max=3).tolist() == pytest.approx(clipped, rel=1e-4)
    assert out.grad_norm.item() == pytest.approx(out.grad_norms.norm().item())


def test_the_clock_tells_the_parts_of_the_last_step() -> None:
    step = _step()
    for _ in range(2):
        step(*_flat(_crops(0)), HYPER)
    parts = step.clock.read()
    assert list(parts) == ["forward", "backward", "update"]
    assert all(milliseconds > 0 for milliseconds in parts.values())


# What rounding to 8 and 11 bits costs in 18 layers whose batch norms see as few as 12 values: the measured
# differences are at most 2 % and 0.2 % of the loss, 0.13 and 0.02 nats of entropy.
@pytest.mark.parametrize(
    ("precision", "loss", "entropy"),
    [("bf16", 4e-2, 0.25), pytest.param("fp16", 5e-3, 0.04, marks=pytest.mark.slow)],  # CPUs emulate fp16
)
def test_lower_precision_stays_close_to_float32(precision: Precision, loss: float, entropy: float) -> None:
    exact, rounded = _step(), _scaled_to_fit(precision)
    still = replace(HYPER, lr=0.0)  # the weights stay, so that differences do not feed on themselves
    for t in range(2):
        crops = _flat(_crops(t))
        expected, out = exact(*crops, still), rounded(*crops, still)
        assert out.loss.dtype == torch.float32
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=loss)
        assert out.teacher_entropy.item() == pytest.approx(expected.teacher_entropy.item(), abs=entropy)
        assert out.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=0.1)


def _scaled_to_fit(precision: Precision, **options: Any) -> TrainStep:
    """A step whose first loss scale fits these gradients, hundreds in norm; the scaler's own is 65536."""
    step = _step(precision, **options)
    if precision == "fp16":
        step.loss_scale = LossScale(torch.device("cpu"), 1024.0)
    return step


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_master_weights_stay_float32_and_move(precision: Precision) -> None:
    step = _scaled_to_fit(precision)
    before = copy.deepcopy(step.student.state_dict())
    for t in range(2):
        step(*_flat(_crops(t, batch=2)), HYPER)
    for name, tensor in step.student.named_parameters():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
        assert torch.equal(tensor, before[name]) == (name == "head.last_layer.weight_g")


@pytest.mark.slow  # a CPU emulates float16
def test_an_overflowing_float16_step_moves_no_weight_and_halves_the_scale() -> None:
    step = _step("fp16")
    before = [p.detach().clone() for p in step.student.parameters()]
    out = step(*_flat(_crops(0)), HYPER)
    assert not out.grad_norm.isfinite()
    assert step.loss_scale is not None
    assert step.loss_scale.scale == 2**15
    assert all(torch.equal(a, b) for a, b in zip(step.student.parameters(), before, strict=True))


def test_a_loss_scale_is_a_grad_scalers_and_reads_its_state() -> None:
    cpu = torch.device("cpu")
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=INTERVAL)
    theirs.scale(torch.zeros(()))  # makes its state
    theirs.load_state_dict({**theirs.state_dict(), "_growth_tracker": INTERVAL - 2})
    ours = LossScale(cpu)
    ours.load_state_dict(theirs.state_dict())
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for overflowed in (False, False, False, True, True, False):
        parameter.grad = torch.tensor(torch.inf if overflowed else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(overflowed))
        state = ours.state_dict()
        assert state["scale"] == theirs.state_dict()["scale"]
        assert state["_growth_tracker"] == theirs.state_dict()["_growth_tracker"]


def test_the_loss_scale_stays_a_number() -> None:
    scale = LossScale(torch.device("cpu"), 2.0**125)
    for overflowed, expected in ((False, 2.0**126), (False, 2.0**126), (True, 2.0**125)):
        scale._good.fill_(INTERVAL - 1)
        scale.update(torch.tensor(overflowed))
        assert scale.state_dict()["scale"] == expected


def test_a_state_without_a_loss_scale_begins_a_new_one() -> None:
    """As after a change of precision, to whose last checkpoint a run goes back because the scale has collapsed."""
    step = _step("fp16")
    for _ in range(30):
        step.loss_scale.update(torch.tensor(True))
    step.load_state_dict(_step("bf16").state_dict())
    state = step.state_dict()["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (65536, 0)


FP16_SGD = pytest.param("fp16", "sgd", marks=pytest.mark.slow)


@pytest.mark.parametrize(("precision", "name"), [("fp32", "adamw"), FP16_SGD, ("bf16", "lars")])
def test_a_restored_step_goes_on_bit_for_bit(precision: Precision, name: str, tmp_path: Path) -> None:
    step = _scaled_to_fit(precision, name=name)
    step(*_flat(_crops(0, batch=2)), HYPER)
    torch.save(step.state_dict(), tmp_path / "state.pt")
    restored = _step(precision, name=name)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for s in (step, restored):
        assert s(*_flat(_crops(1, batch=2)), HYPER).skipped == 0
    torch.testing.assert_close(restored.state_dict(), step.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_channels_last_is_held_at_every_stage(precision: Precision) -> None:
    step = _step(precision)
    seen: list[tuple[str, bool]] = []

    def look(name: str) -> Any:
        def forward(module: nn.Module, inputs: Any, out: Tensor) -> None:
            seen.append((name, out.is_contiguous(memory_format=torch.channels_last)))
            if out.requires_grad:
                out.register_hook(lambda grad: seen.append((f"{name} backward", _channels_last(grad))))

        return forward

    for network, which in ((step.bare_student, "student"), (step.teacher, "teacher")):
        for stage in ("relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            network.backbone.get_submodule(stage).register_forward_hook(look(f"{which} {stage}"))
    step(*_flat(_crops(0)), HYPER)
    assert len(seen) == 6 * (2 + 1 + 2)
    assert [name for name, held in seen if not held] == []
    for name, p in step.bare_student.named_parameters():
        assert p.ndim != 4 or (_channels_last(p) and _channels_last(p.grad)), name


def _channels_last(x: Tensor | None) -> bool:
    return x is not None and x.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_in_parts_has_the_loss_center_and_gradients_of_all_of_it() -> None:
    step, twin = _step(dtype=torch.float64), _step(dtype=torch.float64)
    step.accumulate = 2
    globals_, locals_ = _crops(0, torch.float64)
    out = step(*_flat((globals_, locals_)), HYPER)
    twin.optimizer.zero_grad()
    found = []
    for mine in (slice(0, 2), slice(2, 4)):  # batch norms see a part
        part = _flat((globals_[:, mine], locals_[:, mine]))
        with torch.no_grad():
            teacher_logits = twin.teacher([part[0]])
        found.append(compute_objective(twin.student([*part]), teacher_logits, twin.center, 0.1, HYPER.teacher_temp, 5))
    loss = (found[0].loss + found[1].loss) / 2
    loss.backward()
    TorchUpdate(twin.optimizer, twin.bare_student, twin.teacher, 3.0, [])(HYPER, None)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.teacher_entropy, (found[0].teacher_entropy + found[1].teacher_entropy) / 2)
    torch.testing.assert_close(step.center, 0.05 * (found[0].teacher_mean + found[1].teacher_mean))
    torch.testing.assert_close(step.student.state_dict(), twin.student.state_dict(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step.teacher.state_dict(), twin.teacher.state_dict(), rtol=1e-9, atol=1e-12)


def test_parts_keep_layout_views_and_images() -> None:
    globals_, locals_ = _crops(1)
    count = len(globals_) + len(locals_)
    scales = torch.arange(3 * count * globals_.shape[1]).view(3, -1)
    parts = split_batch(*_flat((globals_, locals_)), scales, 4)
    assert len(parts) == 4
    for number, part in enumerate(parts):
        assert part.scales is not None
        assert torch.equal(part.scales, scales.view(3, count, 4, -1)[:, :, number].flatten(1))
        for views, expected in zip(part[:2], (globals_, locals_), strict=True):
            assert views is not None
            torch.testing.assert_close(views, expected[:, number], rtol=0, atol=0)
            assert _channels_last(views)
    with pytest.raises(ValueError, match="4 images cannot be split into 3 equal parts"):
        split_batch(*_flat((globals_, locals_)), None, 3)


ALONE = Ranks(0, 1, torch.device("cpu"))


def test_what_is_no_number_any_more_is_found_before_it_is_saved() -> None:
    for name in (
        "center",
        "student.backbone.bn1.running_mean",
        "teacher.head.mlp.0.bias",
        "student.backbone.conv1.weight",
    ):
        step = _step()
        assert find_non_finite_state(3, step, ALONE) == ""
        network, _, tensor = name.partition(".")
        held = step.center if not tensor else getattr(step, network).state_dict()[tensor]
        held[(0,) * held.dim()] = torch.nan
        assert "after step 3 are not finite" in find_non_finite_state(3, step, ALONE), name


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student, teacher = _networks(torch.float64)
    # Two batch-norm forwards a backward forbid broadcasting the buffers; torch 2.15 renames the setting.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keep_buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(student, gradient_as_bucket_view=True, **keep_buffers)
    optimizer = build_optimizer(OptimRecipe(), wrapped)
    step = TrainStep(wrapped, teacher, optimizer, LossRecipe(), 3.0)
    mine = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    losses = []
    for t in range(4):
        step.accumulate = 2 if t == 3 else 1
        globals_, locals_ = _crops(t, torch.float64)
        hyper = Hyper(0.05, 1e-2, 0.9, 0.05, freeze_last_layer=t == 1)
        losses.append(step(*_flat((globals_[:, mine], locals_[:, mine])), hyper).loss)
    torch.save({"losses": torch.stack(losses), "state": step.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one_with_their_batches_together(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        step = _step(dtype=torch.float64)
        losses = []
        for t in range(4):
            globals_, locals_ = _crops(t, torch.float64)
            if t == 3:  # in two parts, of which each rank has one image
                step.accumulate = 2
                globals_, locals_ = globals_[:, [0, 2, 1, 3]], locals_[:, [0, 2, 1, 3]]
            hyper = Hyper(0.05, 1e-2, 0.9, 0.05, freeze_last_layer=t == 1)
            losses.append(step(*_flat((globals_, locals_)), hyper).loss)
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((ranks[0]["losses"] + ranks[1]["losses"]) / 2, torch.stack(losses), rtol=1e-9, atol=0)
    for rank in ranks:
        torch.testing.assert_close(rank["state"], step.state_dict(), rtol=1e-7, atol=1e-9)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), Path(sys.argv[2]))
