"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): each image of a batch is mixed with its neighbor in it.

What is drawn for a step depends on seed and step alone. Neighbors stand in for the random pairs of other programs: the
order of a batch is random already. Pairs lie within a rank's share if it has an even number of images, and are then the
same on any number of ranks.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_STREAM = 1  # keeps these draws apart from others of a seed and a number


class Mix(NamedTuple):
    """How the images of a step are mixed."""

    share: float
    """of an image and its label; the neighbor has the rest. 1: nothing is mixed"""
    box: tuple[int, int, int, int] | None
    """top, left, bottom and right, in pixels, of what the neighbor gives; None: both images are blended"""


def draw_mix(mixup: float, cutmix: float, seed: int, step: int, side: int) -> Mix:
    """Draw how the images of a step, of `side` pixels, are mixed. `mixup`, `cutmix`: parameters of Beta(α, α), or 0.

    With both, each has half of the steps, as in DeiT.
    """
    if not mixup and not cutmix:
        return Mix(1.0, None)
    rng = np.random.default_rng([seed, step, _STREAM])
    cut = bool(cutmix) and (not mixup or rng.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = float(rng.beta(alpha, alpha))
    return _cut_box(share, rng.integers(0, side, 2).tolist(), side) if cut else Mix(share, None)


def _cut_box(share: float, center: list[int], side: int) -> Mix:
    """Return a box of 1 − share of the image around a point. What lies outside of the image is cut off."""
    half = int(side * (1 - share) ** 0.5) // 2
    top, left, bottom, right = (min(max(at + by, 0), side) for by in (-half, half) for at in center)
    return Mix(1 - (bottom - top) * (right - left) / side**2, (top, left, bottom, right))


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Return the images [B, 3, S, S], each mixed with its neighbor."""
    if mix.share == 1:
        return images
    others = images[find_neighbors(len(images), images.device)]
    if mix.box is None:
        return images * mix.share + others * (1 - mix.share)
    top, left, bottom, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return mixed


def find_neighbors(count: int, device: torch.device) -> Tensor:
    """Return 1, 0, 3, 2, …: [count], int64. The last one of an odd count is its own neighbor."""
    return (torch.arange(count, device=device) ^ 1).clamp_(max=count - 1)


def compute_mixed_loss(logits: Tensor, labels: Tensor, mix: Mix, smoothing: float) -> Tensor:
    """Return the mean cross-entropy of logits [B, C] with the labels [B] of both images, by their shares."""
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if mix.share == 1:
        return loss
    others = labels[find_neighbors(len(labels), labels.device)]
    return mix.share * loss + (1 - mix.share) * F.cross_entropy(logits, others, label_smoothing=smoothing)
