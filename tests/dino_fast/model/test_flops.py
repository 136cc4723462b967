"""The FLOPs of a step are those that torch counts when it runs one."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_fast.config import Recipe
from dino_fast.model.backbones import build_backbone
from dino_fast.model.flops import flops_an_image, list_layers
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from pipelines.crops import CropRecipe

RECIPE = Recipe(
    crops=CropRecipe(global_size=64, local_size=32, locals=3), head=HeadRecipe(out_dim=64, hidden_dim=32, layers=2)
)


@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet50", "vit_tiny_patch16", "vit_small_patch8", "timm/test_vit2", "timm/test_byobnet"]
)
def test_flops_are_those_that_torch_counts(backbone: str):
    recipe = replace(RECIPE, backbone=backbone)
    student, teacher = build_student_teacher(backbone, recipe.head)
    globals_, locals_ = torch.randn(2 * 2, 3, 64, 64), torch.randn(3 * 2, 3, 32, 32)  # of two images
    # The counter knows attention by its products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            teacher([globals_])
        student([globals_, locals_]).sum().backward()
    assert flops_an_image(recipe) == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_flops_of_depthwise_convolutions_are_those_that_torch_counts():
    """In a forward pass alone. In a backward one, torch counts a convolution in groups as if it had one."""
    network, _ = build_backbone("timm/test_convnext")
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.randn(1, 3, 64, 64))
    assert sum(layer.flops for layer in list_layers("timm/test_convnext", 64)) == counter.get_total_flops()
