"""The DINO loss and the center of the teacher's outputs (`DINOLoss` in facebookresearch/dino `main_dino.py`)."""

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
    """The temperatures and the centering: they keep the teacher sharp, and keep it from collapsing."""

    student_temp: Annotated[float, Gt(0)] = 0.1
    """temperature of the student's softmax"""
    teacher_temp: Annotated[float, Gt(0)] = 0.04
    """temperature of the teacher's softmax after its warm-up"""
    warmup_teacher_temp: Annotated[float, Gt(0)] = 0.04
    """temperature of the teacher's softmax at the start of its warm-up"""
    warmup_teacher_temp_epochs: Duration = 0
    """length of the warm-up of the teacher's temperature, which changes once an epoch"""
    center_momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    """share of the center that one step keeps"""


class Objective(NamedTuple):
    """What is computed from the logits of both networks."""

    loss: Tensor
    """scalar in nats, differentiable by the student's logits"""
    teacher_entropy: Tensor
    """scalar in nats"""
    teacher_mean: Tensor
    """[1, K], the mean of this rank's teacher logits"""


def compute_objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float | Tensor,
    views: int,
) -> Objective:
    """Compute `dino_loss`, `teacher_entropy` and `teacher_mean` with torch's own operations."""
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
    """Return the mean cross-entropy over the 2V − 2 pairs of a teacher view and a different student view.

    Caron et al. 2021, eq. 3 and algorithm 1. The pairs that share a student view share its log-softmax, so there are
    V of them and not 2V − 2.

    student_logits: [V·B, K], view-major, the two global views first; teacher_logits: [2·B, K]; center: [1, K], the
    one from before this step. All is computed in float32, or float64 for float64 logits. Gradients flow to the student
    only. Raises ValueError if the rows do not divide into the views.
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
    """Return the mean entropy of the teacher's targets, a scalar in nats. 0 and ln K are the two kinds of collapse."""
    log_q = _teacher_log_probabilities(teacher_logits, center, teacher_temp)
    return -(log_q.exp() * log_q).sum(dim=-1).mean()


@torch.no_grad()
def teacher_mean(teacher_logits: Tensor) -> Tensor:
    """Return the mean [1, K] of this rank's teacher logits [N, K], in float32 or better."""
    return _wide(teacher_logits).mean(dim=0, keepdim=True)


class CenterUpdate:
    """Moves the center [1, K] in place towards the mean of all ranks' teacher means [1, K], of equally many rows each.

    A mean that is not finite leaves the center as it is. The ranks' sum is under way from the start; `finish` waits for
    it (on a GPU its stream does) and moves the center.
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
        # One bad batch must not stay in the center for good. The ranks' mean is the same on all of them.
        self._center.copy_(torch.where(self._mean.isfinite().all(), moved, self._center))


@torch.no_grad()
def _teacher_log_probabilities(teacher_logits: Tensor, center: Tensor, teacher_temp: float | Tensor) -> Tensor:
    return torch.log_softmax((_wide(teacher_logits) - center) / teacher_temp, dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
