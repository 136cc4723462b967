"""Random draws have the distribution of torchvision's own draws, and do not depend on each other.

Seeds are fixed, so a test passes always or never. P is so small that none of the tests fails by chance.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop

from pipelines.crops import CropRecipe, center_window, draw_windows
from pipelines.order import permute
from pipelines.photometric import AugmentParameters, PhotometricRecipe, draw_augment_parameters

P = 1e-4
SHAPES = {"square": (300, 300), "4:3": (375, 500), "tall": (600, 200), "10:1": (60, 600), "small": (30, 40)}
RATIO = (3 / 4, 4 / 3)


def draw_our_windows(
    recipe: CropRecipe, count: int, shape: tuple[int, int], seed: int = 0, epoch: int = 0
) -> np.ndarray:
    """Return our windows [views, count, 4] for images of one shape."""
    return draw_windows(recipe, seed, epoch, np.arange(count), *(np.full(count, side) for side in shape))


def draw_their_windows(scale: tuple[float, float], count: int, shape: tuple[int, int]) -> np.ndarray:
    """Return torchvision's windows [count, 4]."""
    blank = torch.empty(1, *shape)
    return np.array([RandomResizedCrop.get_params(blank, list(scale), list(RATIO)) for _ in range(count)])


def measure_windows(found: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return what is compared of windows [count, 4]: size, shape, place, and products that show dependencies."""
    top, left, height, width = found.T
    down, across = top / (shape[0] - height + 1), left / (shape[1] - width + 1)  # share of the room there is
    return {
        "area": height * width,
        "aspect": width / height,
        "height": height,
        "width": width,
        "down": down,
        "across": across,
        "down and across": down * across,
        "area and down": height * width * (down + 0.1),
        "aspect and across": width / height * (across + 0.1),
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("view", [0, 1, 2], ids=["global 1", "global 2", "local"])
def test_windows_of_every_view_and_shape_have_torchvisions_distribution(shape: tuple[int, int], view: int):
    count = 6000
    recipe = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.4), locals=1)
    torch.manual_seed(view)
    ours = draw_our_windows(recipe, count, shape)[view]
    theirs = draw_their_windows(recipe.local_scale if view == 2 else recipe.global_scale, count, shape)
    for (name, one), other in zip(
        measure_windows(ours, shape).items(), measure_windows(theirs, shape).values(), strict=True
    ):
        assert stats.ks_2samp(one, other, method="asymp").pvalue > P, name


def test_the_fallback_is_as_frequent_as_in_torchvision():
    count, shape, scale = 10000, (60, 600), (0.05, 0.4)
    fallback = center_window(np.array([shape[0]]), np.array([shape[1]]))[0]
    torch.manual_seed(0)
    recipe = CropRecipe(global_scale=scale, locals=0)
    both = draw_our_windows(recipe, count, shape)[0], draw_their_windows(scale, count, shape)
    times = [int((found == fallback).all(1).sum()) for found in both]
    assert 0.02 * count < min(times) < max(times) < 0.9 * count
    assert stats.chi2_contingency([times, [count - n for n in times]]).pvalue > P


def test_jitter_has_torchvisions_distribution():
    count, strengths = 10000, {"brightness": 0.3, "contrast": 0.5, "saturation": 0.7, "hue": 0.2}
    ours = draw_augment_parameters(PhotometricRecipe(**strengths), 0, 0, np.arange(count), 3)[2]
    jitter = ColorJitter(**strengths)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    torch.manual_seed(0)
    orders, *factors = zip(*(ColorJitter.get_params(*ranges) for _ in range(count)), strict=True)
    for operation, theirs in enumerate(factors):
        assert stats.ks_2samp(ours.factor[:, operation], theirs, method="asymp").pvalue > P
    code = 4 ** np.arange(4)
    codes = [found @ code for found in (ours.order, torch.stack(orders).numpy())]
    table = [np.unique(found, return_counts=True) for found in codes]
    assert np.array_equal(table[0][0], table[1][0])
    assert len(table[0][0]) == 24
    assert stats.chi2_contingency([counts for _, counts in table]).pvalue > P


CHANCES = PhotometricRecipe(
    flip=0.3, jitter=0.6, grayscale=0.4, blur_global_1=0.7, blur_global_2=0.25, blur_locals=0.45, solarize_global_2=0.35
)


def list_decisions(parameters: AugmentParameters) -> dict[str, np.ndarray]:
    """Return for each operation whether it applies, [views, B]."""
    return {
        "flip": parameters.flip,
        "jitter": parameters.jitter,
        "grayscale": parameters.grayscale,
        "blur": parameters.blur_sigma > 0,
        "solarize": parameters.solarize,
    }


def test_each_view_decides_with_its_own_probability():
    count, views = 20000, 5
    found = list_decisions(draw_augment_parameters(CHANCES, 1, 0, np.arange(count), views))
    expected = {name: [getattr(CHANCES, name)] * views for name in ("flip", "jitter", "grayscale")}
    expected["blur"] = [0.7, 0.25, 0.45, 0.45, 0.45]
    expected["solarize"] = [0, 0.35, 0, 0, 0]
    for name, by_view in expected.items():
        for times, probability in zip(found[name].sum(1), by_view, strict=True):
            assert stats.binomtest(int(times), count, probability).pvalue > P, name


def test_decisions_do_not_depend_on_each_other():
    found = list_decisions(draw_augment_parameters(CHANCES, 2, 0, np.arange(20000), 3))
    for (name, one), (other_name, other) in combinations(found.items(), 2):
        table = np.histogram2d(one[1], other[1], bins=2)[0]
        assert stats.chi2_contingency(table).pvalue > P, (name, other_name)


def draw_numbers(seed: int, epoch: int, count: int = 10000, views: int = 4) -> np.ndarray:
    """Return all that a view draws as numbers [draws, views, count]: places, sizes, factors and decisions."""
    found = draw_our_windows(CropRecipe(global_scale=(0.14, 1.0), locals=views - 2), count, (375, 500), seed, epoch)
    parameters = draw_augment_parameters(CHANCES, seed, epoch, np.arange(count), views)
    # Only one view is ever solarized. In the others a correlation with that is not defined.
    chosen = [found for name, found in list_decisions(parameters).items() if name != "solarize"]
    return np.stack(
        [*np.moveaxis(found, -1, 0), *np.moveaxis(parameters.factor, -1, 0), parameters.order[..., 0], *chosen]
    )


def assert_uncorrelated(one: np.ndarray, other: np.ndarray) -> None:
    """Assert that no row of `one` [draws, n] is correlated with a row of `other` [other draws, n]."""
    draws, count = one.shape
    correlation = np.corrcoef(one, other)[:draws, draws:]
    assert np.abs(correlation).max() < stats.norm.isf(P / correlation.size) / np.sqrt(count)


def test_a_views_augmentations_are_independent_of_its_window_and_of_each_other():
    found = draw_numbers(0, 0)
    for view in range(4):
        place, parameters = found[:4, view], found[4:, view]
        assert_uncorrelated(place, parameters)
        for number, one in enumerate(parameters[:-1]):
            assert_uncorrelated(one[None], parameters[number + 1 :])


def test_neighboring_samples_are_independent():
    found = draw_numbers(0, 0)
    for view in range(4):
        for apart in (1, 2, 64):
            assert_uncorrelated(found[:, view, :-apart], found[:, view, apart:])


def test_views_are_independent():
    found = draw_numbers(0, 0)
    for one, other in combinations(range(4), 2):
        assert_uncorrelated(found[:, one], found[:, other])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (0, 2), (1, 0), (1, 1), (2**32, 0), (0, 2**16)])
def test_epochs_and_seeds_are_independent(seed: int, epoch: int):
    first, other = draw_numbers(0, 0), draw_numbers(seed, epoch)
    for view in range(4):
        assert_uncorrelated(first[:, view], other[:, view])
        assert_uncorrelated(first[:, view], other[:, (view + 1) % 4])


def test_one_sample_over_many_epochs_has_the_distribution_too():
    """Draw along the other axis of the counters: an image must differ between its own epochs."""
    epochs, shape = 4000, (375, 500)
    recipe = CropRecipe(global_scale=(0.14, 1.0), locals=0)
    ours = np.concatenate([draw_our_windows(recipe, 1, shape, epoch=epoch)[0] for epoch in range(epochs)])
    torch.manual_seed(0)
    theirs = draw_their_windows(recipe.global_scale, epochs, shape)
    for (name, one), other in zip(
        measure_windows(ours, shape).items(), measure_windows(theirs, shape).values(), strict=True
    ):
        assert stats.ks_2samp(one, other, method="asymp").pvalue > P, name
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < stats.norm.isf(P) / np.sqrt(epochs), name


def test_every_sample_is_equally_likely_at_every_place_of_an_epoch():
    size, epochs = 12, 2000
    orders = np.array([permute(np.arange(size), size, 0, epoch) for epoch in range(epochs)])
    table = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    # Rows and columns both sum to the number of epochs: (size − 1)² degrees of freedom.
    assert stats.chi2.sf(((table - expected) ** 2 / expected).sum() * (size - 1) / size, (size - 1) ** 2) > P
    follows = np.zeros((size, size))
    np.add.at(follows, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    pairs = follows[~np.eye(size, dtype=bool)]
    assert stats.chisquare(pairs).pvalue > P
