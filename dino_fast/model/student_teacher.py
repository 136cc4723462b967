"""Student and teacher: a backbone and a DINO head each, over crops of several resolutions."""

import copy
from itertools import groupby

import torch
from torch import Tensor, nn

from dino_fast.model.backbones import build_backbone
from dino_fast.model.head import DinoHead, HeadRecipe
from dino_fast.model.sync_batchnorm import convert_sync_batchnorm


class MultiCropModel(nn.Module):
    """A backbone and a DINO head over crops of several resolutions."""

    def __init__(self, backbone: nn.Module, head: DinoHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor], scales: Tensor | None = None) -> Tensor:
        """Return the logits [Σ n_i, K] of crops [n_i, 3, H_i, W_i], in the same order.

        `scales` [branches, Σ n_i] are what a ViT's branches are multiplied by, for drop path. Each resolution is one
        batch to the backbone's batch norms, and all crops together are one to the head's. Crops that follow each other
        at the same resolution are joined first, as in the published code.
        """
        batches = [_join(list(same)) for _, same in groupby(crops, key=lambda crop: crop.shape[-2:])]
        if scales is None:
            return self.head(_join([self.backbone(batch) for batch in batches]))
        parts = scales.split([len(batch) for batch in batches], dim=1)
        return self.head(_join([self.backbone(*given) for given in zip(batches, parts, strict=True)]))


def build_student_teacher(backbone: str, head: HeadRecipe) -> tuple[MultiCropModel, MultiCropModel]:
    """Build a new student, and a teacher that is its copy.

    Both are in train mode, channels-last, with synchronized batch norms: the teacher normalizes by the statistics of
    its batch, too. The teacher has no gradients. Raises UserError for an unknown backbone.
    """
    features, width = build_backbone(backbone)
    student = MultiCropModel(features, DinoHead(width, head)).to(memory_format=torch.channels_last)
    convert_sync_batchnorm(student)
    return student, copy.deepcopy(student).requires_grad_(False)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # cat would copy even a single tensor
