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
from tests.pipelines.pictures import some_pictures

POOL = ThreadPoolExecutor(2)
STRONG = ph.PhotometricRecipe(
    jitter=0.9, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, grey=0.3, blur_global_1=0.5, blur_global_2=0.5,
    blur_locals=0.5, blur_sigma=(0.05, 2.3), solarize_global_2=0.5,
)  # fmt: skip


def views_of(batch: int, views: int, side: int, seed: int = 0) -> Tensor:
    """Pictures [batch, views, side, side, 3]."""
    return torch.stack([some_pictures(batch, side, seed + view) for view in range(views)], 1)


def empty(pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    batch, views, side = pictures.shape[:3]
    return torch.empty(batch * views, 3, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


def both(pictures: Tensor, colours: ph.Colours) -> tuple[Tensor, Tensor]:
    """Ours and the reference's, in levels [V·B, 3, S, S]."""
    found = []
    for augment in (lambda *given: cpu.augment(*given, POOL), ph.augment):
        out = empty(pictures)
        augment(pictures, colours, out)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ph.MEAN, ph.STD))
        found.append((out * std + mean) * 255)
    return found[0], found[1]


# The same cases every time: how many values a level early in the chain moves is a matter of statistics.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32), side=st.sampled_from([48, 65]), batch=st.integers(12, 17), views=st.integers(1, 3),
    recipe=st.sampled_from([ph.PhotometricRecipe(), STRONG]),
)  # fmt: skip
def test_it_is_the_reference(seed, side, batch, views, recipe):
    # Without the flat ones: there a level's difference is one of all pixels at once.
    pictures = views_of(batch + 3, views, side, seed % 1000)[3:].contiguous()
    before = pictures.clone()
    colours = ph.draw_colours(recipe, seed, 0, np.arange(batch), views)
    ours, theirs = both(pictures, replace(colours, solarize=np.zeros_like(colours.solarize)))
    assert torch.equal(pictures, before)
    # One level early in the chain can be amplified by contrast and hue to a few levels in single pixels.
    assert ((ours - theirs).abs() > 1.5).float().mean() <= 1e-3


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("grey", [False, True])
def test_single_operations_differ_by_a_level_at_most(operation, grey):
    pictures = views_of(16, 1, 48)
    colours = ph.draw_colours(STRONG, 3, 0, np.arange(16), 1)
    factor = np.broadcast_to(ph.NEUTRAL, colours.factor.shape).copy()
    factor[..., operation] = colours.factor[..., operation]
    colours = replace(
        colours, factor=factor, jitter=np.ones((1, 16), bool), grey=np.full((1, 16), grey), sigma=np.zeros((1, 16))
    )
    ours, theirs = both(pictures, colours)
    assert (ours - theirs).abs().max() < 1.5
    assert ((ours - theirs).abs() > 0.5).float().mean() < 3e-3


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.7, 1.3, 2.3])
def test_blur_differs_by_a_level_at_most(sigma):
    pictures = views_of(6, 2, 40)
    colours = ph.draw_colours(ph.PhotometricRecipe(jitter=0, grey=0), 0, 0, np.arange(6), 2)
    ours, theirs = both(pictures, replace(colours, sigma=np.full((2, 6), sigma), solarize=np.zeros((2, 6), bool)))
    assert (ours - theirs).abs().max() < 1.5
    assert ((ours - theirs).abs() > 0.5).float().mean() < 1e-3


def test_flip_and_solarise_are_the_references_bits():
    pictures = views_of(16, 2, 40)
    recipe = ph.PhotometricRecipe(jitter=0, grey=0, blur_global_1=0, blur_global_2=0, solarize_global_2=0.5)
    colours = ph.draw_colours(recipe, 0, 0, np.arange(16), 2)
    assert colours.flip.any()
    assert colours.solarize[1].any()
    ours, theirs = both(pictures, colours)
    assert torch.equal(ours, theirs)


def test_solarise_after_other_operations_inverts_what_they_make():
    pictures = views_of(12, 1, 40)
    colours = ph.draw_colours(STRONG, 5, 0, np.arange(12), 1)
    plain, _ = both(pictures, replace(colours, solarize=np.zeros((1, 12), bool)))
    solarized, _ = both(pictures, replace(colours, solarize=np.ones((1, 12), bool)))
    plain, solarized = plain.round(), solarized.round()
    assert torch.equal(solarized, torch.where(plain >= ph.SOLARIZE_THRESHOLD, 255 - plain, plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_single(dtype):
    pictures = views_of(9, 3, 32)
    colours = ph.draw_colours(ph.PhotometricRecipe(), 0, 0, np.arange(9), 3)
    exact, half = empty(pictures), empty(pictures, dtype)
    cpu.augment(pictures, colours, exact, POOL)
    cpu.augment(pictures, colours, half, POOL)
    assert torch.equal(exact.to(dtype), half)


def test_a_picture_does_not_depend_on_its_batch_nor_on_the_threads():
    pictures = views_of(19, 2, 32)
    colours = ph.draw_colours(ph.PhotometricRecipe(), 0, 0, np.arange(19), 2)
    whole = empty(pictures)
    with ThreadPoolExecutor(3) as pool:
        cpu.augment(pictures, colours, whole, pool)
    for place in (0, 8, 18):
        alone = empty(pictures[:1])
        cpu.augment(pictures[[place]], colours[:, [place]], alone, POOL)
        assert torch.equal(alone, whole.view(2, 19, 3, 32, 32)[:, place])
