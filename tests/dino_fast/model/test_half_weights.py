"""Layers with weights in half precision against torch's own under autocast, which casts them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dino_fast.model.half_weights import keep_half_weights
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.step.compiled import compile_backbones
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep
from tests.chain import Chain
from tests.interpreted import kernels

HALVES = [torch.bfloat16, torch.float16]
HYPER = Hyper(lr=0.01, weight_decay=1e-2, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)


def _network() -> nn.Module:
    torch.manual_seed(0)
    return Chain(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten(), nn.Linear(64, 5)
    ).to(memory_format=torch.channels_last)  # fmt: skip


def _gradients(network: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", dtype):
        out = network(x)
    out.float().square().sum().backward()
    return out.detach(), [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_gradients_are_autocasts_to_the_bit(dtype: torch.dtype, compiled: bool) -> None:
    plain, x = _network(), torch.randn(6, 3, 6, 6)
    keeping = copy.deepcopy(plain)
    copies = keep_half_weights(keeping, dtype)
    assert keeping.state_dict().keys() == plain.state_dict().keys()
    assert [tuple(whole.shape) for whole in copies] == [(8, 3, 3, 3), (8,), (4, 8, 1, 1), (5, 64), (5,)]
    assert all(half.dtype == dtype and half.stride() == whole.stride() for whole, half in copies.items())
    if compiled:
        keeping.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    (out, grads), (expected, exact) = (_gradients(network, x, dtype) for network in (keeping, plain))
    assert torch.equal(out, expected)
    assert len(grads) == len(exact)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(grads, exact, strict=True))


def test_it_is_the_copy_that_works_under_autocast_and_the_weight_elsewhere() -> None:
    network, x = _network().eval(), torch.randn(2, 3, 6, 6)
    before = network(x)
    for half in keep_half_weights(network, torch.bfloat16).values():
        half.zero_()
    assert torch.equal(network(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert not network(x).any()


def _step(precision: str) -> TrainStep:
    torch.manual_seed(0)
    student, teacher = build_student_teacher("resnet18", HeadRecipe(out_dim=64, hidden_dim=32, bottleneck_dim=16))
    optimizer = build_optimizer(OptimRecipe(), student)
    return TrainStep(student, teacher, optimizer, LossRecipe(), 3.0, precision, kernels=True)  # type: ignore[arg-type]


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, kernels are slow by the block: a few large ones do."""
    kernels("dino_fast.step.kernels.dino_loss")
    update = kernels("dino_fast.step.kernels.update")
    if not torch.cuda.is_available():
        for name in ("BLOCK", "CHUNK"):
            monkeypatch.setattr(update, name, update.tl.constexpr(1 << 16))


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_keeps_the_copies_up_and_a_loaded_one_has_its_own(compiled: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("its tensors are on the CPU, where compiled kernels do not work")
    step, other = _step("bf16"), _step("bf16")
    if compiled:
        compile_backbones(step, backend="aot_eager")
    globals_, locals_ = (torch.randn(n, 3, side, side) for n, side in ((4, 48), (4, 32)))
    step(globals_, locals_, HYPER)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    checked = 0
    for network in (step.student, step.teacher, other.student, other.teacher):
        for layer in network.modules():
            if hasattr(layer, "half_weight"):
                # Triton's interpreter cuts bfloat16's digits off instead of rounding.
                torch.testing.assert_close(layer.half_weight, layer.weight.bfloat16(), rtol=2**-7, atol=0)
                checked += 1
    assert checked == 4 * (20 + 3)  # convolutions of a ResNet-18, and the head's linear layers
