"""Collapse: figures that show it coming, and alarms that say what it is and what to do.

A DINO run fails in few ways: all targets become even, all become the same one prototype, or the features lose their
dimensions. `probe` measures them on a few pictures without changing the run; `Alarms` judges the rows that are logged.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.model.backbones import evaluating
from dino_fast.step.train_step import TrainStep

PICTURES = 128  # seen by a probe at most: as many as the rank of features can then be


class Probe(NamedTuple):
    """The teacher's targets and features over a few pictures of this rank: scalars on the device."""

    target_kl: Tensor
    """of the mean target to the uniform one, in nats; 0: all prototypes used alike, ln K: one for every picture"""
    target_entropy: Tensor
    """mean over the pictures of their target's, in nats"""
    feature_rank: Tensor
    """RankMe of the backbone's features: from 1 to the smaller of pictures and dimensions"""
    feature_std: Tensor
    """of the features at length 1, times √D: 1 where they point everywhere, 0 where all are the same"""
    center_norm: Tensor
    """length of the centre; its K entries are cosines where `norm_last_layer`, so it is at most √K"""


@torch.no_grad()
def probe(step: TrainStep, globals_: Tensor, teacher_temp: float) -> Probe:
    """Look at the teacher through the first global view of a batch, `globals_`: [2·B, 3, G, G], view-major.

    One forward pass of at most `PICTURES` pictures, normalised by running statistics: ranks need not talk, and nothing
    of the run is changed. The host waits for the device only inside the eigenvalues.
    """
    pictures = globals_[: min(PICTURES, len(globals_) // 2)]
    with step.autocast(), evaluating(step.teacher):
        features = step.teacher.backbone.forward(pictures)  # not called: that would compile a graph for this mode
        logits = step.teacher.head(features)
    kl, entropy = spread_of_targets(logits, step.center, teacher_temp)
    features = _wide(features)
    return Probe(kl, entropy, rank_me(features), unit_std(features), torch.linalg.vector_norm(step.center))


def spread_of_targets(logits: Tensor, center: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
    """KL of the mean target to the uniform distribution, and the mean entropy of the targets: scalars, in nats.

    Teacher logits: [N, K]; centre: [1, K]. The mean over N sharp targets holds at most N prototypes: where K is more,
    the KL of healthy targets is about ln K − ln N.
    """
    log_p = torch.log_softmax((_wide(logits) - center) / teacher_temp, dim=-1)
    p = log_p.exp()
    kl = math.log(logits.shape[1]) - torch.special.entr(p.mean(0)).sum()
    return kl, -(p * log_p).sum(-1).mean()


def rank_me(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values of [N, D], divided by their sum: a scalar (Garrido et al. 2023, eq. 1).

    NaN for features that are not all finite. From the eigenvalues of the smaller Gram matrix, in float64: their roots
    would have only half of float32's digits, and a hundred rounding errors look like a dimension.
    """
    wide = features.double()
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    finite = gram.isfinite().all()
    gram = torch.where(finite, gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))  # LAPACK raises on NaN
    try:
        values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    except RuntimeError:  # they did not converge; a figure of a log is not worth a run
        return features.new_full((), math.nan)
    rank = torch.special.entr(values / values.sum()).sum().exp()
    return torch.where(finite, rank, math.nan).to(features.dtype)


def unit_std(features: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of features [N, D] at length 1, times √D (Chen & He 2021, 4.1)."""
    unit = F.normalize(features, dim=1)
    return unit.std(0, correction=0).mean() * math.sqrt(features.shape[1])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- Alarms ---------------------------------------------------------------------------------------------------------

# A run is not judged before both are over: at first all pictures look alike to the networks, and the centre is not
# there yet.
BEGINNING_EPOCHS = 1
BEGINNING_STEPS = 200  # epochs of small data are short
PATIENCE = 5  # logs in a row that must show it: targets swing while the centre follows them, and a few batches show it
CLEARED = 2.0  # times its limit a figure must be for an alarm to be over
FEW = 8  # pictures of a probe; fewer fall on one prototype, or span two dimensions, by chance

UNIFORM_NATS = 0.05  # from ln K: untrained networks are 0.2 and more below it, those with even targets 0.01
ONE_POINT_NATS = 0.1  # from the entropy 0 of a single prototype: 98 of 100 pictures have the same one
FEATURE_RANK = 2.0  # equal features have 1, with bfloat16's rounding up to 1.4; runs that learn have 4 and more
FEATURE_STD = 0.02  # equal features have 0, with bfloat16's rounding 0.003; runs that learn have 0.2 and more
CENTER_SIZE = 1.0  # of the centre's entries, the root of their mean square: that of mean cosines is smaller

_UNIFORM, _ONE_POINT, _DIMENSIONS, _CENTER = (
    "uniform collapse", "one-point collapse", "dimensional collapse", "growing centre",
)  # fmt: skip
_FREEZE = "freeze the last layer longer with --optim.freeze_last_layer_epochs"
REMEDIES = {
    _UNIFORM: f"lower --loss.teacher_temp and --loss.warmup_teacher_temp, or {_FREEZE}",
    _ONE_POINT: "raise --loss.teacher_temp and --loss.warmup_teacher_temp; --loss.center_momentum must be below 1",
    _DIMENSIONS: f"lower --optim.lr, raise --optim.ema_momentum if batches are small, or {_FREEZE}",
    _CENTER: "keep the prototypes' lengths at 1 with --head.norm_last_layer true, or lower --optim.lr",
}
GO_ON = "go on from here with --accept_changes true, or begin anew in another --output"


class Alarms:
    """Judges the rows that a run logs: a line for each kind of trouble, once until it is over.

    It takes `PATIENCE` logs in a row within a kind's limit, and is over at `CLEARED` times that. A figure that is
    absent, None or NaN changes nothing.
    """

    def __init__(
        self,
        prototypes: int,
        pictures: int = PICTURES,
        *,
        beginning_epochs: int = BEGINNING_EPOCHS,
        beginning_steps: int = BEGINNING_STEPS,
    ) -> None:
        """prototypes: K; pictures: how many a probe sees, at most `PICTURES`."""
        self._prototypes, self._pictures = prototypes, pictures
        self._epochs, self._steps = beginning_epochs, beginning_steps
        self._logs = dict.fromkeys(REMEDIES, 0)  # in a row that show it

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """The lines to say about a row of `step` and `epoch`, from 0, `loss`, `teacher_entropy` and the figures of
        `Probe`, each with its remedy."""
        figures = defaultdict(lambda: math.nan, {name: value for name, value in row.items() if value is not None})
        if figures["step"] < self._steps or figures["epoch"] < self._epochs:
            return []
        if self._pictures < FEW:
            figures |= dict.fromkeys(("target_kl", "feature_rank", "feature_std"), math.nan)
        found = [sign(figures, self._prototypes) for sign in (_uniform, _one_point, _dimensions, _center)]
        return [
            f"{sign.kind} at step {figures['step']:.0f}: {sign.finding}: {REMEDIES[sign.kind]}; {GO_ON}"
            for sign in found
            if self._is_new(sign.kind, sign.distance)
        ]

    def _is_new(self, kind: str, distance: float) -> bool:
        """Count a log; whether it is the one to speak at. What is compared with NaN is false, and changes nothing."""
        if distance <= 1:
            self._logs[kind] += 1
            return self._logs[kind] == PATIENCE
        if distance >= CLEARED or (distance > 1 and self._logs[kind] < PATIENCE):
            self._logs[kind] = 0
        return False


class _Sign(NamedTuple):
    """What a row says of one kind of trouble."""

    kind: str
    distance: float
    """from it, in limits: up to 1 is trouble; NaN is not known"""
    finding: str
    """the figures and what they mean"""


def _uniform(row: Mapping[str, float], prototypes: int) -> _Sign:
    """Both figures, because the loss of a run that begins well stays at ln K for a while, or passes it."""
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
        f"teacher_entropy {entropy:.3f} is at 0 and target_kl {kl:.3f} at ln K = {even:.3f}, so every picture's target "
        "is the same prototype",
    )


def _dimensions(row: Mapping[str, float], _prototypes: int) -> _Sign:
    rank, std = row["feature_rank"], row["feature_std"]
    return _Sign(
        _DIMENSIONS,
        _smallest(rank / FEATURE_RANK, std / FEATURE_STD),
        f"feature_rank {rank:.2f} (at least 1) and feature_std {std:.4f} (at least 0) say that the features of "
        "different pictures are nearly the same, or lie on a line",
    )


def _center(row: Mapping[str, float], prototypes: int) -> _Sign:
    size = row["center_norm"] / math.sqrt(prototypes)
    return _Sign(
        _CENTER,
        CENTER_SIZE / size if size else math.inf,
        f"center_norm {row['center_norm']:.1f} is {size:.2f} times √K, which a centre of cosines cannot exceed, so the "
        "logits are growing",
    )


def _largest(*values: float) -> float:
    """NaN if one is: it takes all to tell."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _smallest(*values: float) -> float:
    """Of those that are not NaN: one is enough to tell."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)
