"""The hyper-parameters of one step, on the host and on the device."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters of one step."""

    lr: float
    """learning rate"""
    weight_decay: float
    """weight decay, of the parameters that have any"""
    momentum: float
    """momentum of the EMA teacher, not of the optimizer"""
    teacher_temp: float
    """temperature of the teacher's softmax"""
    freeze_last_layer: bool
    """whether the head's last layer keeps its weights in this step"""


class DeviceHyper(NamedTuple):
    """The hyper-parameters of one step in the device's memory, in float32."""

    values: Tensor
    """[5], in the order of `kernels.update.pack`"""
    teacher_temp: Tensor
    """[1]"""
