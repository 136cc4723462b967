"""The kernel for GPUs against the torch reference on the CPU: interpreted where there is no GPU, else compiled."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines import photometric as ph
from tests.interpreted import kernels
from tests.pipelines.pictures import some_pictures

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDERS = np.array(list(permutations(range(4))))
FACTORS = (0.0, 0.6, 1.0, 1.0, 1.37, 2.0)
SHIFTS = (-0.5, -0.1, 0.0, 0.04, 0.5)
SIGMAS = (0.0, 0.0, 0.01, 0.1, 0.9, 2.3)

fast = kernels("pipelines.photometric_triton")


def views_of(batch: int, views: int, side: int, seed: int = 0) -> Tensor:
    """Pictures [batch, views, side, side, 3]."""
    return torch.stack([some_pictures(batch, side, seed + view) for view in range(views)], 1)


def any_colours(batch: int, views: int, seed: int) -> ph.Colours:
    """Every combination of what is neutral, usual and extreme is as likely as any other."""
    rng = np.random.default_rng(seed)
    shape = views, batch
    factors = [rng.choice(FACTORS, shape) for _ in range(3)]
    return ph.Colours(
        flip=rng.random(shape) < 0.5,
        jitter=rng.random(shape) < 0.8,
        order=ORDERS[rng.integers(0, 24, shape)],
        factor=np.stack([*factors, rng.choice(SHIFTS, shape)], -1),
        grey=rng.random(shape) < 0.3,
        sigma=rng.choice(SIGMAS, shape),
        solarize=rng.random(shape) < 0.5,
    )


def augmented(pictures: Tensor, colours: ph.Colours, dtype: torch.dtype = torch.float32) -> Tensor:
    """The kernel's normalised views [V·B, 3, S, S]. The output begins as NaN: what is not written shows."""
    batch, views, side = pictures.shape[:3]
    out = torch.full((batch * views, 3, side, side), torch.nan, dtype=dtype, device=DEVICE)
    out = out.contiguous(memory_format=torch.channels_last)
    fast.augment(pictures.to(DEVICE), colours, out)
    return out.cpu()


def levels(normalised: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ph.MEAN, ph.STD))
    return (normalised * std + mean) * 255


def apart(pictures: Tensor, colours: ph.Colours) -> Tensor:
    """By how many levels the kernel and the reference differ."""
    batch, views, side = pictures.shape[:3]
    theirs = torch.empty(batch * views, 3, side, side)
    ph.augment(pictures, colours, theirs)
    return (levels(augmented(pictures, colours)) - levels(theirs)).abs()


@settings(max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 2**32), side=st.sampled_from([24, 33, 48, 65]), batch=st.integers(1, 5),
    views=st.integers(1, 2),
)  # fmt: skip
def test_it_is_the_reference(seed, side, batch, views):
    colours = any_colours(batch, views, seed)
    # The threshold of solarising makes up to 255 levels of one: tested below on the kernel's own result.
    colours = replace(colours, solarize=np.zeros_like(colours.solarize))
    # One level early in the chain can be amplified by later operations to a few levels, in single pixels.
    assert (apart(views_of(batch, views, side, seed % 1000), colours) < 1.5).float().mean() >= 0.999


def test_all_orders_are_the_references():
    # Factors whose products are seldom whole numbers, which interpreters before Triton 3.9 round twice.
    colours = replace(
        any_colours(24, 1, 0), jitter=np.ones((1, 24), bool), order=ORDERS[None], grey=np.zeros((1, 24), bool),
        factor=np.broadcast_to([1.2937, 0.7193, 1.5771, 0.2113], (1, 24, 4)), sigma=np.zeros((1, 24)),
        solarize=np.zeros((1, 24), bool),
    )  # fmt: skip
    pictures = views_of(1, 1, 24, 3).expand(24, -1, -1, -1, -1).contiguous()
    assert (apart(pictures, colours) < 1.5).float().mean() >= 0.999


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("grey", [False, True])
def test_single_operations_differ_by_a_level_at_most(operation, grey):
    colours = any_colours(6, 1, 1)
    factor = np.broadcast_to(ph.NEUTRAL, colours.factor.shape).copy()
    factor[..., operation] = SHIFTS[0] if operation == ph.HUE else [[0.0, 0.3, 0.6, 1.2, 1.7, 2.0]]
    colours = replace(
        colours, factor=factor, jitter=np.ones((1, 6), bool), grey=np.full((1, 6), grey), sigma=np.zeros((1, 6)),
        solarize=np.zeros((1, 6), bool),
    )  # fmt: skip
    found = apart(views_of(6, 1, 33), colours)
    assert found.max() < 1.5
    assert (found > 0.5).float().mean() < 3e-3


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.7, 2.3])
def test_blur_differs_by_a_level_at_most(sigma):
    colours = replace(
        any_colours(5, 1, 0), jitter=np.zeros((1, 5), bool), sigma=np.full((1, 5), sigma),
        solarize=np.zeros((1, 5), bool),
    )  # fmt: skip
    found = apart(views_of(5, 1, 65), colours)
    assert found.max() < 1.5
    assert (found > 0.5).float().mean() < 1e-3


def test_many_blocks_and_tiles_a_picture():
    colours = replace(
        any_colours(1, 1, 0), jitter=np.ones((1, 1), bool), order=ORDERS[[[6]]], factor=np.array([[[1.2, 0.7, 1, 0]]]),
        sigma=np.ones((1, 1)), solarize=np.zeros((1, 1), bool),
    )  # fmt: skip
    assert (apart(some_pictures(2, 224)[None, 1:] // 2 + views_of(1, 1, 224) // 2, colours) < 1.5).all()


def test_solarise_inverts_what_the_rest_makes():
    pictures, colours = views_of(6, 2, 33), any_colours(6, 2, 2)
    assert (colours.sigma > 0).any()
    plain, solarized = (
        levels(augmented(pictures, replace(colours, solarize=np.full((2, 6), on)))).round() for on in (False, True)
    )
    assert torch.equal(solarized, torch.where(plain >= ph.SOLARIZE_THRESHOLD, 255 - plain, plain))


def test_twice_the_same_bits_and_the_input_untouched():
    pictures, colours = views_of(5, 2, 48).to(DEVICE), any_colours(5, 2, 4)
    before = pictures.clone()
    assert torch.equal(augmented(pictures, colours), augmented(pictures, colours))
    assert torch.equal(pictures, before)


def test_a_picture_does_not_depend_on_its_batch():
    pictures, colours = views_of(7, 2, 33), any_colours(7, 2, 5)
    whole = augmented(pictures, colours).view(2, 7, 3, 33, 33)
    for place in (0, 3, 6):
        assert torch.equal(augmented(pictures[[place]], colours[:, [place]]), whole[:, place])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_single(dtype):
    pictures, colours = views_of(5, 2, 33), any_colours(5, 2, 6)
    assert (colours.sigma > 0).any()
    assert (colours.sigma == 0).any()
    single = augmented(pictures, colours)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        single = (single.view(torch.int32) & -(2**16)).view(torch.float32)  # the interpreter cuts where a GPU rounds
    assert torch.equal(augmented(pictures, colours, dtype), single.to(dtype))


def test_other_layouts_are_refused():
    pictures, colours = views_of(2, 2, 24).to(DEVICE), any_colours(2, 2, 0)
    out = torch.empty(4, 3, 24, 24, device=DEVICE)
    with pytest.raises(ValueError, match="channels-last"):
        fast.augment(pictures, colours, out)
    with pytest.raises(ValueError, match="contiguous"):
        fast.augment(pictures.transpose(0, 1), colours, out.contiguous(memory_format=torch.channels_last))
