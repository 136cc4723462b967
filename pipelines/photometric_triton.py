"""The photometric stage on a GPU: at most three launches for all views of one resolution.

First the grey sums of the pictures whose contrast changes, then everything but blur, then blur for those that want it.
A launch looks up in a table what each picture needs; what has nothing to do returns at once. Nothing waits for the GPU,
sums have a fixed order, and no picture's result depends on another's. The operations, their order and their rounding
are those of `photometric.apply_colours`. On an H200 it takes 6.5 µs an image of 2×224 + 6×96 pixels.
"""
# In kernels Triton evaluates annotations, and takes constexpr alone:
# mypy: allow-incomplete-defs

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines import photometric as ph

BLOCK = tl.constexpr(1024)  # pixels a program of the kernels without a neighbourhood
TILE = tl.constexpr(64)  # the side of what a program of the blur reads, in pixels
RADIUS = tl.constexpr(ph.BLUR_RADIUS)
STEP = tl.constexpr(TILE.value - 2 * ph.BLUR_RADIUS)  # the side of what it writes

CONTRAST, SATURATION, HUE, NONE = (tl.constexpr(number) for number in (ph.CONTRAST, ph.SATURATION, ph.HUE, ph.NONE))
# The table's columns. The first three are one number a turn, SCALE and SHIFT one a channel.
OPERATION, FACTOR, REST, TURNS, FLIP, GREY, BLUR, SOLARIZE, SCALE, SHIFT, WEIGHT = (
    tl.constexpr(column) for column in (0, 4, 8, 12, 13, 14, 15, 16, 17, 20, 23)
)
COLUMNS = tl.constexpr(23 + ph.BLUR_RADIUS + 1)

AS_WRITTEN = {"enable_fp_fusion": False}  # multiplications and additions are fused where the code says so, only


def augment(pictures: Tensor, colours: ph.Colours, out: Tensor) -> None:
    """All views of one resolution: uint8 [B, V, S, S, 3] with `colours` [V, B] into `out` [V·B, 3, S, S].

    View v of picture b goes to row v·B + b. `pictures` are contiguous and left as they are; `out` is channels-last, of
    any floating type, on the same device. Raises ValueError for another layout.
    """
    batch, views, side = pictures.shape[:3]
    if not pictures.is_contiguous() or not out.permute(0, 2, 3, 1).is_contiguous():
        raise ValueError("pictures must be contiguous [B, V, S, S, 3], and out channels-last [V·B, 3, S, S]")
    host = table(colours)
    packed = torch.from_numpy(host)
    if out.is_cuda:
        # A fresh buffer of torch's caching allocator, which is not given out again before the copy is done.
        packed = packed.pin_memory()
    packed = packed.to(out.device, non_blocking=True)
    blocks, tiles = triton.cdiv(side**2, BLOCK.value), triton.cdiv(side, STEP.value)
    sums = torch.empty(len(host), blocks, dtype=torch.int32, device=out.device)
    sharp = torch.empty(len(host), side, side, dtype=torch.int32, device=out.device)
    with torch.cuda.device_of(out):
        if (host[:, TURNS.value] >= 0).any():
            _grey_sums[(len(host), blocks)](pictures, packed, sums, batch, views, side, **AS_WRITTEN)
        slots = 1 << (blocks - 1).bit_length()  # blocks, as a power of two
        _pointwise[(len(host), blocks)](pictures, packed, sums, sharp, out, batch, views, side, slots, **AS_WRITTEN)
        if host[:, BLUR.value].any():
            _blur[(len(host), tiles**2)](packed, sharp, out, side, **AS_WRITTEN)


def table(colours: ph.Colours) -> npt.NDArray[np.float32]:
    """What the kernels need to know of each picture and view, [V·B, COLUMNS], view-major.

    TURNS is the number of turns before contrast's, or -1 without it. SOLARIZE is the level from which on levels turn,
    256 for none.
    """
    rows = np.empty((*colours.flip.shape, COLUMNS.value), np.float32)
    operations = ph.active_operations(colours)
    factor = np.take_along_axis(colours.factor, operations, -1)  # of NONE, whichever
    contrast = operations == ph.CONTRAST
    rows[..., OPERATION.value : FACTOR.value] = operations
    rows[..., FACTOR.value : REST.value] = factor
    rows[..., REST.value : TURNS.value] = 1 - factor
    rows[..., TURNS.value] = np.where(contrast.any(-1), contrast.argmax(-1), -1)
    rows[..., FLIP.value] = colours.flip
    rows[..., GREY.value] = colours.grey
    rows[..., BLUR.value] = colours.sigma > 0
    rows[..., SOLARIZE.value] = np.where(colours.solarize, ph.SOLARIZE_THRESHOLD, 256)
    rows[..., SCALE.value : SHIFT.value] = [1 / (255 * std) for std in ph.STD]
    rows[..., SHIFT.value : WEIGHT.value] = [-mean / std for mean, std in zip(ph.MEAN, ph.STD, strict=True)]
    rows[..., WEIGHT.value :] = ph.blur_weights(colours.sigma)[..., ph.BLUR_RADIUS :]  # they are symmetric
    return rows.reshape(-1, COLUMNS.value)


@triton.jit(do_not_specialize=["batch", "views"])  # or a last, smaller batch would wait for a compiler
def _grey_sums(pictures, packed, sums, batch, views, SIDE: tl.constexpr):
    """Into `sums` [V·B, blocks]: each block's sum of grey levels when contrast's turn comes. Integers, thus exact."""
    row, block = tl.program_id(0), tl.program_id(1)
    mine = packed + row * COLUMNS
    turns = tl.load(mine + TURNS)
    if turns >= 0:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        red, green, blue = _pixels(pictures, mine, row, pixel, batch, views, SIDE)
        for turn in range(3):
            if turn < turns:
                red, green, blue = _jitter(mine, turn, 0.0, red, green, blue)
        levels = tl.where(pixel < SIDE * SIDE, _grey_level(red, green, blue), 0.0).to(tl.int32)
        tl.store(sums + row * tl.num_programs(1) + block, _total(levels))


@triton.jit(do_not_specialize=["batch", "views"])
def _pointwise(pictures, packed, sums, sharp, out, batch, views, SIDE: tl.constexpr, SLOTS: tl.constexpr):
    """All but blur: finished pictures into `out`, those to be blurred as 0x00BBGGRR into `sharp` [V·B, S, S]."""
    row, block = tl.program_id(0), tl.program_id(1)
    mine = packed + row * COLUMNS
    mean = 0.0
    if tl.load(mine + TURNS) >= 0:
        blocks, place = tl.num_programs(1), tl.arange(0, SLOTS)
        parts = tl.load(sums + row * blocks + place, mask=place < blocks, other=0)
        mean = tl.div_rn(_total(parts).to(tl.float32), SIDE * SIDE * 1.0)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIDE * SIDE
    red, green, blue = _pixels(pictures, mine, row, pixel, batch, views, SIDE)
    for turn in range(4):
        red, green, blue = _jitter(mine, turn, mean, red, green, blue)
    if tl.load(mine + GREY) > 0:
        red = _grey_level(red, green, blue)
        green, blue = red, red
    if tl.load(mine + BLUR) > 0:
        levels = red.to(tl.int32) | green.to(tl.int32) << 8 | blue.to(tl.int32) << 16
        tl.store(sharp + row.to(tl.int64) * (SIDE * SIDE) + pixel, levels, mask=inside)
    else:
        target = out + row.to(tl.int64) * (SIDE * SIDE * 3) + pixel * 3
        tl.store(target, _finished(mine, red, 0).to(out.dtype.element_ty), mask=inside)
        tl.store(target + 1, _finished(mine, green, 1).to(out.dtype.element_ty), mask=inside)
        tl.store(target + 2, _finished(mine, blue, 2).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _blur(packed, sharp, out, SIDE: tl.constexpr):
    """Blur `sharp` into `out`, a tile a program: the tile between two band matrices that hold the kernel."""
    row, tile = tl.program_id(0), tl.program_id(1)
    mine = packed + row * COLUMNS
    if tl.load(mine + BLUR) > 0:
        across: tl.constexpr = (SIDE + STEP - 1) // STEP
        place = tl.arange(0, TILE)
        y, x = tile // across * STEP + place, tile % across * STEP + place
        source = _reflected(y - RADIUS, SIDE)[:, None] * SIDE + _reflected(x - RADIUS, SIDE)[None, :]
        levels = tl.load(sharp + row.to(tl.int64) * (SIDE * SIDE) + source)
        apart = tl.abs(place[None, :] - place[:, None] - RADIUS)
        high, low = _halves(tl.load(mine + WEIGHT + apart, mask=apart <= RADIUS, other=0.0))  # [written, read]
        inside = (place < STEP) & (y < SIDE)
        inside = inside[:, None] & ((place < STEP) & (x < SIDE))[None, :]
        target = out + row.to(tl.int64) * (SIDE * SIDE * 3) + (y[:, None] * SIDE + x[None, :]) * 3
        for channel in range(3):
            plane = (levels >> (8 * channel) & 255).to(tl.float16)
            more, less = _halves(tl.dot(high, plane) + tl.dot(low, plane) / 2048)
            rest = tl.dot(more, tl.trans(low)) + tl.dot(less, tl.trans(high))
            plane = tl.dot(more, tl.trans(high)) + rest / 2048
            plane = (plane + 12582912.0) - 12582912.0  # 1.5 · 2^23 leaves no fraction: the nearest, ties to even
            tl.store(target + channel, _finished(mine, plane, channel).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(values):
    """Two float16 for a float32: the sum of the first and 1/2048 of the second has 22 of its 24 bits."""
    high = values.to(tl.float16)
    return high, ((values - high.to(tl.float32)) * 2048).to(tl.float16)


@triton.jit
def _pixels(pictures, mine, row, pixel, batch, views, SIDE: tl.constexpr):
    """Red, green and blue of a view's pixels, by their numbers in the flipped picture: whole float32 levels."""
    flipped = tl.load(mine + FLIP) > 0
    source = tl.where(flipped, pixel + SIDE - 1 - 2 * (pixel % SIDE), pixel)
    view = (row % batch * views + row // batch).to(tl.int64)
    first = pictures + view * (SIDE * SIDE * 3) + source * 3
    inside = pixel < SIDE * SIDE
    red = tl.load(first, mask=inside, other=0).to(tl.float32)
    green = tl.load(first + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(first + 2, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _jitter(mine, turn, mean, red, green, blue):
    """The operation whose turn it is; `mean` is the picture's mean grey level, for contrast."""
    operation = tl.load(mine + OPERATION + turn)
    factor, rest = tl.load(mine + FACTOR + turn), tl.load(mine + REST + turn)
    if operation == HUE:
        red, green, blue = _turned(factor, red, green, blue)
    elif operation != NONE:
        other = tl.where(operation == SATURATION, _grey_level(red, green, blue), 0.0)
        other = tl.where(operation == CONTRAST, mean, other)  # brightness blends with black
        red = _blend(red, other, factor, rest)
        green = _blend(green, other, factor, rest)
        blue = _blend(blue, other, factor, rest)
    return red, green, blue


@triton.jit
def _grey_level(red, green, blue):
    """Luma by ITU-R BT.601, rounded down."""
    return tl.floor(tl.fma(blue, 0.114, tl.fma(green, 0.587, red * 0.2989)))


@triton.jit
def _blend(level, other, factor, rest):
    """Fused as torch does it: where the exact result is a whole number, another rounding is another level."""
    return tl.floor(tl.minimum(tl.maximum(tl.fma(other, rest, level * factor), 0.0), 255.0))


@triton.jit
def _turned(shift, red, green, blue):
    """Hue by Smith's hexcone, as `photometric.hue`, but on levels instead of shares of 255."""
    value = tl.maximum(tl.maximum(red, green), blue)
    span = value - tl.minimum(tl.minimum(red, green), blue)
    first, second = value == red, value == green
    rise = tl.where(first, green - blue, tl.where(second, blue - red, red - green))
    sector = tl.where(first, 0.0, tl.where(second, 2.0, 4.0)) + rise / tl.where(span == 0, 1.0, span)
    share = sector / 6 + shift
    hue = (share - tl.floor(share)) * 6
    return _fallen(hue + 5, value, span), _fallen(hue + 3, value, span), _fallen(hue + 1, value, span)


@triton.jit
def _fallen(distance, value, span):
    distance = tl.where(distance >= 6, distance - 6, distance)
    fall = tl.minimum(tl.maximum(tl.minimum(distance, 4 - distance), 0.0), 1.0)
    return tl.floor(tl.fma(-span, fall, value) * (255.999 / 255))


@triton.jit
def _finished(mine, level, channel):
    """Solarised if the picture is, and normalised."""
    level = tl.where(level >= tl.load(mine + SOLARIZE), 255 - level, level)
    return tl.fma(level, tl.load(mine + SCALE + channel), tl.load(mine + SHIFT + channel))


@triton.jit
def _reflected(place, SIDE: tl.constexpr):
    """Reflected at the edges. Farther than RADIUS outside, where no result depends on it, just somewhere inside."""
    return tl.maximum(SIDE - 1 - tl.abs(SIDE - 1 - tl.abs(place)), 0)


@triton.jit
def _total(values):
    # What tl.sum is; interpreted, tl.sum itself fails where triton was imported (by torchvision, say) to be compiled.
    return tl.reduce(values, 0, tl.standard._sum_combine)
