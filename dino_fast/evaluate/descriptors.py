"""Descriptors: one vector for each image, by which images are compared.

The published retrieval takes the [CLS] token, and with several scales the sum over the scales. The published copy
detection joins the [CLS] token with the generalized mean (GeM, Radenovic et al. 2018) of the patch tokens.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_fast.evaluate.features import show_progress
from dino_fast.evaluate.images import UnreadableImage
from dino_fast.model.vit import VisionTransformer
from pipelines.loader import count_default_threads
from pipelines.photometric import Normalization, normalize
from shards.errors import UserError

SCALES = (1.0, 2**-0.5, 0.5)  # of the published multi-scale descriptors

_LEAST = 1e-6  # values of patch tokens below it are raised to it before their power is taken: negative ones vanish
_SMALLEST_SIDE = 32  # pixels
_PIXELS = 64 * 224 * 224  # of the images that go through the backbone at once
_AHEAD = 64  # images that are decoded ahead

Prepare = Callable[[Image.Image], Image.Image]
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


# Many images


@dataclass(frozen=True)
class Described:
    """Descriptors of the images that could be read."""

    descriptors: Tensor
    """[n, D], float32, on the CPU, not normalized"""
    numbers: list[int]
    """[n], the images' numbers"""
    unreadable: list[str] = field(default_factory=list)
    """one line for each image that could not be read"""


@torch.inference_mode()
def describe_images(
    network: nn.Module,
    count: int,
    load: Callable[[int], Image.Image],
    normalization: Normalization,
    device: torch.device,
    what: str,
    *,
    skip_unreadable: bool = False,
) -> Described:
    """Compute the descriptors of images 0 to count − 1.

    load: returns an image by its number, ready for the network, and may raise UnreadableImage. It is called by several
    threads, which decode ahead. what: for the progress bar. Images of one size that follow each other go through the
    network together. Raises UserError for an image that cannot be read, unless such images are skipped.
    """
    network.to(device).to(memory_format=torch.channels_last).eval()
    parts: list[Tensor] = []
    numbers: list[int] = []
    unreadable: list[str] = []
    loaded = show_progress(load_ahead(partial(_try_to_load, load), count), what, count)
    for batch in group_by_size(_sort_out(loaded, unreadable, skip_unreadable)):
        numbers += [number for number, _ in batch]
        images = torch.from_numpy(np.stack([np.asarray(image) for _, image in batch]))
        out = torch.empty(len(images), 3, *images.shape[1:3]).contiguous(memory_format=torch.channels_last)
        normalize(images, out, normalization)
        parts.append(_run(network, out.to(device)).float().cpu())
    if not parts:
        raise UserError(f"{what}: none of the images could be read. The first reason: {unreadable[0]}")
    return Described(torch.cat(parts), numbers, unreadable)


def _run(network: nn.Module, images: Tensor) -> Tensor:
    """Run the network. Raises UserError where it cannot take images of this size, as some of timm's models cannot."""
    try:
        features: Tensor = network(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        height, width = images.shape[2:]
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"the backbone cannot take an image of {width} x {height} pixels ({reason.rstrip('.')}). Pass another "
            "size, or another backbone."
        ) from error
    if not features.isfinite().all():
        raise UserError("--checkpoint: its features are not finite, because the run diverged. Pass an earlier one.")
    return features


def _try_to_load(load: Callable[[int], Image.Image], number: int) -> tuple[int, Image.Image | UnreadableImage]:
    try:
        return number, load(number)
    except UnreadableImage as error:
        return number, error


def _sort_out(
    loaded: Iterable[tuple[int, Image.Image | UnreadableImage]], unreadable: list[str], skip: bool
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the images, and note why others could not be read. Raises UserError for those unless they are skipped."""
    for number, image in loaded:
        if isinstance(image, UnreadableImage):
            if not skip:
                raise UserError(f"cannot read the image {image}. Replace it, or take it out of the set.") from image
            unreadable.append(str(image))
        else:
            yield number, image


def load_ahead(load: Callable[[int], Any], count: int) -> Iterator[Any]:
    """Yield load(0) to load(count − 1), in order. As many threads as there are cores do the work ahead."""
    pool = ThreadPoolExecutor(count_default_threads(), thread_name_prefix="describe")
    pending: collections.deque[Future[Any]] = collections.deque()
    try:
        for number in range(count):
            pending.append(pool.submit(load, number))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def group_by_size(images: Iterable[tuple[int, Image.Image]]) -> Iterator[list[tuple[int, Image.Image]]]:
    """Yield lists of images that follow each other and have one size. A list has at most 64 · 224² pixels."""
    group: list[tuple[int, Image.Image]] = []
    for number, image in images:
        size = image.size
        if group and (group[0][1].size != size or (len(group) + 1) * size[0] * size[1] > _PIXELS):
            yield group
            group = []
        group.append((number, image))
    if group:
        yield group
