"""Damaged images: kept and decodable in training, or refused with a reason; never a crash or a hang."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.decode_torch import decode as decode_for_training
from shards.images.decode import decode, load, read_info
from shards.images.image_info import ImageInfo, UndecodableError
from tests.shards import dali
from tests.shards.fuzz import mutant, whole_files

MOST_SECONDS = 5.0  # an image, on a busy machine

Result = ImageInfo | str  # or the reason why it is refused

MANY = [2_000, pytest.param(20_000, marks=pytest.mark.slow)]


def decode_or_explain(judge, data: bytes) -> Result:
    try:
        return judge(data)
    except UndecodableError as reason:
        return str(reason)


def awkward_files(folder: Path) -> list[bytes]:
    """Real images and traps, without the largest, which would take most of the time."""
    files = (path.read_bytes() for path in sorted((folder / "awkward").rglob("*")) if path.is_file())
    return [data for data in files if data and len(data) < 400_000]


def kept(samples: Sequence[bytes]) -> dict[bytes, ImageInfo]:
    """What `decode` keeps, after a look at every result."""
    images = {}
    for sample in samples:
        began = time.monotonic()
        found = decode_or_explain(decode, sample)
        assert time.monotonic() - began < MOST_SECONDS
        assert decode_or_explain(decode, sample) == found, "another result the second time"
        if isinstance(found, ImageInfo):
            assert read_info(sample) == found._replace(largest=0)
            images[sample] = found
        else:
            assert found
            assert found.isprintable(), found
            header = decode_or_explain(read_info, sample)
            assert header == found or isinstance(header, ImageInfo), "the header alone gives another reason"
    return images


def assert_decodable(images: dict[bytes, ImageInfo]) -> None:
    """By both decoders of training, with the sizes that the index would hold."""
    sizes = [(image.height, image.width) for image in images.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata, which training shows
        assert [tuple(decode_for_training(sample).shape[1:]) for sample in images] == sizes
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: only the torch decoder was asked")
    answers = dali.ask(list(images))
    assert not [(a, p) for a, p in zip(answers, images.values(), strict=True) if a != (p.height, p.width)]


@pytest.mark.parametrize("count", MANY)
def test_every_mutant_is_kept_and_decodable_or_refused_with_a_reason(count: int):
    files = list(whole_files().values())
    images = kept([mutant(seed, files) for seed in range(count)])
    assert count / 8 < len(images) < count / 2, "the mutants are damaged too much or too little to tell anything"
    assert_decodable(images)


@pytest.mark.parametrize("count", MANY)
def test_a_jpeg_drawn_at_an_eighth_has_the_verdict_of_the_whole_one(count: int):
    files = [data for name, data in whole_files().items() if name.endswith(".jpg")]
    looked_at = 0
    for seed in range(count):
        sample = mutant(seed, files)
        image = decode_or_explain(read_info, sample)
        if isinstance(image, ImageInfo):
            whole, eighth = (loaded(sample, image, at_an_eighth=small) for small in (False, True))
            assert whole == eighth
            looked_at += 1
    assert looked_at > count / 4


def loaded(sample: bytes, image: ImageInfo, *, at_an_eighth: bool) -> str:
    """Why not; empty where it loads."""
    try:
        load(sample, image, at_an_eighth=at_an_eighth)
    except UndecodableError as reason:
        return str(reason)
    return ""


@pytest.mark.slow
def test_every_mutant_of_real_images_is_kept_and_decodable_or_refused_with_a_reason(shared_data: Path):
    files = awkward_files(shared_data)
    images = kept([mutant(seed, files) for seed in range(1_000)])
    assert len(images) > 100
    assert_decodable(images)


def test_awkward_images_are_kept_and_decodable_or_refused_with_a_reason(shared_data: Path):
    images = kept(awkward_files(shared_data))
    assert len(images) > 30
    assert_decodable(images)
