"""DALI and torchvision against Pillow, image by image."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.crops import CropRecipe, draw_windows
from pipelines.decode_dali import DaliDecoder, find_tiny
from pipelines.decode_torch import TorchDecoder, decode
from pipelines.decoder import DecodeError, DecodeRequest
from shards.index import ShardIndex

CPU = torch.device("cpu")
RECIPE = CropRecipe(global_size=64, global_scale=(0.14, 1.0), local_size=32, local_scale=(0.05, 0.14), locals=4)
DECODERS = ("dali", "torch")


def build_decoder(kind: str, recipe: CropRecipe, batch: int):
    return DaliDecoder(recipe, batch, CPU, threads=2) if kind == "dali" else TorchDecoder(recipe, ThreadPoolExecutor(2))


def load_rgb(sample: bytes) -> Image.Image:
    """Return Pillow's image in 8-bit RGB. Of 16-bit grayscale the high byte is kept: Pillow would clip to white."""
    image = Image.open(io.BytesIO(sample))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def crop_by_pillow(sample: bytes, places: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    image = load_rgb(sample)
    return [
        np.asarray(image.crop((left, top, left + wide, top + tall)).resize((size, size), Image.Resampling.BICUBIC))
        for (top, left, tall, wide), size in zip(places.tolist(), sizes, strict=True)
    ]


def make_request(samples: list[bytes], recipe: CropRecipe, step: int = 0) -> DecodeRequest:
    sizes = [load_rgb(sample).size for sample in samples]
    ids = np.arange(len(samples))
    widths, heights = (np.array(side) for side in zip(*sizes, strict=True))
    return DecodeRequest(step, ids, samples, draw_windows(recipe, 0, 0, ids, heights, widths))


def crop_all_by_pillow(request: DecodeRequest, recipe: CropRecipe) -> list[list[np.ndarray]]:
    return [
        crop_by_pillow(sample, request.windows[:, place], recipe.sizes) for place, sample in enumerate(request.samples)
    ]


def measure_difference_to_pillow(
    kind: str, request: DecodeRequest, recipe: CropRecipe, expected: list[list[np.ndarray]]
) -> np.ndarray:
    """Return the mean difference to the `expected` crops of each view and image, [views, B], in levels of 255."""
    (_, crops), *more = list(build_decoder(kind, recipe, len(request.samples)).decode_requests([request]))
    assert not more
    assert not isinstance(crops, DecodeError), crops
    views = [view for crops_of_one_size in crops for view in crops_of_one_size.unbind(1)]
    return np.array([
        [np.abs(views[view][place].numpy().astype(int) - exact).mean() for view, exact in enumerate(crops_of_image)]
        for place, crops_of_image in enumerate(expected)
    ]).T  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_crops_agree_with_pillow(kind: str, index: ShardIndex):
    request = make_request(index.read(range(24)), RECIPE)
    assert measure_difference_to_pillow(kind, request, RECIPE, crop_all_by_pillow(request, RECIPE)).max() < 0.3


def test_crops_of_awkward_images_agree_with_pillow(shared_data: Path):
    samples = []
    for path in sorted((shared_data / "awkward").rglob("*")):
        try:
            load_rgb(path.read_bytes()).load()
        except (OSError, SyntaxError):
            continue
        samples.append(path.read_bytes())
    assert len(samples) > 30
    recipe = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=4)
    request = make_request(samples, recipe)
    expected = crop_all_by_pillow(request, recipe)
    for kind in DECODERS:
        assert measure_difference_to_pillow(kind, request, recipe, expected).max() < 0.5, kind


def test_crops_of_photographs_agree_with_pillow(shared_data: Path):
    import tarfile

    with tarfile.open(shared_data / "photos-256.tar") as photos:
        members = [photos.next() for _ in range(24)]
        samples = [photos.extractfile(member).read() for member in members]
    recipe = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=4)
    request = make_request(samples, recipe)
    expected = crop_all_by_pillow(request, recipe)
    for kind in DECODERS:
        difference = measure_difference_to_pillow(kind, request, recipe, expected)
        assert difference.mean() < 0.2, kind
        assert difference.max() < 0.3, kind


@pytest.mark.parametrize("kind", DECODERS)
def test_an_image_alone_is_the_same_as_in_a_batch(kind: str, index: ShardIndex):
    request = make_request(index.read(range(9)), RECIPE)
    decoder = build_decoder(kind, RECIPE, 16)
    [(_, together)] = list(decoder.decode_requests([request]))
    for place, sample in enumerate(request.samples):
        alone = decoder.decode_one(sample, request.windows[:, [place]])
        assert all(torch.equal(view[place], image) for view, image in zip(together, alone, strict=True))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_bad_image_fails_its_own_request_only(kind: str, index: ShardIndex):
    good = make_request(index.read(range(6)), RECIPE, step=0)
    samples = [*good.samples[:3], good.samples[3][:400], *good.samples[4:]]
    bad = DecodeRequest(1, good.ids, samples, good.windows)
    decoder = build_decoder(kind, RECIPE, 6)
    outcomes = []
    for request, crops in decoder.decode_requests([good, bad, good, bad, bad, good, good]):
        outcomes.append((request.step, isinstance(crops, DecodeError)))
    assert outcomes == [(0, False), (1, True), (0, False), (1, True), (1, True), (0, False), (0, False)]
    with pytest.raises(DecodeError):
        decoder.decode_one(samples[3], bad.windows[:, [3]])
    assert sum(map(len, decoder.decode_one(samples[2], bad.windows[:, [2]]))) == RECIPE.views


def test_tiny_windows_are_found_by_their_thinner_side():
    places = np.array([[[0, 0, 16, 16], [0, 0, 15, 400], [0, 0, 400, 15]]] * 2)
    assert find_tiny(places).tolist() == [False, True, True]


@pytest.mark.parametrize("sample", [b"", b"<html>", bytes(1000)])
def test_bytes_that_are_not_an_image_do_not_decode(sample: bytes):
    with pytest.raises(DecodeError):
        decode(sample)


def test_a_failed_batch_does_not_write_into_the_next(index: ShardIndex, monkeypatch: pytest.MonkeyPatch):
    from pipelines import decode_torch

    good = make_request(index.read(range(4)), RECIPE)
    bad = DecodeRequest(1, good.ids, [b"junk", *good.samples[1:]], good.windows)
    plain = decode_torch.decode
    started = threading.Event()

    def slow_for_the_last(sample: bytes):
        if sample is bad.samples[3] and not started.is_set():
            started.set()
            time.sleep(1)
        return plain(sample)

    [(_, expected)] = list(build_decoder("torch", RECIPE, 4).decode_requests([good]))
    with ThreadPoolExecutor(4) as pool:
        stream = TorchDecoder(RECIPE, pool).decode_requests([bad, good])
        monkeypatch.setattr(decode_torch, "decode", slow_for_the_last)
        assert isinstance(next(stream)[1], DecodeError)
        _, found = next(stream)
    # The pool has ended here: the straggler too.
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_an_undecodable_image_is_reported_in_the_same_words_each_time():
    with pytest.raises(DecodeError) as raised:
        decode(b"junk")
    assert str(raised.value) == "cannot identify image file"
