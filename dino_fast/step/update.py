"""The end of a step: unscale and clip the gradients, move the student by its optimizer, move the teacher towards it.

`TorchUpdate` does this with torch's own operations, on any device and in any precision; `kernel_update.KernelUpdate`
does it in three launches on a GPU. Both leave the optimizer's state where torch keeps it, so a checkpoint of one can be
loaded by the other.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino_fast.step.hyper import Hyper
from dino_fast.step.optimizers import clip_gradients, set_hyper, update_ema

FLOOR, CEILING = 2.0**-24, 2.0**126  # least and greatest loss scale; both and their reciprocals are normal in float32
INTERVAL = 2000  # steps in a row without an overflow after which the loss scale is doubled


class LossScale:
    """The factor on a float16 loss that keeps small gradients from vanishing (Micikevicius et al. 2018).

    It is halved after a step whose gradients overflowed, and doubled after `INTERVAL` steps in a row in which none did.
    It can load the state of a torch.amp.GradScaler. The scale stays on the device, and the host never waits for it.
    """

    scale: Tensor
    """float32 scalar on the device"""

    def __init__(self, device: torch.device, scale: float = 65536.0) -> None:
        self._first = scale
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.int32, device=device)  # steps since the last change

    @torch.no_grad()
    def update(self, overflowed: Tensor) -> None:
        """Choose the scale of the next step. `overflowed` is a scalar, nonzero where a gradient was not finite."""
        overflowed = overflowed.bool()
        good = torch.where(overflowed, 0, self._good + 1)
        grown = good == INTERVAL
        self.scale.mul_(torch.where(overflowed, 0.5, torch.where(grown, 2.0, 1.0))).clamp_(FLOOR, CEILING)
        self._good.copy_(torch.where(grown, 0, good))

    def reset(self) -> None:
        """Start the search for the scale again."""
        self.scale.fill_(self._first)
        self._good.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "_growth_tracker": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(torch.as_tensor(state["scale"]))
        self._good.copy_(torch.as_tensor(state["_growth_tracker"]))


class UpdateOutput(NamedTuple):
    """The figures of an update for the log: float32 tensors on the device."""

    grad_norm: Tensor
    """norm of all gradients together, unscaled, before clipping: a scalar"""
    skipped: Tensor
    """1 where a gradient was not finite and the student has stayed as it was, else 0: a scalar"""
    grad_norms: Tensor
    """norm of each of the student's parameters' gradients, in their order, 0 without a gradient: [parameters]"""


class Update(Protocol):
    """The end of a step."""

    def prepare(self, hyper: Hyper) -> Any:
        """Return the hyper-parameters in the form that `__call__` takes; it has a field `teacher_temp`."""

    def __call__(self, hyper: Any, scale: LossScale | None) -> UpdateOutput:
        """Make one update by the gradients that the student's parameters hold."""

    def after_load(self) -> None:
        """Call this after the optimizer or a network has loaded a state: copies and tensors may be outdated."""

    def after_recording(self) -> None:
        """Call this after a CUDA graph has recorded a step, before its first replay."""


class TorchUpdate:
    """Clips each gradient, steps the optimizer and updates the EMA teacher with torch's foreach operations.

    Parameters in `frozen` are left alone while the hyper-parameters freeze the last layer. The host reads whether the
    gradients were finite, which is the one wait in a step; where they were not, the student stays.
    """

    def __init__(
        self, optimizer: Optimizer, student: nn.Module, teacher: nn.Module, clip_grad: float, frozen: Iterable[Tensor]
    ) -> None:
        self._optimizer, self._student, self._teacher = optimizer, student, teacher
        self._clip_grad, self._frozen = clip_grad, list(frozen)

    def prepare(self, hyper: Hyper) -> Hyper:
        return hyper

    def after_load(self) -> None:
        pass

    def after_recording(self) -> None:
        raise RuntimeError("a step with torch's own operations cannot be recorded")

    def __call__(self, hyper: Hyper, scale: LossScale | None) -> UpdateOutput:
        if scale is not None:
            self._unscale(scale)
        norms = clip_gradients(self._student.parameters(), self._clip_grad)
        norm = torch.linalg.vector_norm(norms)
        finite = norm.isfinite()
        if hyper.freeze_last_layer:
            # Without a gradient, rather than with a zero one, a tensor gets neither weight decay nor momentum.
            for parameter in self._frozen:
                parameter.grad = None
        set_hyper(self._optimizer, hyper.lr, hyper.weight_decay)
        if finite:
            self._optimizer.step()
        if scale is not None:
            scale.update(~finite)
        update_ema(self._teacher, self._student, hyper.momentum)
        return UpdateOutput(norm, (~finite).to(norm.dtype), norms)

    @torch.no_grad()
    def _unscale(self, scale: LossScale) -> None:
        grads = [p.grad for p in self._student.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, scale.scale.reciprocal())
