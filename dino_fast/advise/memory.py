"""Estimate the device memory of a run, and the size of its checkpoints.

Networks are built on torch's meta device, whose tensors have shapes and no memory.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.flops import identify_storage
from dino_fast.model.half_weights import HALVED
from dino_fast.model.vit import VisionTransformer
from dino_fast.run.build import build_train_step
from dino_fast.step.precision import DTYPES
from dino_fast.step.train_step import TrainStep

_UNQUEUED_BATCHES = 3  # besides those queued: one at the step, one that the step has just released, one being made
_TORCH_LOSS_COPIES = 3  # of the logits, in torch's operations; kernels hold one, and write the gradient into it


def build_meta_step(recipe: Recipe) -> TrainStep:
    """Build the networks and the optimizer on the meta device, in the state after a first step."""
    meta = torch.device("meta")
    with meta:
        step = build_train_step(recipe, Ranks(0, 1, meta), kernels=False)
    for parameter in step.bare_student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    step.optimizer.step()
    return step


def find_tensors(state: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from find_tensors(item)


def count_bytes(state: Any) -> int:
    """Return the bytes of the tensors in nested dicts, lists and tuples."""
    return sum(tensor.nbytes for tensor in find_tensors(state))


def estimate_memory(recipe: Recipe, step: TrainStep, share: int) -> dict[str, int]:
    """Estimate the bytes on one device for `share` images a step. The sum is the peak, in the backward pass.

    - weights: student, teacher and center; on a GPU also the half-precision copies of convolutions and linear layers;
    - gradients, twice where those of one part are added to those of others;
    - optimizer: its state;
    - activations: what the student's backward pass needs for the images of one part, counted tensor by tensor on the
      meta device, and the normalized prototypes; a compiled network may need less;
    - logits: (V + 2) · images · K of student and teacher, times `_TORCH_LOSS_COPIES` without kernels;
    - batches: `data.prefetch` + `_UNQUEUED_BATCHES` of `share` images, as 8-bit crops and as augmented views.

    CUDA's context, the workspaces of the libraries and the gaps of the allocator are left out. The estimate has not
    been compared with the figures of a GPU yet.
    """
    on_gpu, precision = recipe.device != "cpu", DTYPES[recipe.precision]
    images = share // recipe.accumulate
    pixels = 3 * sum(side**2 for side in recipe.crops.sizes)
    logit_size = 2 if recipe.precision == "fp16" else 4
    student, head = step.bare_student, recipe.head
    logits = (recipe.crops.views + 2) * images * head.out_dim * logit_size
    halves = sum(map(count_half_weights, (student, step.teacher))) if on_gpu and recipe.precision != "fp32" else 0
    gradients = sum(parameter.nbytes for parameter in student.parameters() if parameter.requires_grad)
    state = step.state_dict()
    parts = {
        "weights": count_bytes([state["student"], state["teacher"], state["center"]]) + halves,
        "gradients": gradients * (2 if recipe.accumulate > 1 else 1),
        "optimizer": count_bytes(state["optimizer"]),
        "activations": count_activations(recipe, step, images) + head.out_dim * head.bottleneck_dim * 4,
        "logits": logits * (1 if on_gpu else _TORCH_LOSS_COPIES),
        "batches": (recipe.data.prefetch + _UNQUEUED_BATCHES) * share * pixels * (precision.itemsize + 1),
    }
    return parts | {"total": sum(parts.values())}


def count_half_weights(network: nn.Module) -> int:
    """Return the bytes of a network's half-precision copies for autocast (`half_weights.py`)."""
    layers = (module for module in network.modules() if type(module) in HALVED)
    return sum(2 * parameter.numel() for layer in layers for parameter in layer.parameters())


def count_activations(recipe: Recipe, step: TrainStep, images: int) -> int:
    """Return the bytes that the backward pass needs of the student, up to the last layer, for so many images' views.

    Where blocks are computed again, these are what is kept from the forward pass, the blocks' inputs among it, and the
    largest block that is computed again.
    """
    dtype = DTYPES[recipe.precision]  # the meta device has no autocast, so the network itself takes the precision
    student = copy.deepcopy(step.bare_student).to(dtype)
    views = [
        torch.empty((part.stop - part.start) * images, 3, size, size, dtype=dtype, device="meta")
        for size, part in recipe.crops.resolutions
    ]

    def run_student() -> None:
        student.head.mlp(torch.cat([student.backbone(view) for view in views]))

    backbone = student.backbone
    if not (isinstance(backbone, VisionTransformer) and backbone.activation_checkpointing):
        return count_saved_bytes(student, views, run_student)
    tokens = [backbone.embed(view).detach().requires_grad_() for view in views]
    block = backbone.blocks[0]
    again = max(count_saved_bytes(block, [x], partial(block, x)) for x in tokens)
    return count_saved_bytes(student, views, run_student) + again


def count_saved_bytes(network: nn.Module, given: list[Tensor], run: Callable[[], object]) -> int:
    """Return the bytes that autograd saves while `run` runs, without the network's own tensors and those given."""
    own = {identify_storage(tensor) for tensor in (*network.parameters(), *network.buffers(), *given)}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[identify_storage(tensor)] = tensor  # a reference, so that no other storage gets the same id
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in own)
