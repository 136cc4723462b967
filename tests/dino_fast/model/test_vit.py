"""Vision transformers give the figures of the published code (tests/golden/vit_forward.json), in float64."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_fast.model.drop_path import scale_branches
from dino_fast.model.vit import DEPTH, VisionTransformer, attend
from tests.golden_runs import fill

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "vit_forward.json").read_text())
SIZES = {"vit_tiny": (192, 3), "vit_small": (384, 6)}


def build(arch: str, patch: int) -> VisionTransformer:
    network = VisionTransformer(patch, *SIZES[arch]).double().eval()
    fill(network)
    return network


def draw_images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng([2000, height, width]).standard_normal((count, 3, height, width)))


def assert_digest(tensor: Tensor, expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert list(tensor.shape) == expected["shape"]
    flat = tensor.detach().double().flatten()
    size = expected["norm"] * math.sqrt(len(flat))
    assert flat.norm().item() == pytest.approx(expected["norm"], rel=tolerance)
    assert flat.sum().item() == pytest.approx(expected["sum"], abs=tolerance * size)
    dot = (flat * torch.arange(len(flat), dtype=torch.float64).cos()).sum().item()
    assert dot == pytest.approx(expected["dot"], abs=tolerance * size)
    first = expected["first"]
    assert flat[: len(first)].tolist() == pytest.approx(first, rel=tolerance, abs=tolerance)


def list_models() -> list[Any]:
    """Return the golden models. The largest is slow."""
    models = {f"{model['arch']}-{model['patch_size']}": model for model in GOLDEN["models"]}
    return [
        pytest.param(model, id=name, marks=[pytest.mark.slow] if name == "vit_small-8" else [])
        for name, model in models.items()
    ]


@pytest.mark.parametrize("model", list_models())
@torch.no_grad()
def test_the_published_figures(model: dict[str, Any]):
    network = build(model["arch"], model["patch_size"])
    assert len(network.state_dict()) == model["tensors"]
    assert sum(parameter.numel() for parameter in network.parameters()) == model["parameters"]
    for given in model["inputs"]:
        images = draw_images(*given["size"])
        assert_digest(network(images), given["cls"])
        assert_digest(network.interpolate_positions(*given["size"]), given["pos_embed"])
        assert_digest(network.embed(images), given["tokens_in"])
        assert_digest(network.last_attention(images), given["last_attention"])
        for tokens, expected in zip(network.last_tokens(images, 4), given["intermediate"], strict=True):
            assert_digest(tokens, expected)


@pytest.mark.parametrize("given", GOLDEN["pos_embed_only"], ids=lambda given: f"{given['patch_size']}-{given['size']}")
def test_positions_of_any_size_are_the_published_ones(given: dict[str, Any]):
    network = build("vit_tiny", given["patch_size"])
    assert_digest(network.interpolate_positions(*given["size"]), given["pos_embed"])


@pytest.mark.parametrize("given", GOLDEN["drop_path"], ids=lambda given: str(given["drop_path_rate"]))
@torch.no_grad()
def test_drop_path_is_the_published_one(given: dict[str, Any]):
    images = draw_images(96, 96)
    images = torch.cat([images, 0.5 * images.flip(0), 0.25 * images, images + 1])
    draws = np.zeros((2 * DEPTH, len(images)))  # the first block has no draws, and is kept
    for block in range(1, DEPTH):
        for branch in range(2):
            draws[2 * block + branch] = np.random.default_rng([4000, block, branch]).random(len(images))
    scales = scale_branches(draws, given["drop_path_rate"])
    assert np.count_nonzero(scales[2:]) == given["kept_of_176"]
    exact = np.where(scales > 0, 1 / (1 - np.repeat(given["rate_of_block"], 2))[:, None], 0)
    assert_digest(build("vit_tiny", 16)(images, torch.from_numpy(exact)), given["cls"])
    assert np.allclose(scales, exact, rtol=1e-7)


def test_attention_on_a_cpu_has_the_value_and_the_gradient_of_the_fused_one():
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 11, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found, expected = attend(*given), torch.nn.functional.scaled_dot_product_attention(*given)
    slope = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    for one, two in zip(*(torch.autograd.grad(value, given, slope) for value in (found, expected)), strict=True):
        torch.testing.assert_close(one, two)
    with torch.no_grad():
        torch.testing.assert_close(attend(*given), expected)
