"""Damaged pictures: kept and decodable in training, or refused with a reason; never a crash or a hang."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.decode_torch import decode as decode_for_training
from shards.images.decode import Picture, UndecodableError, decode, load, measure
from tests.shards import dali
from tests.shards.fuzz import mutant, whole_files

MOST_SECONDS = 5.0  # a picture, on a busy machine

Verdict = Picture | str  # or why not

MANY = [2_000, pytest.param(20_000, marks=pytest.mark.slow)]


def verdict(judge, data: bytes) -> Verdict:
    try:
        return judge(data)
    except UndecodableError as reason:
        return str(reason)


def awkward_files(folder: Path) -> list[bytes]:
    """Real pictures and traps, without the largest, which would take most of the time."""
    files = (path.read_bytes() for path in sorted((folder / "awkward").rglob("*")) if path.is_file())
    return [data for data in files if data and len(data) < 400_000]


def kept(samples: Sequence[bytes]) -> dict[bytes, Picture]:
    """What `decode` keeps, after a look at every verdict."""
    pictures = {}
    for sample in samples:
        began = time.monotonic()
        found = verdict(decode, sample)
        assert time.monotonic() - began < MOST_SECONDS
        assert verdict(decode, sample) == found, "another verdict the second time"
        if isinstance(found, Picture):
            assert measure(sample) == found
            pictures[sample] = found
        else:
            assert found
            assert found.isprintable(), found
            header = verdict(measure, sample)
            assert header == found or isinstance(header, Picture), "the header alone gives another reason"
    return pictures


def assert_decodable(pictures: dict[bytes, Picture]) -> None:
    """By both decoders of training, with the sizes that the index would hold."""
    sizes = [(picture.height, picture.width) for picture in pictures.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd metadata, which training shows
        assert [tuple(decode_for_training(sample).shape[1:]) for sample in pictures] == sizes
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: only the torch decoder was asked")
    answers = dali.ask(list(pictures))
    assert not [(a, p) for a, p in zip(answers, pictures.values(), strict=True) if a != (p.height, p.width)]


@pytest.mark.parametrize("count", MANY)
def test_every_mutant_is_kept_and_decodable_or_refused_with_a_reason(count: int):
    files = list(whole_files().values())
    pictures = kept([mutant(seed, files) for seed in range(count)])
    assert count / 8 < len(pictures) < count / 2, "the mutants are damaged too much or too little to tell anything"
    assert_decodable(pictures)


@pytest.mark.parametrize("count", MANY)
def test_a_jpeg_drawn_at_an_eighth_has_the_verdict_of_the_whole_one(count: int):
    files = [data for name, data in whole_files().items() if name.endswith(".jpg")]
    looked_at = 0
    for seed in range(count):
        sample = mutant(seed, files)
        picture = verdict(measure, sample)
        if isinstance(picture, Picture):
            whole, eighth = (loaded(sample, picture, at_an_eighth=small) for small in (False, True))
            assert whole == eighth
            looked_at += 1
    assert looked_at > count / 4


def loaded(sample: bytes, picture: Picture, *, at_an_eighth: bool) -> str:
    """Why not; empty where it loads."""
    try:
        load(sample, picture, at_an_eighth=at_an_eighth)
    except UndecodableError as reason:
        return str(reason)
    return ""


@pytest.mark.slow
def test_every_mutant_of_real_pictures_is_kept_and_decodable_or_refused_with_a_reason(shared_data: Path):
    files = awkward_files(shared_data)
    pictures = kept([mutant(seed, files) for seed in range(1_000)])
    assert len(pictures) > 100
    assert_decodable(pictures)


def test_awkward_pictures_are_kept_and_decodable_or_refused_with_a_reason(shared_data: Path):
    pictures = kept(awkward_files(shared_data))
    assert len(pictures) > 30
    assert_decodable(pictures)
