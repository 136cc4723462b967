"""The heads' training against the published code's figures in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_fast.evaluate.linear_heads import Heads, LinearProtocol, measure_losses, score_heads, take_sgd_step
from tests.dino_fast.model.test_vit import assert_digest

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "linear.json").read_text())["probe"]


def test_the_published_probe():
    weight = torch.from_numpy(0.01 * np.random.default_rng(90).standard_normal((5, 24)))
    r = np.random.default_rng(91)
    x, y = r.standard_normal((128, 24)), r.integers(0, 5, 128)
    x[np.arange(128), y] += 2
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    protocol = LinearProtocol((0.1, 0.5), epochs=3, batch=32)  # the first head must not change the second
    heads = Heads(weight.repeat(2, 1, 1), torch.zeros(2, 5, dtype=torch.float64))
    velocity, steps = heads.make_velocity(), iter(GOLDEN["steps"])
    for epoch in range(3):
        rates = protocol.learning_rates_at(epoch)
        for rows in torch.arange(128).split(32):
            logits = take_sgd_step(heads, velocity, x[rows], y[rows], torch.tensor(rates, dtype=torch.float64)[:, None])
            expected = next(steps)
            assert (expected["epoch"], rates[1]) == (epoch, pytest.approx(expected["lr"], rel=1e-12))
            assert measure_losses(logits, y[rows])[1].item() == pytest.approx(expected["loss"], rel=1e-9)
    assert_digest(heads.weights[1], GOLDEN["weight"])
    assert_digest(heads.biases[1], GOLDEN["bias"])
    assert score_heads(heads, x, y)[1] == (GOLDEN["top1_on_train"], GOLDEN["top5_on_train"])
