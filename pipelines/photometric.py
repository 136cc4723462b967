"""Flip, colour jitter, grey, blur and solarise: the recipe, its parameters from counters, and the exact reference.

The semantics are torchvision's on 8-bit tensors, operation by operation, rounding to 8 bits after each. Everything
works on a whole batch of pictures; each picture is touched only by the operations that its parameters ask for.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Le
from torch import Tensor

from pipelines.counters import COLOURS, uniform

Probability = Annotated[float, Ge(0), Le(1)]
Strength = Annotated[float, Ge(0), Le(1)]

Parameters = npt.NDArray[np.float64]  # one number a picture
Operation = Callable[[Tensor, Parameters], Tensor]  # on uint8 [B, S, S, 3]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NONE = -1  # in place of an operation
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the factors that change nothing, by operation
_ORDERS = np.array(list(permutations(range(4))))
_DRAWS = 11
BLUR_RADIUS = 7  # pixels: 3.5 sigma at the widest published blur
SOLARIZE_THRESHOLD = 128
# On a CPU, many more pixels at once than this cost up to four times as much (bench/LOG.md).
CHUNK_PIXELS = 2**19
# The mean and deviation of ImageNet's channels that every published DINO model was trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PhotometricRecipe:
    """The published augmentation (facebookresearch/dino, `DataAugmentationDINO`)."""

    flip: Probability = 0.5
    """probability of a horizontal flip"""
    jitter: Probability = 0.8
    """probability of colour jitter"""
    brightness: Strength = 0.4
    """factor uniform in 1 ± this"""
    contrast: Strength = 0.4
    """factor uniform in 1 ± this, around the picture's grey mean"""
    saturation: Strength = 0.2
    """factor uniform in 1 ± this"""
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.1
    """shift uniform in ± this share of the circle"""
    grey: Probability = 0.2
    """probability of losing all colour"""
    blur_global_1: Probability = 1.0
    """probability of blur in the first global view"""
    blur_global_2: Probability = 0.1
    """probability of blur in the second global view"""
    blur_locals: Probability = 0.5
    """probability of blur in a local view"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """standard deviation of the blur in pixels, uniform between these"""
    solarize_global_2: Probability = 0.2
    """probability of solarising the second global view"""


@dataclass(frozen=True)
class Colours:
    """Parameters of every view and picture. Arrays are [views, B] and, for the jitter, [views, B, 4]."""

    flip: npt.NDArray[np.bool_]
    jitter: npt.NDArray[np.bool_]
    order: npt.NDArray[np.int64]  # the four operations in the order in which they apply
    factor: npt.NDArray[np.float64]  # by operation: three factors and the hue's shift
    grey: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float64]  # pixels; 0 for no blur
    solarize: npt.NDArray[np.bool_]

    def __getitem__(self, key: Any) -> "Colours":
        """All arrays indexed alike: one view's parameters ([B] and [B, 4]), those of some views, of some pictures."""
        return Colours(*(getattr(self, field.name)[key] for field in fields(self)))


def draw_colours(recipe: PhotometricRecipe, seed: int, epoch: int, ids: npt.NDArray[np.int64], views: int) -> Colours:
    """The parameters of samples `ids` [B] in each of `views` views, the first two of them global."""
    numbers = np.arange(views)
    u = uniform(seed, COLOURS, epoch, ids[None, :], numbers[:, None], _DRAWS)
    blur = np.array([recipe.blur_global_1, recipe.blur_global_2] + [recipe.blur_locals] * (views - 2))[:, None]
    solarize = np.where(numbers == 1, recipe.solarize_global_2, 0.0)[:, None]
    strengths = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    low, high = recipe.blur_sigma
    return Colours(
        flip=u[..., 0] < recipe.flip,
        jitter=u[..., 1] < recipe.jitter,
        order=_ORDERS[(u[..., 2] * len(_ORDERS)).astype(np.int64)],
        factor=NEUTRAL + strengths * (2 * u[..., 3:7] - 1),
        grey=u[..., 7] < recipe.grey,
        sigma=np.where(u[..., 8] < blur, low + (high - low) * u[..., 9], 0.0),
        solarize=u[..., 10] < solarize,
    )


def augment(pictures: Tensor, colours: Colours, out: Tensor) -> None:
    """All views of one resolution: `pictures` uint8 [B, V, S, S, 3] and their `colours` [V, B], normalised into `out`
    [V·B, 3, S, S], view-major. The reference: every fast kernel has this contract."""
    batch, side = len(pictures), pictures.shape[2]
    step = batch if pictures.is_cuda else max(1, CHUNK_PIXELS // side**2)
    for view, target in enumerate(out.split(batch)):
        for first in range(0, batch, step):
            part = slice(first, first + step)
            normalise(apply_colours(pictures[part, view], colours[view][part]), target[part])


def apply_colours(pictures: Tensor, colours: Colours) -> Tensor:
    """Everything but the normalisation: uint8 [B, S, S, 3], left as they are, to the same shape."""
    pictures = pictures.clone()
    _change(pictures, colours.flip, lambda chosen, _: chosen.flip(2), colours.flip)
    operations = active_operations(colours)
    for turn in range(4):
        for operation, change in _JITTER.items():
            _change(pictures, operations[:, turn] == operation, change, colours.factor[:, operation])
    _change(pictures, colours.grey, lambda chosen, _: grey(chosen), colours.grey)
    _change(pictures, colours.sigma > 0, gaussian_blur, colours.sigma)
    _change(pictures, colours.solarize, lambda chosen, _: solarize(chosen), colours.solarize)
    return pictures


def active_operations(colours: Colours) -> npt.NDArray[np.int64]:
    """The jitter's operations that change a picture [..., 4], in their order, then NONE: a factor of exactly 1 (or a
    shift of 0) leaves its operation out, as torchvision does for a strength of 0."""
    changes = colours.jitter[..., None] & (colours.factor != NEUTRAL)  # by operation
    active = np.take_along_axis(changes, colours.order, -1)
    first = np.argsort(~active, axis=-1, kind="stable")
    return np.take_along_axis(np.where(active, colours.order, NONE), first, -1)


def _change(pictures: Tensor, chosen: npt.NDArray[np.bool_], operation: Operation, parameter: npt.NDArray[Any]) -> None:
    """Replace the `chosen` [B] pictures by operation(pictures, parameters)."""
    places = np.flatnonzero(chosen)
    if len(places):
        index = torch.from_numpy(places).to(pictures.device, non_blocking=True)
        pictures[index] = operation(pictures[index], parameter[places])


def _per_picture(values: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True).view(-1, 1, 1, 1)


def grey_levels(pictures: Tensor) -> Tensor:
    """Luma by ITU-R BT.601, rounded down: uint8 [B, S, S, 3] to float32 [B, S, S, 1]."""
    red, green, blue = pictures.unbind(-1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(-1)


def _blend(pictures: Tensor, other: Tensor | None, factor: Parameters) -> Tensor:
    """factor · pictures + (1 − factor) · other, clamped and cut to 8 bits; None stands for black."""
    mixed = pictures * _per_picture(factor, pictures)
    if other is not None:
        mixed = mixed.addcmul_(other, _per_picture(1 - factor, pictures))
    return mixed.clamp_(0, 255).to(torch.uint8)


def brightness(pictures: Tensor, factor: Parameters) -> Tensor:
    return _blend(pictures, None, factor)


def contrast(pictures: Tensor, factor: Parameters) -> Tensor:
    return _blend(pictures, grey_levels(pictures).mean((1, 2, 3), keepdim=True), factor)


def saturation(pictures: Tensor, factor: Parameters) -> Tensor:
    return _blend(pictures, grey_levels(pictures), factor)


def hue(pictures: Tensor, shift: Parameters) -> Tensor:
    """Turn the hue by `shift` [B] of a full circle, in HSV."""
    pictures = pictures.to(torch.float32) / 255
    red, green, blue = pictures.unbind(-1)
    value, least = pictures.amax(-1), pictures.amin(-1)
    range_ = value - least
    divisor = torch.where(range_ == 0, 1.0, range_)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = (sector / 6 + _per_picture(shift, pictures).squeeze(-1)).remainder_(1.0) * 6
    # Smith's hexcone: a channel falls from `value` by `range_` according to its distance from the hue.
    distance = (turned.unsqueeze(-1) + torch.tensor([5.0, 3.0, 1.0], device=pictures.device)).remainder_(6.0)
    fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return value.unsqueeze(-1).sub(range_.unsqueeze(-1) * fall).clamp_(0, 1).mul_(255.999).to(torch.uint8)


def grey(pictures: Tensor) -> Tensor:
    return grey_levels(pictures).to(torch.uint8).expand_as(pictures)


def solarize(pictures: Tensor) -> Tensor:
    return torch.where(pictures >= SOLARIZE_THRESHOLD, 255 - pictures, pictures)


def gaussian_blur(pictures: Tensor, sigma: Parameters) -> Tensor:
    """Gaussian blur with `sigma` [B] pixels: a separable 15-tap kernel, reflected at the edges, rounded to 8 bits."""
    kernel = blur_weights(sigma)
    weights = [_per_picture(kernel[:, tap], pictures) for tap in range(2 * BLUR_RADIUS + 1)]
    side = pictures.shape[1]
    reflect = torch.from_numpy(np.pad(np.arange(side), BLUR_RADIUS, "reflect")).to(pictures.device, non_blocking=True)
    blurred = pictures.to(torch.float32)
    for axis in (1, 2):
        padded = blurred.index_select(axis, reflect)
        blurred = padded.narrow(axis, 0, side) * weights[0]
        for tap in range(1, 2 * BLUR_RADIUS + 1):
            blurred.addcmul_(padded.narrow(axis, tap, side), weights[tap])
    return blurred.round_().to(torch.uint8)


def blur_weights(sigma: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The Gaussian kernels [..., 15] of `sigma` [...] pixels, each of sum 1; a sigma of 0 stands for no blur."""
    taps = np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    kernels = np.exp(-0.5 * (taps / np.where(sigma > 0, sigma, 1)[..., None]) ** 2)
    weights: npt.NDArray[np.float64] = kernels / kernels.sum(-1, keepdims=True)
    return weights


_JITTER = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}


def normalise(pictures: Tensor, out: Tensor) -> None:
    """Write (level / 255 − mean) / std of uint8 [B, S, S, 3] into `out` [B, 3, S, S], channels-last, any float."""
    scale = torch.tensor([1 / (255 * std) for std in STD], device=pictures.device)
    shift = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)], device=pictures.device)
    out.permute(0, 2, 3, 1).copy_((pictures * scale).add_(shift))


def normalised_levels(dtype: torch.dtype) -> Tensor:
    """What `normalise` makes of each level: [3, 256], by channel."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    out = torch.empty(1, 3, 16, 16, dtype=dtype)
    normalise(levels, out)
    return out.view(3, 256)
