"""timm's models as backbones, by the name `timm/NAME`: random weights, pooled features, no classifier, no dropout.

timm is a library of more than a thousand models that others keep up. So they are not written here. Nothing is
downloaded: a new model has random weights, and names that would fetch a file are not in timm's list.
"""

import difflib
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from shards.errors import UserError
from shards.text import find_reason

PREFIX = "timm/"

Levels = tuple[float, float, float]  # of the color channels, 0 to 1


def build_timm_backbone(name: str) -> tuple[nn.Module, int]:
    """Build the model `timm/NAME`, which maps [N, 3, H, W] to [N, D]. Returns it and its D.

    A model that can take images of any size is told to. Dropout and drop path are off: they would draw from torch's
    global generator, and a resumed run would draw other numbers. Raises what `check_timm_name` does.
    """
    check_timm_name(name)
    network = _create_model(name, pretrained=False)
    for module in network.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for rate in ("drop_prob", "drop_rate"):  # of timm's drop path and drop block; of models that call F.dropout
            if hasattr(module, rate):
                setattr(module, rate, 0.0)
    return network, network.head_hidden_size


def load_timm_model(name: str) -> tuple[nn.Module, Levels, Levels]:
    """Build a model with the weights that timm downloads, or has downloaded, for it: `timm/NAME` or `timm/NAME.TAG`.

    Returns it with the mean and the standard deviation that its images are normalized by. Raises what `check_timm_name`
    does, and UserError for a model without such weights, and where they cannot be had.
    """
    model, _, tag = name.removeprefix(PREFIX).partition(".")
    check_timm_name(PREFIX + model)
    tags = [
        known.partition(".")[2]
        for known in _import_timm(name).list_pretrained(f"{model}*")
        if known.partition(".")[0] == model
    ]
    if not tags or (tag and tag not in tags):
        which = f"timm has weights of {', '.join(tags)}" if tags else "timm has no weights for this model"
        raise UserError(f"--backbone {name}: {which}. timm.list_pretrained() lists all.")
    try:
        network = _create_model(name, pretrained=True)
    except Exception as error:  # the hub, the network and the cache each have exceptions of their own
        reason = find_reason(error)
        raise UserError(
            f"--backbone {name}: its weights could not be downloaded ({reason}). Download them where "
            "there is a network, or pass --checkpoint FILE."
        ) from error
    about: Any = network.pretrained_cfg
    return network, about["mean"], about["std"]


def _create_model(name: str, pretrained: bool) -> Any:
    """Create a model without its classifier, for images of any size where it can be told to."""
    create, model = _import_timm(name).create_model, name.removeprefix(PREFIX)
    try:
        return create(model, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:  # it has no such setting, as convolutional models do not need one
        return create(model, pretrained=pretrained, num_classes=0)


def check_timm_name(name: str) -> None:
    """Raise UserError where timm is not installed, or has no model of this name, with the nearest one."""
    known, model = _import_timm(name).list_models(), name.removeprefix(PREFIX)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=1)
        hint = f"Did you mean {PREFIX}{near[0]}? " if near else ""
        raise UserError(f"backbone {name!r}: timm has no model of this name. {hint}timm.list_models() lists all.")


def find_classifiers(network: nn.Module) -> tuple[str, ...] | None:
    """Return the names that a model's classifiers have in timm. Return None for a network that is not timm's."""
    about: Any = getattr(network, "pretrained_cfg", None)
    if about is None:
        return None
    names = about.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def number_timm_layers(network: nn.Module) -> dict[str, int] | None:
    """Return the number of the layer of each parameter, from 0 at the input. Return None where timm does not tell."""
    find_matcher: Any = getattr(network, "group_matcher", None)
    if find_matcher is None:
        return None
    from timm.models import group_parameters

    layers: dict[str, int] = group_parameters(network, find_matcher(coarse=False), reverse=True)
    return layers


def _import_timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"backbone {name!r}: the package timm is not installed. Run pip install -e '.[timm]', or choose another "
            "backbone."
        ) from error
    return timm
