"""The end of a step by Triton kernels: the counterpart of `update.TorchUpdate` on a GPU."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dino_fast.step.hyper import DeviceHyper, Hyper
from dino_fast.step.kernels.update import FusedUpdate, pack
from dino_fast.step.update import LossScale, UpdateOutput


class KernelUpdate:
    """Does what `TorchUpdate` does in three launches. The host reads nothing from the device."""

    def __init__(
        self,
        optimizer: Optimizer,
        student: nn.Module,
        teacher: nn.Module,
        clip_grad: float,
        frozen: Iterable[Tensor],
        halves: Mapping[Tensor, Tensor],
    ) -> None:
        """`halves` maps parameters to their copies in half precision, which every update writes, too."""
        self._fused = FusedUpdate(optimizer, student, teacher, clip_grad, frozen, halves)
        self._device = next(student.parameters()).device

    def prepare(self, hyper: Hyper) -> DeviceHyper:
        """Copy the hyper-parameters to the device without waiting for it."""
        host = torch.tensor([*pack(hyper), hyper.teacher_temp], dtype=torch.float32)
        if self._device.type == "cuda":
            host = host.pin_memory()
        values = host.to(self._device, non_blocking=True)
        return DeviceHyper(values[:-1], values[-1:])

    def after_load(self) -> None:
        """Look up again where all tensors lie."""
        self._fused.bind()

    def after_recording(self) -> None:
        """Tell the device where the recorded step keeps its gradients."""
        self._fused.write_addresses()

    def __call__(self, hyper: DeviceHyper, scale: LossScale | None) -> UpdateOutput:
        output = self._fused(hyper.values, None if scale is None else scale.scale.reciprocal())
        if scale is not None:
            scale.update(output.skipped)
        return output
