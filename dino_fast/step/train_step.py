"""One training step of DINO (algorithm 1 of Caron et al. 2021). Read `TrainStep.run`: it is the whole step.

    teacher, student   model/student_teacher.py
    loss, center       loss.py, or in kernels kernels/dino_loss.py
    update             clip, optimizer and EMA: update.py, or in kernels kernel_update.py

With kernels nothing in it waits for the device, so that the host can run ahead.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dino_fast.model.half_weights import keep_half_weights
from dino_fast.model.student_teacher import MultiCropModel
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import CenterUpdate, LossRecipe, Objective, compute_objective
from dino_fast.step.part_clock import PartClock
from dino_fast.step.precision import AUTOCAST_DTYPES, Precision
from dino_fast.step.update import LossScale, TorchUpdate, Update


class StepOutput(NamedTuple):
    """The figures of a step for the log, on the device: those of this rank's batch, and those of `UpdateOutput`."""

    loss: Tensor
    """scalar, in nats"""
    teacher_entropy: Tensor
    """entropy of the teacher's targets: a scalar, in nats"""
    grad_norm: Tensor
    skipped: Tensor
    grad_norms: Tensor


class TrainStep:
    """The state that steps change (networks, center, optimizer, loss scale), and the step that changes it."""

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
        """Take student and teacher, on their device, from `build_student_teacher`, and their optimizer.

        precision: "fp32" computes in the networks' own type; "bf16" and "fp16" use autocast, "fp16" with loss scaling.
        accumulate: the parts of a batch that go through the networks one after another. Batch norms see a part; loss,
        center and gradients are those of the whole batch.
        kernels: compute loss and update by Triton kernels instead of torch's own operations.
        fused_norms: compute batch norm, ReLU, addition and the stem's pooling by Triton kernels, in ResNets.
        teacher_aside: run the teacher's forward pass in a CUDA stream of its own, beside the student's.
        """
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.loss, self.precision, self.accumulate, self.kernels = loss, precision, accumulate, kernels
        prototypes = teacher.head.last_layer.weight_g
        self.center = prototypes.new_zeros(1, len(prototypes))  # [1, K]
        self.loss_scale = LossScale(self.center.device) if precision == "fp16" else None
        self.clock = PartClock(self.center.device)
        self.fused_norms = fused_norms and self._fuse_norms()
        self._side = torch.cuda.Stream(self.center.device) if teacher_aside else None
        self.objective, self.update = self._kernels(clip_grad) if kernels else self._torch_operations(clip_grad)

    def __call__(
        self, globals_: Tensor, locals_: Tensor | None, hyper: Hyper, scales: Tensor | None = None
    ) -> StepOutput:
        """Make one update. globals_: [2·B, 3, G, G]; locals_: [n·B, 3, L, L] or None; both view-major.

        scales: [branches, (2 + n)·B], view-major, what the branches of the student's blocks are multiplied by; None
        without drop path. Raises ValueError where B is not a multiple of the parts.
        """
        return self.run(globals_, locals_, self.prepare(hyper), scales)

    def run(self, globals_: Tensor, locals_: Tensor | None, hyper: Any, scales: Tensor | None = None) -> StepOutput:
        """Make one update with the hyper-parameters that `prepare` returned.

        With kernels this only launches work, so that a CUDA graph can record it.
        """
        self.clock.start()
        self.optimizer.zero_grad()
        parts = split_batch(globals_, locals_, scales, self.accumulate)
        found: list[Objective] = []
        for number, (part_globals, part_locals, part_scales) in enumerate(parts, 1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self._without_averaging():
                with self.autocast():
                    with torch.no_grad(), self._teacher_stream():
                        teacher_logits = self.teacher([part_globals])
                    crops = [part_globals] if part_locals is None else [part_globals, part_locals]
                    student_logits = self.student(crops) if scales is None else self.student(crops, part_scales)
                self._wait_for(teacher_logits)
                found.append(self._compute_objective(student_logits, teacher_logits, hyper.teacher_temp))
                if last:  # start the all-reduce of the center now, so that it overlaps the backward pass
                    center_update = self._start_center_update(found)
                self.clock.mark("forward")
                self._scale(found[-1].loss / len(parts)).backward()
                self.clock.mark("backward")
        center_update.finish()
        updated = self.update(hyper, self.loss_scale)  # clip, optimizer, EMA
        self.clock.mark("update")
        loss = torch.stack([part.loss.detach() for part in found]).mean()
        return StepOutput(loss, torch.stack([part.teacher_entropy for part in found]).mean(), *updated)

    def prepare(self, hyper: Hyper) -> Any:
        """Return the hyper-parameters in the form that `run` takes: on the device where kernels do the work."""
        return self.update.prepare(hyper)

    @property
    def bare_student(self) -> MultiCropModel:
        """The student without its DistributedDataParallel wrapper."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes on the networks' device."""
        dtype = AUTOCAST_DTYPES.get(self.precision, torch.bfloat16)
        return torch.autocast(self.center.device.type, dtype=dtype, enabled=self.precision in AUTOCAST_DTYPES)

    # ---- What the lines of `run` do beside the networks

    def _without_averaging(self) -> contextlib.AbstractContextManager[None]:
        """Do not average gradients over the ranks in this backward pass. DDP does it once, in that of the last part."""
        if isinstance(self.student, DistributedDataParallel):
            return self.student.no_sync()
        return contextlib.nullcontext()

    def _teacher_stream(self) -> contextlib.AbstractContextManager[None]:
        """Run the block in the teacher's stream, if it has one, after all work that the current stream has queued."""
        if self._side is None:
            return contextlib.nullcontext()
        self._side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._side)

    def _wait_for(self, teacher_logits: Tensor) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            teacher_logits.record_stream(torch.cuda.current_stream())  # not freed before this stream is done

    def _compute_objective(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float | Tensor
    ) -> Objective:
        views = 2 * len(student_logits) // len(teacher_logits)
        return self.objective(student_logits, teacher_logits, self.center, self.loss.student_temp, teacher_temp, views)

    def _start_center_update(self, found: list[Objective]) -> CenterUpdate:
        mean = torch.stack([part.teacher_mean for part in found]).mean(0)
        return CenterUpdate(self.center, mean, self.loss.center_momentum)

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    # ---- What computes loss and update

    def _torch_operations(self, clip_grad: float) -> tuple[Callable[..., Objective], Update]:
        frozen = self.bare_student.head.last_layer.parameters()
        return compute_objective, TorchUpdate(self.optimizer, self.bare_student, self.teacher, clip_grad, frozen)

    def _kernels(self, clip_grad: float) -> tuple[Callable[..., Objective], Update]:
        from dino_fast.step.kernel_update import KernelUpdate
        from dino_fast.step.kernels.dino_loss import fused_dino_loss

        frozen, halves = self.bare_student.head.last_layer.parameters(), self._keep_half_weights()
        return fused_dino_loss, KernelUpdate(self.optimizer, self.bare_student, self.teacher, clip_grad, frozen, halves)

    def _keep_half_weights(self) -> dict[Tensor, Tensor]:
        if self.precision not in AUTOCAST_DTYPES:
            return {}
        networks = self.bare_student, self.teacher
        student, teacher = (keep_half_weights(network, AUTOCAST_DTYPES[self.precision]) for network in networks)
        return student | teacher

    def _fuse_norms(self) -> bool:
        """Change both backbones to fused norms. Returns whether they could be changed."""
        from dino_fast.model.fused_resnet import fuse_norms

        return fuse_norms(self.bare_student) and fuse_norms(self.teacher)

    # ---- State

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs from the step.

        It is the same with and without DistributedDataParallel, with torch's operations and with kernels.
        """
        return {
            "student": self.bare_student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "center": self.center,
            "optimizer": self.optimizer.state_dict(),
            "scaler": {} if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises torch's errors if it comes from another model."""
        self.bare_student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.center.copy_(state["center"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss_scale is not None:
            if state["scaler"]:
                self.loss_scale.load_state_dict(state["scaler"])
            else:  # of a run without loss scaling
                self.loss_scale.reset()
        self.update.after_load()


class BatchPart(NamedTuple):
    """Some images of a batch, with all of their views."""

    globals: Tensor
    """[2·b, 3, G, G], view-major"""
    locals: Tensor | None
    """[n·b, 3, L, L], view-major"""
    scales: Tensor | None
    """[branches, (2 + n)·b], view-major"""


def split_batch(globals_: Tensor, locals_: Tensor | None, scales: Tensor | None, parts: int) -> list[BatchPart]:
    """Split a batch of B images, as `TrainStep` takes it, into `parts` of B / parts images each.

    Raises ValueError where B is not a multiple of the parts.
    """
    if parts == 1:
        return [BatchPart(globals_, locals_, scales)]
    batch = len(globals_) // 2
    if batch % parts:
        raise ValueError(f"{batch} images cannot be split into {parts} equal parts")

    def take(views: Tensor | None, number: int, dim: int = 0) -> Tensor | None:
        if views is None:
            return None
        first, count = number * batch // parts, batch // parts
        return torch.cat([view.narrow(dim, first, count) for view in views.split(batch, dim)], dim)

    def take_part(number: int) -> BatchPart:
        part = take(globals_, number)
        assert part is not None
        return BatchPart(part, take(locals_, number), take(scales, number, dim=1))

    return [take_part(number) for number in range(parts)]
