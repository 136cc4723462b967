"""Drop path draws by (seed, step, sample, view, branch) alone: the same on any rank, after any resume."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_fast.config import Recipe
from dino_fast.model.drop_path import draw_branch_scales
from dino_fast.run.drop_path import draw_scales
from pipelines.crops import CropRecipe

CPU = torch.device("cpu")
RECIPE = Recipe(backbone="vit_tiny_patch16", crops=CropRecipe(locals=3))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**48), step=st.integers(0, 2**31), parts=st.integers(1, 4),
    ids=st.lists(st.integers(0, 2**40), unique=True, min_size=1, max_size=9),
)  # fmt: skip
def test_a_sample_has_the_same_draws_in_any_batch(seed: int, step: int, ids: list[int], parts: int):
    whole = draw_branch_scales(0.5, 12, seed, step, np.array(ids), 5).reshape(24, 5, -1)
    for share in np.array_split(np.arange(len(ids)), parts):
        if len(share):
            part = draw_branch_scales(0.5, 12, seed, step, np.array(ids)[share], 5).reshape(24, 5, -1)
            assert np.array_equal(part, whole[:, :, share])


def test_branches_are_left_out_as_often_as_the_rate_says():
    ids = np.arange(4000)
    scales = draw_branch_scales(0.3, 12, 0, 7, ids, 4)
    rates = np.repeat(np.linspace(0, 0.3, 12), 2)
    assert (scales[:2] == 1).all()  # the first block has none
    dropped = (scales == 0).mean(1)
    assert np.abs(dropped - rates).max() < 5 * np.sqrt(0.3 * 0.7 / scales.shape[1])
    assert np.abs(scales.mean(1) - 1).max() < 0.02
    kept = np.where(scales > 0, scales, np.nan)
    assert np.allclose(np.nanmax(kept, 1), 1 / (1 - rates))
    # Attention and MLP, views, samples and steps are drawn independently.
    other = draw_branch_scales(0.3, 12, 0, 8, ids, 4)
    for one, two in ((scales[22], scales[23]), (scales[23, :4000], scales[23, 4000:8000]), (scales[23], other[23])):
        both = ((one == 0) & (two == 0)).mean()
        assert both == pytest.approx(0.09, abs=0.02)


def test_a_run_draws_for_its_own_views():
    scales = draw_scales(RECIPE, 3, np.array([5, 6]), CPU)
    assert scales is not None
    assert scales.dtype == torch.float32
    assert np.array_equal(scales.numpy(), draw_branch_scales(0.1, 12, 0, 3, np.array([5, 6]), 5))


@pytest.mark.parametrize("recipe", [replace(RECIPE, drop_path=0.0), replace(RECIPE, backbone="resnet18")])
def test_without_drop_path_there_are_no_draws(recipe: Recipe):
    assert draw_scales(recipe, 0, np.array([1]), CPU) is None
