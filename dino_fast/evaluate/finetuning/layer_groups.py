"""The parameters of a classifier in groups of one learning rate and one weight decay each."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dino_fast.model.timm_backbones import number_timm_layers
from dino_fast.model.vit import VisionTransformer

_SPARED = ("cls_token", "pos_embed", "reg_token", "dist_token")  # of weight decay, as in DeiT


def make_parameter_groups(
    backbone: nn.Module, head: nn.Module, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Return groups for an optimizer. `scale` is what the learning rate is multiplied by in a group.

    That is 1 for the head, `layer_decay` for the backbone's last layer, and once more for each layer before.
    """
    layers = number_layers(backbone)
    depth = max(layers.values(), default=0) + 1
    groups: dict[tuple[float, float], list[Tensor]] = {}
    named = [(name, value, layer_decay ** (depth - layers[name])) for name, value in backbone.named_parameters()]
    for name, value, scale in [*named, *((name, value, 1.0) for name, value in head.named_parameters())]:
        if value.requires_grad:
            spared = value.ndim <= 1 or name.endswith(".bias") or name.split(".")[-1] in _SPARED
            groups.setdefault((scale, 0.0 if spared else weight_decay), []).append(value)
    return [{"params": values, "scale": scale, "weight_decay": decay} for (scale, decay), values in groups.items()]


def number_layers(backbone: nn.Module) -> dict[str, int]:
    """Return the number of the layer of each parameter, from 0 at the input.

    Layers of vision transformers are the embedding, each block, and the last norm together with the last block. Those
    of other networks are the ones that timm says, or else their first modules, as layer1 to layer4 of a ResNet.
    """
    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, VisionTransformer):
        last = len(backbone.blocks)
        return {name: _number_of_block(name, last) for name in names}
    return number_timm_layers(backbone) or _number_first_modules(names)


def _number_of_block(name: str, last: int) -> int:
    module, _, rest = name.partition(".")
    if module == "blocks":
        return int(rest.partition(".")[0]) + 1
    return last if module == "norm" else 0


def _number_first_modules(names: Iterable[str]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    return {name: numbers.setdefault(name.partition(".")[0], len(numbers)) for name in names}
