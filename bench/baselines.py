"""Run the training step without this project's code, to measure ours beside it.

`Published` works as the published code does (facebookresearch/dino, `main_dino.py`). `Stock` is what somebody who knows
PyTorch well makes of it, without a kernel of their own. Both start from the weights of a `build_student_teacher` pair.
A call with globals [2·B, 3, G, G] and locals [n·B, 3, L, L] makes one update, and returns the loss, a scalar on their
device. Views are stacked: view 0 of all images, then view 1 of all images, and so on. In float32 each step without drop
path equals a step of `TrainStep`. With it, torch's generators draw. The hyper-parameters are given once and stay as
they are.
"""

import math
from itertools import groupby

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import Optimizer

from bench import baseline_vit
from bench.baseline_vit import BaselineVit, VitStyle
from dino_fast.config import Recipe
from dino_fast.model.backbones import build_backbone
from dino_fast.model.head import DinoHead, HeadRecipe
from dino_fast.model.student_teacher import MultiCropModel
from dino_fast.model.sync_batchnorm import world_size
from dino_fast.model.vit import VisionTransformer
from dino_fast.step.hyper import Hyper
from dino_fast.step.optimizers import parameter_groups, set_hyper

Pair = tuple[MultiCropModel, MultiCropModel]  # student and teacher


class Head(nn.Module):
    """The DINO head with torch's own weight norm. Maps features [N, width] to logits [N, K]."""

    def __init__(self, width: int, recipe: HeadRecipe) -> None:
        super().__init__()
        self.mlp = DinoHead(width, recipe).mlp  # torch's linear layers and GELUs
        self.last_layer = weight_norm(nn.Linear(recipe.bottleneck_dim, recipe.out_dim, bias=False))
        lengths = self.last_layer.get_parameter("parametrizations.weight.original0")
        lengths.requires_grad_(not recipe.norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """torchvision's ResNet or a `BaselineVit`, which runs once for each resolution, and the head on all features."""

    def __init__(self, backbone: nn.Module, width: int, head: HeadRecipe) -> None:
        super().__init__()
        self.backbone, self.head = backbone, Head(width, head)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Map crops, [n_i, 3, H_i, W_i] each, to logits [Σ n_i, K] in the same order."""
        batches = [list(same) for _, same in groupby(crops, key=lambda crop: crop.shape[-1])]
        features = [self.backbone(batch[0] if len(batch) == 1 else torch.cat(batch)) for batch in batches]
        return self.head(torch.cat(features))


def build_network(recipe: Recipe, model: MultiCropModel, style: VitStyle, drop_path: float) -> Network:
    """Return a network with the weights of `model`, in train mode. `style` and `drop_path` are those of a ViT."""
    given = model.backbone
    if isinstance(given, VisionTransformer):
        network = Network(BaselineVit(given, style, drop_path), given.pos_embed.shape[-1], recipe.head)
    else:
        network = Network(*build_backbone(recipe.backbone), recipe.head)
    network.to(model.head.last_layer.weight_v.dtype).load_state_dict(model.state_dict())
    return network


def build_networks(
    recipe: Recipe, pair: Pair, device: torch.device, layout: torch.memory_format, style: VitStyle
) -> tuple[Network, Network]:
    """Return student and teacher on the device. Only the student has drop path."""
    rates = recipe.drop_path, 0.0
    student, teacher = (build_network(recipe, model, style, rate) for model, rate in zip(pair, rates, strict=True))
    for network in (student, teacher):
        network.to(device).to(memory_format=layout)
    return student, teacher.requires_grad_(False)


def build_optimizer(recipe: Recipe, hyper: Hyper, student: Network, fused: bool | None = None) -> Optimizer:
    """Return torch's SGD with momentum, or its AdamW. Without `fused` torch chooses the form."""
    groups = parameter_groups(student)
    optimizer: Optimizer
    if recipe.optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)
    set_hyper(optimizer, hyper.lr, hyper.weight_decay)
    return optimizer


class Published:
    """The step as it was published.

    It takes a list of crops and runs eagerly. On a GPU it uses float16 autocast and loss scaling, on a CPU float32.
    Each pair of views has a log-softmax of its own. Loops over the parameters clip gradients and average the teacher.
    The host waits in many places. With several ranks the center is averaged over them, which blocks; nothing else is.
    """

    def __init__(self, recipe: Recipe, pair: Pair, hyper: Hyper, device: torch.device) -> None:
        self.student, self.teacher = build_networks(
            recipe, pair, device, torch.contiguous_format, baseline_vit.PUBLISHED
        )
        self.recipe, self.hyper, self.device, self.on_gpu = recipe, hyper, device, device.type == "cuda"
        self.center = torch.zeros(1, recipe.head.out_dim, device=device)
        self.optimizer = build_optimizer(recipe, hyper, self.student)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.on_gpu)

    def __call__(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        batch = len(globals_) // 2
        crops = [*globals_.split(batch), *locals_.split(batch)]
        with torch.autocast(self.device.type, torch.float16, enabled=self.on_gpu):
            teacher_logits = self.teacher(crops[:2])
            loss = self.loss(self.student(crops), teacher_logits, len(crops))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.update()
        if self.on_gpu:
            torch.cuda.synchronize()
        loss.item()  # for the log
        return loss.detach()

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, views: int) -> Tensor:
        """Return the mean cross-entropy of the 2V − 2 pairs, each computed from the logits. Moves the center."""
        predictions = (student_logits / self.recipe.loss.student_temp).chunk(views)
        targets = torch.softmax((teacher_logits - self.center) / self.hyper.teacher_temp, dim=-1).detach().chunk(2)
        terms = [
            (-target * torch.log_softmax(prediction, dim=-1)).sum(dim=-1).mean()
            for t, target in enumerate(targets)
            for s, prediction in enumerate(predictions)
            if s != t
        ]
        self.move_center(teacher_logits)
        return sum(terms[1:], terms[0]) / len(terms)

    @torch.no_grad()
    def move_center(self, teacher_logits: Tensor) -> None:
        """Move the center towards the mean of the teacher's logits over all ranks."""
        total = teacher_logits.sum(dim=0, keepdim=True)
        if world_size() > 1:
            dist.all_reduce(total)
        momentum = self.recipe.loss.center_momentum
        self.center = self.center * momentum + total / (len(teacher_logits) * world_size()) * (1 - momentum)

    def update(self) -> None:
        """Update student and teacher."""
        move_student(self)
        self.move_teacher()

    @torch.no_grad()
    def clip_gradients(self) -> list[float]:
        """Clip each gradient by itself, and return the norms before, for a log.

        The host reads each norm twice: once for the log, and once to decide.
        """
        norms = []
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2)
                norms.append(norm.item())
                shrink = self.recipe.optim.clip_grad / (norm + 1e-6)
                if shrink < 1:
                    parameter.grad.mul_(shrink)
        return norms

    @torch.no_grad()
    def move_teacher(self) -> None:
        """Update the EMA teacher, one parameter after another."""
        momentum = self.hyper.momentum
        for average, latest in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            average.mul_(momentum).add_((1 - momentum) * latest)


class Stock:
    """The step in well-tuned stock PyTorch.

    It is channels-last, with autocast to bfloat16 unless the recipe says fp32, a fused optimizer, foreach clipping and
    averaging, and one log-softmax for each view. With `compiled` torch.compile compiles the backbones. The host reads
    nothing. The last layer is torch's linear layer, which autocast runs in bfloat16. That is coarser than ours.
    Clipping and averaging are written out here, so that they stay stock however ours may change.
    """

    def __init__(self, recipe: Recipe, pair: Pair, hyper: Hyper, device: torch.device, compiled: bool = False) -> None:
        self.student, self.teacher = build_networks(recipe, pair, device, torch.channels_last, baseline_vit.STOCK)
        self.recipe, self.hyper, self.device = recipe, hyper, device
        self.center = torch.zeros(1, recipe.head.out_dim, device=device)
        self.optimizer = build_optimizer(recipe, hyper, self.student, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)  # for `move_student`
        if compiled:
            for network in (self.student, self.teacher):
                network.backbone.compile(dynamic=False)  # one static graph for each resolution

    def __call__(self, globals_: Tensor, locals_: Tensor) -> Tensor:
        with self.autocast():
            with torch.no_grad():
                teacher_logits = self.teacher([globals_]).float()
            student_logits = self.student([globals_, locals_]).float()
        views = 2 * len(student_logits) // len(teacher_logits)
        loss = self.loss(student_logits, teacher_logits, views)
        self.center.lerp_(teacher_logits.mean(dim=0, keepdim=True), 1 - self.recipe.loss.center_momentum)
        self.optimizer.zero_grad()
        loss.backward()
        self.update()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision != "fp32")

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, views: int) -> Tensor:
        """Return the mean cross-entropy of the pairs: one product gives all, then those of a view with itself go."""
        batch = len(teacher_logits) // 2
        targets = torch.softmax((teacher_logits - self.center) / self.hyper.teacher_temp, dim=-1)
        log_p = torch.log_softmax(student_logits / self.recipe.loss.student_temp, dim=-1)
        pairs = torch.einsum("tbk,sbk->bts", targets.view(2, batch, -1), log_p.view(views, batch, -1))
        same = pairs.diagonal(dim1=1, dim2=2)
        return (same.sum() - pairs.sum()) / (batch * (2 * views - 2))

    @torch.no_grad()
    def update(self) -> None:
        """Update student and teacher."""
        move_student(self)
        averages: list[Tensor] = list(self.teacher.parameters())
        latest: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(averages, latest, 1 - self.hyper.momentum)

    def clip_gradients(self) -> None:
        """Clip each gradient by itself."""
        grads = [parameter.grad for parameter in self.student.parameters() if parameter.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads))
        shrink = (self.recipe.optim.clip_grad / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(shrink.unbind()))


def move_student(step: Published | Stock) -> None:
    """Update the student by its gradients: unscale them, clip them, and drop those of a frozen last layer."""
    step.scaler.unscale_(step.optimizer)
    step.clip_gradients()
    if step.hyper.freeze_last_layer:
        drop_gradients(step.student.head.last_layer)
    step.scaler.step(step.optimizer)
    step.scaler.update()


def drop_gradients(layer: nn.Module) -> None:
    """Remove the gradients of a layer. With zero gradients it would still get weight decay and momentum."""
    for parameter in layer.parameters():
        parameter.grad = None
