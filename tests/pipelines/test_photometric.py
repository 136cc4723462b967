import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from pipelines import photometric as ph
from tests.pipelines.images import make_images


def apply_one_by_one(operation, images: Tensor, values) -> Tensor:
    """Apply a function of torchvision to one image at a time: uint8 [B, S, S, 3]."""
    changed = [operation(p.permute(2, 0, 1), float(v)).permute(1, 2, 0) for p, v in zip(images, values, strict=True)]
    return torch.stack(changed)


def through_pillow(operation, image: Tensor, *values: float) -> Tensor:
    """Apply a function of torchvision to an image [S, S, 3] as the published code does, which has images of Pillow."""
    return torch.from_numpy(np.array(operation(Image.fromarray(image.numpy()), *values)))


def compare_levels(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Return the largest difference, and the share of values that differ at all."""
    apart = (ours.int() - theirs.int()).abs()
    return int(apart.max()), float((apart > 0).float().mean())


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [
        (ph.adjust_brightness, F.adjust_brightness, 1e-4),
        (ph.adjust_contrast, F.adjust_contrast, 1e-3),
        (ph.adjust_saturation, F.adjust_saturation, 1e-3),
    ],
)
def test_each_operation_agrees_with_pillow(ours, theirs, share):
    """But for sums that are a whole number, which another order of operations rounds to a little below it."""
    images = make_images(16, 48)
    factors = np.random.default_rng(1).uniform(0, 2, 16)
    pillows = torch.stack([through_pillow(theirs, p, float(f)) for p, f in zip(images, factors, strict=True)])
    largest, different = compare_levels(ours(images, factors), pillows)
    assert largest <= 1
    assert different <= share


def test_hue_agrees_with_torchvisions_of_tensors():
    """Pillow's has 256 hues only."""
    images = make_images(16, 48)
    shifts = np.random.default_rng(1).uniform(-0.5, 0.5, 16)
    largest, different = compare_levels(ph.adjust_hue(images, shifts), apply_one_by_one(F.adjust_hue, images, shifts))
    assert largest <= 1
    assert different <= 1e-4
    pillows = torch.stack([through_pillow(F.adjust_hue, p, float(f)) for p, f in zip(images, shifts, strict=True)])
    assert (ph.adjust_hue(images, shifts).int() - pillows.int()).abs().float().mean() < 1


def test_grayscale_and_solarize_are_pillows_to_the_bit():
    images = make_images(8, 40)
    gray = torch.stack([through_pillow(F.rgb_to_grayscale, p, 3) for p in images])
    solarized = torch.stack([through_pillow(F.solarize, p, 128) for p in images])
    assert torch.equal(ph.to_grayscale(images), gray)
    assert torch.equal(ph.solarize(images), solarized)


def blur_by_pillow(image: Tensor, sigma: float) -> Tensor:
    blurred = Image.fromarray(image.numpy()).filter(ImageFilter.GaussianBlur(sigma))
    return torch.from_numpy(np.array(blurred))


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.2, 0.25, 0.3, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.3])
def test_blur_is_pillows_in_each_image(sigma: float):
    """Pillow rounds after each of its six passes, so a mean difference of a level remains, and of a few in a pixel."""
    images = make_images(12, 64)
    ours = ph.gaussian_blur(images, np.full(12, sigma)).int()
    pillows = torch.stack([blur_by_pillow(image, sigma) for image in images]).int()
    means = (ours - pillows).abs().float().mean((1, 2, 3))
    assert means.max() < 0.95
    inside = (ours - pillows)[:, 8:-8, 8:-8].abs()  # Pillow extends the edge anew in every pass
    assert inside.max() <= 6


@given(sigma=st.floats(0, 2.3))
def test_a_blurs_kernel_has_the_sum_1_and_its_variance(sigma: float):
    kernel = ph.blur_kernels(np.array([sigma]))[0]
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert kernel.min() > -1e-15
    assert kernel == pytest.approx(kernel[::-1], abs=1e-15)
    assert (kernel * np.arange(-7, 8) ** 2).sum() == pytest.approx(sigma**2, abs=1e-9)


def apply_published_chain(image: Tensor, parameters: ph.AugmentParameters, place: int) -> Tensor:
    """Apply torchvision's functions as published, but for hue and blur, to an image [S, S, 3] by the parameters."""
    p = image.flip(1) if parameters.flip[place] else image
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for operation in parameters.order[place] if parameters.jitter[place] else ():
        amount = float(parameters.factor[place, operation])
        if operation == ph.HUE:
            p = F.adjust_hue(p.permute(2, 0, 1), amount).permute(1, 2, 0)
        else:
            p = through_pillow(steps[operation], p, amount)
    p = through_pillow(F.rgb_to_grayscale, p, 3) if parameters.grayscale[place] else p
    sigma = parameters.blur_sigma[place : place + 1]
    p = ph.gaussian_blur(p[None], sigma)[0] if sigma > 0 else p
    return through_pillow(F.solarize, p, 128) if parameters.solarize[place] else p


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), view=st.integers(0, 3), side=st.sampled_from([16, 33, 48]))
def test_a_whole_view_agrees_with_the_published_chain(seed, view, side):
    images = make_images(12, side, seed % 1000)
    before = images.clone()
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), seed, 0, np.arange(12), 4)[view]
    ours = ph.augment_levels(images, parameters)
    assert torch.equal(images, before)
    theirs = torch.stack([apply_published_chain(images[place], parameters, place) for place in range(12)])
    apart = (ours.int() - theirs.int()).abs()
    # One level early in the chain can be amplified: by contrast and hue to a few levels, by the threshold of
    # solarize to the whole range, in single pixels.
    assert (apart > 1).float().mean() < 1e-3


def test_augment_normalizes_and_does_not_depend_on_the_batch(monkeypatch):
    images = torch.stack([make_images(10, 32), make_images(10, 32, 1)], 1)
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), 0, 0, np.arange(10), 4)[2:]
    whole = torch.empty(20, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    ph.augment(images, parameters, whole)
    levels = torch.cat([ph.augment_levels(images[:, view], parameters[view]) for view in range(2)])
    expected = F.normalize(levels.permute(0, 3, 1, 2).double() / 255, list(ph.MEAN), list(ph.STD))
    assert torch.allclose(whole.double(), expected, atol=1e-6)
    monkeypatch.setattr(ph, "CHUNK_PIXELS", 3 * 32 * 32)
    parts = torch.empty_like(whole)
    ph.augment(images, parameters, parts)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_batches_are_the_rounded_ones(dtype, tolerance):
    images = make_images(4, 16)
    exact, half = torch.empty(4, 3, 16, 16), torch.empty(4, 3, 16, 16, dtype=dtype)
    ph.normalize(images, exact)
    ph.normalize(images, half)
    assert ((half.float() - exact).abs() <= tolerance * exact.abs() + 1e-6).all()


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation():
    images, out = make_images(3, 16), torch.empty(3, 3, 16, 16)
    mean, std = (0.1, 0.5, 0.9), (0.05, 0.25, 1.5)
    ph.normalize(images, out, ph.Normalization(mean, std))
    exact = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    assert (out.permute(0, 2, 3, 1).double() - exact).abs().max() < 2e-5


def test_gray_images_keep_their_levels_to_one():
    gray = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    for factor in (0.8, 1.0, 1.2):
        assert (ph.adjust_saturation(gray, np.array([factor])).int() - gray.int()).abs().max() <= 1
        assert torch.equal(ph.adjust_hue(gray, np.array([factor / 2 - 0.5])), gray)
    assert (ph.to_grayscale(gray).int() - gray.int()).abs().max() <= 1


def test_parameters_follow_the_recipe():
    count = 20000
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), 0, 0, np.arange(count), 4)
    near = 4 * 0.5 / np.sqrt(count)
    assert abs(parameters.flip.mean() - 0.5) < near
    assert abs(parameters.jitter.mean() - 0.8) < near
    assert abs(parameters.grayscale.mean() - 0.2) < near
    assert np.abs((parameters.blur_sigma > 0).mean(1) - [1.0, 0.1, 0.5, 0.5]).max() < near
    assert np.abs(parameters.solarize.mean(1) - [0, 0.2, 0, 0]).max() < near
    for operation, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        factor = np.sort(parameters.factor[0, :, operation])
        assert low <= factor[0] < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < factor[-1] <= high
        assert np.abs((factor - low) / (high - low) - np.arange(count) / count).max() < 1.95 / np.sqrt(count)
    sigma = np.sort(parameters.blur_sigma[0])
    assert np.abs((sigma - 0.1) / 1.9 - np.arange(count) / count).max() < 1.95 / np.sqrt(count)
    orders, counts = np.unique(parameters.order[0], axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - count / 24) ** 2 / (count / 24)).sum() < 56  # chi-squared, 23 degrees of freedom: p = 1e-4


def test_strengths_of_zero_leave_the_image_alone():
    recipe = ph.PhotometricRecipe(
        flip=0, jitter=1, brightness=0, contrast=0, saturation=0, hue=0, grayscale=0, blur_global_1=0, blur_global_2=0,
        blur_locals=0, solarize_global_2=0,
    )  # fmt: skip
    images = make_images(6, 24)
    for view in range(3):
        parameters = ph.draw_augment_parameters(recipe, 0, 0, np.arange(6), 3)[view]
        assert torch.equal(ph.augment_levels(images, parameters), images)


def test_active_operations_are_in_their_order_and_without_the_neutral_ones():
    parameters = ph.draw_augment_parameters(ph.PhotometricRecipe(), 0, 0, np.arange(2), 1)[0]
    parameters.jitter[:] = True, False
    parameters.order[0] = 3, 1, 0, 2
    parameters.factor[0] = 0.9, 1.0, 1.0, 0.02
    assert ph.active_operations(parameters).tolist() == [[ph.HUE, ph.BRIGHTNESS, ph.NONE, ph.NONE], [ph.NONE] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_table_of_levels_is_what_normalize_makes(dtype):
    images = make_images(3, 24)
    out = torch.empty(3, 3, 24, 24, dtype=dtype)
    ph.normalize(images, out)
    table = ph.build_normalize_table(dtype)
    for channel in range(3):
        assert torch.equal(table[channel][images[..., channel].long()], out[:, channel])
