"""The loss and the center against the form in which they were published: two loops over pairs of views."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino_fast.step.loss import CenterUpdate, compute_objective, dino_loss, teacher_entropy, teacher_mean


def _published(student: Tensor, teacher: Tensor, center: Tensor, ts: float, tt: float, views: int) -> Tensor:
    total, pairs = torch.zeros((), dtype=student.dtype), 0
    for t, target in enumerate(torch.softmax((teacher - center) / tt, dim=-1).chunk(2)):
        for s, logits in enumerate((student / ts).chunk(views)):
            if s != t:
                total = total - (target * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
                pairs += 1
    return total / pairs


def _draw(seed: int, views: int, batch: int, prototypes: int) -> tuple[Tensor, Tensor, Tensor]:
    r = torch.Generator().manual_seed(seed)
    rows = (views * batch, 2 * batch, 1)
    student, teacher, center = (2 * torch.rand(n, prototypes, dtype=torch.float64, generator=r) - 1 for n in rows)
    return student, teacher, 0.2 * center


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    views=st.integers(2, 9),
    batch=st.integers(1, 5),
    prototypes=st.integers(2, 70),
    temps=st.tuples(st.floats(0.05, 0.5), st.floats(0.02, 0.2)),
)
def test_value_and_gradient_equal_the_published_form(
    seed: int, views: int, batch: int, prototypes: int, temps: tuple[float, float]
) -> None:
    student, teacher, center = _draw(seed, views, batch, prototypes)
    mine, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = dino_loss(mine, teacher, center, *temps, views)
    expected = _published(theirs, teacher, center, *temps, views)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)


def test_the_objective_is_all_three() -> None:
    student, teacher, center = _draw(5, 4, 3, 9)
    found = compute_objective(student, teacher, center, 0.1, torch.tensor(0.04, dtype=torch.float64), 4)
    assert torch.equal(found.loss, dino_loss(student, teacher, center, 0.1, 0.04, 4))
    assert torch.equal(found.teacher_entropy, teacher_entropy(teacher, center, 0.04))
    assert torch.equal(found.teacher_mean, teacher.mean(0, keepdim=True))


def test_gradcheck() -> None:
    student, teacher, center = _draw(0, 4, 2, 5)
    assert torch.autograd.gradcheck(lambda z: dino_loss(z, teacher, center, 0.1, 0.04, 4), student.requires_grad_())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_lower_precision_logits_cost_only_their_own_rounding(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, center = _draw(1, 8, 4, 1024)
    expected = _published(student, teacher, center, 0.1, 0.04, 8)
    loss = dino_loss(student.to(dtype), teacher.to(dtype), center.float(), 0.1, 0.04, 8)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, center = _draw(2, 2, 3, 7)
    dino_loss(student.requires_grad_(), teacher.requires_grad_(), center, 0.1, 0.04, 2).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("rows", "views"), [(8, 1), (9, 4), (6, 3)])
def test_rows_that_are_not_the_views_are_refused(rows: int, views: int) -> None:
    with pytest.raises(ValueError, match="views do not fit"):
        dino_loss(torch.zeros(rows, 3), torch.zeros(6, 3), torch.zeros(1, 3), 0.1, 0.04, views)


def test_entropy_at_both_collapses_and_between() -> None:
    center = torch.zeros(1, 50)
    assert teacher_entropy(torch.zeros(4, 50), center, 0.04).item() == pytest.approx(math.log(50), rel=1e-6)
    assert teacher_entropy(torch.eye(50)[:4] * 1e4, center, 0.04).item() == 0
    _, teacher, center = _draw(3, 2, 4, 50)
    q = torch.softmax((teacher - center) / 0.1, dim=-1)
    expected = torch.distributions.Categorical(probs=q).entropy().mean()
    torch.testing.assert_close(teacher_entropy(teacher, center, 0.1), expected)


def test_the_center_is_a_moving_average_in_place() -> None:
    _, teacher, center = _draw(4, 2, 5, 6)
    expected = 0.9 * center + 0.1 * teacher.mean(0, keepdim=True)
    CenterUpdate(center, teacher_mean(teacher), 0.9).finish()
    torch.testing.assert_close(center, expected, rtol=1e-12, atol=0)


def test_a_half_precision_teacher_moves_a_float32_center() -> None:
    center = torch.zeros(1, 2)
    for _ in range(3):
        CenterUpdate(center, teacher_mean(torch.full((4, 2), 0.5, dtype=torch.bfloat16)), 0.9).finish()
    torch.testing.assert_close(center, torch.full((1, 2), 0.5 * (1 - 0.9**3)))
