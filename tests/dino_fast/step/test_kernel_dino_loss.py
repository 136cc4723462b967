"""The fused loss against `dino_fast.step.loss` in float64: interpreted where there is no GPU, else compiled."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dino_fast.step.loss import dino_loss, teacher_entropy
from tests.interpreted import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 1024.0  # of the loss, as in a float16 run, or the gradients would be subnormal
# Relative, and absolute as a share of the largest: for float32 sums and, in gradients, for the result's rounding.
SUMS = {"rtol": 3e-6, "atol": 1e-6}
GRADIENT = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2**-10, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2e-6},  # the interpreter cuts where a GPU rounds
}

fused = kernels("dino_fast.step.kernels.dino_loss")


class Case(NamedTuple):
    """What a loss is computed of."""

    student: Tensor
    teacher: Tensor
    center: Tensor
    temps: tuple[float, float]
    views: int


class Found(NamedTuple):
    loss: Tensor
    entropy: Tensor
    mean: Tensor
    gradient: Tensor


def draw(
    seed: int,
    views: int,
    batch: int,
    prototypes: int,
    dtype: torch.dtype = torch.float32,
    temps: tuple[float, float] = (0.1, 0.04),
    spread: float = 1.0,
    center: float = 0.2,
) -> Case:
    """Logits between ±`spread`, rounded to `dtype`, and a center between ±`center`."""
    r = torch.Generator().manual_seed(seed)
    rows, sizes = (views * batch, 2 * batch, 1), (spread, spread, center)
    tensors = [size * (2 * torch.rand(n, prototypes, generator=r) - 1) for n, size in zip(rows, sizes, strict=True)]
    student, teacher, center = (tensor.to(DEVICE) for tensor in tensors)
    return Case(student.to(dtype), teacher.to(dtype), center, temps, views)


def temperature(value: float) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def mine(case: Case, scale: float = SCALE) -> Found:
    """The kernels' results; the case's own logits stay as they are."""
    student = case.student.clone().requires_grad_()
    ts, tt = case.temps
    loss, entropy, mean = fused.fused_dino_loss(student, case.teacher, case.center, ts, temperature(tt), case.views)
    (gradient,) = torch.autograd.grad(loss * scale, student)
    return Found(loss.detach(), entropy, mean, gradient)


def reference(case: Case, scale: float = SCALE) -> Found:
    """Torch's results in float64, of the very logits that the kernels see."""
    student, teacher, center = (tensor.double() for tensor in case[:3])
    ts, tt = case.temps
    loss = dino_loss(student.requires_grad_(), teacher, center, ts, tt, case.views)
    (gradient,) = torch.autograd.grad(loss * scale, student)
    return Found(loss.detach(), teacher_entropy(teacher, center, tt), teacher.mean(0, keepdim=True), gradient)


def assert_same(found: Found, expected: Found) -> None:
    assert found.loss.dtype == found.entropy.dtype == found.mean.dtype == torch.float32
    assert found.loss.shape == found.entropy.shape == ()
    for name in ("loss", "entropy", "mean", "gradient"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        tolerance = GRADIENT[ours.dtype] if name == "gradient" else SUMS
        atol = tolerance["atol"] * max(theirs.abs().max().item(), 1.0)
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance["rtol"], atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    views=st.sampled_from([2, 3, 5, 8, 10, 12]),
    batch=st.sampled_from([1, 2, 3, 4, 9]),
    prototypes=st.sampled_from([2, 37, 255, 512, 1000, 2050]),
    dtype=st.sampled_from(list(GRADIENT)),
    temps=st.tuples(st.floats(0.05, 0.5), st.floats(0.02, 0.2)),
    spread=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    center=st.floats(0, 0.5),
)
def test_it_is_the_reference(
    seed: int,
    views: int,
    batch: int,
    prototypes: int,
    dtype: torch.dtype,
    temps: tuple[float, float],
    spread: float,
    center: float,
) -> None:
    case = draw(seed, views, batch, prototypes, dtype, temps, spread, center)
    assert_same(mine(case), reference(case))


@pytest.mark.parametrize("prototypes", [60000, 65536])
def test_many_blocks(prototypes: int) -> None:
    case = draw(0, 8, 1, prototypes, torch.float16)
    assert_same(mine(case), reference(case))


@pytest.mark.parametrize("dtype", GRADIENT)
def test_large_logits_stay_finite_and_right(dtype: torch.dtype) -> None:
    case = draw(1, 5, 3, 1500, dtype, spread=1e4, center=0.0)
    assert_same(mine(case), reference(case))


def test_large_logits_that_are_close_to_each_other() -> None:
    case = draw(2, 4, 2, 700)
    case = case._replace(student=case.student + 1e4, center=torch.zeros_like(case.center))
    assert_same(mine(case), reference(case))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_overflow_shows_in_loss_and_gradient(bad: float, which: str) -> None:
    case = draw(3, 3, 2, 1100)
    getattr(case, which)[1, 1050] = bad
    found = mine(case)
    assert not found.loss.isfinite()
    assert not found.gradient.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -3.0, 2.0**16])
def test_the_gradient_is_times_the_incoming_one(scale: float) -> None:
    case = draw(4, 4, 3, 600)
    assert_same(mine(case, scale), reference(case, scale))


def test_the_gradient_of_each_row_sums_to_nothing() -> None:
    gradient = mine(draw(5, 8, 3, 1000)).gradient
    assert gradient.abs().sum(1).min() > 1
    assert (gradient.sum(1).abs() < 1e-5 * gradient.abs().sum(1)).all()


def test_the_order_of_local_views_moves_their_gradients_only() -> None:
    case, order = draw(6, 7, 3, 600), torch.tensor([0, 1, 5, 2, 6, 4, 3], device=DEVICE)
    permuted = case._replace(student=case.student.view(7, 3, 600)[order].flatten(0, 1))
    one, other = mine(case), mine(permuted)
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.gradient.view(7, 3, 600), one.gradient.view(7, 3, 600)[order], rtol=1e-6, atol=0)


def test_twice_the_same_bits_and_the_teacher_untouched() -> None:
    case = draw(7, 8, 9, 1100, torch.float16)
    before = case.teacher.clone(), case.center.clone()
    for one, other in zip(mine(case), mine(case), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(case.teacher, before[0])
    assert torch.equal(case.center, before[1])


def test_the_gradient_takes_the_place_of_the_logits_once() -> None:
    case = draw(8, 3, 2, 40)
    student = case.student.requires_grad_()
    loss = fused.fused_dino_loss(student, case.teacher, case.center, 0.1, temperature(0.04), 3).loss
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert gradient.data_ptr() == student.data_ptr()
    assert not gradient.requires_grad
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_gradients_flow_on_to_what_made_the_logits() -> None:
    case, r = draw(9, 4, 3, 50), torch.Generator().manual_seed(0)
    features, weight = (torch.randn(*shape, generator=r).to(DEVICE) / 4 for shape in ((12, 16), (16, 50)))
    gradients = []
    for dtype, loss_of in ((torch.float32, lambda *a: fused.fused_dino_loss(*a).loss), (torch.float64, dino_loss)):
        x = features.to(dtype, copy=True).requires_grad_()
        loss_of(x @ weight.to(dtype), case.teacher.to(dtype), case.center, 0.1, temperature(0.04), 4).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-6)


def test_another_reader_of_the_logits_is_not_given_gradients_for_values() -> None:
    case = draw(10, 3, 2, 40)
    logits = case.student.requires_grad_() * 1
    other = logits.square().sum()
    loss = fused.fused_dino_loss(logits, case.teacher, case.center, 0.1, temperature(0.04), 3).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_the_center_may_move_before_the_backward_pass() -> None:
    case = draw(11, 3, 2, 40)
    student, center = case.student.clone().requires_grad_(), case.center.clone()
    loss = fused.fused_dino_loss(student, case.teacher, center, 0.1, temperature(0.04), 3).loss
    center.add_(1)
    (gradient,) = torch.autograd.grad(loss * SCALE, student)
    assert torch.equal(gradient, mine(case).gradient)


def test_the_temperature_may_not() -> None:
    case, temp = draw(11, 3, 2, 40), temperature(0.04)
    loss = fused.fused_dino_loss(case.student.requires_grad_(), case.teacher, case.center, 0.1, temp, 3).loss
    temp.fill_(0.07)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_the_loss_is_differentiable() -> None:
    case = draw(12, 3, 2, 40)
    found = fused.fused_dino_loss(
        case.student.requires_grad_(), case.teacher.requires_grad_(), case.center, 0.1, temperature(0.04), 3
    )
    assert not found.teacher_entropy.requires_grad
    assert not found.teacher_mean.requires_grad
    found.loss.backward()
    assert case.teacher.grad is None


def test_memory_beside_the_logits() -> None:
    batch, views, prototypes = 128, 8, 65536
    space = fused._workspace(torch.empty(1, prototypes, device="meta"), batch, views)
    mean = prototypes * 4
    extra = sum(tensor.numel() * tensor.element_size() for tensor in space) + mean
    assert extra <= 0.07 * (2 * batch * (views + 2) * prototypes)  # of 16-bit logits


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"views": 1}, "views do not fit"),
        ({"views": 4}, "views do not fit"),
        ({"views": 12}, "views do not fit"),
        ({"student": torch.zeros(0, 5), "teacher": torch.zeros(0, 5)}, "views do not fit"),
        ({"teacher": torch.zeros(4, 6)}, "views do not fit"),
        ({"center": torch.zeros(5)}, "center"),
        ({"center": torch.zeros(1, 6)}, "center"),
        ({"center": torch.zeros(1, 5, dtype=torch.float64)}, "center"),
        ({"temp": torch.zeros(2)}, "temperature"),
        ({"temp": torch.zeros(1, dtype=torch.float64)}, "temperature"),
        ({"student": torch.zeros(6, 5, dtype=torch.float64)}, "logits must be"),
        ({"teacher": torch.zeros(4, 5, dtype=torch.float64)}, "logits must be"),
        ({"student": torch.zeros(5, 6).T}, "contiguous"),
        ({"teacher": torch.zeros(5, 4).T}, "contiguous"),
        ({"center": torch.zeros(1, 10)[:, ::2]}, "contiguous"),
        ({"temp": torch.zeros(1, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], match: str) -> None:
    fits = {
        "student": torch.zeros(6, 5), "teacher": torch.zeros(4, 5), "center": torch.zeros(1, 5),
        "student_temp": 0.1, "temp": torch.full((1,), 0.04), "views": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=match):
        fused.fused_dino_loss(*(fits | change).values())
