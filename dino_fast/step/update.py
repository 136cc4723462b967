"""The end of a step: gradients unscaled and clipped, the student moved by its optimizer, the teacher towards it.

`TorchUpdate` does it with torch's own operations, on any device and in any precision; `kernels.update` in three
launches on a GPU. Both leave the optimizer's state where torch keeps it, so a checkpoint of one is one of the other.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino_fast.run.schedules import Hyper
from dino_fast.step.optimizers import clip_gradients, ema_update, set_hyper

FLOOR, CEILING = 2.0**-24, 2.0**126  # of the scale: beyond, its reciprocal or it becomes infinite, for good
INTERVAL = 2000  # steps in a row without an overflow after which the loss is scaled by twice as much


class LossScale:
    """The factor on a float16 loss that keeps small gradients from vanishing (Micikevicius et al. 2018).

    Halved after a step whose gradients overflowed, doubled after `INTERVAL` steps in a row in which none did. As
    torch.amp.GradScaler, whose state it reads, but the host never reads the scale. `scale`: float32 scalar.
    """

    def __init__(self, device: torch.device, scale: float = 65536.0) -> None:
        self._first = scale
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.int32, device=device)  # steps since the last change

    @torch.no_grad()
    def update(self, overflowed: Tensor) -> None:
        """Choose the scale of the next step. overflowed: a scalar, true (or not 0) where a gradient was not finite."""
        overflowed = overflowed.bool()
        good = torch.where(overflowed, 0, self._good + 1)
        grown = good == INTERVAL
        self.scale.mul_(torch.where(overflowed, 0.5, torch.where(grown, 2.0, 1.0))).clamp_(FLOOR, CEILING)
        self._good.copy_(torch.where(grown, 0, good))

    def reset(self) -> None:
        """Begin to look for the scale anew."""
        self.scale.fill_(self._first)
        self._good.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "_growth_tracker": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(torch.as_tensor(state["scale"]))
        self._good.copy_(torch.as_tensor(state["_growth_tracker"]))


class Updated(NamedTuple):
    """What an update leaves to log: float32 tensors on the device."""

    grad_norm: Tensor
    """of all gradients together, unscaled, before clipping: a scalar"""
    skipped: Tensor
    """1 where a gradient was not finite and the student has stayed as it was, else 0: a scalar"""
    grad_norms: Tensor
    """of each of the student's parameters, in their order, 0 without a gradient: [parameters]"""


class Update(Protocol):
    """How a step ends."""

    def settings(self, hyper: Hyper) -> Any:
        """The step's settings in the form that `__call__` takes; `teacher_temp` is one of its fields."""

    def __call__(self, settings: Any, scale: LossScale | None) -> Updated:
        """One update by the gradients that the student's parameters hold."""

    def loaded(self) -> None:
        """To be called after the optimizer or a network has loaded a state."""


class TorchUpdate:
    """Clips per tensor, steps the optimizer and averages the teacher with torch's foreach operations.

    `frozen` are left alone while the settings freeze the last layer. The host reads whether the gradients were finite,
    the one wait in a step; where they were not, the student stays.
    """

    def __init__(
        self, optimizer: Optimizer, student: nn.Module, teacher: nn.Module, clip_grad: float, frozen: Iterable[Tensor]
    ) -> None:
        self._optimizer, self._student, self._teacher = optimizer, student, teacher
        self._clip_grad, self._frozen = clip_grad, list(frozen)

    def settings(self, hyper: Hyper) -> Hyper:
        return hyper

    def loaded(self) -> None:
        pass

    def __call__(self, settings: Hyper, scale: LossScale | None) -> Updated:
        if scale is not None:
            self._unscale(scale)
        norms = clip_gradients(self._student.parameters(), self._clip_grad)
        norm = torch.linalg.vector_norm(norms)
        finite = norm.isfinite()
        if settings.freeze_last_layer:
            # Without a gradient, rather than with a zero one, a tensor gets neither weight decay nor momentum.
            for parameter in self._frozen:
                parameter.grad = None
        set_hyper(self._optimizer, settings.lr, settings.weight_decay)
        if finite:
            self._optimizer.step()
        if scale is not None:
            scale.update(~finite)
        ema_update(self._teacher, self._student, settings.momentum)
        return Updated(norm, (~finite).to(norm.dtype), norms)

    @torch.no_grad()
    def _unscale(self, scale: LossScale) -> None:
        grads = [p.grad for p in self._student.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, scale.scale.reciprocal())


class DeviceHyper(NamedTuple):
    """A step's settings in the device's memory, float32."""

    values: Tensor  # [5], as kernels.update packs them
    teacher_temp: Tensor  # [1]


class KernelUpdate:
    """As `TorchUpdate`, by `kernels.update`; the host reads nothing. `halves` are copies of parameters, kept up."""

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        teacher: nn.Module,
        clip_grad: float,
        frozen: Iterable[Tensor],
        halves: Mapping[Tensor, Tensor],
    ) -> None:
        from dino_fast.step.kernels.update import FusedUpdate, pack

        self._fused, self._pack = FusedUpdate(optimizer, student, teacher, clip_grad, frozen, halves), pack
        self._device = next(student.parameters()).device

    def settings(self, hyper: Hyper) -> DeviceHyper:
        """Copied to the device without waiting for it."""
        host = torch.tensor([*self._pack(hyper), hyper.teacher_temp], dtype=torch.float32)
        if self._device.type == "cuda":
            host = host.pin_memory()
        values = host.to(self._device, non_blocking=True)
        return DeviceHyper(values[:-1], values[-1:])

    def loaded(self) -> None:
        self._fused.bind()

    def recorded(self) -> None:
        """To be called after a CUDA graph has recorded a step, before its first replay."""
        self._fused.write_addresses()

    def __call__(self, settings: DeviceHyper, scale: LossScale | None) -> Updated:
        done = self._fused(settings.values, None if scale is None else scale.scale.reciprocal())
        if scale is not None:
            scale.update(done.skipped)
        return done
