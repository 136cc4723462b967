"""Collapse: the figures that show it coming, and the alarms that say what it is and what to do.

A DINO run fails in few ways: all targets become uniform, all become the same single prototype, or the features lose
their dimensions. `probe` measures this on a few images without changing the run; `CollapseAlarms` looks at the rows
that are logged. `require_gradients` stops a run that cannot learn at all.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.model.backbones import evaluating
from dino_fast.step.hyper import Hyper
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError

IMAGES = 128  # at most in a probe; the rank of their features can be as high as their number


def collect_figures(step: TrainStep, globals_: Tensor, hyper: Hyper) -> dict[str, float | Tensor]:
    """Return the figures that a row has besides the step's own; their names are in `metrics.OF_A_LOOK`."""
    parts = {f"{part}_ms": milliseconds for part, milliseconds in step.clock.read().items()}
    scale = {} if step.loss_scale is None else {"loss_scale": step.loss_scale.scale}
    return {**parts, **scale, **probe(step, globals_, hyper.teacher_temp)._asdict()}


class Probe(NamedTuple):
    """The teacher's targets and features on a few images of this rank: scalars on the device."""

    target_kl: Tensor
    """divergence of the mean target from the uniform one, in nats: 0 if all prototypes are used alike, ln K if only one
    is used"""
    target_entropy: Tensor
    """mean entropy of the targets, in nats"""
    feature_rank: Tensor
    """RankMe of the backbone's features, from 1 to the smaller number of images and dimensions"""
    feature_std: Tensor
    """spread of the features at length 1, times √D: 1 if they point everywhere, 0 if all are the same"""
    center_norm: Tensor
    """length of the center; its K entries are cosines where `norm_last_layer`, so it is at most √K"""


@torch.no_grad()
def probe(step: TrainStep, globals_: Tensor, teacher_temp: float) -> Probe:
    """Look at the teacher through the first global view of a batch, `globals_`: [2·B, 3, G, G], view-major.

    This is one forward pass of at most `IMAGES` images, normalized by running statistics. So ranks need not
    communicate, and nothing of the run changes. The host waits for the device only inside the eigenvalues.
    """
    images = globals_[: min(IMAGES, len(globals_) // 2)]
    with step.autocast(), evaluating(step.teacher):
        features = step.teacher.backbone.forward(images)  # not called: that would compile a graph for this mode
        logits = step.teacher.head(features)
    kl, entropy = measure_targets(logits, step.center, teacher_temp)
    features = _wide(features)
    return Probe(kl, entropy, rank_me(features), unit_std(features), torch.linalg.vector_norm(step.center))


def measure_targets(logits: Tensor, center: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
    """Return the divergence of the mean target from the uniform one, and the targets' mean entropy, in nats.

    logits: the teacher's, [N, K]; center: [1, K]. The mean over N sharp targets holds at most N prototypes: where K is
    larger, the divergence of healthy targets is about ln K − ln N.
    """
    log_p = torch.log_softmax((_wide(logits) - center) / teacher_temp, dim=-1)
    p = log_p.exp()
    kl = math.log(logits.shape[1]) - torch.special.entr(p.mean(0)).sum()
    return kl, -(p * log_p).sum(-1).mean()


def rank_me(features: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values of [N, D], divided by their sum (Garrido et al. 2023, eq. 1).

    The result is a scalar, and NaN for features that are not all finite. It is computed from the eigenvalues of the
    smaller Gram matrix, in float64: their roots would have only half of float32's digits, and a hundred rounding errors
    look like a dimension.
    """
    wide = features.double()
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    finite = gram.isfinite().all()
    gram = torch.where(finite, gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))  # LAPACK raises on NaN
    try:
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    except RuntimeError:  # they did not converge; a figure of the log must not end a run
        return features.new_full((), math.nan)
    rank = torch.special.entr(values / values.sum()).sum().exp()
    return torch.where(finite, rank, math.nan).to(features.dtype)


def unit_std(features: Tensor) -> Tensor:
    """Return the mean standard deviation of features [N, D] at length 1, times √D (Chen & He 2021, section 4.1)."""
    unit = F.normalize(features, dim=1)
    return unit.std(0, correction=0).mean() * math.sqrt(features.shape[1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Gradients ------------------------------------------------------------------------------------------------------

# Steps after which every weight must have had a gradient. One that starts at 0 keeps it from others for a while.
GRADIENT_STEPS = 50
_OTHERWISE = f"Pass --compile never, --graph never, or use another version of torch (this is {torch.__version__})."


def require_gradients(row: Mapping[str, Any], without: Sequence[str], step: TrainStep) -> None:
    """Raise UserError if the backbone, or a parameter, gets no gradient, whatever the cause is.

    row: a row of the log; without: the names of parameters that had no gradient in `GRADIENT_STEPS` steps. Frozen
    parameters need none, and those of the head that batch norm makes needless: biases. A row of skipped steps alone
    has no norm, and says nothing.
    """
    if row["grad_norm_first_layer"] == 0:
        raise UserError(
            f"the backbone gets no gradient: at step {row['step']}, the gradient's norm is exactly 0 in its first "
            f"layer and {row['grad_norm_head']:.3g} in the head. The run would learn nothing. {_OTHERWISE}"
        )
    trained = {name for name, parameter in step.bare_student.named_parameters() if parameter.requires_grad}
    never = [n for n in without if n in trained and not (n.startswith("head.") and n.endswith(".bias"))]
    if never:
        raise UserError(
            f"{len(never)} parameters have had no gradient in any step up to {row['step']} ({', '.join(never[:3])}"
            f"{', …' if len(never) > 3 else ''}). They would stay as they are. {_OTHERWISE}"
        )


# ---- Alarms ---------------------------------------------------------------------------------------------------------

# No alarm is raised before both are over: at first all images look alike to the networks, and the center is not there.
BEGINNING_EPOCHS = 1
BEGINNING_STEPS = 200  # epochs of small data are short
PATIENCE = 5  # rows in a row that must show it: targets swing while the center follows them, and single batches do, too
CLEARED = 2.0  # an alarm is over when its figure is this many times its limit
FEW = 8  # images of a probe; fewer fall on one prototype, or span two dimensions, by chance

UNIFORM_NATS = 0.05  # from ln K: untrained networks are 0.2 and more below it, those with uniform targets 0.01
ONE_POINT_NATS = 0.1  # from the entropy 0 of a single prototype: 98 of 100 images have the same one
FEATURE_RANK = 2.0  # equal features have 1, with bfloat16's rounding up to 1.4; runs that learn have 4 and more
FEATURE_STD = 0.02  # equal features have 0, with bfloat16's rounding 0.003; runs that learn have 0.2 and more
CENTER_SIZE = 1.0  # root mean square of the center's entries; it is smaller for mean cosines

_UNIFORM, _ONE_POINT, _DIMENSIONS, _CENTER = (
    "uniform collapse", "one-point collapse", "dimensional collapse", "growing center",
)  # fmt: skip
_FREEZE = "freeze the last layer longer with --optim.freeze_last_layer_epochs"
REMEDIES = {
    _UNIFORM: f"Lower --loss.teacher_temp and --loss.warmup_teacher_temp, or {_FREEZE}",
    _ONE_POINT: "Raise --loss.teacher_temp and --loss.warmup_teacher_temp; --loss.center_momentum must be below 1",
    _DIMENSIONS: f"Lower --optim.lr, raise --optim.ema_momentum if batches are small, or {_FREEZE}",
    _CENTER: "Keep the prototypes' lengths at 1 with --head.norm_last_layer true, or lower --optim.lr",
}
CONTINUE = "Continue from here with --accept_changes true, or start again in another --output."


class CollapseAlarms:
    """Looks at the rows that a run logs, and gives one message for each kind of collapse until it is over.

    An alarm takes `PATIENCE` rows in a row within a kind's limit, and is over at `CLEARED` times that limit. A figure
    that is absent, None or NaN changes nothing.
    """

    def __init__(
        self,
        prototypes: int,
        images: int = IMAGES,
        *,
        beginning_epochs: int = BEGINNING_EPOCHS,
        beginning_steps: int = BEGINNING_STEPS,
    ) -> None:
        """prototypes: K; images: how many a rank has in a step."""
        self._prototypes, self._images = prototypes, min(images, IMAGES)
        self._epochs, self._steps = beginning_epochs, beginning_steps
        self._rows = dict.fromkeys(REMEDIES, 0)  # in a row that show it

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """Return the messages about a row, each with its remedy."""
        figures = defaultdict(lambda: math.nan, {name: value for name, value in row.items() if value is not None})
        if figures["step"] < self._steps or figures["epoch"] < self._epochs:
            return []
        if self._images < FEW:
            figures |= dict.fromkeys(("target_kl", "feature_rank", "feature_std"), math.nan)
        signs = [find(figures, self._prototypes) for find in (_uniform, _one_point, _dimensions, _center)]
        return [
            f"{sign.kind} at step {figures['step']:.0f}: {sign.finding}. {REMEDIES[sign.kind]}. {CONTINUE}"
            for sign in signs
            if self._is_new(sign.kind, sign.distance)
        ]

    def _is_new(self, kind: str, distance: float) -> bool:
        """Count a row, and return whether it raises the alarm. A distance of NaN changes nothing."""
        if distance <= 1:
            self._rows[kind] += 1
            return self._rows[kind] == PATIENCE
        if distance >= CLEARED or (distance > 1 and self._rows[kind] < PATIENCE):
            self._rows[kind] = 0
        return False


class _Sign(NamedTuple):
    """What a row says of one kind of collapse."""

    kind: str
    """name of the kind"""
    distance: float
    """distance from the collapse in limits: up to 1 is trouble, NaN is not known"""
    finding: str
    """the figures and what they mean"""


def _uniform(row: Mapping[str, float], prototypes: int) -> _Sign:
    """Look at both figures, because the loss of a run that starts well stays at ln K for a while, or passes it."""
    entropy, loss, even = row["teacher_entropy"], row["loss"], math.log(prototypes)
    return _Sign(
        _UNIFORM,
        _largest(even - entropy, abs(even - loss)) / UNIFORM_NATS,
        f"teacher_entropy {entropy:.3f} and loss {loss:.3f} are at ln K = {even:.3f}, so every target is spread evenly "
        "over all prototypes and nothing is learned",
    )


def _one_point(row: Mapping[str, float], prototypes: int) -> _Sign:
    entropy, kl, even = row["teacher_entropy"], row["target_kl"], math.log(prototypes)
    return _Sign(
        _ONE_POINT,
        _largest(entropy, even - kl) / ONE_POINT_NATS,
        f"teacher_entropy {entropy:.3f} is at 0 and target_kl {kl:.3f} at ln K = {even:.3f}, so every image's target "
        "is the same prototype",
    )


def _dimensions(row: Mapping[str, float], _prototypes: int) -> _Sign:
    rank, std = row["feature_rank"], row["feature_std"]
    return _Sign(
        _DIMENSIONS,
        _smallest(rank / FEATURE_RANK, std / FEATURE_STD),
        f"feature_rank {rank:.2f} (at least 1) and feature_std {std:.4f} (at least 0) say that the features of "
        "different images are nearly the same, or lie on a line",
    )


def _center(row: Mapping[str, float], prototypes: int) -> _Sign:
    size = row["center_norm"] / math.sqrt(prototypes)
    return _Sign(
        _CENTER,
        CENTER_SIZE / size if size else math.inf,
        f"center_norm {row['center_norm']:.1f} is {size:.2f} times √K, which a center of cosines cannot exceed, so the "
        "logits are growing",
    )


def _largest(*values: float) -> float:
    """Return the largest value, or NaN if one is NaN: all are needed."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _smallest(*values: float) -> float:
    """Return the smallest value that is not NaN: one is enough."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)
