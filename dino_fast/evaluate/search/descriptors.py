"""Descriptors: one vector for each image, by which images are compared.

The published retrieval takes the [CLS] token, and with several scales the sum over the scales. The published copy
detection joins the [CLS] token with the generalized mean (GeM, Radenovic et al. 2018) of the patch tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_fast.model.vit import VisionTransformer
from shards.errors import UserError

SCALES = (1.0, 2**-0.5, 0.5)  # of the published multi-scale descriptors

_LEAST = 1e-6  # values of patch tokens below it are raised to it before their power is taken: negative ones vanish
_SMALLEST_SIDE = 32  # pixels

Box = tuple[float, float, float, float]


# An image becomes a network's input


def shrink(image: Image.Image, size: int, box: Box | None = None) -> Image.Image:
    """Cut out a box, and shrink the longer side to `size` pixels. A smaller image is not enlarged.

    box: left, top, right, bottom, pixels. The filter is Lanczos, as published. A side under 32 pixels is stretched to
    32, because some networks take no smaller images.
    """
    image = cut_box(image, box) if box else image.copy()
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    sides = [max(side, _SMALLEST_SIDE) for side in image.size]
    return image if list(image.size) == sides else image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)


def cut_box(image: Image.Image, box: Box) -> Image.Image:
    """Return the part of the image in a box, in whole pixels: at least one."""
    left, top = (min(max(round(edge), 0), side - 1) for edge, side in zip(box[:2], image.size, strict=True))
    right, bottom = (min(round(edge), side) for edge, side in zip(box[2:], image.size, strict=True))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def squash(image: Image.Image, size: int) -> Image.Image:
    """Resize to a square of `size` pixels, whatever the aspect ratio. The filter is bicubic, as published."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


# A network's input becomes a descriptor


class Descriptor(nn.Module):
    """Maps images to descriptors that are not normalized."""

    def __init__(self, backbone: nn.Module, gem: float | None = None, scales: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.backbone, self.gem, self.scales = backbone, gem, tuple(scales)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to [N, D]: the sum over the scales of the features of the scaled images."""
        total = torch.zeros((), dtype=images.dtype, device=images.device)
        for scale in self.scales:
            total = total + self._describe(scale_images(images, scale))
        return total

    def _describe(self, images: Tensor) -> Tensor:
        features: Tensor = (
            self.backbone(images) if self.gem is None else describe_by_gem(self.backbone, images, self.gem)
        )
        return features

    def __str__(self) -> str:
        features = "[CLS] or pooled features" if self.gem is None else f"with GeM (p = {self.gem:g})"
        return f"{features}, {len(self.scales)} scale{'s' if len(self.scales) > 1 else ''}"


def scale_images(images: Tensor, scale: float) -> Tensor:
    """Resize images [N, 3, H, W] by a factor, bilinear without antialiasing, as published."""
    return images if scale == 1 else F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)


def describe_by_gem(backbone: nn.Module, images: Tensor, power: float) -> Tensor:
    """Map images [N, 3, H, W] to [N, D].

    Of a transformer these are its feature and the generalized mean of its patch tokens, joined. Of a convolutional
    network it is the generalized mean of its last map alone.
    """
    if isinstance(backbone, VisionTransformer):
        (tokens,) = backbone.last_tokens(images, 1)
        return torch.cat([tokens[:, 0], compute_gem(tokens[:, 1:], power)], dim=1)
    timm: Any = backbone
    found = timm.forward_features(images) if hasattr(backbone, "forward_features") else read_last_map(backbone, images)
    if found.ndim == 3:
        patches = found[:, getattr(timm, "num_prefix_tokens", 0) :]
        return torch.cat([timm.forward_head(found), compute_gem(patches, power)], dim=1)
    channels_last = getattr(timm, "output_fmt", "NCHW") == "NHWC"
    return compute_gem(found.flatten(1, 2) if channels_last else found.flatten(2).transpose(1, 2), power)


def compute_gem(patches: Tensor, power: float) -> Tensor:
    """Return the generalized mean over the patches of [N, P, D]: [N, D]. Values below 1e-6 count as 1e-6."""
    return patches.clamp(min=_LEAST).pow(power).mean(1).pow(1 / power)


def read_last_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return what a convolutional network's `avgpool` is given, [N, C, h, w]. Raises UserError without one."""
    pool = getattr(backbone, "avgpool", None)
    if not isinstance(pool, nn.Module):
        raise UserError("--gem: this backbone has neither patch tokens nor a last map. Leave the flag out.")
    found: list[Tensor] = []
    with pool.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
        backbone(images)
    return found[-1]
