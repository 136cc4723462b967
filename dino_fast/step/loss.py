"""The DINO loss and the centre of the teacher's outputs (`DINOLoss` in facebookresearch/dino `main_dino.py`)."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt, Le
from torch import Tensor

from dino_fast.durations import Duration
from dino_fast.model.sync_batchnorm import world_size


@dataclass(frozen=True)
class LossRecipe:
    """Temperatures and centring: what keeps the teacher sharp, and what keeps it from collapsing."""

    student_temp: Annotated[float, Gt(0)] = 0.1
    """temperature of the student's softmax"""
    teacher_temp: Annotated[float, Gt(0)] = 0.04
    """temperature of the teacher's softmax after its warm-up"""
    warmup_teacher_temp: Annotated[float, Gt(0)] = 0.04
    """temperature of the teacher's softmax where its warm-up begins"""
    warmup_teacher_temp_epochs: Duration = 0
    """how long the teacher's temperature goes from the one to the other, a step an epoch"""
    center_momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    """share of the centre that one step keeps"""


class Objective(NamedTuple):
    """What comes of the two networks' logits."""

    loss: Tensor
    """scalar, differentiable by the student's logits"""
    teacher_entropy: Tensor
    """scalar, in nats"""
    teacher_mean: Tensor
    """[1, K], of this rank's rows"""


def objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    views: int,
) -> Objective:
    """`dino_loss`, `teacher_entropy` and `teacher_mean` together, with torch's own operations."""
    return Objective(
        dino_loss(student_logits, teacher_logits, center, student_temp, teacher_temp, views),
        teacher_entropy(teacher_logits, center, teacher_temp),
        teacher_mean(teacher_logits),
    )


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    views: int,
) -> Tensor:
    """The mean, over the 2V − 2 pairs of a teacher view and a different student view, of their cross-entropy.

    Caron et al. 2021, eq. 3 and algorithm 1. The pairs that share a student view share its log-softmax, so there are
    V of them and not 2V − 2.

    student_logits: [V·B, K], view-major, the two global views first; teacher_logits: [2·B, K]; center: [1, K], the
    one from before this step. Computed in float32, or float64 for float64 logits. Gradients flow to the student only.
    Raises ValueError if the rows do not divide into the views.
    """
    rows, prototypes = student_logits.shape
    if views < 2 or rows % views or teacher_logits.shape != (2 * rows // views, prototypes):
        raise ValueError(
            f"{views} views do not fit student logits of {tuple(student_logits.shape)} "
            f"and teacher logits of {tuple(teacher_logits.shape)}"
        )
    batch = rows // views
    targets = _teacher_log_probabilities(teacher_logits, center, teacher_temp).exp().view(2, batch, prototypes)
    log_p = torch.log_softmax(_wide(student_logits) / student_temp, dim=-1).view(views, batch, prototypes)
    agreement = (targets.flip(0) * log_p[:2]).sum() + (targets.sum(0) * log_p[2:]).sum()
    return -agreement / (batch * (2 * views - 2))


@torch.no_grad()
def teacher_entropy(teacher_logits: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Mean entropy, in nats, of the teacher's targets: a scalar on their device. 0 and ln K are the two collapses."""
    log_q = _teacher_log_probabilities(teacher_logits, center, teacher_temp)
    return -(log_q.exp() * log_q).sum(dim=-1).mean()


@torch.no_grad()
def teacher_mean(teacher_logits: Tensor) -> Tensor:
    """Mean [1, K] of the teacher logits [N, K] of this rank, in float32 or better."""
    return _wide(teacher_logits).mean(dim=0, keepdim=True)


class CenterUpdate:
    """Moves `center` [1, K] in place towards the mean of all ranks' teacher means [1, K] (of equally many rows each),
    unless that is not finite.

    The ranks' sum is under way from the start; `finish` waits for it (on a GPU its stream does) and moves the centre.
    """

    def __init__(self, center: Tensor, mean: Tensor, momentum: float) -> None:
        self._center, self._mean, self._momentum = center, mean, momentum
        self._sum = dist.all_reduce(mean, async_op=True) if world_size() > 1 else None

    @torch.no_grad()
    def finish(self) -> None:
        if self._sum is not None:
            self._sum.wait()
            self._mean /= world_size()
        moved = self._center * self._momentum + self._mean * (1 - self._momentum)
        # One bad batch must not stay in the centre for good. The ranks' mean is the same on all of them.
        self._center.copy_(torch.where(self._mean.isfinite().all(), moved, self._center))


@torch.no_grad()
def _teacher_log_probabilities(teacher_logits: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    return torch.log_softmax((_wide(teacher_logits) - center) / teacher_temp, dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
