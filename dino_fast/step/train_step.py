"""One training step: teacher and student forward, loss, backward, update (algorithm 1 of Caron et al. 2021).

Nothing in it waits for the device, so that the host runs ahead.
"""

import contextlib
import copy
from collections.abc import Callable
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dino_fast.model.backbones import build_backbone
from dino_fast.model.half_weights import keep_half_weights
from dino_fast.model.head import DinoHead, HeadRecipe
from dino_fast.model.sync_batchnorm import convert_sync_batchnorm
from dino_fast.run.schedules import Hyper
from dino_fast.step.loss import CenterUpdate, LossRecipe, Objective, objective
from dino_fast.step.part_clock import PartClock
from dino_fast.step.update import KernelUpdate, LossScale, TorchUpdate, Update

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
    """What a step leaves to log, on the device: scalars of this rank's batch, and the fields of `Updated`."""

    loss: Tensor
    teacher_entropy: Tensor
    """in nats, of the teacher's targets"""
    grad_norm: Tensor
    skipped: Tensor
    grad_norms: Tensor


class TrainStep:
    """The state that steps change (networks, centre, optimizer, loss scale) and the step that changes it."""

    def __init__(
        self,
        student: MultiCropModel | DistributedDataParallel,
        teacher: MultiCropModel,
        optimizer: Optimizer,
        loss: LossRecipe,
        clip_grad: float = 0.0,
        precision: Precision = "fp32",
        *,
        accumulate: int = 1,
        kernels: bool = False,
        fused_norms: bool = False,
        teacher_aside: bool = False,
    ) -> None:
        """student and teacher: on their device, from `build_student_teacher`; optimizer: from `build_optimizer`.

        "fp32" runs in the networks' own type; "bf16" and "fp16" autocast on their device, "fp16" with loss scaling.
        `accumulate` parts of a batch go through the networks one after another: batch norms see a part, loss, centre
        and gradients are those of the batch. `kernels`: loss and update by Triton instead of torch's own operations;
        `fused_norms`: batch norm, ReLU, addition and the stem's pooling, too, where a backbone is a ResNet.
        `teacher_aside`: on a GPU the teacher's forward pass has a stream of its own, beside the student's.
        """
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.loss, self.precision, self.accumulate = loss, precision, accumulate
        prototypes = teacher.head.last_layer.weight_g
        self.center = prototypes.new_zeros(1, len(prototypes))  # [1, K]
        self.loss_scale = LossScale(self.center.device) if precision == "fp16" else None
        self.clock = PartClock(self.center.device)
        self._side = torch.cuda.Stream(self.center.device) if teacher_aside else None
        frozen = self.bare_student.head.last_layer.parameters()
        self.fused_norms = fused_norms and self._fuse_norms()
        ends = optimizer, self.bare_student, teacher, clip_grad, frozen
        self.objective: Callable[..., Objective]
        self.update: Update
        if kernels:
            from dino_fast.step.kernels.dino_loss import fused_dino_loss

            self.objective, self.update = fused_dino_loss, KernelUpdate(*ends, self._keep_half_weights())
        else:
            self.objective, self.update = objective, TorchUpdate(*ends)

    def _fuse_norms(self) -> bool:
        """Whether there were backbones to do it in."""
        from dino_fast.model.fused_resnet import fuse_norms

        return fuse_norms(self.bare_student) and fuse_norms(self.teacher)

    @property
    def bare_student(self) -> MultiCropModel:
        """The student without its DistributedDataParallel wrapper."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def _keep_half_weights(self) -> dict[Tensor, Tensor]:
        if self.precision not in _AUTOCAST:
            return {}
        networks = self.bare_student, self.teacher
        student, teacher = (keep_half_weights(network, _AUTOCAST[self.precision]) for network in networks)
        return student | teacher

    def __call__(self, globals_: Tensor, locals_: Tensor | None, hyper: Hyper) -> StepOutput:
        """One update. globals_: [2·B, 3, G, G], locals_: [n·B, 3, L, L] or None, both view-major.

        Raises ValueError where B is not a multiple of the parts.
        """
        return self.run(globals_, locals_, self.settings(hyper))

    def settings(self, hyper: Hyper) -> Any:
        """`hyper` in the form that `run` takes: on the device, where kernels do the work."""
        return self.update.settings(hyper)

    def run(self, globals_: Tensor, locals_: Tensor | None, settings: Any) -> StepOutput:
        """One update, as `__call__`. With kernels it launches work only, so that a CUDA graph can record it."""
        self.clock.start()
        parts = split_batch(globals_, locals_, self.accumulate)
        self.optimizer.zero_grad()
        found: list[Objective] = []
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self._apart():
                found.append(self._forward(*part, settings.teacher_temp))
                if last:  # the ranks' sum runs beside the backward pass
                    mean = torch.stack([one.teacher_mean for one in found]).mean(0)
                    center = CenterUpdate(self.center, mean, self.loss.center_momentum)
                self.clock.mark("forward")
                self._backward(found[-1].loss / len(parts))
                self.clock.mark("backward")
        center.finish()
        updated = self.update(settings, self.loss_scale)
        self.clock.mark("update")
        loss = torch.stack([one.loss.detach() for one in found]).mean()
        return StepOutput(loss, torch.stack([one.teacher_entropy for one in found]).mean(), *updated)

    def _apart(self) -> contextlib.AbstractContextManager[None]:
        """Gradients stay this rank's own: they are averaged over the ranks with the last part's."""
        if isinstance(self.student, DistributedDataParallel):
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _forward(self, globals_: Tensor, locals_: Tensor | None, teacher_temp: float | Tensor) -> Objective:
        with self.autocast():
            with torch.no_grad(), self._aside():
                teacher_logits = self.teacher([globals_])
            student_logits = self.student([globals_] if locals_ is None else [globals_, locals_])
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            teacher_logits.record_stream(torch.cuda.current_stream())  # its memory is the side's to give out again
        views = 2 * len(student_logits) // len(teacher_logits)
        return self.objective(student_logits, teacher_logits, self.center, self.loss.student_temp, teacher_temp, views)

    def _aside(self) -> contextlib.AbstractContextManager[None]:
        """The side stream, from where the current one is."""
        if self._side is None:
            return contextlib.nullcontext()
        self._side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._side)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()

    def autocast(self) -> torch.autocast:
        """What forward passes run under, on the networks' device."""
        dtype = _AUTOCAST.get(self.precision, torch.bfloat16)
        return torch.autocast(self.center.device.type, dtype=dtype, enabled=self.precision in _AUTOCAST)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs from the step, the same with and without DistributedDataParallel, with torch's
        operations and with kernels."""
        return {
            "student": self.bare_student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "center": self.center,
            "optimizer": self.optimizer.state_dict(),
            "scaler": {} if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises what torch does if it comes from another model or precision."""
        self.bare_student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.center.copy_(state["center"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss_scale is not None:
            if state["scaler"]:
                self.loss_scale.load_state_dict(state["scaler"])
            else:  # of a run without loss scaling
                self.loss_scale.reset()
        self.update.loaded()


def split_batch(globals_: Tensor, locals_: Tensor | None, parts: int) -> list[tuple[Tensor, Tensor | None]]:
    """A batch [2·B, …] and [n·B, …], view-major, in `parts` of B / parts images each, view-major too.

    Raises ValueError where B is not a multiple.
    """
    if parts == 1:
        return [(globals_, locals_)]
    batch = len(globals_) // 2
    if batch % parts:
        raise ValueError(f"{batch} images do not divide into {parts} parts")

    def of(views: Tensor, number: int) -> Tensor:
        mine = slice(number * batch // parts, (number + 1) * batch // parts)
        return torch.cat([view[mine] for view in views.split(batch)])

    return [(of(globals_, part), None if locals_ is None else of(locals_, part)) for part in range(parts)]


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # cat copies even a single one
