"""Descriptors against those of the published code (tests/golden/retrieval.json), and for every kind of backbone."""

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from dino_fast.distributed import Ranks
from dino_fast.evaluate.search import describer
from dino_fast.evaluate.search.describer import Describer, group_by_size, join_shares, load_ahead
from dino_fast.evaluate.search.descriptors import (
    SCALES,
    Descriptor,
    compute_gem,
    cut_box,
    describe_by_gem,
    scale_images,
    shrink,
    squash,
)
from dino_fast.evaluate.search.images import UnreadableImage
from dino_fast.model.backbones import build_backbone
from pipelines.photometric import IMAGENET
from shards.errors import UserError
from tests.dino_fast.model.test_vit import assert_digest, build, draw_images
from tests.golden_runs import fill

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "retrieval.json").read_text())
ALONE = Ranks(0, 1, torch.device("cpu"))


def _build_golden(network: str) -> nn.Module:
    if network == "vit_tiny_p16":
        return build("vit_tiny", 16)
    backbone = build_backbone(network)[0].double().eval()
    fill(backbone)
    return backbone


@pytest.mark.parametrize("given", GOLDEN["multi_scale"], ids=lambda given: f"{given['network']}-{given['size']}")
@torch.no_grad()
def test_the_published_multi_scale_descriptors(given: dict[str, Any]):
    images = draw_images(*given["size"], count=1)
    assert_digest(scale_images(images, SCALES[1]), given["input_at_0.7071"])
    backbone = _build_golden(given["network"])
    assert_digest(Descriptor(backbone)(images), given["single_scale"])
    assert_digest(nn.functional.normalize(Descriptor(backbone, scales=SCALES)(images)), given["multi_scale"])


@pytest.mark.parametrize("given", GOLDEN["cls_gem"], ids=lambda given: str(given["patch_size"]))
@torch.no_grad()
def test_the_published_cls_token_with_gem(given: dict[str, Any]):
    images = np.stack([np.random.default_rng([72, i]).integers(0, 256, (96, 96, 3)) for i in range(3)])
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET.mean, IMAGENET.std))
    x = ((torch.from_numpy(images).double() / 255) - mean) / std
    found = Descriptor(build(given["arch"], given["patch_size"]), gem=4)(x.permute(0, 3, 1, 2))
    assert_digest(found, given["features"])
    assert_digest(found[:, 192:], given["gem_part"])
    for row, expected in zip(found, given["each"], strict=True):
        assert_digest(row, expected)


# Any backbone


def _gem(patches: Tensor, power: float) -> Tensor:
    """The mean of the powers in numpy. `patches`: [N, P, D]."""
    return torch.from_numpy((np.maximum(patches.numpy(), 1e-6) ** power).mean(1) ** (1 / power))


@torch.no_grad()
def test_gem_of_a_resnet_is_that_of_its_last_map():
    backbone = build_backbone("resnet18")[0].eval()
    x = draw_images(64, 96).float()
    maps = nn.Sequential(*list(backbone.children())[:-2])(x)
    assert maps.shape == (2, 512, 2, 3)
    torch.testing.assert_close(describe_by_gem(backbone, x, 3), _gem(maps.flatten(2).transpose(1, 2), 3))
    # Its values are 0 or more, so the power 1 is the average pool.
    torch.testing.assert_close(describe_by_gem(backbone, x, 1), backbone(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "side", "tokens"),
    [("timm/test_vit2", 64, True), ("timm/test_resnet", 64, False), ("timm/swin_tiny_patch4_window7_224", 224, False)],
)
@torch.no_grad()
def test_gem_of_a_model_of_timm(name: str, side: int, tokens: bool):
    backbone, width = build_backbone(name)
    backbone.eval()
    x = draw_images(side, side).float()
    maps = backbone.forward_features(x)  # type: ignore[operator]
    if tokens:
        patches = maps[:, backbone.num_prefix_tokens :]
    else:
        patches = maps.flatten(1, 2) if maps.shape[-1] == width else maps.flatten(2).transpose(1, 2)
    found = describe_by_gem(backbone, x, 4)
    torch.testing.assert_close(found[:, -patches.shape[2] :], _gem(patches, 4))
    assert found.shape[1] == (width if tokens else 0) + patches.shape[2]
    if tokens:
        torch.testing.assert_close(found[:, :width], backbone(x))


def test_a_backbone_without_a_map_has_no_gem():
    with pytest.raises(UserError, match="--gem: this backbone has neither patch tokens nor a last map"):
        describe_by_gem(nn.Flatten(), torch.zeros(1, 3, 4, 4), 4)


def test_values_below_the_least_count_as_the_least():
    patches = torch.tensor([[[-5.0, 1.0], [-1.0, 3.0]]])
    torch.testing.assert_close(compute_gem(patches, 2), torch.tensor([[1e-6, 5.0**0.5]]))


# Images


@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 200))
def test_an_image_is_shrunk_but_never_enlarged(width: int, height: int, size: int):
    image = shrink(Image.new("RGB", (width, height)), size)
    assert max(image.size) <= max(size, 32)
    for new, old in zip(image.size, (width, height), strict=True):
        assert new <= max(old, 32)
        assert new >= 32
    if max(width, height) <= size and min(width, height) >= 32:
        assert image.size == (width, height)


def test_shrinking_is_pillows_thumbnail():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    expected = image.crop((10, 20, 210, 120))
    expected.thumbnail((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(shrink(image, 64, (9.6, 20.4, 210.4, 120.0)), expected)
    assert squash(image, 32).size == (32, 32)


@pytest.mark.parametrize(
    ("box", "size"),
    [((-5, -5, 3, 2), (3, 2)), ((8, 8, 99, 99), (2, 2)), ((3.1, 3.1, 3.2, 3.2), (1, 1)), ((50, 60, 70, 80), (1, 1))],
)
def test_a_box_has_a_pixel_of_the_image_at_least(box: tuple[float, float, float, float], size: tuple[int, int]):
    assert cut_box(Image.new("RGB", (10, 10)), box).size == size


# Many images


class _Mean(nn.Module):
    """Maps images to their mean levels, and notes how many come together."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(tuple(images.shape))
        return images.mean((2, 3))


def _load(number: int) -> Image.Image:
    if number == 3:
        raise UnreadableImage("three.jpg: broken")
    return Image.new("RGB", (8 if number < 5 else 16, 8), (number, 2 * number, 0))


def test_images_of_one_size_go_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(describer, "_PIXELS", 8 * 8 * 2)
    network = _Mean()
    found = Describer(network, IMAGENET, ALONE).describe(_load, 8, "the images", skip_unreadable=True)
    assert network.batches == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 16), (1, 3, 8, 16), (1, 3, 8, 16)]
    assert found.numbers == [0, 1, 2, 4, 5, 6, 7]
    assert found.unreadable == ["three.jpg: broken"]
    levels = torch.tensor([[number, 2 * number, 0] for number in found.numbers]) / 255
    torch.testing.assert_close(found.descriptors, (levels - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std))


def test_an_image_that_cannot_be_read_is_named():
    with pytest.raises(UserError, match=r"cannot read the image three\.jpg: broken\. Replace it"):
        Describer(_Mean(), IMAGENET, ALONE).describe(_load, 8, "the images")
    with pytest.raises(UserError, match=r"the set: none of the images can be read\. The first is three"):
        Describer(_Mean(), IMAGENET, ALONE).describe(lambda _: _load(3), 2, "the set", skip_unreadable=True)


def test_ranks_share_the_images():
    shares = [
        Describer(_Mean(), IMAGENET, Ranks(rank, 3, torch.device("cpu")))._describe_share(
            _load, range(rank, 8, 3), True
        )
        for rank in range(3)
    ]
    alone = Describer(_Mean(), IMAGENET, ALONE).describe(_load, 8, "x", skip_unreadable=True)
    joined = join_shares(shares)
    assert (joined.numbers, joined.unreadable) == (alone.numbers, alone.unreadable)
    torch.testing.assert_close(joined.descriptors, alone.descriptors)


def test_descriptors_are_kept_and_a_stopped_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Chunks have three images here. The fourth image cannot be read, and is read again in the hope that it can."""
    monkeypatch.setattr("dino_fast.evaluate.feature_file.CHUNK", 3)
    monkeypatch.setattr(describer, "CHUNK", 3)
    expected = Describer(_Mean(), IMAGENET, ALONE).describe(_load, 8, "x", skip_unreadable=True)
    asked: list[int] = []

    def load(number: int, last: int = 8) -> Image.Image:
        asked.append(number)
        if number >= last:
            raise RuntimeError("killed")
        return _load(number)

    once = Describer(_Mean(), IMAGENET, ALONE, "mean", tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        once.describe(partial(load, last=5), 8, "x", {"images": "a"}, skip_unreadable=True)
    for read in [0, 3, 3, 4, 5, 6, 7], [0, 3]:  # the first tells the width; 1 and 2 were kept
        asked.clear()
        found = once.describe(load, 8, "x", {"images": "a"}, skip_unreadable=True)
        assert sorted(asked) == read
        assert (found.numbers, found.unreadable) == (expected.numbers, expected.unreadable)
        torch.testing.assert_close(found.descriptors, expected.descriptors)
    with pytest.raises(UserError, match=r"cannot read the image three\.jpg"):
        once.describe(load, 8, "x", {"images": "a"})
    other = once.describe(lambda n: Image.new("RGB", (8, 8), (n, 0, 0)), 8, "x", {"images": "b"})
    assert other.numbers == list(range(8))


def test_a_size_that_a_backbone_cannot_take_is_named():
    class Picky(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[2] == 99, "the height must be 99.\nMore"
            return images.flatten(1)

    with pytest.raises(UserError, match=r"cannot take an image of 8 x 8 pixels \(the height must be 99\)\. Pass"):
        Describer(Picky(), IMAGENET, ALONE).describe(_load, 2, "the images")


def test_features_that_are_not_finite_are_refused():
    class Diverged(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) / 0

    with pytest.raises(UserError, match="its features are not finite"):
        Describer(Diverged(), IMAGENET, ALONE).describe(_load, 2, "the images")


def test_loading_ahead_keeps_the_order_and_stops_early():
    begun: list[int] = []
    lock = threading.Lock()

    def load(number: int) -> int:
        with lock:
            begun.append(number)
        return number**2

    assert list(load_ahead(load, range(200))) == [number**2 for number in range(200)]
    begun.clear()
    some = load_ahead(load, range(10_000))
    assert next(some) == 0
    some.close()  # type: ignore[attr-defined]
    assert len(begun) < 200


@given(st.lists(st.sampled_from([(8, 8), (8, 9), (300, 300)]), max_size=20))
def test_groups_hold_every_image_once_and_in_order(sizes: list[tuple[int, int]]):
    images = [(number, Image.new("L", size)) for number, size in enumerate(sizes)]
    groups = list(group_by_size(images))
    assert [pair for group in groups for pair in group] == images
    assert all(len({image.size for _, image in group}) == 1 for group in groups)
    assert all(len(group) * group[0][1].width * group[0][1].height <= 64 * 224 * 224 for group in groups)
