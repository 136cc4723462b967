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
from tests.pipelines.images import make_images

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDERS = np.array(list(permutations(range(4))))
FACTORS = (0.0, 0.6, 1.0, 1.0, 1.37, 2.0)
SHIFTS = (-0.5, -0.1, 0.0, 0.04, 0.5)
SIGMAS = (0.0, 0.0, 0.01, 0.1, 0.9, 2.3)

fast = kernels("pipelines.photometric_triton")


def make_views(batch: int, views: int, side: int, seed: int = 0) -> Tensor:
    """Return images [batch, views, side, side, 3]."""
    return torch.stack([make_images(batch, side, seed + view) for view in range(views)], 1)


def draw_any_parameters(batch: int, views: int, seed: int) -> ph.AugmentParameters:
    """Draw neutral, usual and extreme parameters, every combination with the same probability."""
    rng = np.random.default_rng(seed)
    shape = views, batch
    factors = [rng.choice(FACTORS, shape) for _ in range(3)]
    return ph.AugmentParameters(
        flip=rng.random(shape) < 0.5,
        jitter=rng.random(shape) < 0.8,
        order=ORDERS[rng.integers(0, 24, shape)],
        factor=np.stack([*factors, rng.choice(SHIFTS, shape)], -1),
        grayscale=rng.random(shape) < 0.3,
        blur_sigma=rng.choice(SIGMAS, shape),
        solarize=rng.random(shape) < 0.5,
    )


def augment_fast(images: Tensor, parameters: ph.AugmentParameters, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the kernel's views [V·B, 3, S, S]. The output starts as NaN, so values that are not written show."""
    batch, views, side = images.shape[:3]
    out = torch.full((batch * views, 3, side, side), torch.nan, dtype=dtype, device=DEVICE)
    out = out.contiguous(memory_format=torch.channels_last)
    fast.augment(images.to(DEVICE), parameters, out)
    return out.cpu()


def to_levels(normalized: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ph.MEAN, ph.STD))
    return (normalized * std + mean) * 255


def test_the_kernel_normalizes_as_it_is_told():
    images, told = make_views(2, 2, 33), ph.Normalization((0.1, 0.5, 0.9), (0.05, 0.25, 1.5))
    parameters = draw_any_parameters(2, 2, 5)
    out = torch.empty(4, 3, 33, 33, device=DEVICE).contiguous(memory_format=torch.channels_last)
    fast.augment(images.to(DEVICE), parameters, out, told)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (told.mean, told.std))
    assert ((out.cpu() * std + mean) * 255 - to_levels(augment_fast(images, parameters))).abs().max() < 0.01


def measure_differences(images: Tensor, parameters: ph.AugmentParameters) -> Tensor:
    """Return by how many levels the kernel and the reference differ."""
    batch, views, side = images.shape[:3]
    theirs = torch.empty(batch * views, 3, side, side)
    ph.augment(images, parameters, theirs)
    return (to_levels(augment_fast(images, parameters)) - to_levels(theirs)).abs()


@settings(max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 2**32), side=st.sampled_from([24, 33, 48, 65]), batch=st.integers(1, 3),
    views=st.integers(1, 2),
)  # fmt: skip
def test_the_kernel_agrees_with_the_reference(seed, side, batch, views):
    parameters = draw_any_parameters(batch, views, seed)
    # The threshold of solarize makes up to 255 levels of one: tested below on the kernel's own result.
    parameters = replace(parameters, solarize=np.zeros_like(parameters.solarize))
    # One level early in the chain can be amplified by later operations to a few levels, in single pixels.
    assert (measure_differences(make_views(batch, views, side, seed % 1000), parameters) < 1.5).float().mean() >= 0.999


def test_all_orders_agree_with_the_reference():
    # Factors whose products are seldom whole numbers, which interpreters before Triton 3.9 round twice.
    parameters = replace(
        draw_any_parameters(24, 1, 0), jitter=np.ones((1, 24), bool), order=ORDERS[None],
        factor=np.broadcast_to([1.2937, 0.7193, 1.5771, 0.2113], (1, 24, 4)), grayscale=np.zeros((1, 24), bool),
        blur_sigma=np.zeros((1, 24)), solarize=np.zeros((1, 24), bool),
    )  # fmt: skip
    images = make_views(1, 1, 24, 3).expand(24, -1, -1, -1, -1).contiguous()
    assert (measure_differences(images, parameters) < 1.5).float().mean() >= 0.999


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("grayscale", [False, True])
def test_single_operations_differ_by_a_level_at_most(operation, grayscale):
    parameters = draw_any_parameters(6, 1, 1)
    factor = np.broadcast_to(ph.NEUTRAL, parameters.factor.shape).copy()
    factor[..., operation] = SHIFTS[0] if operation == ph.HUE else [[0.0, 0.3, 0.6, 1.2, 1.7, 2.0]]
    parameters = replace(
        parameters, factor=factor, jitter=np.ones((1, 6), bool), grayscale=np.full((1, 6), grayscale),
        blur_sigma=np.zeros((1, 6)), solarize=np.zeros((1, 6), bool),
    )  # fmt: skip
    found = measure_differences(make_views(6, 1, 33), parameters)
    assert found.max() < 1.5
    assert (found > 0.5).float().mean() < 3e-3


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.7, 2.3])
def test_blur_differs_by_a_level_at_most(sigma):
    parameters = replace(
        draw_any_parameters(5, 1, 0), jitter=np.zeros((1, 5), bool), blur_sigma=np.full((1, 5), sigma),
        solarize=np.zeros((1, 5), bool),
    )  # fmt: skip
    found = measure_differences(make_views(5, 1, 65), parameters)
    assert found.max() < 1.5
    assert (found > 0.5).float().mean() < 1e-3


def test_many_blocks_and_tiles_in_an_image():
    parameters = replace(
        draw_any_parameters(1, 1, 0), jitter=np.ones((1, 1), bool), order=ORDERS[[[6]]],
        factor=np.array([[[1.2, 0.7, 1, 0]]]), blur_sigma=np.ones((1, 1)), solarize=np.zeros((1, 1), bool),
    )  # fmt: skip
    assert (
        measure_differences(make_images(2, 224)[None, 1:] // 2 + make_views(1, 1, 224) // 2, parameters) < 1.5
    ).all()


def test_solarize_inverts_what_the_rest_makes():
    images, parameters = make_views(6, 2, 33), draw_any_parameters(6, 2, 2)
    assert (parameters.blur_sigma > 0).any()
    plain, solarized = (
        to_levels(augment_fast(images, replace(parameters, solarize=np.full((2, 6), on)))).round()
        for on in (False, True)
    )
    assert torch.equal(solarized, torch.where(plain >= ph.SOLARIZE_THRESHOLD, 255 - plain, plain))


def test_the_result_is_reproducible_and_the_input_unchanged():
    images, parameters = make_views(5, 2, 48).to(DEVICE), draw_any_parameters(5, 2, 4)
    before = images.clone()
    assert torch.equal(augment_fast(images, parameters), augment_fast(images, parameters))
    assert torch.equal(images, before)


def test_an_image_does_not_depend_on_its_batch():
    images, parameters = make_views(7, 2, 33), draw_any_parameters(7, 2, 5)
    whole = augment_fast(images, parameters).view(2, 7, 3, 33, 33)
    for place in (0, 3, 6):
        assert torch.equal(augment_fast(images[[place]], parameters[:, [place]]), whole[:, place])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_single(dtype):
    images, parameters = make_views(5, 2, 33), draw_any_parameters(5, 2, 6)
    assert (parameters.blur_sigma > 0).any()
    assert (parameters.blur_sigma == 0).any()
    single = augment_fast(images, parameters)
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        single = (single.view(torch.int32) & -(2**16)).view(torch.float32)  # the interpreter cuts where a GPU rounds
    assert torch.equal(augment_fast(images, parameters, dtype), single.to(dtype))


def test_other_layouts_are_refused():
    images, parameters = make_views(2, 2, 24).to(DEVICE), draw_any_parameters(2, 2, 0)
    out = torch.empty(4, 3, 24, 24, device=DEVICE)
    with pytest.raises(ValueError, match="channels-last"):
        fast.augment(images, parameters, out)
    with pytest.raises(ValueError, match="contiguous"):
        fast.augment(images.transpose(0, 1), parameters, out.contiguous(memory_format=torch.channels_last))
