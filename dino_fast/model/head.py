"""The DINO projection head: an MLP to a unit-length bottleneck, then a weight-normalized map to K prototypes.

`DINOHead` in facebookresearch/dino `vision_transformer.py`; Caron et al. 2021, appendix C. Parameter names are the
published ones, so released heads load.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadRecipe:
    """The projection head, which is trained on top of the backbone and not used after the training."""

    out_dim: Annotated[int, Ge(2)] = 65536
    """number of prototypes K, the width of the logits"""
    hidden_dim: Annotated[int, Ge(1)] = 2048
    """width of the MLP's hidden layers"""
    bottleneck_dim: Annotated[int, Ge(1)] = 256
    """width of the unit-length features before the last layer"""
    layers: Annotated[int, Ge(1)] = 3
    """number of linear layers of the MLP"""
    batch_norm: bool = False
    """whether a batch norm follows each hidden linear layer"""
    norm_last_layer: bool = True
    """whether the prototypes stay at length 1, instead of having learned lengths"""


class WeightNormLinear(nn.Module):
    """Computes x · Wᵀ, where a row of W is `weight_g` · `weight_v` / ‖`weight_v`‖ (Salimans & Kingma 2016).

    weight_v: [out, in], weight_g: [out, 1]. `torch.nn.utils.weight_norm` does the same through hooks that break under
    compilation; this is its operation alone, with the same state.
    """

    def __init__(self, in_features: int, out_features: int, learn_lengths: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=learn_lengths)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # nn.Linear's own, as published

    def weight(self) -> Tensor:
        """Return the rows in use, [out, in], in float32 or better whatever the type of the parameters."""
        dtype = torch.promote_types(self.weight_v.dtype, torch.float32)
        return torch._weight_norm(self.weight_v.to(dtype), self.weight_g.to(dtype), 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in] to [N, out], in float16 under float16 autocast, otherwise in float32 or better.

        The logits are cosines that the loss divides by as little as 0.04: rounded to bfloat16 they would be wrong by
        0.05 after that, so a bfloat16 run multiplies here in float32 (TF32 where the run allows it).
        """
        device = x.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        with torch.autocast(device, enabled=False):
            weight = self.weight()
            dtype = torch.float16 if half else weight.dtype
            return F.linear(x.to(dtype), weight.to(dtype))


class DinoHead(nn.Module):
    """Maps backbone features [N, in_dim] to logits [N, K], which are cosines with `norm_last_layer`."""

    def __init__(self, in_dim: int, recipe: HeadRecipe) -> None:
        super().__init__()
        self.mlp = _mlp(in_dim, recipe)
        self.last_layer = WeightNormLinear(recipe.bottleneck_dim, recipe.out_dim, not recipe.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(_unit_length(self.mlp(x)))


def _mlp(in_dim: int, recipe: HeadRecipe) -> nn.Module:
    if recipe.layers == 1:
        return _linear(in_dim, recipe.bottleneck_dim)
    modules: list[nn.Module] = []
    width = in_dim
    for _ in range(recipe.layers - 1):
        modules.append(_linear(width, recipe.hidden_dim))
        if recipe.batch_norm:
            modules.append(nn.BatchNorm1d(recipe.hidden_dim))
        modules.append(nn.GELU())
        width = recipe.hidden_dim
    return nn.Sequential(*modules, _linear(width, recipe.bottleneck_dim))


def _linear(in_dim: int, out_dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _unit_length(x: Tensor) -> Tensor:
    """Scale the rows of x to length 1, in float32 or better. x's own type can hold the smallest length."""
    eps = 1e-6 if x.dtype.itemsize < 4 else 1e-12
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=eps)
