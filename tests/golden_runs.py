"""What the tests against the published code's figures share: how its runs are set up, and how tensors are compared."""

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dino_fast.config import Recipe
from dino_fast.run.schedules import Schedules
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe


def make_schedules(config: dict[str, Any]) -> Schedules:
    """Return the schedules of a golden run."""
    optim = OptimRecipe(
        name=config["optimizer"],
        lr=config["lr"],
        min_lr=config["min_lr"],
        warmup_epochs=config["warmup_epochs"],
        weight_decay=config["weight_decay"],
        weight_decay_end=config["weight_decay_end"],
        clip_grad=config["clip_grad"],
        freeze_last_layer_epochs=config["freeze_last_layer"],
        ema_momentum=config["momentum_teacher"],
    )
    loss = LossRecipe(
        student_temp=config["student_temp"],
        teacher_temp=config["teacher_temp"],
        warmup_teacher_temp=config["warmup_teacher_temp"],
        warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"],
        center_momentum=config["center_momentum"],
    )
    # At this batch the rate is the one given: the published runs' is scaled already.
    recipe = Recipe(batch_size=256, epochs=config["epochs"], optim=optim, loss=loss)
    return Schedules(recipe, config["steps_per_epoch"])


def fill(network: nn.Module) -> None:
    """Fill every tensor from its name, by the rule of the golden files."""
    for name, tensor in network.state_dict().items():
        draws = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith(("running_mean", "num_batches_tracked")):
            values = np.zeros(tensor.shape)
        elif name.endswith(("running_var", "weight_g")):
            values = np.ones(tensor.shape)
        elif name.endswith(".bias"):
            values = 0.1 * draws.standard_normal(tensor.shape)
        elif tensor.ndim == 1:
            values = 1 + 0.1 * draws.standard_normal(tensor.shape)
        else:
            values = draws.standard_normal(tensor.shape) * math.sqrt(2 / math.prod(tensor.shape[1:]))
        tensor.copy_(torch.as_tensor(values))


def draw_inputs(t: int, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the global and the local views of a step, view-major."""
    shape = config["batch"], 3
    views = [
        torch.from_numpy(np.random.default_rng([1000 + t, v]).standard_normal((*shape, size, size)))
        for v, size in enumerate(config["crop_sizes"])
    ]
    return torch.cat(views[:2]), torch.cat(views[2:])


def assert_summary(tensor: Tensor, expected: dict[str, Any], rel: float, name: str) -> None:
    flat = tensor.detach().double().flatten()
    norm = flat.norm().item()
    assert norm == pytest.approx(expected["norm"], rel=rel, abs=1e-300), name
    # A sum cancels: what it can be held to is the size of its terms.
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=rel * norm), name
    assert flat[:3].tolist() == pytest.approx(expected["first"], rel=rel, abs=rel * norm / len(flat) ** 0.5), name
