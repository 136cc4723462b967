"""The kernel for CPU cores against the torch reference."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines import photometric as ph
from pipelines import photometric_cpu as cpu
from tests.pipelines.images import make_images

POOL = ThreadPoolExecutor(2)
STRONG = ph.PhotometricRecipe(
    jitter=0.9, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, grayscale=0.3, blur_global_1=0.5,
    blur_global_2=0.5, blur_locals=0.5, blur_sigma=(0.05, 2.3), solarize_global_2=0.5,
)  # fmt: skip


def make_views(batch: int, views: int, side: int, seed: int = 0) -> Tensor:
    """Return images [batch, views, side, side, 3]."""
    return torch.stack([make_images(batch, side, seed + view) for view in range(views)], 1)


def empty(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    batch, views, side = images.shape[:3]
    return torch.empty(batch * views, 3, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


def augment_both(images: Tensor, parameters: ph.AugmentParameters) -> tuple[Tensor, Tensor]:
    """Return the results of the kernel and the reference, in levels [V·B, 3, S, S]."""
    found = []
    for augment in (lambda *given: cpu.augment(*given, POOL), ph.augment):
        out = empty(images)
        augment(images, parameters, out)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ph.MEAN, ph.STD))
        found.append((out * std + mean) * 255)
    return found[0], found[1]


# The same cases every time: how many values a level early in the chain moves is a matter of statistics.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32), side=st.sampled_from([48, 65]), batch=st.integers(12, 17), views=st.integers(1, 3),
    recipe=st.sampled_from([ph.PhotometricRecipe(), STRONG]),
)  # fmt: skip
def test_the_kernel_agrees_with_the_reference(seed, side, batch, views, recipe):
    # Without the flat ones: there a level's difference is one of all pixels at once.
    images = make_views(batch + 3, views, side, seed % 1000)[3:].contiguous()
    before = images.clone()
    parameters = ph.draw_augment_parameters(recipe, seed, 0, np.arange(batch), views)
    ours, theirs = augment_both(images, replace(parameters, solarize=np.zeros_like(parameters.solarize)))
    assert torch.equal(images, before)
    # One level early in the chain can be amplified by contrast and hue to a few levels in single pixels.
    assert ((ours - theirs).abs() > 1.5).float().mean() <= 1e-3


def test_the_kernel_normalizes_as_it_is_told():
    images, other = make_views(4, 2, 48), ph.Normalization((0.1, 0.5, 0.9), (0.05, 0.25, 1.5))
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), 0, 0, np.arange(4), 2)
    plain, told = empty(images), empty(images)
    cpu.augment(images, parameters, plain, POOL)
    cpu.augment(images, parameters, told, POOL, other)
    mean, std, new_mean, new_std = (
        torch.tensor(values).view(3, 1, 1) for values in (ph.MEAN, ph.STD, other.mean, other.std)
    )
    assert (told - (plain * std + mean - new_mean) / new_std).abs().max() < 1e-4


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("grayscale", [False, True])
def test_single_operations_differ_by_a_level_at_most(operation, grayscale):
    images = make_views(16, 1, 48)
    parameters = ph.draw_augment_parameters(STRONG, 3, 0, np.arange(16), 1)
    factor = np.broadcast_to(ph.NEUTRAL, parameters.factor.shape).copy()
    factor[..., operation] = parameters.factor[..., operation]
    parameters = replace(
        parameters,
        factor=factor,
        jitter=np.ones((1, 16), bool),
        grayscale=np.full((1, 16), grayscale),
        blur_sigma=np.zeros((1, 16)),
    )
    ours, theirs = augment_both(images, parameters)
    assert (ours - theirs).abs().max() < 1.5
    assert ((ours - theirs).abs() > 0.5).float().mean() < 3e-3


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.7, 1.3, 2.3])
def test_blur_differs_by_a_level_at_most(sigma):
    images = make_views(6, 2, 40)
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(jitter=0, grayscale=0), 0, 0, np.arange(6), 2)
    ours, theirs = augment_both(
        images, replace(parameters, blur_sigma=np.full((2, 6), sigma), solarize=np.zeros((2, 6), bool))
    )
    assert (ours - theirs).abs().max() < 1.5
    assert ((ours - theirs).abs() > 0.5).float().mean() < 1e-3


def test_flip_and_solarize_agree_with_the_reference_bit_for_bit():
    images = make_views(16, 2, 40)
    recipe = ph.PhotometricRecipe(jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, solarize_global_2=0.5)
    parameters = ph.draw_augment_parameters(recipe, 0, 0, np.arange(16), 2)
    assert parameters.flip.any()
    assert parameters.solarize[1].any()
    ours, theirs = augment_both(images, parameters)
    assert torch.equal(ours, theirs)


def test_solarize_after_other_operations_inverts_what_they_make():
    images = make_views(12, 1, 40)
    parameters = ph.draw_augment_parameters(STRONG, 5, 0, np.arange(12), 1)
    plain, _ = augment_both(images, replace(parameters, solarize=np.zeros((1, 12), bool)))
    solarized, _ = augment_both(images, replace(parameters, solarize=np.ones((1, 12), bool)))
    plain, solarized = plain.round(), solarized.round()
    assert torch.equal(solarized, torch.where(plain >= ph.SOLARIZE_THRESHOLD, 255 - plain, plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_single(dtype):
    images = make_views(9, 3, 32)
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), 0, 0, np.arange(9), 3)
    exact, half = empty(images), empty(images, dtype)
    cpu.augment(images, parameters, exact, POOL)
    cpu.augment(images, parameters, half, POOL)
    assert torch.equal(exact.to(dtype), half)


def test_an_image_does_not_depend_on_its_batch_nor_on_the_threads():
    images = make_views(19, 2, 32)
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), 0, 0, np.arange(19), 2)
    whole = empty(images)
    with ThreadPoolExecutor(3) as pool:
        cpu.augment(images, parameters, whole, pool)
    for place in (0, 8, 18):
        alone = empty(images[:1])
        cpu.augment(images[[place]], parameters[:, [place]], alone, POOL)
        assert torch.equal(alone, whole.view(2, 19, 3, 32, 32)[:, place])
