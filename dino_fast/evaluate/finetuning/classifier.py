"""A backbone with a linear layer, trained as a whole for one learning rate."""

import contextlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_fast.distributed import Ranks, show_progress_once, wrap_in_ddp
from dino_fast.evaluate.finetuning.layer_groups import make_parameter_groups
from dino_fast.evaluate.finetuning.mixing import compute_mixed_loss, draw_mix, mix_images
from dino_fast.evaluate.finetuning.recipe import FinetuneRecipe, scale_rate
from dino_fast.model.drop_path import draw_branch_scales
from dino_fast.model.sync_batchnorm import convert_sync_batchnorm
from dino_fast.model.vit import VisionTransformer
from dino_fast.step.precision import AUTOCAST_DTYPES, Precision
from pipelines.decoder import move_to_device
from pipelines.labeled_crops import LabeledBatch, LabeledCropLoader
from shards.errors import UserError

MOMENTUM = 0.9
# The first gradients then change the layer more than the backbone, whose features are good already.
INITIAL_STD = 2e-5


class Classifier(nn.Module):
    """Maps images [N, 3, H, W] to logits [N, C]."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, scales: Tensor | None = None) -> Tensor:
        """Map images to logits. `scales` [2·DEPTH, N] are those of drop path, for vision transformers alone."""
        features = self.backbone(images) if scales is None else self.backbone(images, scales)
        logits: Tensor = self.head(features)
        return logits


@dataclass(frozen=True)
class Plan:
    """How long a training is, and what it is computed with."""

    recipe: FinetuneRecipe
    """the settings"""
    layer_decay: float
    """that of this backbone"""
    epochs: int
    """passes over the training set"""
    steps_per_epoch: int
    """whole batches of a pass"""
    batch: int
    """images of a step over all ranks"""
    seed: int
    """seed of all that is random"""
    precision: Precision
    """number format of the forward pass"""

    @property
    def steps(self) -> int:
        """All steps of a training."""
        return self.epochs * self.steps_per_epoch

    def learning_rate(self, lr: float, step: int) -> float:
        """Return the learning rate of the head at a step; `lr` is the peak for a batch of 256."""
        warmup = min(self.recipe.warmup_epochs * self.steps_per_epoch, self.steps // 4)
        return lr * self.batch / 256 * scale_rate(step, self.steps, warmup)


class ClassHits(NamedTuple):
    """How many images of each class are classified right."""

    images: Tensor
    """[C], int64, number of images"""
    first: Tensor
    """[C], int64, whose class has the largest logit"""
    among_five: Tensor
    """[C], int64, whose class is among the first min(5, C)"""


class Training:
    """Trains a classifier at one learning rate, on the ranks together. The classifier lies on the rank's device."""

    def __init__(self, classifier: Classifier, plan: Plan, lr: float, ranks: Ranks) -> None:
        self.classifier, self._plan, self._lr, self._ranks = classifier, plan, lr, ranks
        if ranks.world > 1:
            _synchronize_norms(classifier)
        self._model = wrap_in_ddp(classifier, ranks)
        self._optimizer = self._build_optimizer()
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=plan.precision == "fp16")
        dtype = AUTOCAST_DTYPES.get(plan.precision)
        self._autocast = torch.autocast(ranks.device.type, dtype) if dtype else contextlib.nullcontext()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        recipe = self._plan.recipe
        groups = make_parameter_groups(
            self.classifier.backbone, self.classifier.head, recipe.weight_decay, self._plan.layer_decay
        )
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, foreach=True)
        return torch.optim.AdamW(groups, lr=0.0, foreach=True)

    def train_epoch(self, epoch: int, loader: LabeledCropLoader) -> float:
        """Train through an epoch, counted from 0. Returns the mean loss; not finite where the training diverged."""
        count = self._plan.steps_per_epoch
        # Models of timm may draw numbers of their own: dropout, drop path.
        torch.manual_seed(int(np.random.default_rng([self._plan.seed, epoch, self._ranks.rank]).integers(2**62)))
        self.classifier.train()
        total = torch.zeros((), device=self._ranks.device)
        with show_progress_once(f"lr = {self._lr:g}, epoch {epoch + 1}", self._ranks) as report:
            for done, batch in enumerate(loader.load_batches(range(epoch * count, (epoch + 1) * count)), 1):
                total += self._take_step(batch)
                report(done * self._plan.batch, count * self._plan.batch)
        if self._ranks.world > 1:
            dist.all_reduce(total)
        return total.item() / (count * self._ranks.world)

    def _take_step(self, batch: LabeledBatch) -> Tensor:
        """Update the classifier. Returns the loss, a scalar."""
        plan, recipe = self._plan, self._plan.recipe
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate(self._lr, batch.step) * group["scale"]
        mix = draw_mix(recipe.mixup, recipe.cutmix, plan.seed, batch.step, batch.images.shape[-1])
        with self._autocast:
            logits = self._model(mix_images(batch.images, mix), *self._draw_drop_path(batch))
        loss = compute_mixed_loss(logits.float(), batch.labels, mix, recipe.label_smoothing)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss.detach()

    def _draw_drop_path(self, batch: LabeledBatch) -> tuple[Tensor, ...]:
        """Return what the branches of a vision transformer are multiplied by, or nothing."""
        rate, backbone = self._plan.recipe.drop_path, self.classifier.backbone
        if not rate or not isinstance(backbone, VisionTransformer):
            return ()
        scales = draw_branch_scales(rate, len(backbone.blocks), self._plan.seed, batch.step, batch.ids, views=1)
        return (move_to_device(torch.from_numpy(scales), self._ranks.device),)

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Tensor:
        """Return the logits of images [N, 3, H, W] in evaluation mode, [N, C], float32."""
        self.classifier.eval()
        with self._autocast:
            logits: Tensor = self.classifier(images)
        return logits.float()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the training depends on."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.classifier.load_state_dict(state["classifier"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


def _synchronize_norms(classifier: Classifier) -> None:
    """Have batch norms use all ranks' images. Raises UserError for a norm that cannot."""
    try:
        convert_sync_batchnorm(classifier)
    except TypeError as error:
        raise UserError(f"--backbone: {error}. Run on one GPU, without torchrun.") from error


def count_class_hits(logits: Tensor, labels: Tensor) -> ClassHits:
    """Count the hits of each class for logits [N, C] and labels [N]. An image whose logits overflow is a miss."""
    classes = logits.shape[1]
    correct = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    correct &= logits.isfinite().all(1, keepdim=True)
    chosen = (torch.ones_like(labels, dtype=torch.bool), correct[:, 0], correct.any(1))
    return ClassHits(*(torch.bincount(labels[which], minlength=classes) for which in chosen))
