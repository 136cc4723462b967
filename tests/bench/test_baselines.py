"""The baselines make the same step as ours, so that they differ only in time."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import baselines
from bench.baselines import Pair, Published, Stock
from bench.kernels import run_baseline_loss
from dino_fast.config import Recipe
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.step.compiled import find_compile_problem
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import dino_loss
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep

RECIPE = Recipe(
    precision="fp32",
    backbone="resnet18",
    head=HeadRecipe(out_dim=256, hidden_dim=64, bottleneck_dim=32),
    optim=OptimRecipe(clip_grad=0.5),
)
HYPER = Hyper(lr=0.05, weight_decay=0.1, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
CPU = torch.device("cpu")
BATCH = 4


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A teacher that is not its student, and biases and norms that are not at their initial values."""
    torch.manual_seed(0)
    student, teacher = build_student_teacher(RECIPE.backbone, RECIPE.head)
    for model in (student, teacher):
        for parameter in model.parameters():
            spread = 0.5 if parameter.ndim == 1 else 0.1 * parameter.std()
            parameter.data += spread * torch.randn_like(parameter)
    return student, teacher


def crops(seed: int) -> tuple[Tensor, Tensor]:
    """Return two global and three local views of each image, channels-last."""
    r = torch.Generator().manual_seed(seed)
    made = (torch.randn(views * BATCH, 3, side, side, generator=r) for views, side in ((2, 64), (3, 48)))
    globals_, locals_ = (views.contiguous(memory_format=torch.channels_last) for views in made)
    return globals_, locals_


def our_step(pair: Pair) -> TrainStep:
    student, teacher = copy.deepcopy(pair)
    return TrainStep(student, teacher, build_optimizer(RECIPE.optim, student), RECIPE.loss, RECIPE.optim.clip_grad)


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    """Compare tensors by the norm of their difference."""
    assert (found - expected).norm() <= relative * expected.norm() + 1e-12


def assert_same_steps(build: Callable[..., Published | Stock], pair: Pair, hyper: Hyper) -> None:
    """Compare losses, weights, how far they moved, and running statistics, over two steps.

    The second step has a center and a momentum.
    """
    ours, other = our_step(pair), build(RECIPE, pair, hyper, CPU)
    for number in range(2):
        expected = ours(*crops(number), hyper).loss
        torch.testing.assert_close(other(*crops(number)), expected, rtol=1e-5, atol=0)
    for mine, theirs, before in zip((ours.student, ours.teacher), (other.student, other.teacher), pair, strict=True):
        for one, two, first in zip(mine.parameters(), theirs.parameters(), before.parameters(), strict=True):
            assert_near(two, one, 1e-4)
            # Rounding turns a ReLU on or off whose input is about zero, which changes gradients by half a percent.
            assert_near(two - first, one - first, 2e-2)
        for one, two in zip(mine.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(other.center, ours.center, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("build", [Published, Stock])
def test_a_baselines_step_is_ours(build: Callable[..., Published | Stock], freeze: bool, pair: Pair):
    assert_same_steps(build, pair, replace(HYPER, freeze_last_layer=freeze))


@pytest.mark.slow
def test_a_compiled_step_is_ours(pair: Pair):
    if problem := find_compile_problem(CPU):
        pytest.skip(problem)
    assert_same_steps(partial(Stock, compiled=True), pair, HYPER)


@pytest.mark.parametrize("build", [Published, Stock])
def test_the_pair_is_only_read_and_some_gradients_are_clipped(build: Callable[..., Published | Stock], pair: Pair):
    before = copy.deepcopy([model.state_dict() for model in pair])
    step = build(RECIPE, pair, HYPER, CPU)
    step(*crops(0))
    torch.testing.assert_close([model.state_dict() for model in pair], before, rtol=0, atol=0)
    norms = torch.tensor([p.grad.norm() for p in step.student.parameters() if p.grad is not None])
    clipped = (norms - RECIPE.optim.clip_grad).abs() < 1e-4
    assert clipped.any()
    assert (norms[~clipped] < RECIPE.optim.clip_grad).all()
    assert (~clipped).any()


@pytest.fixture(scope="module")
def losses(pair: Pair) -> list[Published | Stock]:
    torch.manual_seed(1)
    steps = [build(RECIPE, pair, HYPER, CPU) for build in (Published, Stock)]
    center = torch.randn(1, RECIPE.head.out_dim)
    for step in steps:
        step.center = center.clone()
    return steps


@given(
    batch=st.integers(1, 4), views=st.integers(2, 10), seed=st.integers(0, 2**32), scale=st.sampled_from([0.1, 1, 20])
)
def test_losses_and_their_gradients_are_the_references(
    losses: list[Published | Stock], batch: int, views: int, seed: int, scale: float
):
    r = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n * batch, RECIPE.head.out_dim, generator=r) for n in (views, 2))
    exact = student.double().requires_grad_()
    for step in losses:
        center = step.center
        expected = dino_loss(exact, teacher.double(), center.double(), RECIPE.loss.student_temp, 0.04, views)
        [slope] = torch.autograd.grad(expected, exact)
        leaf = student.clone().requires_grad_()
        loss = step.loss(leaf, teacher, views)
        step.center = center  # the published loss moves it
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert_near(torch.autograd.grad(loss, leaf)[0].double(), slope, 1e-4)


def test_the_center_is_the_mean_of_the_ranks(losses: list[Published | Stock], monkeypatch: pytest.MonkeyPatch):
    """Two ranks with the same logits have the center of one."""
    published = losses[0]
    assert isinstance(published, Published)
    logits, center = torch.randn(6, RECIPE.head.out_dim), published.center
    published.move_center(logits)
    alone, published.center = published.center, center
    monkeypatch.setattr(baselines, "world_size", lambda: 2)
    monkeypatch.setattr(baselines.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    published.move_center(logits)
    torch.testing.assert_close(published.center, alone)
    torch.testing.assert_close(alone, 0.9 * center + 0.1 * logits.mean(0, keepdim=True))
    published.center = center


# What rounding costs in 18 layers whose batch norms see few values, as in the test of our own step.
@pytest.mark.parametrize("precision", ["bf16", "fp16"])  # whatever half ours runs in, stock runs in bfloat16
def test_stock_in_lower_precision_stays_close(precision: str, pair: Pair):
    exact, rounded = (Stock(replace(RECIPE, precision=name), pair, HYPER, CPU) for name in ("fp32", precision))
    loss = rounded(*crops(0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(*crops(0)).item(), rel=4e-2)
    assert all(parameter.dtype == torch.float32 for parameter in rounded.student.parameters())


def test_the_published_step_stops_if_the_loss_is_nan(pair: Pair):
    globals_, locals_ = crops(0)
    with pytest.raises(FloatingPointError, match="nan"):
        Published(RECIPE, pair, HYPER, CPU)(globals_ * float("nan"), locals_)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, True), (torch.float32, False)])
def test_the_published_loss_of_half_logits_runs_under_autocast(dtype: torch.dtype, expected: bool):
    seen = []

    class Step:
        def loss(self, student: torch.Tensor, teacher: torch.Tensor, views: int) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            assert student.dtype == teacher.dtype == dtype
            return student.sum()

    run_baseline_loss(Step(), torch.zeros(8, 4, dtype=dtype), torch.zeros(2, 4, dtype=dtype))  # type: ignore[arg-type]
    assert seen == [expected]
