"""Batch norm with what follows it in a ResNet, in as few passes over memory as its statistics allow.

Three operations, each differentiable: `norm_relu`, `norm_add_relu` (the end of a residual block, with the norm on the
way around it if there is one) and `norm_relu_pool` (the stem, with its 3×3 max pooling). The numbers are those of
nn.BatchNorm2d in train mode and of the operations after it, computed in float32 and rounded once. Forward, the sums of
every channel are one pass and the result is the second; backward, the sums are one pass and the gradient is the second.
Where a ReLU let nothing through is computed again from the input, so that its output need not be read, except behind an
addition. With several ranks the statistics are those of all ranks together, in one message a layer in each direction.

All tensors are channels-last, so that memory is a matrix [rows, channels] of one row a pixel. A program takes a block
of channels, of which it keeps what a channel needs in registers, and a stretch of rows. Sums have a fixed order, and
nothing waits for the GPU.
"""
# In kernels Triton evaluates annotations, and takes constexpr alone:
# mypy: allow-incomplete-defs

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dino_fast.model.sync_batchnorm import world_size

# Bytes of each tensor that a program takes at once: each of its 128 threads reads 4 times 16 before it waits. With five
# tensors, two tiles ahead of use, they take 82 kB of a multiprocessor's shared memory.
TILE_BYTES = 8192
QUAD_BYTES = 2048  # the same for the stem, which holds twelve tiles
CHANNELS = 128  # channels a program takes, at most; of the stem half as many
# Programs whose sums a channel is added up from, for each multiprocessor: as many as it holds at a time. What they take
# next is on its way while they add, STAGES - 1 tiles ahead.
VALUE_PROGRAMS, GRADIENT_PROGRAMS = 4, 3
STAGES = tl.constexpr(3)
SETTLED = 8  # channels a program of the small launch between two passes takes
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
NO_SCALING = None, None, None, None


class Statistics(NamedTuple):
    """The statistics of every channel of a batch, over all ranks: float32 [C] each."""

    mean: Tensor
    inverse_std: Tensor
    values: Tensor  # how many a channel has: one float32


class _Layer(NamedTuple):
    """A norm with the statistics of the batch at hand."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    statistics: Statistics

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias, *self.statistics

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "_Layer":
        """Return the layer from what `tensors` returned."""
        x, weight, bias, *statistics = tensors
        return cls(x, weight, bias, Statistics(*statistics))

    @property
    def scaling(self) -> tuple[Tensor, ...]:
        """Return what kernels take of a norm."""
        return self.weight, self.bias, self.statistics.mean, self.statistics.inverse_std


class _Grid(NamedTuple):
    """How a matrix [rows, channels] is divided among programs."""

    programs: int
    stretches: int  # programs that take the same channels
    sizes: tuple[int, int]  # rows and channels of a tile


def norm_relu(x: Tensor, norm: _BatchNorm) -> Tensor:
    """Return relu(norm(x)) of x [N, C, H, W], and update the running statistics of `norm`."""
    return _NormRelu.apply(_channels_last(x), norm.weight, norm.bias, norm)


def norm_add_relu(
    x: Tensor, norm: _BatchNorm, residual: Tensor, residual_norm: _BatchNorm | None = None
) -> tuple[Tensor, Tensor]:
    """Return relu(norm(x) + residual) of x and residual [N, C, H, W], or the same with residual_norm(residual).

    The result comes twice: one for each of the two operations that take it in the next block, whose gradients are then
    added within the backward pass's first kernel.
    """
    around = (None, None) if residual_norm is None else (residual_norm.weight, residual_norm.bias)
    return _NormAddRelu.apply(
        _channels_last(x), norm.weight, norm.bias, norm, _channels_last(residual), *around, residual_norm
    )


def norm_relu_pool(x: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return max_pool2d(relu(norm(x)), 3, stride=2, padding=1) of x [N, C, H, W], twice as `norm_add_relu`."""
    return _NormReluPool.apply(_channels_last(x), norm.weight, norm.bias, norm)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _grid(x: Tensor, programs: int | None = None) -> _Grid:
    """For x's rows and channels; programs: how many a multiprocessor there are at most. None: one a tile."""
    return _share_out(x, programs, TILE_BYTES // x.element_size(), CHANNELS)


def _pool_grid(x: Tensor, places: Tensor, programs: int | None = None) -> _Grid:
    """Return the same as `_grid`, for the stem's tiles, over the pixels of its output."""
    return _share_out(places, programs, QUAD_BYTES // x.element_size(), CHANNELS // 2)


def _share_out(x: Tensor, programs: int | None, tile: int, most_channels: int) -> _Grid:
    tile_channels = min(most_channels, triton.next_power_of_2(x.shape[1]))
    tile_rows, blocks = tile // tile_channels, triton.cdiv(x.shape[1], tile_channels)
    stretches = triton.cdiv(_rows(x), tile_rows)
    if programs is not None:
        stretches = min(stretches, max(1, programs * _multiprocessors(x.device) // blocks))
    return _Grid(stretches * blocks, stretches, (tile_rows, tile_channels))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Statistics, of one rank and of all


def _statistics(x: Tensor, norm: _BatchNorm) -> Statistics:
    """Return the statistics of x over all ranks, and update the running ones. Raises ValueError for a single value."""
    if _rows(x) * world_size() == 1:
        raise ValueError(f"batch norm needs more than one value a channel, got {tuple(x.shape)}")
    grid, channels = _grid(x, VALUE_PROGRAMS), x.shape[1]
    parts = x.new_empty(2, grid.stretches, channels, dtype=torch.float32)
    found = x.new_empty(2 * channels + 1, dtype=torch.float32)
    alone = world_size() == 1
    with torch.cuda.device_of(x):
        _sum_values[(grid.programs,)](x, parts, _rows(x), channels, *grid.sizes, **LAUNCH)
        _settle_statistics[(triton.cdiv(channels, SETTLED),)](
            x, parts, found, norm.running_mean, norm.running_var, norm.num_batches_tracked,
            grid.stretches, _rows(x), channels, norm.momentum, norm.eps, alone, SETTLED, **LAUNCH,
        )  # fmt: skip
    return Statistics(*found.split([channels, channels, 1])) if alone else _over_ranks(found, norm)


@torch.no_grad()
def _over_ranks(found: Tensor, norm: _BatchNorm) -> Statistics:
    """Combine each rank's mean, sum of squared deviations and count, by the formula of Chan et al. 1979."""
    gathered = found.new_empty(world_size() * len(found))
    dist.all_gather_into_tensor(gathered, found)
    channels = len(found) // 2
    means, squares, counts = gathered.view(world_size(), -1).split([channels, channels, 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    if norm.track_running_stats:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        assert norm.momentum is not None
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (total / (total - 1).clamp(min=1)), norm.momentum)
    return Statistics(mean, torch.rsqrt(var + norm.eps), total)


def _settle_gradient(totals: Tensor, products: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """From parts [stretches, C] of Σ g and Σ g · (x − mean): the gradients of bias and weight [2, C] by this
    rank, and the same over all ranks, which the gradient of x takes."""
    stretches, channels = totals.shape
    sums = totals.new_empty(2, channels)
    with torch.cuda.device_of(totals):
        _settle_sums[(triton.cdiv(channels, SETTLED),)](
            totals, products, sums, statistics.inverse_std, stretches, channels, SETTLED, **LAUNCH
        )
    if world_size() == 1:
        return sums, sums
    everywhere = sums.clone()
    dist.all_reduce(everywhere)
    return sums, everywhere


# The operations


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: _BatchNorm) -> Tensor:
        layer = _Layer(x, weight, bias, _statistics(x, norm))
        ctx.save_for_backward(*layer.tensors)
        return _launch_normalize(layer, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer, grad = _Layer.of(ctx.saved_tensors), _channels_last(grad)
        totals, products = _launch_gradient_sums(layer, grad, None)
        sums, everywhere = _settle_gradient(totals, products, layer.statistics)
        return _launch_gradient(layer, grad, everywhere, relu=True), sums[1], sums[0], None


class _NormAddRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        norm: _BatchNorm,
        residual: Tensor,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
        residual_norm: _BatchNorm | None,
    ) -> tuple[Tensor, Tensor]:
        layer, around = _Layer(x, weight, bias, _statistics(x, norm)), None
        if residual_norm is not None:
            assert residual_weight is not None
            assert residual_bias is not None
            around = _Layer(residual, residual_weight, residual_bias, _statistics(residual, residual_norm))
        y = _launch_normalize(layer, residual, around)
        ctx.save_for_backward(y, *layer.tensors, *(() if around is None else around.tensors))
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, one: Tensor | None, two: Tensor | None) -> tuple[Tensor | None, ...]:
        y, *saved = ctx.saved_tensors
        layer, around = _Layer.of(saved[:6]), _Layer.of(saved[6:]) if len(saved) > 6 else None
        grad, more = _both(one, two)
        grad_y = torch.empty_like(y)  # of the sum, where the ReLU has let it through
        totals, products, *rest = _launch_gradient_sums(layer, grad, more, y, grad_y, around)
        sums, everywhere = _settle_gradient(totals, products, layer.statistics)
        grads = _launch_gradient(layer, grad_y, everywhere, relu=False), sums[1], sums[0], None
        if around is None:
            return *grads, grad_y, None, None, None
        sums, everywhere = _settle_gradient(totals, rest[0], around.statistics)
        return *grads, _launch_gradient(around, grad_y, everywhere, relu=False), sums[1], sums[0], None


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
        layer = _Layer(x, weight, bias, _statistics(x, norm))
        batch, channels, height, width = x.shape
        shape = batch, channels, triton.cdiv(height, 2), triton.cdiv(width, 2)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        places = torch.empty_like(y, dtype=torch.uint8)
        grid = _pool_grid(x, places)
        with torch.cuda.device_of(x):
            _pool[(grid.programs,)](
                x, *layer.scaling, y, places, _rows(y), channels, height, width, *y.shape[2:],
                *grid.sizes, **LAUNCH,
            )  # fmt: skip
        ctx.save_for_backward(places, *layer.tensors)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, one: Tensor | None, two: Tensor | None) -> tuple[Tensor | None, ...]:
        places, *saved = ctx.saved_tensors
        layer, (grad, more) = _Layer.of(saved), _both(one, two)
        x, grid = layer.x, _pool_grid(layer.x, places, GRADIENT_PROGRAMS)
        what = grad, more, places, x, *layer.scaling
        shape = _rows(places), x.shape[1], *x.shape[2:], *places.shape[2:]
        parts = x.new_empty(2, grid.stretches, x.shape[1], dtype=torch.float32)
        with torch.cuda.device_of(x):
            _pool_gradient_sums[(grid.programs,)](*what, parts, *shape, *grid.sizes, **LAUNCH)
        sums, everywhere = _settle_gradient(parts[0], parts[1], layer.statistics)
        grad_x, grid = torch.empty_like(x), _pool_grid(x, places)
        with torch.cuda.device_of(x):
            _pool_gradient[(grid.programs,)](
                *what, everywhere, layer.statistics.values, grad_x, *shape, *grid.sizes, **LAUNCH
            )
        return grad_x, sums[1], sums[0], None


def _both(one: Tensor | None, two: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients that exist, channels-last. At least one does: else there would be no backward pass."""
    first, *rest = [_channels_last(grad) for grad in (one, two) if grad is not None]
    return first, rest[0] if rest else None


def _launch_normalize(layer: _Layer, residual: Tensor | None, around: _Layer | None) -> Tensor:
    """Return the ReLU of the layer's normalized x plus `residual`, which is normalized too if it is `around`'s x."""
    x, grid, y = layer.x, _grid(layer.x), torch.empty_like(layer.x)
    with torch.cuda.device_of(x):
        _normalize[(grid.programs,)](
            x, *layer.scaling, residual, *(NO_SCALING if around is None else around.scaling), y, _rows(x), x.shape[1],
            *grid.sizes, **LAUNCH,
        )  # fmt: skip
    return y


def _launch_gradient_sums(
    layer: _Layer,
    grad: Tensor,
    more: Tensor | None,
    y: Tensor | None = None,
    grad_y: Tensor | None = None,
    around: _Layer | None = None,
) -> Tensor:
    """The programs' parts [2, stretches, C] of Σ g and Σ g · (x − mean), and [3, …] with those of `around`'s x."""
    x, grid = layer.x, _grid(layer.x, GRADIENT_PROGRAMS)
    parts = x.new_empty(2 if around is None else 3, grid.stretches, x.shape[1], dtype=torch.float32)
    residual = (None, None) if around is None else (around.x, around.statistics.mean)
    with torch.cuda.device_of(x):
        _sum_gradients[(grid.programs,)](
            grad, more, y, x, *layer.scaling, *residual, grad_y, parts, _rows(x), x.shape[1], *grid.sizes, **LAUNCH
        )
    return parts


def _launch_gradient(layer: _Layer, grad: Tensor, sums: Tensor, relu: bool) -> Tensor:
    """Return the gradient of the layer's x. relu: pass it only where the normalized value was positive."""
    x, grid, grad_x = layer.x, _grid(layer.x), torch.empty_like(layer.x)
    with torch.cuda.device_of(x):
        _input_gradient[(grid.programs,)](
            grad, x, *layer.scaling, sums, layer.statistics.values, grad_x, _rows(x), x.shape[1],
            relu, *grid.sizes, **LAUNCH,
        )  # fmt: skip
    return grad_x


# The kernels. Tiles are taken in the order of memory by all programs together, in passes of opposite directions: what a
# pass has read or written last is in the GPU's cache when the next one begins there. A forward pass through the network
# is values from the last to the first, results from the first on; a backward pass is sums from the first on, gradients
# from the last, since the convolution that is next begins at the first.


@triton.jit
def _sum_values(x, parts, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store into `parts` [2, stretches, channels] Σ (x − s) and Σ (x − s)² of a program's tiles; s is the first row."""
    first, step, channel, inside = _place(channels, CHANNELS)
    shift = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    total, squares = tl.full((ROWS, CHANNELS), 0.0, tl.float32), tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    tiles = _tiles(rows, ROWS)
    for number in tl.range(first, tiles, step, num_stages=STAGES):
        place, mask = _tile(tiles - 1 - number, rows, channel, inside, channels, ROWS)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - shift[None, :]
        value = tl.where(mask, value, 0.0)
        total += value
        squares += value * value
    _store_part(parts, 0, _sum(total, 0), first, step, channel, inside, channels)
    _store_part(parts, 1, _sum(squares, 0), first, step, channel, inside, channels)


@triton.jit
def _settle_statistics(
    x, parts, found, running_mean, running_var, tracked, stretches, rows, channels, momentum, eps,
    ALONE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store into `found` [2 · channels + 1] means, inverse standard deviations and the number of rows.

    If not ALONE, it stores squared deviations instead of inverse standard deviations.

    ALONE, it also updates the running statistics, whose variance is the unbiased one.
    """
    _, _, channel, inside = _place(channels, CHANNELS)
    total, squares = _sum_parts(parts, parts + stretches * channels, stretches, channel, inside, channels, CHANNELS)
    shift = tl.load(x + channel, mask=inside, other=0.0).to(tl.float32)
    offset = total / rows
    mean = shift + offset
    deviations = tl.maximum(squares - total * offset, 0.0)
    tl.store(found + channel, mean, mask=inside)
    if ALONE:
        var = deviations / rows
        tl.store(found + channels + channel, 1.0 / tl.sqrt_rn(var + eps), mask=inside)
        if running_mean is not None:
            _move(running_mean + channel, mean, momentum, inside)
            _move(running_var + channel, deviations / tl.maximum(rows - 1, 1), momentum, inside)
            if tl.program_id(0) == 0:
                tl.store(tracked, tl.load(tracked) + 1)
    else:
        tl.store(found + channels + channel, deviations, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(found + 2 * channels, rows)


@triton.jit
def _normalize(
    x, weight, bias, mean, inverse_std, residual, residual_weight, residual_bias, residual_mean, residual_inverse_std,
    y, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute y = max(0, (x − mean) · weight / std + bias + residual), of which any part may be missing."""
    number, _, channel, inside = _place(channels, CHANNELS)
    center, scale, shift = _scaling(weight, bias, mean, inverse_std, channel, inside)
    if residual_weight is not None:
        residual_center, residual_scale, residual_shift = _scaling(
            residual_weight, residual_bias, residual_mean, residual_inverse_std, channel, inside
        )
    place, mask = _tile(number, rows, channel, inside, channels, ROWS)
    value = _scaled(tl.load(x + place, mask=mask, other=0.0), center, scale, shift)
    if residual is not None:
        other = tl.load(residual + place, mask=mask, other=0.0)
        if residual_weight is not None:
            other = _scaled(other, residual_center, residual_scale, residual_shift)
        value += other.to(tl.float32)
    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sum_gradients(
    grad, more, y, x, weight, bias, mean, inverse_std, residual, residual_mean, grad_y, parts, rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store into `parts` [2 or 3, stretches, channels] Σ g and Σ g · (x − mean) of a program's tiles and a residual's.

    g is `grad` and `more`, where the ReLU's output was positive: by `y`, or where there is none by x. It is stored
    into `grad_y` if that is there.
    """
    first, step, channel, inside = _place(channels, CHANNELS)
    center, scale, shift = _scaling(weight, bias, mean, inverse_std, channel, inside)
    if residual is not None:
        residual_center = tl.load(residual_mean + channel, mask=inside, other=0.0)
        others = tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    total, products = tl.full((ROWS, CHANNELS), 0.0, tl.float32), tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    for number in tl.range(first, _tiles(rows, ROWS), step, num_stages=STAGES):
        place, mask = _tile(number, rows, channel, inside, channels, ROWS)
        value = tl.load(x + place, mask=mask, other=0.0)
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if more is not None:
            g += tl.load(more + place, mask=mask, other=0.0).to(tl.float32)
        if y is not None:
            g = tl.where(tl.load(y + place, mask=mask, other=0.0) > 0, g, 0.0)
        else:
            g = tl.where(_scaled(value, center, scale, shift) > 0, g, 0.0)
        if grad_y is not None:
            kept = g.to(grad_y.dtype.element_ty)
            tl.store(grad_y + place, kept, mask=mask)
            g = kept.to(tl.float32)
        total += g
        products += g * tl.where(mask, value.to(tl.float32) - center[None, :], 0.0)
        if residual is not None:
            value = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
            others += g * tl.where(mask, value - residual_center[None, :], 0.0)
    _store_part(parts, 0, _sum(total, 0), first, step, channel, inside, channels)
    _store_part(parts, 1, _sum(products, 0), first, step, channel, inside, channels)
    if residual is not None:
        _store_part(parts, 2, _sum(others, 0), first, step, channel, inside, channels)


@triton.jit
def _settle_sums(totals, products, sums, inverse_std, stretches, channels, CHANNELS: tl.constexpr):
    """Store into `sums` [2, channels] Σ g and Σ g · (x − mean) / std, the gradients of bias and weight."""
    _, _, channel, inside = _place(channels, CHANNELS)
    total, product = _sum_parts(totals, products, stretches, channel, inside, channels, CHANNELS)
    tl.store(sums + channel, total, mask=inside)
    tl.store(sums + channels + channel, product * tl.load(inverse_std + channel, mask=inside, other=0.0), mask=inside)


@triton.jit
def _input_gradient(
    grad, x, weight, bias, mean, inverse_std, sums, count, grad_x, rows, channels,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x = weight / std · (g − Σ g / n − (x − mean) / std · Σ (g · (x − mean) / std) / n), with n = `count`."""
    number, _, channel, inside = _place(channels, CHANNELS)
    center, scale, shift = _scaling(weight, bias, mean, inverse_std, channel, inside)
    level, slope = _correction(sums, count, inverse_std, channel, inside, channels)
    place, mask = _tile(_tiles(rows, ROWS) - 1 - number, rows, channel, inside, channels, ROWS)
    value = tl.load(x + place, mask=mask, other=0.0)
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(_scaled(value, center, scale, shift) > 0, g, 0.0)
    g = scale[None, :] * (g - level[None, :] - (value.to(tl.float32) - center[None, :]) * slope[None, :])
    tl.store(grad_x + place, g.to(grad_x.dtype.element_ty), mask=mask)


# The stem's. A row is a pixel of the pooled output. Its window is centered at twice its place, and of the input's four
# pixels from there on (its quad) each lies in one, two or four windows: the row's own, the next one's to the right,
# the next one's below, and that between the two.


@triton.jit
def _pool(
    x, weight, bias, mean, inverse_std, y, places, rows, channels, height, width, pooled_height, pooled_width,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Find the largest of a window's normalized values that is not negative, and which of its nine pixels has it.

    Where a channel's scale is positive that is the pixel of the largest x, else of the smallest; the first of equal
    ones. A NaN among them need not be looked for: it makes the channel's mean NaN, and so all of its results.
    """
    number, _, channel, inside = _place(channels, CHANNELS)
    center, scale, shift = _scaling(weight, bias, mean, inverse_std, channel, inside)
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    place, mask = _tile(number, rows, channel, inside, channels, ROWS)
    pixel = _rows_of(number, ROWS)
    image, top, left = _pixel(pixel, pooled_height, pooled_width)
    best = tl.full((ROWS, CHANNELS), -1.0e38, tl.float32)
    which = tl.full((ROWS, CHANNELS), 0, tl.int32)
    for tap in tl.static_range(9):
        down, right = 2 * top + tap // 3 - 1, 2 * left + tap % 3 - 1
        there = (down >= 0) & (down < height) & (right >= 0) & (right < width) & (pixel < rows)
        source = _places((image * height + down) * width + right, channel, channels)
        taken = there[:, None] & inside[None, :]
        value = tl.load(x + source, mask=taken, other=0.0).to(tl.float32) * sign[None, :]
        larger = taken & (value > best)
        best, which = tl.where(larger, value, best), tl.where(larger, tap, which)
    best = tl.where(mask, best * sign[None, :], 0.0)
    value = tl.maximum(_scaled(best, center, scale, shift), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)
    tl.store(places + place, which.to(tl.uint8), mask=mask)


@triton.jit
def _pool_gradient_sums(
    grad, more, places, x, weight, bias, mean, inverse_std, parts, rows, channels, height, width, pooled_height,
    pooled_width, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Do what `_sum_gradients` does, with the gradient of the pooled output."""
    first, step, channel, inside = _place(channels, CHANNELS)
    center, scale, shift = _scaling(weight, bias, mean, inverse_std, channel, inside)
    total, products = tl.full((ROWS, CHANNELS), 0.0, tl.float32), tl.full((ROWS, CHANNELS), 0.0, tl.float32)
    for number in range(first, _tiles(rows, ROWS), step):
        pixel = _rows_of(number, ROWS)
        image, top, left, own, right, below, across = _windows(
            grad, more, places, pixel, rows, channel, inside, channels, pooled_height, pooled_width
        )
        for corner in tl.static_range(4):
            g = _at_corner(corner, own, right, below, across)
            value, taken, _ = _corner(
                x, image, top, left, corner, pixel < rows, channel, inside, channels, height, width
            )
            g = tl.where(taken & (_scaled(value, center, scale, shift) > 0), g, 0.0)
            total += g
            products += g * tl.where(taken, value.to(tl.float32) - center[None, :], 0.0)
    _store_part(parts, 0, _sum(total, 0), first, step, channel, inside, channels)
    _store_part(parts, 1, _sum(products, 0), first, step, channel, inside, channels)


@triton.jit
def _pool_gradient(
    grad, more, places, x, weight, bias, mean, inverse_std, sums, count, grad_x, rows, channels, height, width,
    pooled_height, pooled_width, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Do what `_input_gradient` does, with the gradient of the pooled output."""
    number, _, channel, inside = _place(channels, CHANNELS)
    center, scale, shift = _scaling(weight, bias, mean, inverse_std, channel, inside)
    level, slope = _correction(sums, count, inverse_std, channel, inside, channels)
    pixel = _rows_of(_tiles(rows, ROWS) - 1 - number, ROWS)
    image, top, left, own, right, below, across = _windows(
        grad, more, places, pixel, rows, channel, inside, channels, pooled_height, pooled_width
    )
    for corner in tl.static_range(4):
        g = _at_corner(corner, own, right, below, across)
        value, taken, place = _corner(
            x, image, top, left, corner, pixel < rows, channel, inside, channels, height, width
        )
        g = tl.where(_scaled(value, center, scale, shift) > 0, g, 0.0)
        g = scale[None, :] * (g - level[None, :] - (value.to(tl.float32) - center[None, :]) * slope[None, :])
        tl.store(grad_x + place, g.to(grad_x.dtype.element_ty), mask=taken)


@triton.jit
def _windows(grad, more, places, pixel, rows, channel, inside, channels, pooled_height, pooled_width):
    """Where a tile's quads are, and of the four windows that reach into them gradient and place of the largest."""
    image, top, left = _pixel(pixel, pooled_height, pooled_width)
    more_right, more_below = left + 1 < pooled_width, top + 1 < pooled_height
    there = pixel < rows
    own = _window(grad, more, places, pixel, there, channel, inside, channels)
    right = _window(grad, more, places, pixel + 1, there & more_right, channel, inside, channels)
    lower = pixel + pooled_width
    below = _window(grad, more, places, lower, there & more_below, channel, inside, channels)
    across = _window(grad, more, places, lower + 1, there & more_below & more_right, channel, inside, channels)
    return image, top, left, own, right, below, across


@triton.jit
def _window(grad, more, places, pixel, there, channel, inside, channels):
    """Its gradient, and the number of the pixel that it belongs to; 255 outside."""
    place, mask = _places(pixel, channel, channels), there[:, None] & inside[None, :]
    g = tl.load(grad + place, mask=mask, other=0.0)
    if more is not None:
        g = (g.to(tl.float32) + tl.load(more + place, mask=mask, other=0.0).to(tl.float32)).to(g.dtype)
    return g, tl.load(places + place, mask=mask, other=255)


@triton.jit
def _at_corner(CORNER: tl.constexpr, own, right, below, across):
    """What the windows give a pixel of the quad: 0 top left, 1 to its right, 2 below it, 3 across.

    In its own window the quad's pixels are numbers 4, 5, 7 and 8; in that to the right 3 and 6, one column further to
    the left, are its second column; in that below 1 and 2 its second row; in that across 0 its last pixel.
    """
    if CORNER == 0:
        g = _if_there(own, 4)
    elif CORNER == 1:
        g = _if_there(own, 5) + _if_there(right, 3)
    elif CORNER == 2:
        g = _if_there(own, 7) + _if_there(below, 1)
    else:
        g = _if_there(own, 8) + _if_there(right, 6) + _if_there(below, 2) + _if_there(across, 0)
    return g


@triton.jit
def _if_there(window, NUMBER: tl.constexpr):
    return tl.where(window[1] == NUMBER, window[0].to(tl.float32), 0.0)


@triton.jit
def _corner(x, image, top, left, CORNER: tl.constexpr, there, channel, inside, channels, height, width):
    """Return value, mask and place of a pixel of each quad."""
    down, right = 2 * top + CORNER // 2, 2 * left + CORNER % 2
    place = _places((image * height + down) * width + right, channel, channels)
    taken = (there & (down < height) & (right < width))[:, None] & inside[None, :]
    return tl.load(x + place, mask=taken, other=0.0), taken, place


@triton.jit
def _pixel(pixel, height, width):
    """Return image, row and column of a pixel's number."""
    line = pixel // width
    return line // height, line % height, pixel % width


# What they share


@triton.jit
def _place(channels, CHANNELS: tl.constexpr):
    """This program's first tile, how many further its next one is, its channels, and which of them there are."""
    blocks = (channels + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return program // blocks, tl.num_programs(0) // blocks, channel, channel < channels


@triton.jit
def _tiles(rows, ROWS: tl.constexpr):
    return (rows + ROWS - 1) // ROWS


@triton.jit
def _rows_of(number, ROWS: tl.constexpr):
    """Those of a tile. They stay under 2^31 as long as a batch has fewer than 100,000 images; values do not."""
    return number * ROWS + tl.arange(0, ROWS)


@triton.jit
def _tile(number, rows, channel, inside, channels, ROWS: tl.constexpr):
    """Return places and mask of a tile's values."""
    row = _rows_of(number, ROWS)
    return _places(row, channel, channels), (row < rows)[:, None] & inside[None, :]


@triton.jit
def _places(row, channel, channels):
    """Return the places of values in memory, in 64 bits."""
    return row.to(tl.int64)[:, None] * channels + channel[None, :]


@triton.jit
def _scaling(weight, bias, mean, inverse_std, channel, inside):
    """Return what a channel's values are centered by, multiplied with, and shifted by."""
    scale = tl.load(weight + channel, mask=inside, other=0.0) * tl.load(inverse_std + channel, mask=inside, other=0.0)
    center = tl.load(mean + channel, mask=inside, other=0.0)
    return center, scale, tl.load(bias + channel, mask=inside, other=0.0)


@triton.jit
def _scaled(value, center, scale, shift):
    return (value.to(tl.float32) - center[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def _correction(sums, count, inverse_std, channel, inside, channels):
    """Return what the gradient of a channel loses through its mean, and through each unit of deviation from it."""
    n = tl.load(count)
    level = tl.load(sums + channel, mask=inside, other=0.0) / n
    slope = tl.load(sums + channels + channel, mask=inside, other=0.0) / n
    return level, slope * tl.load(inverse_std + channel, mask=inside, other=0.0)


@triton.jit
def _store_part(parts, NUMBER: tl.constexpr, part, first, stretches, channel, inside, channels):
    tl.store(parts + (NUMBER * stretches + first) * channels + channel, part, mask=inside)


@triton.jit
def _sum_parts(first_parts, second_parts, stretches, channel, inside, channels, CHANNELS: tl.constexpr):
    """Return both sums of each channel over all stretches."""
    STEP: tl.constexpr = 256
    one, two = tl.full((STEP, CHANNELS), 0.0, tl.float32), tl.full((STEP, CHANNELS), 0.0, tl.float32)
    for first in tl.range(0, stretches, STEP, num_stages=STAGES):
        here = first + tl.arange(0, STEP)
        place, mask = here[:, None] * channels + channel[None, :], (here < stretches)[:, None] & inside[None, :]
        one += tl.load(first_parts + place, mask=mask, other=0.0)
        two += tl.load(second_parts + place, mask=mask, other=0.0)
    return _sum(one, 0), _sum(two, 0)


@triton.jit
def _move(running, new, momentum, inside):
    old = tl.load(running, mask=inside, other=0.0)
    tl.store(running, old * (1 - momentum) + new * momentum, mask=inside)


@triton.jit
def _sum(values, axis: tl.constexpr):
    # What tl.sum is; interpreted, tl.sum itself fails where triton was imported (by torchvision, say) to be compiled.
    return tl.reduce(values, axis, tl.standard._sum_combine)
