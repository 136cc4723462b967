"""Make the views of an image with Pillow and torchvision, as other people's loaders do.

An augmentation whose probability is 0 is left out. The random numbers are torch's.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from PIL import Image, ImageFilter
from torch import Tensor

from pipelines.crops import CropRecipe
from pipelines.photometric import BLUR_RADIUS, MEAN, SOLARIZE_THRESHOLD, STD, PhotometricRecipe

RATIO = (3 / 4, 4 / 3)  # of a window's width to its height
BICUBIC = v1.InterpolationMode.BICUBIC

Views = list[Tensor]  # float32 [B, 3, S, S] for each view
Window = tuple[int, int, int, int]  # top, left, height, width in pixels
Levels = npt.NDArray[np.uint8]  # [S, S, 3]
File = str | os.PathLike[str] | io.BytesIO


@dataclass(frozen=True)
class ViewRecipe:
    """What distinguishes one view of an image from another."""

    size: int
    """side of the view, pixels"""
    scale: tuple[float, float]
    """least and greatest share of the image's area"""
    blur: float
    """probability of blur"""
    solarize: float
    """probability of solarize"""


def list_view_recipes(crops: CropRecipe, augment: PhotometricRecipe) -> list[ViewRecipe]:
    """Return the recipe of each view, global views first."""
    return [
        ViewRecipe(crops.global_size, crops.global_scale, augment.blur_global_1, 0.0),
        ViewRecipe(crops.global_size, crops.global_scale, augment.blur_global_2, augment.solarize_global_2),
    ] + [ViewRecipe(crops.local_size, crops.local_scale, augment.blur_locals, 0.0)] * crops.locals


class PillowBlur:
    """Apply Pillow's GaussianBlur with a radius uniform in `radii`, in pixels."""

    def __init__(self, radii: tuple[float, float]) -> None:
        self._radii = radii

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self._radii).item()))


def make_tensor_blur(sigmas: tuple[float, float]) -> v2.GaussianBlur:
    """Return torchvision's blur of tensors, as wide as ours."""
    return v2.GaussianBlur(2 * BLUR_RADIUS + 1, sigmas)


def make_transform(
    kit: Any, view: ViewRecipe, augment: PhotometricRecipe, blur: Callable[..., Any], to_float: Callable[..., Any]
) -> Any:
    """Return the transform of one view.

    `kit` is one of torchvision's two modules. `blur` makes its blur from the range of sigma. `to_float` turns 8-bit
    levels into numbers in 0 to 1.
    """
    jitter = kit.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps = [
        (1.0, kit.RandomResizedCrop(view.size, view.scale, RATIO, BICUBIC, antialias=True)),
        (augment.flip, kit.RandomHorizontalFlip(augment.flip)),
        (augment.jitter, kit.RandomApply([jitter], augment.jitter)),
        (augment.grayscale, kit.RandomGrayscale(augment.grayscale)),
        (view.blur, kit.RandomApply([blur(augment.blur_sigma)], view.blur)),
        (view.solarize, kit.RandomSolarize(SOLARIZE_THRESHOLD, view.solarize)),
        (1.0, to_float),
        (1.0, kit.Normalize(MEAN, STD)),
    ]
    return kit.Compose([step for probability, step in steps if probability])


class MultiCrop:
    """Turn an image into its views, each by a transform of its own."""

    def __init__(self, transforms: list[Callable[[Any], Tensor]]) -> None:
        self._transforms = transforms

    def __call__(self, image: Any) -> Views:
        return [transform(image) for transform in self._transforms]


def make_pillow_crops(crops: CropRecipe, augment: PhotometricRecipe) -> MultiCrop:
    """Return torchvision's v1 transforms, which take a Pillow image."""
    return MultiCrop(
        [make_transform(v1, view, augment, PillowBlur, v1.ToTensor()) for view in list_view_recipes(crops, augment)]
    )


def make_tensor_crops(crops: CropRecipe, augment: PhotometricRecipe) -> MultiCrop:
    """Return torchvision's v2 transforms, which take uint8 [3, H, W]."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return MultiCrop(
        [make_transform(v2, view, augment, make_tensor_blur, to_float) for view in list_view_recipes(crops, augment)]
    )


def load_pillow(file: File) -> Image.Image:
    """Return an image in RGB."""
    with Image.open(file) as image:
        return image.convert("RGB")


def load_tensor(file: File) -> Tensor:
    """Return an image as uint8 [3, H, W]. Pillow decodes it: torchvision has announced the end of its own decoders."""
    return v2.functional.pil_to_tensor(load_pillow(file))


def crop_pillow(sample: bytes, window: Window, size: int) -> Levels:
    """Crop and resize with Pillow's own functions, bicubic. This is the reference of the parity figures."""
    top, left, height, width = window
    crop = load_pillow(io.BytesIO(sample)).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))


def crop_v1(sample: bytes, window: Window, size: int) -> Levels:
    """Crop and resize as torchvision's v1 transforms do."""
    image = load_pillow(io.BytesIO(sample))
    return np.asarray(v1.functional.resized_crop(image, *window, [size, size], BICUBIC))


def crop_v2(sample: bytes, window: Window, size: int) -> Levels:
    """Crop and resize as torchvision's v2 transforms do on tensors."""
    image = load_tensor(io.BytesIO(sample))
    return v2.functional.resized_crop(image, *window, [size, size], BICUBIC).permute(1, 2, 0).numpy()
