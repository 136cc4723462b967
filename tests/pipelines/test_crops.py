import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipelines.crops import CropRecipe, center_window, draw_windows, random_resized_crop

SHAPES = [(333, 500), (500, 333), (224, 224), (100, 900), (60, 40)]


def measure_ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the two-sample Kolmogorov–Smirnov statistic."""
    grid = np.sort(np.concatenate([a, b]))
    return float(np.abs(np.searchsorted(np.sort(a), grid, "right") / len(a)
                        - np.searchsorted(np.sort(b), grid, "right") / len(b)).max())  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("scale", [(0.05, 0.14), (0.14, 1.0)])
def test_windows_have_torchvisions_distribution(height, width, scale):
    count = 4000
    recipe = CropRecipe(global_scale=scale, locals=0)
    ours = draw_windows(recipe, 3, 0, np.arange(count), np.full(count, height), np.full(count, width))[0]
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3)) for _ in range(count)])
    measures = {
        "area": lambda w: w[:, 2] * w[:, 3],
        "aspect": lambda w: w[:, 3] / w[:, 2],
        "top": lambda w: w[:, 0],
        "left": lambda w: w[:, 1],
    }
    limit = 1.95 * math.sqrt(2 / count)  # p = 0.001
    for name, measure in measures.items():
        assert measure_ks_distance(measure(ours), measure(theirs)) < limit, name


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), ids=st.integers(0, 10**9))
def test_windows_lie_inside_the_image(height, width, ids):
    found = draw_windows(CropRecipe(locals=3), 0, 1, np.array([ids]), np.array([height]), np.array([width]))
    assert found.shape == (5, 1, 4)
    top, left, tall, wide = np.moveaxis(found, -1, 0)
    assert (tall >= 1).all()
    assert (wide >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()


@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_the_fallback_agrees_with_torchvision(height, width):
    # Every try fails where ten times the whole area is asked for.
    expected = RandomResizedCrop.get_params(torch.empty(1, height, width), (10.0, 10.0), (3 / 4, 4 / 3))
    if min(height, width) == 1 and max(height, width) == 1:
        assert center_window(np.array([1]), np.array([1])).tolist() == [[0, 0, 1, 1]]
        return
    draws = np.full((1, 1, 22), 0.5)
    found = random_resized_crop(draws, np.full((1, 1, 2), 10.0), np.array([height]), np.array([width]))
    assert tuple(found[0, 0].tolist()) == tuple(map(int, expected))


def test_a_window_depends_on_seed_epoch_sample_and_view_alone():
    recipe, ids = CropRecipe(locals=6), np.arange(50)
    sizes = np.full(50, 400), np.full(50, 500)
    found = draw_windows(recipe, 0, 0, ids, *sizes)
    assert np.array_equal(found[:, 20:30], draw_windows(recipe, 0, 0, ids[20:30], sizes[0][:10], sizes[1][:10]))
    assert len({tuple(window) for window in found.reshape(-1, 4)}) == found.size // 4
    for other in (draw_windows(recipe, 1, 0, ids, *sizes), draw_windows(recipe, 0, 1, ids, *sizes)):
        assert (other != found).any(-1).mean() > 0.99
