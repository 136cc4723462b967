"""The DINO loss with its gradient, the teacher's entropy and the teacher's mean, in two passes over the logits.

The numbers are those of `dino_fast.step.loss`. With q_t the target of teacher view t, s a student row, and M and S the
maximum of s and the sum of exp((s − M)/T_s), the cross-entropy of a pair is (Caron et al. 2021, eq. 3)

    CE(q_t, s) = log S − ⟨q_t, s − M⟩ / T_s,

so that it takes three numbers a row, and one a pair, of which each stretch of the K prototypes yields its part:
`_partials` reads all logits once and writes these parts, `_combine` makes image by image the loss of them, and
`_gradient` reads the logits again and writes the gradient over the student's. Nothing waits for the GPU; all sums are
in float32 and have a fixed order.
"""
# In kernels Triton evaluates annotations, and takes constexpr alone:
# mypy: allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dino_fast.step.loss import Objective

# A program holds V rows (rounded up to a power of two) of some prototypes of an image, and the teacher's two rows.
# In the first pass it is a single warp, since what it does is mostly to add up along rows: with four warps each sum
# waited for all of them, and the pass took 141 µs on an H200 where a copy takes 39. For V = 8 it reads 512 bytes of a
# row of 16-bit logits, whole lines of memory. The second pass has nothing to add up.
PARTS_TILE, GRADIENT_TILE = 2048, 4096
PARTS_LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
# A program of the first pass takes IMAGES one after another, summing the teacher's columns in registers. More would
# write fewer sums; fewer make more programs, and a shorter wait for the last ones.
IMAGES = 8

LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU has 2^x; e^x takes a multiplication more
FLOOR = tl.constexpr(-1e30)  # for −∞ where there is no prototype: its products with 0 are 0


def fused_dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: Tensor,
    views: int,
) -> Objective:
    """Return `loss.dino_loss`, `loss.teacher_entropy` and `loss.teacher_mean` of the same arguments, as float32.

    student_logits: [V·B, K], view-major, the two global views first; teacher_logits: [2·B, K]; both contiguous, of
    float16, bfloat16 or float32. center: [1, K], float32, contiguous. teacher_temp: one float32 on their device, read
    when the kernels run, so that a recorded CUDA graph may be replayed with another.

    The backward pass writes the gradient into the memory of `student_logits`, whose values are lost: it runs once, and
    a second one raises RuntimeError. Until then the caller must not change either logits or `teacher_temp`; `center`
    may be changed at once, a copy of it is kept. Raises ValueError for what is not of these shapes, types and layouts.
    """
    _check(student_logits, teacher_logits, center, teacher_temp, views)
    return Objective(*_FusedLoss.apply(student_logits, teacher_logits, center, student_temp, teacher_temp, views))


def _check(student: Tensor, teacher: Tensor, center: Tensor, teacher_temp: Tensor, views: int) -> None:
    rows, prototypes = student.shape
    if views < 2 or rows < views or rows % views or teacher.shape != (2 * rows // views, prototypes):
        raise ValueError(
            f"{views} views do not fit student logits of {tuple(student.shape)} "
            f"and teacher logits of {tuple(teacher.shape)}"
        )
    if center.shape != (1, prototypes) or center.dtype != torch.float32:
        raise ValueError(f"the center must be float32 [1, {prototypes}], not {center.dtype} {tuple(center.shape)}")
    if teacher_temp.numel() != 1 or teacher_temp.dtype != torch.float32:
        kind = f"{teacher_temp.dtype} {tuple(teacher_temp.shape)}"
        raise ValueError(f"the teacher's temperature must be one float32, not {kind}")
    for logits in (student, teacher):
        if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"logits must be float16, bfloat16 or float32, not {logits.dtype}")
    if not (student.is_contiguous() and teacher.is_contiguous() and center.is_contiguous()):
        raise ValueError("logits and center must be contiguous")
    if not student.device == teacher.device == center.device == teacher_temp.device:
        raise ValueError("logits, center and the teacher's temperature must be on one device")


class _Workspace(NamedTuple):
    """The memory that a loss allocates besides its results. Statistics and the center live until the backward pass.

    With blocks = ⌈K / block⌉ of block = PARTS_TILE / V prototypes, it takes

        4 · (B · blocks · (4·V + 6) + K · (⌈B / IMAGES⌉ + 1) + B · (2·V + 6))  bytes,

    of 16-bit logits' 2 · B · (V + 2) · K about 8 / block + 2 / (IMAGES · (V + 2)): a seventeenth for V = 8.
    """

    student_parts: Tensor  # [B, blocks, 4, V]: max s, Σ exp((s − max s)/T_s), Σ e_t · (s − max s) of both t (see below)
    teacher_parts: Tensor  # [B, blocks, 2, 3]: max y, Σ e_t, Σ e_t · (y − max y), with y = logit − center
    column_means: Tensor  # [groups of images, K]: their parts of the teacher's mean
    center: Tensor  # [1, K], as the forward pass saw it
    student_stats: Tensor  # [V·B, 2]: the row's maximum, and its teachers / Σ exp((s − max s)/T_s)
    teacher_stats: Tensor  # [2·B, 2]: the row's maximum after centering, and 1 / Σ e_t; e_t = exp((y − max y)/T_t)
    terms: Tensor  # [2, B]: the images' parts of the loss and of the entropy


def _workspace(center: Tensor, batch: int, views: int) -> _Workspace:
    prototypes = center.shape[1]
    blocks = triton.cdiv(prototypes, _block(views, PARTS_TILE))

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=center.device)

    return _Workspace(
        student_parts=new(batch, blocks, 4, views),
        teacher_parts=new(batch, blocks, 2, 3),
        column_means=new(triton.cdiv(batch, IMAGES), prototypes),
        center=center.detach().clone(),
        student_stats=new(views * batch, 2),
        teacher_stats=new(2 * batch, 2),
        terms=new(2, batch),
    )


def _block(views: int, tile: int) -> int:
    """Return how many prototypes a program takes at once."""
    return tile // triton.next_power_of_2(views)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        student_temp: float,
        teacher_temp: Tensor,
        views: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = len(teacher) // 2
        space = _workspace(center, batch, views)
        prototypes, blocks, rows = center.shape[1], space.teacher_parts.shape[1], triton.next_power_of_2(views)
        block = _block(views, PARTS_TILE)
        with torch.cuda.device_of(student):
            _partials[(blocks, len(space.column_means))](
                student, teacher, space.center, teacher_temp, space.student_parts, space.teacher_parts,
                space.column_means, 1 / student_temp, batch, prototypes, views, rows, block, IMAGES,
                prototypes % block == 0, **PARTS_LAUNCH,
            )  # fmt: skip
            _combine[(batch,)](
                space.student_parts, space.teacher_parts, teacher_temp, space.student_stats, space.teacher_stats,
                space.terms, 1 / student_temp, batch, blocks, views, rows, triton.next_power_of_2(blocks),
                **LAUNCH,
            )  # fmt: skip
        loss, entropy = space.terms[0].sum(), space.terms[1].sum()
        mean = space.column_means.sum(0, keepdim=True)
        ctx.save_for_backward(student, teacher, space.center, teacher_temp, space.student_stats, space.teacher_stats)
        ctx.student_temp, ctx.views, ctx.spent = student_temp, views, False
        ctx.mark_non_differentiable(entropy, mean)
        ctx.set_materialize_grads(False)  # no zeros for those two
        return loss, entropy, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("this loss's gradient took the place of the student's logits: it can be had only once")
        student, teacher, center, teacher_temp, student_stats, teacher_stats = ctx.saved_tensors
        batch, prototypes, block = len(teacher) // 2, center.shape[1], _block(ctx.views, GRADIENT_TILE)
        share = 1 / (ctx.student_temp * batch * (2 * ctx.views - 2))
        with torch.cuda.device_of(student):
            _gradient[(triton.cdiv(prototypes, block), batch)](
                student, teacher, center, teacher_temp, student_stats, teacher_stats, grad_loss, 1 / ctx.student_temp,
                share, batch, prototypes, ctx.views, triton.next_power_of_2(ctx.views), block, **LAUNCH,
            )  # fmt: skip
        ctx.spent = True
        torch.autograd.graph.increment_version(student)  # for autograd to tell whoever else has kept the logits
        return student.detach(), None, None, None, None, None


@triton.jit(do_not_specialize=["batch"])
def _partials(
    student, teacher, center, teacher_temp, student_parts, teacher_parts, column_means, sharpness, batch, prototypes,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, IMAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the parts of a block of prototypes of a group of images, and the group's column means.

    WHOLE: no block is cut short, so that nothing has to be looked at twice.
    """
    block, group = tl.program_id(0), tl.program_id(1)
    column, view = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    inside, exists = WHOLE | (column < prototypes), view < VIEWS
    shift = tl.load(center + column, mask=inside, other=0.0)
    teacher_sharpness = 1.0 / tl.load(teacher_temp)
    sums = tl.full([BLOCK], 0.0, tl.float32)
    first = group.to(tl.int64) * IMAGES
    for image in range(first, tl.minimum(first + IMAGES, batch)):
        # All loads come first: none shall wait at the barriers of a reduction.
        row = view.to(tl.int64) * batch + image
        place = student + row[:, None] * prototypes + column[None, :]
        logits = tl.load(place, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)
        one = tl.load(teacher + image * prototypes + column, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(teacher + (image + batch) * prototypes + column, mask=inside, other=0.0).to(tl.float32)
        sums += one + two
        part = image * tl.num_programs(0) + block
        one = _teacher_part(one - shift, inside, teacher_sharpness, teacher_parts + part * 6, WHOLE)
        two = _teacher_part(two - shift, inside, teacher_sharpness, teacher_parts + part * 6 + 3, WHOLE)
        if not WHOLE:
            logits = tl.where(inside[None, :], logits, FLOOR)
        top = _max(logits, 1)
        below = logits - top[:, None]
        target = student_parts + part * (4 * VIEWS) + view
        tl.store(target, top, mask=exists)
        tl.store(target + VIEWS, _sum(tl.exp2(below * (sharpness * LOG2_E)), 1), mask=exists)
        tl.store(target + 2 * VIEWS, _sum(below * one[None, :], 1), mask=exists)
        tl.store(target + 3 * VIEWS, _sum(below * two[None, :], 1), mask=exists)
    tl.store(column_means + group.to(tl.int64) * prototypes + column, sums / (2 * batch), mask=inside)


@triton.jit
def _teacher_part(centered, inside, sharpness, target, WHOLE: tl.constexpr):
    """Store the three parts of a block of a teacher row; returns its exp((y − max y)/T_t)."""
    if not WHOLE:
        centered = tl.where(inside, centered, FLOOR)
    top = _max(centered, 0)
    below = centered - top
    weight = tl.exp2(below * (sharpness * LOG2_E))
    tl.store(target, top)
    tl.store(target + 1, _sum(weight, 0))
    tl.store(target + 2, _sum(weight * below, 0))
    return weight


@triton.jit(do_not_specialize=["batch", "blocks"])
def _combine(
    student_parts, teacher_parts, teacher_temp, student_stats, teacher_stats, terms, sharpness, batch, blocks,
    VIEWS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Compute an image's statistics and terms from the parts of its blocks, each scaled to its row's maximum."""
    image = tl.program_id(0).to(tl.int64)
    block, view = tl.arange(0, SLOTS), tl.arange(0, ROWS)
    there, exists = block < blocks, view < VIEWS
    part = image * blocks + block
    teacher_sharpness = 1.0 / tl.load(teacher_temp)
    source = teacher_parts + part * 6
    scale_one, mass_one, entropy_one = _teacher_row(source, there, teacher_sharpness, teacher_stats + image * 2)
    source, target = source + 3, teacher_stats + (image + batch) * 2
    scale_two, mass_two, entropy_two = _teacher_row(source, there, teacher_sharpness, target)

    source = student_parts + part[:, None] * (4 * VIEWS) + view[None, :]
    both = there[:, None] & exists[None, :]
    top = tl.load(source, mask=both, other=FLOOR)
    highest = _max(top, 0)
    drop = top - highest[None, :]
    sums = tl.load(source + VIEWS, mask=both, other=0.0)
    total = tl.where(exists, _sum(sums * tl.exp(drop * sharpness), 0), 1.0)
    dots_one = tl.load(source + 2 * VIEWS, mask=both, other=0.0)
    dots_two = tl.load(source + 3 * VIEWS, mask=both, other=0.0)
    mean_one = _sum(dots_one * scale_one[:, None] + drop * mass_one[:, None], 0)  # ⟨q, s − M⟩
    mean_two = _sum(dots_two * scale_two[:, None] + drop * mass_two[:, None], 0)
    loss = tl.where(exists & (view != 0), tl.log(total) - mean_one * sharpness, 0.0)
    loss += tl.where(exists & (view != 1), tl.log(total) - mean_two * sharpness, 0.0)
    tl.store(terms + image, _sum(loss, 0) / (batch * (2 * VIEWS - 2)))
    tl.store(terms + batch + image, (entropy_one + entropy_two) / (2 * batch))
    target = student_stats + (view.to(tl.int64) * batch + image) * 2
    tl.store(target, highest, mask=exists)
    tl.store(target + 1, tl.where(view < 2, 1.0, 2.0) / total, mask=exists)


@triton.jit
def _teacher_row(source, there, sharpness, target):
    """Of a teacher row, by blocks: the factor that makes e_t probabilities, and their sum; and the row's entropy."""
    top = tl.load(source, mask=there, other=FLOOR)
    sums = tl.load(source + 1, mask=there, other=0.0)
    dots = tl.load(source + 2, mask=there, other=0.0)
    highest = _max(top, 0)
    drop = top - highest
    scale = tl.exp(drop * sharpness)
    total = _sum(sums * scale, 0)
    scale = scale / total
    mass = sums * scale
    tl.store(target, highest)
    tl.store(target + 1, 1.0 / total)
    return scale, mass, tl.log(total) - _sum(dots * scale + drop * mass, 0) * sharpness


@triton.jit(do_not_specialize=["batch"])
def _gradient(
    student, teacher, center, teacher_temp, student_stats, teacher_stats, grad_loss, sharpness, share, batch,
    prototypes, VIEWS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite s, for a block of prototypes of an image, with grad_loss · share · (n_s · softmax(s) − Σ_{t≠s} q_t).

    n_s is the number of teacher views t ≠ s: 1 for the two global views, 2 for locals.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, view = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    inside, exists = column < prototypes, view < VIEWS
    row = view.to(tl.int64) * batch + image
    place = student + row[:, None] * prototypes + column[None, :]
    mask = exists[:, None] & inside[None, :]
    logits = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    top = tl.load(student_stats + row * 2, mask=exists, other=0.0)
    weight = tl.load(student_stats + row * 2 + 1, mask=exists, other=0.0)
    below = tl.where(mask, logits - top[:, None], FLOOR)
    shift = tl.load(center + column, mask=inside, other=0.0)
    teacher_sharpness = 1.0 / tl.load(teacher_temp)
    one = _target(teacher, teacher_stats, shift, teacher_sharpness, image, column, inside, prototypes)
    two = _target(teacher, teacher_stats, shift, teacher_sharpness, image + batch, column, inside, prototypes)
    targets = tl.where((view != 0)[:, None], one[None, :], 0.0) + tl.where((view != 1)[:, None], two[None, :], 0.0)
    gradient = tl.exp(below * sharpness) * weight[:, None] - targets
    gradient *= tl.load(grad_loss) * share
    tl.store(place, gradient.to(student.dtype.element_ty), mask=mask)


@triton.jit
def _target(teacher, teacher_stats, shift, sharpness, row, column, inside, prototypes):
    """Return the probabilities of a block of a teacher row."""
    logits = tl.load(teacher + row * prototypes + column, mask=inside, other=0.0).to(tl.float32)
    top, weight = tl.load(teacher_stats + row * 2), tl.load(teacher_stats + row * 2 + 1)
    return tl.exp(tl.where(inside, logits - shift - top, FLOOR) * sharpness) * weight


# What tl.max and tl.sum are; interpreted, those fail where triton was imported (by torchvision, say) to be compiled.
@triton.jit
def _max(values, axis: tl.constexpr):
    return tl.reduce(values, axis, tl.standard._elementwise_max)


@triton.jit
def _sum(values, axis: tl.constexpr):
    return tl.reduce(values, axis, tl.standard._sum_combine)
