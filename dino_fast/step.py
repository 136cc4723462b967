"""One training step: teacher and student forward, loss, backward, update (algorithm 1 of Caron et al. 2021).

Nothing in it waits for the device, so that the host runs ahead.
"""

import copy
from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dino_fast.backbones import build_backbone
from dino_fast.head import DinoHead, HeadRecipe
from dino_fast.loss import LossRecipe, dino_loss, teacher_entropy, update_center
from dino_fast.optim import clip_gradients, ema_update, set_hyper
from dino_fast.schedules import Hyper
from dino_fast.sync_batchnorm import convert_sync_batchnorm

Precision = Literal["fp32", "bf16", "fp16"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MultiCropModel(nn.Module):
    """A backbone and a DINO head over crops of several resolutions; student and teacher are one each."""

    def __init__(self, backbone: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """crops: one [n_i, 3, H_i, W_i] a resolution → logits [Σ n_i, K], in the same order.

        Each resolution is one batch to the backbone's batch norms, and all crops together are one to the head's.
        Neighbours of equal resolution are joined, as published.
        """
        batches = [_joined(list(same)) for _, same in groupby(crops, key=lambda crop: crop.shape[-2:])]
        return self.head(_joined([self.backbone(batch) for batch in batches]))


def build_student_teacher(backbone: str, head: HeadRecipe) -> tuple[MultiCropModel, MultiCropModel]:
    """A new student, and a teacher that is its copy, both in train mode, channels-last, with synchronised batch norms.

    The teacher normalises by the statistics of its batch too, and has no gradients. Raises UserError for an unknown
    backbone.
    """
    features, width = build_backbone(backbone)
    student = MultiCropModel(features, DinoHead(width, head)).to(memory_format=torch.channels_last)
    convert_sync_batchnorm(student)
    return student, copy.deepcopy(student).requires_grad_(False)


class StepOutput(NamedTuple):
    """What a step leaves to log: scalars on the device, of this rank's batch."""

    loss: Tensor
    teacher_entropy: Tensor
    """in nats, of the teacher's targets"""
    grad_norm: Tensor
    """of all gradients together, before clipping"""


class TrainStep:
    """The state that steps change (networks, centre, optimizer, loss scaler) and the step that changes it."""

    def __init__(
        self,
        student: MultiCropModel | DistributedDataParallel,
        teacher: MultiCropModel,
        optimizer: Optimizer,
        loss: LossRecipe,
        clip_grad: float = 0.0,
        precision: Precision = "fp32",
    ) -> None:
        """student and teacher: on their device, from `build_student_teacher`; optimizer: from `build_optimizer`.

        "fp32" runs in the networks' own type; "bf16" and "fp16" autocast on their device, "fp16" with loss scaling.
        """
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.loss, self.clip_grad, self.precision = loss, clip_grad, precision
        prototypes = teacher.head.last_layer.weight_g
        self.center = prototypes.new_zeros(1, len(prototypes))  # [1, K]
        # The scaler reads from the device whether the gradients were finite: the one wait in an fp16 step.
        self.scaler = torch.amp.GradScaler(self.center.device.type, enabled=precision == "fp16")

    @property
    def bare_student(self) -> MultiCropModel:
        """The student without its DistributedDataParallel wrapper."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def __call__(self, globals_: Tensor, locals_: Tensor | None, hyper: Hyper) -> StepOutput:
        """One update. globals_: [2·B, 3, G, G], locals_: [n·B, 3, L, L] or None, both view-major."""
        with self._autocast():
            with torch.no_grad():
                teacher_logits = self.teacher([globals_])
            student_logits = self.student([globals_] if locals_ is None else [globals_, locals_])
        views = 2 * len(student_logits) // len(teacher_logits)
        loss = dino_loss(student_logits, teacher_logits, self.center, self.loss.student_temp, hyper.teacher_temp, views)
        entropy = teacher_entropy(teacher_logits, self.center, hyper.teacher_temp)
        update_center(self.center, teacher_logits, self.loss.center_momentum)
        grad_norm = self._backward(loss)
        self._update(hyper)
        return StepOutput(loss.detach(), entropy, grad_norm)

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.precision, torch.bfloat16)
        return torch.autocast(self.center.device.type, dtype=dtype, enabled=self.precision in _AUTOCAST)

    def _backward(self, loss: Tensor) -> Tensor:
        """Leave clipped gradients in the student; returns their norm before clipping."""
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.student.parameters(), self.clip_grad)

    def _update(self, hyper: Hyper) -> None:
        """Move the student by its gradients, then the teacher towards it."""
        if hyper.freeze_last_layer:
            _drop_gradients(self.bare_student.head.last_layer.parameters())
        set_hyper(self.optimizer, hyper.lr, hyper.weight_decay)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        ema_update(self.teacher, self.student, hyper.momentum)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs from the step, the same with and without DistributedDataParallel."""
        return {
            "student": self.bare_student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "center": self.center,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises what torch does if it comes from another model or precision."""
        self.bare_student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.center.copy_(state["center"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty from a run without loss scaling
            self.scaler.load_state_dict(state["scaler"])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # cat copies even a single one


def _drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Without a gradient, rather than with a zero one, a tensor gets neither weight decay nor momentum."""
    for parameter in parameters:
        parameter.grad = None
