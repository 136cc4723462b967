"""What a really trained network scores on real images, and what random weights do: the protocols tell them apart."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dino_fast.distributed import Ranks
from dino_fast.evaluate.copies import evaluate_copies
from dino_fast.evaluate.retrieval import RetrievalProtocol, evaluate_retrieval, find_retrieval_files
from dino_fast.evaluate.search.copydays import find_copies
from dino_fast.evaluate.search.describer import Describer
from dino_fast.evaluate.search.descriptor_flags import describe_others
from dino_fast.evaluate.search.descriptors import Descriptor, squash
from dino_fast.evaluate.search.ground_truth import read_ground_truth
from dino_fast.evaluate.search.images import open_images
from pipelines.photometric import IMAGENET
from tests.dino_fast.evaluate.search.trained_network import build_network

CPU = Ranks(0, 1, torch.device("cpu"))
SIZE = 224  # that the network was trained for


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "least", "most"), [(True, 0.80, 1), (False, 0, 0.6)])
def test_cropped_queries_among_views(trained: bool, least: float, most: float, shared_data: Path):
    views = shared_data / "evaluations" / "views"
    describer = Describer(Descriptor(build_network(trained=trained)), IMAGENET, CPU)
    protocol = RetrievalProtocol(SIZE, crop_queries=True)
    truth = read_ground_truth(views / "gnd_views.pkl")
    scores = evaluate_retrieval(truth, find_retrieval_files(truth, views / "jpg"), protocol, describer)
    assert least <= scores["medium"].mean_ap <= most


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "gem", "least", "most"), [(True, 4.0, 0.78, 1), (False, None, 0, 0.4)])
def test_strong_copies(trained: bool, gem: float | None, least: float, most: float, shared_data: Path):
    folder = shared_data / "evaluations" / "copies"
    copies = find_copies(folder)
    copies = replace(copies, blocks={"strong": copies.blocks["strong"]})
    describer = Describer(Descriptor(build_network(trained=trained), gem), IMAGENET, CPU)
    others = open_images(str(folder / "distractors"), "--distractors")
    distractors = describe_others(others, partial(squash, size=SIZE), "squashed", describer, None)
    scores = evaluate_copies(copies, SIZE, describer, distractors)
    assert least <= scores["strong"].mean_ap <= most
