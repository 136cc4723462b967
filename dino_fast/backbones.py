"""The backbones: torchvision's ResNets without their classifier."""

import contextlib
import difflib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from shards.errors import UserError

_RESNETS = {
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
    "resnet101": models.resnet101,
}
BACKBONES = tuple(_RESNETS)


class GlobalAveragePool(nn.Module):
    """[N, D, H, W] → [N, D, 1, 1], as nn.AdaptiveAvgPool2d(1), whose gradient loses the channels-last layout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (x.shape[-2], x.shape[-1]))


def build_backbone(name: str) -> tuple[nn.Module, int]:
    """A freshly initialised backbone, [N, 3, H, W] → [N, D], and its D.

    The last batch norm of a residual block starts at 1 (torchvision's default), as published. Weights are drawn from
    torch's global generator. Raises UserError for a name that is not in `BACKBONES`.
    """
    if name not in _RESNETS:
        near = difflib.get_close_matches(name, BACKBONES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown backbone {name!r}: {hint}the choices are {', '.join(BACKBONES)}")
    backbone = _RESNETS[name](weights=None)
    features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    backbone.avgpool = GlobalAveragePool()
    return backbone, features


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it, every module is in its own again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
