"""Flip, color jitter, grayscale, blur and solarize: the recipe, its parameters from counters, and the exact reference.

The semantics are torchvision's on 8-bit tensors, operation by operation, and each operation rounds to 8 bits.
All functions work on a whole batch of images. An operation touches only the images whose parameters ask for it.
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

from pipelines.random_numbers import AUGMENT_STREAM, draw_uniform

Probability = Annotated[float, Ge(0), Le(1)]
Strength = Annotated[float, Ge(0), Le(1)]

PerImage = npt.NDArray[np.float64]  # [B], one number for each image
Operation = Callable[[Tensor, PerImage], Tensor]  # on uint8 [B, S, S, 3]

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NONE = -1  # in place of an operation
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # factors that change nothing, by operation
_ORDERS = np.array(list(permutations(range(4))))
_DRAWS = 11
# Weights of red, green and blue in Pillow. In float32 every sum of levels by these weights is exact, in any order.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)
BLUR_RADIUS = 7  # pixels: three boxes reach 6 up to a sigma of 2.45; the kernels for GPUs and cores have 7
SOLARIZE_THRESHOLD = 128
# On a CPU, many more pixels at a time than these take up to four times as long (bench/LOG.md).
CHUNK_PIXELS = 2**19
# Mean and standard deviation of ImageNet's channels. Every published DINO model was trained with these.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PerChannel = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class Normalization:
    """What is subtracted from each channel, and what it is then divided by. Black is 0 and white is 1."""

    mean: PerChannel = MEAN
    """means of the channels"""
    std: PerChannel = STD
    """standard deviations of the channels, above 0"""


IMAGENET = Normalization()


@dataclass(frozen=True)
class PhotometricRecipe:
    """The published augmentation (facebookresearch/dino, `DataAugmentationDINO`)."""

    flip: Probability = 0.5
    """probability of a horizontal flip"""
    jitter: Probability = 0.8
    """probability of color jitter"""
    brightness: Strength = 0.4
    """color jitter: the factor is uniform in 1 ± this"""
    contrast: Strength = 0.4
    """color jitter: the factor is uniform in 1 ± this, around the image's mean gray level"""
    saturation: Strength = 0.2
    """color jitter: the factor is uniform in 1 ± this"""
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.1
    """color jitter: the shift is uniform in ± this share of the color circle"""
    grayscale: Probability = 0.2
    """probability of grayscale"""
    blur_global_1: Probability = 1.0
    """probability of blur in the first global view"""
    blur_global_2: Probability = 0.1
    """probability of blur in the second global view"""
    blur_locals: Probability = 0.5
    """probability of blur in a local view"""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """least and greatest standard deviation of the blur in pixels, uniform between them"""
    solarize_global_2: Probability = 0.2
    """probability of solarize in the second global view"""


@dataclass(frozen=True)
class AugmentParameters:
    """What is done to every view of every image. Arrays are [views, B]; some have 4 numbers more, [views, B, 4]."""

    flip: npt.NDArray[np.bool_]
    """whether the view is flipped [views, B]"""
    jitter: npt.NDArray[np.bool_]
    """whether color jitter applies [views, B]"""
    order: npt.NDArray[np.int64]
    """the four jitter operations in the order in which they apply [views, B, 4]"""
    factor: npt.NDArray[np.float64]
    """three factors and the shift of the hue, by operation [views, B, 4]"""
    grayscale: npt.NDArray[np.bool_]
    """whether the view becomes gray [views, B]"""
    blur_sigma: npt.NDArray[np.float64]
    """standard deviation of the blur in pixels, 0 for no blur [views, B]"""
    solarize: npt.NDArray[np.bool_]
    """whether the view is solarized [views, B]"""

    def __getitem__(self, key: Any) -> "AugmentParameters":
        """Index all arrays alike, for one view ([B] and [B, 4]), for some views or for some images."""
        return AugmentParameters(*(getattr(self, field.name)[key] for field in fields(self)))


def draw_augment_parameters(
    recipe: PhotometricRecipe, seed: int, epoch: int, ids: npt.NDArray[np.int64], views: int
) -> AugmentParameters:
    """Return the parameters of samples `ids` [B] in each of `views` views. The first two views are the global ones."""
    numbers = np.arange(views)
    u = draw_uniform(seed, AUGMENT_STREAM, epoch, ids[None, :], numbers[:, None], _DRAWS)
    blur = np.array([recipe.blur_global_1, recipe.blur_global_2] + [recipe.blur_locals] * (views - 2))[:, None]
    solarize = np.where(numbers == 1, recipe.solarize_global_2, 0.0)[:, None]
    strengths = np.array([recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue])
    low, high = recipe.blur_sigma
    return AugmentParameters(
        flip=u[..., 0] < recipe.flip,
        jitter=u[..., 1] < recipe.jitter,
        order=_ORDERS[(u[..., 2] * len(_ORDERS)).astype(np.int64)],
        factor=NEUTRAL + strengths * (2 * u[..., 3:7] - 1),
        grayscale=u[..., 7] < recipe.grayscale,
        blur_sigma=np.where(u[..., 8] < blur, low + (high - low) * u[..., 9], 0.0),
        solarize=u[..., 10] < solarize,
    )


def augment(
    images: Tensor, parameters: AugmentParameters, out: Tensor, normalization: Normalization = IMAGENET
) -> None:
    """Augment and normalize all views of one resolution. Every fast kernel has this contract.

    `images` is uint8 [B, V, S, S, 3] and stays as it is, `parameters` has arrays [V, B]. The result goes into `out`
    [V·B, 3, S, S]: view 0 of all images, then view 1 of all images, and so on.
    """
    batch, side = len(images), images.shape[2]
    step = batch if images.is_cuda else max(1, CHUNK_PIXELS // side**2)
    for view, target in enumerate(out.split(batch)):
        for first in range(0, batch, step):
            part = slice(first, first + step)
            normalize(augment_levels(images[part, view], parameters[view][part]), target[part], normalization)


def augment_levels(images: Tensor, parameters: AugmentParameters) -> Tensor:
    """Apply everything but the normalization to one view.

    Takes and returns uint8 [B, S, S, 3]. `images` stays as it is, `parameters` has arrays [B].
    """
    images = images.clone()
    _apply_where(images, parameters.flip, lambda chosen, _: chosen.flip(2), parameters.flip)
    operations = active_operations(parameters)
    for turn in range(4):
        for operation, adjust in _JITTER.items():
            _apply_where(images, operations[:, turn] == operation, adjust, parameters.factor[:, operation])
    _apply_where(images, parameters.grayscale, lambda chosen, _: to_grayscale(chosen), parameters.grayscale)
    _apply_where(images, parameters.blur_sigma > 0, gaussian_blur, parameters.blur_sigma)
    _apply_where(images, parameters.solarize, lambda chosen, _: solarize(chosen), parameters.solarize)
    return images


def active_operations(parameters: AugmentParameters) -> npt.NDArray[np.int64]:
    """Return the jitter operations that change an image [..., 4], in their order and followed by NONE.

    A factor of exactly 1, or a shift of 0, leaves its operation out, as torchvision does for a strength of 0.
    """
    changes = parameters.jitter[..., None] & (parameters.factor != NEUTRAL)  # by operation
    active = np.take_along_axis(changes, parameters.order, -1)
    first = np.argsort(~active, axis=-1, kind="stable")
    return np.take_along_axis(np.where(active, parameters.order, NONE), first, -1)


def _apply_where(
    images: Tensor, chosen: npt.NDArray[np.bool_], operation: Operation, parameter: npt.NDArray[Any]
) -> None:
    """Replace the `chosen` [B] images by operation(images, parameters)."""
    places = np.flatnonzero(chosen)
    if len(places):
        index = torch.from_numpy(places).to(images.device, non_blocking=True)
        images[index] = operation(images[index], parameter[places])


def _broadcast(values: PerImage, like: Tensor) -> Tensor:
    """Return `values` [B] as float32 [B, 1, 1, 1] on the device of `like`."""
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True).view(-1, 1, 1, 1)


def gray_levels(images: Tensor) -> Tensor:
    """Return the luma by ITU-R BT.601, rounded as Pillow does it: uint8 [B, S, S, 3] to float32 [B, S, S, 1]."""
    red, green, blue = images.unbind(-1)
    luma = red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return luma.add_(0.5).floor_().unsqueeze(-1)


def _blend(images: Tensor, other: Tensor | None, factor: PerImage) -> Tensor:
    """Return factor · images + (1 − factor) · other, clamped and cut to 8 bits. None stands for black."""
    mixed = images * _broadcast(factor, images)
    if other is not None:
        mixed = mixed.addcmul_(other, _broadcast(1 - factor, images))
    return mixed.clamp_(0, 255).to(torch.uint8)


def adjust_brightness(images: Tensor, factor: PerImage) -> Tensor:
    """Blend with black. Takes and returns uint8 [B, S, S, 3], as the following functions do."""
    return _blend(images, None, factor)


def adjust_contrast(images: Tensor, factor: PerImage) -> Tensor:
    """Blend with each image's mean gray level, which is rounded to a whole level, as in Pillow."""
    pixels = images.shape[1] * images.shape[2]
    mean = (gray_levels(images).sum((1, 2, 3), keepdim=True, dtype=torch.int64) + pixels // 2) // pixels
    return _blend(images, mean.float(), factor)


def adjust_saturation(images: Tensor, factor: PerImage) -> Tensor:
    """Blend with each image in grayscale."""
    return _blend(images, gray_levels(images), factor)


def adjust_hue(images: Tensor, shift: PerImage) -> Tensor:
    """Turn the hue by `shift` [B] of a full circle, in HSV (Smith's hexcone)."""
    images = images.to(torch.float32) / 255
    red, green, blue = images.unbind(-1)
    value, least = images.amax(-1), images.amin(-1)
    range_ = value - least
    divisor = torch.where(range_ == 0, 1.0, range_)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = (sector / 6 + _broadcast(shift, images).squeeze(-1)).remainder_(1.0) * 6
    # A channel falls from `value` by a share of `range_` that depends on its distance from the hue.
    distance = (turned.unsqueeze(-1) + torch.tensor([5.0, 3.0, 1.0], device=images.device)).remainder_(6.0)
    fall = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return value.unsqueeze(-1).sub(range_.unsqueeze(-1) * fall).clamp_(0, 1).mul_(255.999).to(torch.uint8)


def to_grayscale(images: Tensor) -> Tensor:
    """Give all channels the gray level."""
    return gray_levels(images).to(torch.uint8).expand_as(images)


def solarize(images: Tensor) -> Tensor:
    """Invert all levels from SOLARIZE_THRESHOLD on."""
    return torch.where(images >= SOLARIZE_THRESHOLD, 255 - images, images)


def gaussian_blur(images: Tensor, sigma: PerImage) -> Tensor:
    """Blur with `sigma` [B] pixels as Pillow does, but for its rounding between passes. Edge pixels go on outside."""
    kernel = blur_kernels(sigma)
    weights = [_broadcast(kernel[:, tap], images) for tap in range(2 * BLUR_RADIUS + 1)]
    side = images.shape[1]
    extend = torch.from_numpy(np.pad(np.arange(side), BLUR_RADIUS, "edge")).to(images.device, non_blocking=True)
    blurred = images.to(torch.float32)
    for axis in (1, 2):
        padded = blurred.index_select(axis, extend)
        blurred = padded.narrow(axis, 0, side) * weights[0]
        for tap in range(1, 2 * BLUR_RADIUS + 1):
            blurred.addcmul_(padded.narrow(axis, tap, side), weights[tap])
    return blurred.round_().to(torch.uint8)


def blur_kernels(sigma: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return kernels [..., 15] of `sigma` [...] pixels, below 2.45. Each has the sum 1; that of 0 changes nothing.

    A kernel is three box blurs of the variance sigma² / 3 each, one after another. A box has `whole` taps of one weight
    on either side, and one more of the weight that makes the variance right (Gwosdek et al. 2011, "Theoretical
    foundations of Gaussian convolution by extended box filtering"). So a small sigma blurs, too: a Gaussian that is
    sampled at whole pixels does next to nothing below 0.35.
    """
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    last = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    apart = np.abs(np.arange(-BLUR_RADIUS, BLUR_RADIUS + 1))
    reach = apart - whole[..., None]  # 0 or less: a whole tap; 1: the last one
    box = np.where(reach <= 0, 1, np.where(reach == 1, last[..., None], 0))
    box = box / box.sum(-1, keepdims=True)
    spectrum = np.fft.rfft(np.fft.ifftshift(box, axes=-1))
    kernels: npt.NDArray[np.float64] = np.fft.fftshift(np.fft.irfft(spectrum**3, box.shape[-1]), axes=-1)
    return kernels


_JITTER = {
    BRIGHTNESS: adjust_brightness,
    CONTRAST: adjust_contrast,
    SATURATION: adjust_saturation,
    HUE: adjust_hue,
}


def normalize(images: Tensor, out: Tensor, normalization: Normalization = IMAGENET) -> None:
    """Write (level / 255 − mean) / std of uint8 [B, S, S, 3] into `out` [B, 3, S, S], channels-last, any float type."""
    scale, shift = find_scale_and_shift(normalization)
    out.permute(0, 2, 3, 1).copy_(
        (images * torch.tensor(scale, device=images.device)).add_(torch.tensor(shift, device=images.device))
    )


def find_scale_and_shift(normalization: Normalization) -> tuple[list[float], list[float]]:
    """Return what a level from 0 to 255 is multiplied by in each channel, and what is then added."""
    mean, std = normalization.mean, normalization.std
    return [1 / (255 * one) for one in std], [-one / other for one, other in zip(mean, std, strict=True)]


def build_normalize_table(dtype: torch.dtype, normalization: Normalization = IMAGENET) -> Tensor:
    """Return what `normalize` makes of each level in each channel, [3, 256]."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    out = torch.empty(1, 3, 16, 16, dtype=dtype)
    normalize(levels, out, normalization)
    return out.view(3, 256)
