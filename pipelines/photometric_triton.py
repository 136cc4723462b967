"""Augment on a GPU, with at most three kernel launches for all views of one resolution.

The first kernel sums the gray levels of the images whose contrast changes. The second does everything but blur. The
third blurs. A table tells each program what its image needs, and a program without work returns at once. Nothing waits
for the GPU, sums have a fixed order, and no image's result depends on another image. The operations, their order and
their rounding are those of `photometric.augment_levels`. An H200 takes 6.5 µs for an image of 2×224 + 6×96 pixels.
"""
# Triton evaluates the annotations of kernels, and accepts only constexpr there:
# mypy: allow-incomplete-defs

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines import photometric as ph

BLOCK = tl.constexpr(1024)  # pixels of a program, in the kernels that look at each pixel alone
TILE = tl.constexpr(64)  # side of the square that a program of the blur reads, in pixels
RADIUS = tl.constexpr(ph.BLUR_RADIUS)
STEP = tl.constexpr(TILE.value - 2 * ph.BLUR_RADIUS)  # side of the square that it writes

RED, GREEN, BLUE = (tl.constexpr(weight) for weight in ph.LUMA)
CONTRAST, SATURATION, HUE, NONE = (tl.constexpr(number) for number in (ph.CONTRAST, ph.SATURATION, ph.HUE, ph.NONE))
# The table's columns. The first three have one number for each jitter operation, SCALE and SHIFT one for each channel.
OPERATION, FACTOR, REST, TURNS, FLIP, GRAYSCALE, BLUR, SOLARIZE, SCALE, SHIFT, WEIGHT = (
    tl.constexpr(column) for column in (0, 4, 8, 12, 13, 14, 15, 16, 17, 20, 23)
)
COLUMNS = tl.constexpr(23 + ph.BLUR_RADIUS + 1)

AS_WRITTEN = {"enable_fp_fusion": False}  # fuse a multiplication and an addition only where the code says so


def augment(
    images: Tensor, parameters: ph.AugmentParameters, out: Tensor, normalization: ph.Normalization = ph.IMAGENET
) -> None:
    """Augment and normalize all views of one resolution.

    `images` is uint8 [B, V, S, S, 3], contiguous, and stays as it is. `parameters` has arrays [V, B]. View v of image b
    goes into row v·B + b of `out` [V·B, 3, S, S], which is channels-last, of any float type, on the same device. Raises
    ValueError for another layout.
    """
    batch, views, side = images.shape[:3]
    if not images.is_contiguous() or not out.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError("images must be contiguous [B, V, S, S, 3], and out channels-last [V·B, 3, S, S]")
    host = build_table(parameters, normalization)
    table = torch.from_numpy(host)
    if out.is_cuda:
        # This takes a fresh buffer from torch's caching allocator, which keeps it until the copy is done.
        table = table.pin_memory()
    table = table.to(out.device, non_blocking=True)
    blocks, tiles = triton.cdiv(side**2, BLOCK.value), triton.cdiv(side, STEP.value)
    sums = torch.empty(len(host), blocks, dtype=torch.int32, device=out.device)
    sharp = torch.empty(len(host), side, side, dtype=torch.int32, device=out.device)
    with torch.cuda.device_of(out):
        if (host[:, TURNS.value] >= 0).any():
            _sum_gray_levels[(len(host), blocks)](images, table, sums, batch, views, side, **AS_WRITTEN)
        slots = 1 << (blocks - 1).bit_length()  # the number of blocks, rounded up to a power of two
        _augment_pixels[(len(host), blocks)](images, table, sums, sharp, out, batch, views, side, slots, **AS_WRITTEN)
        if host[:, BLUR.value].any():
            _blur[(len(host), tiles**2)](table, sharp, out, side, **AS_WRITTEN)


def build_table(
    parameters: ph.AugmentParameters, normalization: ph.Normalization = ph.IMAGENET
) -> npt.NDArray[np.float32]:
    """Return what the kernels must know of each view and image, [V·B, COLUMNS]: view 0 of all images, then view 1.

    TURNS is the number of operations before contrast, or -1 without contrast. Levels from SOLARIZE on are inverted;
    it is 256 where none are.
    """
    rows = np.empty((*parameters.flip.shape, COLUMNS.value), np.float32)
    operations = ph.active_operations(parameters)
    factor = np.take_along_axis(parameters.factor, operations, -1)  # where the operation is NONE, any factor
    contrast = operations == ph.CONTRAST
    rows[..., OPERATION.value : FACTOR.value] = operations
    rows[..., FACTOR.value : REST.value] = factor
    rows[..., REST.value : TURNS.value] = 1 - factor
    rows[..., TURNS.value] = np.where(contrast.any(-1), contrast.argmax(-1), -1)
    rows[..., FLIP.value] = parameters.flip
    rows[..., GRAYSCALE.value] = parameters.grayscale
    rows[..., BLUR.value] = parameters.blur_sigma > 0
    rows[..., SOLARIZE.value] = np.where(parameters.solarize, ph.SOLARIZE_THRESHOLD, 256)
    rows[..., SCALE.value : SHIFT.value], rows[..., SHIFT.value : WEIGHT.value] = ph.find_scale_and_shift(normalization)
    kernels = ph.blur_kernels(parameters.blur_sigma)
    rows[..., WEIGHT.value :] = kernels[..., ph.BLUR_RADIUS :]  # they are symmetric, so one side is enough
    return rows.reshape(-1, COLUMNS.value)


@triton.jit(do_not_specialize=["batch", "views"])  # otherwise a smaller last batch would be compiled for
def _sum_gray_levels(images, table, sums, batch, views, SIDE: tl.constexpr):
    """Write each block's sum of gray levels before contrast into `sums` [V·B, blocks]. Integers make it exact."""
    row, block = tl.program_id(0), tl.program_id(1)
    mine = table + row * COLUMNS
    turns = tl.load(mine + TURNS)
    if turns >= 0:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        red, green, blue = _load_pixels(images, mine, row, pixel, batch, views, SIDE)
        for turn in range(3):
            if turn < turns:
                red, green, blue = _jitter(mine, turn, 0.0, red, green, blue)
        levels = tl.where(pixel < SIDE * SIDE, _gray_level(red, green, blue), 0.0).to(tl.int32)
        tl.store(sums + row * tl.num_programs(1) + block, _sum(levels))


@triton.jit(do_not_specialize=["batch", "views"])
def _augment_pixels(images, table, sums, sharp, out, batch, views, SIDE: tl.constexpr, SLOTS: tl.constexpr):
    """Do everything but blur. Images to be blurred go as 0x00BBGGRR into `sharp` [V·B, S, S], all others into `out`."""
    row, block = tl.program_id(0), tl.program_id(1)
    mine = table + row * COLUMNS
    mean = 0.0
    if tl.load(mine + TURNS) >= 0:
        blocks, place = tl.num_programs(1), tl.arange(0, SLOTS)
        parts = tl.load(sums + row * blocks + place, mask=place < blocks, other=0)
        mean = ((_sum(parts) + SIDE * SIDE // 2) // (SIDE * SIDE)).to(tl.float32)  # a whole level
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIDE * SIDE
    red, green, blue = _load_pixels(images, mine, row, pixel, batch, views, SIDE)
    for turn in range(4):
        red, green, blue = _jitter(mine, turn, mean, red, green, blue)
    if tl.load(mine + GRAYSCALE) > 0:
        red = _gray_level(red, green, blue)
        green, blue = red, red
    if tl.load(mine + BLUR) > 0:
        levels = red.to(tl.int32) | green.to(tl.int32) << 8 | blue.to(tl.int32) << 16
        tl.store(sharp + row.to(tl.int64) * (SIDE * SIDE) + pixel, levels, mask=inside)
    else:
        target = out + row.to(tl.int64) * (SIDE * SIDE * 3) + pixel * 3
        tl.store(target, _normalize(mine, red, 0).to(out.dtype.element_ty), mask=inside)
        tl.store(target + 1, _normalize(mine, green, 1).to(out.dtype.element_ty), mask=inside)
        tl.store(target + 2, _normalize(mine, blue, 2).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _blur(table, sharp, out, SIDE: tl.constexpr):
    """Blur `sharp` into `out`, one tile in each program.

    The tile is multiplied from both sides by band matrices that hold the blur's kernel.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    mine = table + row * COLUMNS
    if tl.load(mine + BLUR) > 0:
        across: tl.constexpr = (SIDE + STEP - 1) // STEP
        place = tl.arange(0, TILE)
        y, x = tile // across * STEP + place, tile % across * STEP + place
        source = _clamp(y - RADIUS, SIDE)[:, None] * SIDE + _clamp(x - RADIUS, SIDE)[None, :]
        levels = tl.load(sharp + row.to(tl.int64) * (SIDE * SIDE) + source)
        apart = tl.abs(place[None, :] - place[:, None] - RADIUS)
        high, low = _split(tl.load(mine + WEIGHT + apart, mask=apart <= RADIUS, other=0.0))  # [written, read]
        inside = (place < STEP) & (y < SIDE)
        inside = inside[:, None] & ((place < STEP) & (x < SIDE))[None, :]
        target = out + row.to(tl.int64) * (SIDE * SIDE * 3) + (y[:, None] * SIDE + x[None, :]) * 3
        for channel in range(3):
            plane = (levels >> (8 * channel) & 255).to(tl.float16)
            more, less = _split(tl.dot(high, plane) + tl.dot(low, plane) / 2048)
            rest = tl.dot(more, tl.trans(low)) + tl.dot(less, tl.trans(high))
            plane = tl.dot(more, tl.trans(high)) + rest / 2048
            plane = (plane + 12582912.0) - 12582912.0  # 1.5 · 2^23: rounds to the nearest, ties to even
            tl.store(target + channel, _normalize(mine, plane, channel).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _split(values):
    """Split a float32 into two float16. The first plus 1/2048 of the second has 22 of its 24 bits."""
    high = values.to(tl.float16)
    return high, ((values - high.to(tl.float32)) * 2048).to(tl.float16)


@triton.jit
def _load_pixels(images, mine, row, pixel, batch, views, SIDE: tl.constexpr):
    """Return red, green and blue of a view's pixels as whole float32 levels. `pixel` numbers them after the flip."""
    flipped = tl.load(mine + FLIP) > 0
    source = tl.where(flipped, pixel + SIDE - 1 - 2 * (pixel % SIDE), pixel)
    view = (row % batch * views + row // batch).to(tl.int64)
    first = images + view * (SIDE * SIDE * 3) + source * 3
    inside = pixel < SIDE * SIDE
    red = tl.load(first, mask=inside, other=0).to(tl.float32)
    green = tl.load(first + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(first + 2, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _jitter(mine, turn, mean, red, green, blue):
    """Apply jitter operation number `turn`. `mean` is the image's mean gray level, for contrast."""
    operation = tl.load(mine + OPERATION + turn)
    factor, rest = tl.load(mine + FACTOR + turn), tl.load(mine + REST + turn)
    if operation == HUE:
        red, green, blue = _adjust_hue(factor, red, green, blue)
    elif operation != NONE:
        other = tl.where(operation == SATURATION, _gray_level(red, green, blue), 0.0)
        other = tl.where(operation == CONTRAST, mean, other)  # brightness blends with black
        red = _blend(red, other, factor, rest)
        green = _blend(green, other, factor, rest)
        blue = _blend(blue, other, factor, rest)
    return red, green, blue


@triton.jit
def _gray_level(red, green, blue):
    """Return the luma by ITU-R BT.601, rounded. Products and sums are exact."""
    return tl.floor(red * RED + green * GREEN + blue * BLUE + 0.5)


@triton.jit
def _blend(level, other, factor, rest):
    """Return level · factor + other · rest, clamped and cut to a whole level.

    It is fused as torch does it: where the exact result is a whole number, another rounding gives another level.
    """
    return tl.floor(tl.minimum(tl.maximum(tl.fma(other, rest, level * factor), 0.0), 255.0))


@triton.jit
def _adjust_hue(shift, red, green, blue):
    """Turn the hue by Smith's hexcone, as `photometric.adjust_hue` does, but on levels instead of shares of 255."""
    value = tl.maximum(tl.maximum(red, green), blue)
    span = value - tl.minimum(tl.minimum(red, green), blue)
    first, second = value == red, value == green
    rise = tl.where(first, green - blue, tl.where(second, blue - red, red - green))
    sector = tl.where(first, 0.0, tl.where(second, 2.0, 4.0)) + rise / tl.where(span == 0, 1.0, span)
    share = sector / 6 + shift
    hue = (share - tl.floor(share)) * 6
    return _channel(hue + 5, value, span), _channel(hue + 3, value, span), _channel(hue + 1, value, span)


@triton.jit
def _channel(distance, value, span):
    """Return the level of a channel that lies `distance` sixths of a circle from the hue."""
    distance = tl.where(distance >= 6, distance - 6, distance)
    fall = tl.minimum(tl.maximum(tl.minimum(distance, 4 - distance), 0.0), 1.0)
    return tl.floor(tl.fma(-span, fall, value) * (255.999 / 255))


@triton.jit
def _normalize(mine, level, channel):
    """Solarize the level where the table says so, and normalize it."""
    level = tl.where(level >= tl.load(mine + SOLARIZE), 255 - level, level)
    return tl.fma(level, tl.load(mine + SCALE + channel), tl.load(mine + SHIFT + channel))


@triton.jit
def _clamp(place, SIDE: tl.constexpr):
    """Return the place of the nearest pixel inside."""
    return tl.minimum(tl.maximum(place, 0), SIDE - 1)


@triton.jit
def _sum(values):
    # The same as tl.sum. In the interpreter tl.sum fails if triton was imported before, by torchvision for instance, to
    # compile kernels.
    return tl.reduce(values, 0, tl.standard._sum_combine)
