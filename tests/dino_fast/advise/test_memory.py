"""The estimated memory is about what a step takes."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_fast.advise.estimate import TrainSet, estimate_run
from dino_fast.advise.memory import build_meta_step, count_bytes, estimate_memory
from dino_fast.config import read_recipe
from dino_fast.distributed import Ranks
from dino_fast.run.build import build_train_step
from dino_fast.step.hyper import Hyper

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
IMAGENET = 1_281_167
HYPER = Hyper(lr=0.01, weight_decay=1e-2, momentum=0.99, teacher_temp=0.04, freeze_last_layer=False)
CPU = Ranks(0, 1, torch.device("cpu"))


class Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that are allocated inside, and their peak. Views of older ones do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def _release(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count((args, kwargs), are_new=False)
        out = func(*args, **(kwargs or {}))
        self._count(out, are_new=True)
        return out

    def _count(self, tensors: Any, are_new: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.alive:
                size = storage.nbytes() if are_new else 0
                self.alive.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._release, storage._cdata, size)


@pytest.mark.parametrize(
    "options",
    [
        ("--precision", "bf16", "--head.batch_norm", "true"),
        ("--accumulate", "2"),
        ("--head.out_dim", "32768", "--crops.locals", "0"),
        ("--backbone", "vit_tiny_patch16"),
        ("--backbone", "vit_tiny_patch16", "--activation_checkpointing"),
    ],
    ids=" ".join,
)
def test_a_step_takes_about_the_estimated_memory(options: tuple[str, ...]):
    """The estimate is at most a tenth below the peak of a step's tensors, and at most a third above it."""
    sizes = ("--device", "cpu", "--batch_size", "16", "--crops.global_size", "96", "--crops.local_size", "64")
    recipe = read_recipe(["--config", str(CONFIGS / "debug.yaml"), *sizes, *options])
    step = build_train_step(recipe, CPU)
    views = [
        torch.randn(16 * (part.stop - part.start), 3, size, size).to(memory_format=torch.channels_last)
        for size, part in recipe.crops.resolutions
    ]
    batch = views[0], views[1] if len(views) > 1 else None
    step(*batch, HYPER)  # the optimizer's state is there from now on
    with Allocated() as allocated:
        step(*batch, HYPER)
    estimate = estimate_memory(recipe, build_meta_step(recipe), 16)
    assert estimate["weights"] + estimate["optimizer"] == count_bytes(step.state_dict())
    taken = estimate["activations"] + estimate["gradients"] + estimate["logits"]
    assert 0.9 * allocated.peak <= taken <= 1.33 * allocated.peak


@pytest.mark.gpu
def test_a_gpu_takes_about_the_estimated_memory():
    sizes = ("--batch_size", "128", "--crops.global_size", "128", "--crops.local_size", "64", "--compile", "never")
    recipe = read_recipe(["--config", str(CONFIGS / "imagenette_resnet18.yaml"), *sizes, "--graph", "never"])
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    step = build_train_step(recipe, ranks)
    views = [
        torch.randn(128 * (part.stop - part.start), 3, size, size, device="cuda", dtype=torch.bfloat16)
        for size, part in recipe.crops.resolutions
    ]
    globals_, locals_ = (view.to(memory_format=torch.channels_last) for view in views)
    step(globals_, locals_, HYPER)
    torch.cuda.reset_peak_memory_stats()
    step(globals_, locals_, HYPER)
    estimate = estimate_memory(recipe, build_meta_step(recipe), 128)
    taken = estimate["total"] - estimate["batches"] + 2 * sum(view.nbytes for view in views)
    assert 0.75 * torch.cuda.max_memory_allocated() <= taken <= 1.33 * torch.cuda.max_memory_allocated()


def test_the_estimate_follows_the_recipe():
    def estimate(*options: str, world: int = 1) -> dict[str, int]:
        recipe = read_recipe(["--config", str(CONFIGS / "resnet50_100ep.yaml"), *options])
        return estimate_run(recipe, TrainSet(IMAGENET, None, ""), world)["memory"]

    whole, parts, ranks = estimate(), estimate("--accumulate", "8"), estimate(world=8)
    assert estimate("--precision", "fp32")["activations"] == pytest.approx(2 * whole["activations"], rel=0.05)
    assert parts["activations"] == ranks["activations"] == pytest.approx(whole["activations"] / 8, rel=0.05)
    assert parts["batches"] == whole["batches"] == 8 * ranks["batches"]
    assert estimate("--optim.name", "adamw")["optimizer"] == pytest.approx(2 * whole["optimizer"], rel=1e-4)
    assert estimate("--precision", "fp32")["weights"] < whole["weights"]  # no copies in half precision
    # 5 batches of 512 images, as 8-bit crops and as float16 views.
    assert whole["batches"] == 5 * 512 * 3 * (2 * 224**2 + 8 * 96**2) * 3
