"""Optimizers, gradient clipping and the EMA teacher, with the semantics of the published code.

facebookresearch/dino `utils.py` (`get_params_groups`, `clip_gradients`, `LARS`) and `main_dino.py`. Everything works on
lists of tensors and none of it reads the device from the host.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.optim import Optimizer

from dino_fast.durations import Duration


@dataclass(frozen=True)
class OptimRecipe:
    """The optimizer, its schedules and the EMA teacher."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    """update rule; sgd and lars have momentum 0.9"""
    lr: Annotated[float, Ge(0)] = 0.03
    """peak learning rate for a global batch of 256 images; it is scaled linearly to the batch in use"""
    min_lr: Annotated[float, Ge(0)] = 1e-6
    """learning rate at the end of the cosine; it is not scaled"""
    warmup_epochs: Duration = 10
    """length of the warm-up, in which the learning rate rises from 0 to its peak"""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """weight decay at the first step; biases and norms never have any"""
    weight_decay_end: Annotated[float, Ge(0)] = 1e-4
    """weight decay at the end of its cosine"""
    clip_grad: Annotated[float, Ge(0)] = 3.0
    """largest gradient norm of each parameter tensor by itself; 0 does not clip"""
    freeze_last_layer_epochs: Duration = 1
    """length of the start, in which the head's last layer is not trained"""
    ema_momentum: Annotated[float, Ge(0), Le(1)] = 0.996
    """share of itself that the EMA teacher keeps at the first step; it rises to 1 along a cosine"""


class LARS(Optimizer):
    """SGD with momentum whose update of each tensor is rescaled to `eta` times that tensor's norm (You et al. 2017).

    Weight decay and the rescaling apply to tensors that are not 1-D. A tensor whose norm, or whose update's norm, is
    zero is not rescaled. A tensor without a gradient is left alone: it has no decay, and its momentum stays.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            self._update([p for p in with_grad if p.ndim == 1], group, adapt=False)
            self._update([p for p in with_grad if p.ndim != 1], group, adapt=True)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any], adapt: bool) -> None:
        if not params:
            return
        updates: Any = [p.grad for p in params]
        if adapt:
            updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
            updates = torch._foreach_mul(updates, _trust_ratios(params, updates, group["eta"]))
        velocities = [self._velocity(p) for p in params]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        torch._foreach_add_(params, velocities, alpha=-group["lr"])

    def _velocity(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def _trust_ratios(params: list[Tensor], updates: list[Tensor], eta: float) -> list[Tensor]:
    size = torch.stack(torch._foreach_norm(params))
    change = torch.stack(torch._foreach_norm(updates))
    ratios = torch.where((size > 0) & (change > 0), eta * size / change, 1.0)
    return list(ratios.unbind())


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into two groups: those with weight decay, and biases and 1-D tensors."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (spared if name.endswith(".bias") or param.ndim == 1 else decayed).append(param)
    return [
        {"params": decayed, "decays": True, "weight_decay": 0.0},
        {"params": spared, "decays": False, "weight_decay": 0.0},
    ]


def build_optimizer(recipe: OptimRecipe, student: nn.Module) -> Optimizer:
    """Build the recipe's optimizer over the student. Its rates are 0 until `set_hyper` gives it those of a step."""
    groups = parameter_groups(student)
    if recipe.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, foreach=True)
    if recipe.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, foreach=True)
    return LARS(groups, momentum=0.9)


def set_hyper(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Give an optimizer from `build_optimizer` the rates of its next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale down, in place, each gradient whose norm is above `max_norm` to about that norm, each tensor by itself.

    A `max_norm` of 0 clips nothing. Returns the norms before clipping, [parameters] on their device, 0 where a
    parameter has no gradient. At least one must have a gradient.
    """
    found = [p.grad for p in parameters]
    grads = [grad for grad in found if grad is not None]
    norms = torch._foreach_norm(grads)
    if max_norm > 0:
        shrink = (max_norm / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(shrink.unbind()))
    none, known = torch.zeros_like(norms[0]), iter(norms)
    return torch.stack([none if grad is None else next(known) for grad in found])


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set each teacher parameter to teacher · momentum + student · (1 − momentum). Buffers stay as they are."""
    averages: list[Tensor] = list(teacher.parameters())
    latest: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(averages, latest, 1 - momentum)
