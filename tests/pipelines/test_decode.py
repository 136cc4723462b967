"""DALI and torchvision against Pillow, picture by picture."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.crops import CropRecipe, windows
from pipelines.decode_dali import DaliDecoder, tiny
from pipelines.decode_torch import TorchDecoder, decode
from pipelines.request import Request, Undecodable
from shards.index import ShardIndex

CPU = torch.device("cpu")
RECIPE = CropRecipe(global_size=64, global_scale=(0.14, 1.0), local_size=32, local_scale=(0.05, 0.14), locals=4)
DECODERS = ("dali", "torch")


def build(kind: str, recipe: CropRecipe, batch: int):
    return DaliDecoder(recipe, batch, CPU, threads=2) if kind == "dali" else TorchDecoder(recipe, ThreadPoolExecutor(2))


def rgb(sample: bytes) -> Image.Image:
    """Pillow's picture in 8-bit RGB. Its own conversion clips 16-bit greys to white; their high byte is meant."""
    picture = Image.open(io.BytesIO(sample))
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def pillow_crops(sample: bytes, places: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    picture = rgb(sample)
    return [
        np.asarray(picture.crop((left, top, left + wide, top + tall)).resize((size, size), Image.Resampling.BICUBIC))
        for (top, left, tall, wide), size in zip(places.tolist(), sizes, strict=True)
    ]


def request_of(samples: list[bytes], recipe: CropRecipe, step: int = 0) -> Request:
    sizes = [rgb(sample).size for sample in samples]
    ids = np.arange(len(samples))
    widths, heights = (np.array(side) for side in zip(*sizes, strict=True))
    return Request(step, ids, samples, windows(recipe, 0, 0, ids, heights, widths))


def difference_to_pillow(kind: str, request: Request, recipe: CropRecipe) -> np.ndarray:
    """Mean difference of each view and picture, [views, B], in levels of 255."""
    (_, crops), *more = list(build(kind, recipe, len(request.samples)).stream([request]))
    assert not more
    assert not isinstance(crops, Undecodable), crops
    views = [view for crops_of_one_size in crops for view in crops_of_one_size.unbind(1)]
    return np.array([
        [np.abs(views[view][place].numpy().astype(int) - expected).mean() for view, expected in enumerate(
            pillow_crops(sample, request.windows[:, place], recipe.sizes))]
        for place, sample in enumerate(request.samples)
    ]).T  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_crops_are_pillows(kind: str, index: ShardIndex):
    request = request_of(index.read(range(24)), RECIPE)
    assert difference_to_pillow(kind, request, RECIPE).max() < 0.3


@pytest.mark.parametrize("kind", DECODERS)
def test_crops_of_awkward_pictures_are_pillows(kind: str, shared_data: Path):
    samples = []
    for path in sorted((shared_data / "awkward").rglob("*")):
        try:
            rgb(path.read_bytes()).load()
        except (OSError, SyntaxError):
            continue
        samples.append(path.read_bytes())
    assert len(samples) > 30
    recipe = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=4)
    assert difference_to_pillow(kind, request_of(samples, recipe), recipe).max() < 0.5


@pytest.mark.parametrize("kind", DECODERS)
def test_crops_of_photographs_are_pillows(kind: str, shared_data: Path):
    import tarfile

    with tarfile.open(shared_data / "photos-256.tar") as photos:
        members = [photos.next() for _ in range(24)]
        samples = [photos.extractfile(member).read() for member in members]
    recipe = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=4)
    apart = difference_to_pillow(kind, request_of(samples, recipe), recipe)
    assert apart.mean() < 0.2
    assert apart.max() < 0.3


@pytest.mark.parametrize("kind", DECODERS)
def test_a_picture_alone_is_the_same_as_in_a_batch(kind: str, index: ShardIndex):
    request = request_of(index.read(range(9)), RECIPE)
    decoder = build(kind, RECIPE, 16)
    [(_, together)] = list(decoder.stream([request]))
    for place, sample in enumerate(request.samples):
        alone = decoder.one(sample, request.windows[:, [place]])
        assert all(torch.equal(view[place], picture) for view, picture in zip(together, alone, strict=True))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_bad_picture_fails_its_own_request_only(kind: str, index: ShardIndex):
    good = request_of(index.read(range(6)), RECIPE, step=0)
    samples = [*good.samples[:3], good.samples[3][:400], *good.samples[4:]]
    bad = Request(1, good.ids, samples, good.windows)
    decoder = build(kind, RECIPE, 6)
    outcomes = []
    for request, crops in decoder.stream([good, bad, good, bad, bad, good, good]):
        outcomes.append((request.step, isinstance(crops, Undecodable)))
    assert outcomes == [(0, False), (1, True), (0, False), (1, True), (1, True), (0, False), (0, False)]
    with pytest.raises(Undecodable):
        decoder.one(samples[3], bad.windows[:, [3]])
    assert sum(map(len, decoder.one(samples[2], bad.windows[:, [2]]))) == RECIPE.views


def test_tiny_windows_are_found_by_their_thinner_side():
    places = np.array([[[0, 0, 16, 16], [0, 0, 15, 400], [0, 0, 400, 15]]] * 2)
    assert tiny(places).tolist() == [False, True, True]


@pytest.mark.parametrize("sample", [b"", b"<html>", bytes(1000)])
def test_what_is_no_picture_does_not_decode(sample: bytes):
    with pytest.raises(Undecodable):
        decode(sample)


def test_a_failed_batch_does_not_write_into_the_next(index: ShardIndex, monkeypatch: pytest.MonkeyPatch):
    from pipelines import decode_torch

    good = request_of(index.read(range(4)), RECIPE)
    bad = Request(1, good.ids, [b"junk", *good.samples[1:3], good.samples[0]], good.windows)
    plain = decode_torch.decode
    started = threading.Event()

    def slow_for_the_last(sample: bytes):
        if sample is bad.samples[3] and not started.is_set():
            started.set()
            time.sleep(1)
        return plain(sample)

    [(_, expected)] = list(build("torch", RECIPE, 4).stream([good]))
    with ThreadPoolExecutor(4) as pool:
        stream = TorchDecoder(RECIPE, pool).stream([bad, good])
        monkeypatch.setattr(decode_torch, "decode", slow_for_the_last)
        assert isinstance(next(stream)[1], Undecodable)
        _, found = next(stream)
    # The pool has ended here: the straggler too.
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_an_undecodable_picture_is_reported_in_the_same_words_each_time():
    with pytest.raises(Undecodable) as raised:
        decode(b"junk")
    assert str(raised.value) == "cannot identify image file"
