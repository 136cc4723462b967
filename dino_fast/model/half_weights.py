"""Weights that are kept in half precision beside their float32 values, for networks that run under autocast.

Autocast casts every weight in every forward pass, with a launch and 6 bytes a value each time. Here the update of the
weights writes the cast values, too: 2 bytes a value, once a step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALVED = (nn.Conv2d, nn.Linear)  # not what is derived from them, which may compute something else


class HalfConv2d(nn.Conv2d):
    """An `nn.Conv2d` that, under autocast, multiplies by `half_weight`."""

    half_weight: Tensor
    half_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_choose_weights(self, x))


class HalfLinear(nn.Linear):
    """An `nn.Linear` that, under autocast, multiplies by `half_weight`."""

    half_weight: Tensor
    half_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *_choose_weights(self, x))


def keep_half_weights(network: nn.Module, dtype: torch.dtype) -> dict[Tensor, Tensor]:
    """Give the convolutions and linear layers below `network` copies of their parameters in `dtype`.

    Parameters and the state dict stay as they are. Returns the copies by their parameters, in the same memory layout.
    Code that changes a parameter has to change its copy.
    """
    copies: dict[Tensor, Tensor] = {}
    for module in network.modules():
        if type(module) not in HALVED:
            continue
        module.__class__ = HalfConv2d if isinstance(module, nn.Conv2d) else HalfLinear
        for name in ("weight", "bias"):
            whole: Tensor | None = getattr(module, name)
            copy = None if whole is None else whole.detach().to(dtype)
            module.register_buffer(f"half_{name}", copy, persistent=False)
            if whole is not None and copy is not None:
                copies[whole] = copy
    return copies


def _choose_weights(layer: HalfConv2d | HalfLinear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if not torch.is_autocast_enabled(x.device.type):
        return layer.weight, layer.bias
    weight: Tensor = _StandIn.apply(layer.weight, layer.half_weight)
    bias: Tensor | None = None if layer.bias is None else _StandIn.apply(layer.bias, layer.half_bias)
    return weight, bias


class _StandIn(torch.autograd.Function):
    """Returns `half`, the cast values of `whole`, and is differentiated as that cast."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, half: Tensor) -> Tensor:
        ctx.dtype = whole.dtype
        return half.view_as(half)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Without a cast that changes nothing, for the reason in sync_batchnorm.py.
        return grad if grad.dtype == ctx.dtype else grad.to(ctx.dtype), None
