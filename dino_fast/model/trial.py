"""A trial of a backbone: one batch on torch's meta device, before a run begins. It takes no memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from dino_fast.model.backbones import build_backbone
from shards.errors import UserError
from shards.text import find_reason

_IMAGES = 2  # of a batch: batch norm needs two values


def check_size(name: str, side: int, flag: str) -> None:
    """Raise UserError, which names `flag`, where a backbone cannot train on square images of `side` pixels."""
    count_positions(name, side, flag)


def count_positions(name: str, side: int, flag: str) -> int | None:
    """Return how many values of an image, at least, a batch norm of this backbone takes the mean of, by channel.

    That is 1 where the smallest feature map is one pixel, and None for a backbone without batch norm. Raises what
    `check_size` does.
    """
    with _explain(name, side, flag):
        return _try_backbone(name, side)


@cache
def _try_backbone(name: str, side: int) -> int | None:
    """Return what `count_positions` does. Raises whatever the model raises, and ValueError for what cannot be used."""
    found: list[int] = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found.append(inputs[0].numel() // inputs[0].shape[1] // _IMAGES)

    with torch.device("meta"):
        network, width = build_backbone(name)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_hook(note)
        with _RefuseRandomNumbers(), sdpa_kernel(SDPBackend.MATH):
            features = network(torch.empty(_IMAGES, 3, side, side))
            if not isinstance(features, Tensor) or features.shape != (_IMAGES, width):
                raise ValueError("its output is not one vector of features for each image")
            features.sum().backward()
            if idle := [
                key for key, weight in network.named_parameters() if weight.requires_grad and weight.grad is None
            ]:
                raise ValueError(f"its features do not depend on {idle[0]}, which would not be trained")
    return min(found, default=None)


@contextmanager
def _explain(name: str, side: int, flag: str) -> Iterator[None]:
    """Turn whatever a model raises about a size into a UserError of one line."""
    try:
        yield
    except UserError:  # there is no such backbone
        raise
    except Exception as error:  # a model says by an assertion, or by torch's words for shapes, what it cannot take
        reason = find_reason(error)
        raise UserError(
            f"{flag} {side}: backbone {name} cannot train on images of this size ({reason}). Give a size "
            "that it takes, or another model: convolutional ones such as timm/convnext_atto take any size, and "
            "timm/vit_tiny_patch16_224 takes multiples of 16."
        ) from error


class _RefuseRandomNumbers(TorchDispatchMode):
    """Raises ValueError where a network draws random numbers: a resumed run would draw others."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"it draws random numbers in training, by torch's {func}")
        return func(*args, **(kwargs or {}))
