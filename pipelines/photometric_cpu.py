"""Augment on CPU cores, image by image. Each image gets only the operations that its parameters ask for.

The semantics are those of the reference in `photometric.py`. numba compiles to machine code that runs without the GIL,
so threads scale. Levels are whole numbers in float32 planes: loops over those become vector instructions. The last step
looks up every level in a table of normalized values, so that any float type is rounded exactly.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from pipelines.photometric import (
    BLUR_RADIUS,
    BRIGHTNESS,
    CONTRAST,
    HUE,
    IMAGENET,
    LUMA,
    NONE,
    SATURATION,
    SOLARIZE_THRESHOLD,
    AugmentParameters,
    Normalization,
    active_operations,
    blur_kernels,
    build_normalize_table,
)

Array: TypeAlias = npt.NDArray[Any]
Level: TypeAlias = Any  # one float32; mypy does not accept numpy's own type for it
Scratch: TypeAlias = tuple[Array, Array, Array]

_BITS = {2: torch.int16, 4: torch.int32}  # integer types that carry the bits of a table's floats, by their bytes
_CHUNK = 8  # images of one task
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in LUMA)

_scratch = threading.local()


def augment(
    images: Tensor, parameters: AugmentParameters, out: Tensor, pool: Executor, normalization: Normalization = IMAGENET
) -> None:
    """Augment and normalize all views of one resolution on the CPU, with the threads of `pool`.

    `images` is uint8 [B, V, S, S, 3], `parameters` has arrays [V, B]. The result goes into `out` [V·B, 3, S, S],
    channels-last, of a float type of 2 or 4 bytes: view 0 of all images, then view 1 of all images, and so on.
    """
    batch, views, side = images.shape[:3]
    bits = _BITS[out.element_size()]
    plain = build_normalize_table(out.dtype, normalization)
    solarized = torch.where(torch.arange(256) < SOLARIZE_THRESHOLD, plain, plain.flip(1))
    tables = torch.stack([plain, solarized]).view(bits).numpy()
    levels = images.numpy()
    target = out.permute(0, 2, 3, 1).view(bits).numpy().reshape(views, batch, side, side, 3)
    plan = (
        parameters.flip,
        active_operations(parameters),
        parameters.factor.astype(np.float32),
        (1 - parameters.factor).astype(np.float32),
        parameters.grayscale,
        parameters.blur_sigma > 0,
        blur_kernels(parameters.blur_sigma).astype(np.float32)[..., BLUR_RADIUS:],
        parameters.solarize.astype(np.int64),
    )

    def augment_chunk(first: int) -> None:
        _augment(levels, *plan, tables, target, first, min(first + _CHUNK, batch), _get_scratch(side))

    list(pool.map(augment_chunk, range(0, batch, _CHUNK)))


def _get_scratch(side: int) -> Scratch:
    """Return this thread's working memory, float32.

    It has the planes of an image, a row with room for the blur's edges, and a row of each channel.
    """
    if getattr(_scratch, "side", None) != side:
        _scratch.side = side
        shapes = (3, side, side), (side + 2 * BLUR_RADIUS,), (3, side)
        _scratch.arrays = tuple(np.empty(shape, np.float32) for shape in shapes)
    arrays: Scratch = _scratch.arrays
    return arrays


# "numpy": a division by zero gives inf. An exception instead would rule out vector instructions.
# "contract": a multiplication and an addition become one instruction, which rounds once instead of twice.
_options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def _compile(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called. The result is kept beside this file or in the user's cache."""
    try:
        return njit(cache=True, **_options)(function)
    except RuntimeError:  # neither place is writable, so every process compiles for itself, which takes seconds
        return njit(**_options)(function)


@_compile
def _augment(
    images: Array, flip: Array, operations: Array, factor: Array, rest: Array, grayscale: Array, blur: Array,
    weights: Array, solarize: Array, tables: Array, out: Array, first: int, last: int, scratch: Scratch,
) -> None:  # fmt: skip
    """Augment images first … last − 1 in all their views."""
    planes, row, blurred = scratch
    for place in range(first, last):
        for view in range(len(flip)):
            at = view, place
            table = tables[solarize[at]]
            changed = grayscale[at] or operations[at][0] != NONE
            if not changed and not blur[at]:
                _look_up(images[place, view], flip[at], table, out[at])
                continue
            _load(images[place, view], flip[at], planes)
            for operation in operations[at]:
                if operation != NONE:
                    _jitter(planes, operation, factor[at][operation], rest[at][operation])
            if grayscale[at]:
                _to_grayscale(planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1))
            if blur[at]:
                _blur(planes, weights[at], row, blurred, table, out[at])
            else:
                _store(planes, table, out[at])


@_compile
def _load(image: Array, flip: bool, planes: Array) -> None:
    """Copy an image into planes, flipped if `flip`."""
    side = len(image)
    for y in range(side):
        for x in range(side):
            source = image[y, side - 1 - x if flip else x]
            for channel in range(3):
                planes[channel, y, x] = source[channel]


@_compile
def _look_up(image: Array, flip: bool, table: Array, out: Array) -> None:
    """Write the normalized values of an image that nothing else changes, flipped if `flip`."""
    side = len(image)
    for y in range(side):
        for x in range(side):
            source = image[y, side - 1 - x if flip else x]
            for channel in range(3):
                out[y, x, channel] = table[channel, np.int32(source[channel])]


@_compile
def _store(planes: Array, table: Array, out: Array) -> None:
    """Write the normalized values of all planes."""
    for y in range(len(out)):
        _store_row(planes[0, y], planes[1, y], planes[2, y], table, out[y])


@_compile
def _store_row(red: Array, green: Array, blue: Array, table: Array, out: Array) -> None:
    """Round the levels of a row, and write their normalized values."""
    for x in range(len(out)):
        out[x, 0] = table[0, np.int32(np.rint(red[x]))]
        out[x, 1] = table[1, np.int32(np.rint(green[x]))]
        out[x, 2] = table[2, np.int32(np.rint(blue[x]))]


@_compile
def _jitter(planes: Array, operation: int, factor: Level, rest: Level) -> None:
    """Apply one operation to all planes.

    The planes are passed one by one. The compiler cannot know that rows of one array do not overlap, and would then
    not use vector instructions.
    """
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    if operation == BRIGHTNESS:
        for plane in (red, green, blue):
            _blend(plane, factor, np.float32(0), rest)
    elif operation == CONTRAST:
        mean = np.float32((_sum_luma(red, green, blue) + len(red) // 2) // len(red))  # a whole level
        for plane in (red, green, blue):
            _blend(plane, factor, mean, rest)
    elif operation == SATURATION:
        _adjust_saturation(red, green, blue, factor, rest)
    elif operation == HUE:
        _adjust_hue(red, green, blue, factor)


@njit(nogil=True, error_model="numpy")
def _multiply(one: Level, other: Level) -> Level:
    """Return the product, rounded before anything is added to it, as torch rounds it.

    Where the exact result is a whole number, another rounding gives another level.
    """
    return one * other


@_compile
def _cut(value: Level) -> Level:
    """Clamp a value, and cut it to a whole level."""
    return np.floor(min(max(value, np.float32(0)), np.float32(255)))


@_compile
def _luma(red: Level, green: Level, blue: Level) -> Level:
    """Return the gray level, as `photometric.gray_levels` does."""
    return np.floor(red * _RED + green * _GREEN + blue * _BLUE + np.float32(0.5))


@_compile
def _blend(plane: Array, factor: Level, other: Level, rest: Level) -> None:
    """Make each level factor · level + rest · other, in place. `rest` is 1 − factor."""
    for at in range(len(plane)):
        plane[at] = _cut(_multiply(plane[at], factor) + other * rest)


@_compile
def _sum_luma(red: Array, green: Array, blue: Array) -> int:
    """Return the sum of all gray levels."""
    total = 0  # a sum of whole numbers is exact in any order
    for at in range(len(red)):
        total += np.int32(_luma(red[at], green[at], blue[at]))  # type: ignore[assignment]
    return total


@_compile
def _adjust_saturation(red: Array, green: Array, blue: Array, factor: Level, rest: Level) -> None:
    for at in range(len(red)):
        luma = _luma(red[at], green[at], blue[at])
        red[at] = _cut(_multiply(red[at], factor) + luma * rest)
        green[at] = _cut(_multiply(green[at], factor) + luma * rest)
        blue[at] = _cut(_multiply(blue[at], factor) + luma * rest)


@_compile
def _to_grayscale(red: Array, green: Array, blue: Array) -> None:
    for at in range(len(red)):
        luma = _luma(red[at], green[at], blue[at])
        red[at], green[at], blue[at] = luma, luma, luma


@_compile
def _adjust_hue(reds: Array, greens: Array, blues: Array, shift: Level) -> None:
    """Turn the hue in HSV, as `photometric.adjust_hue` does.

    Every choice here is one between two values that have been computed already. Otherwise the compiler would not use
    vector instructions, and the loop would take fifteen times as long.
    """
    one, six = np.float32(1), np.float32(6)
    for at in range(len(reds)):
        red, green, blue = reds[at] / np.float32(255), greens[at] / np.float32(255), blues[at] / np.float32(255)
        value, least = max(max(red, green), blue), min(min(red, green), blue)
        fall = value - least
        divisor = fall + (one if fall == np.float32(0) else np.float32(0))
        from_red = (green - blue) / divisor
        from_green = np.float32(2) + (blue - red) / divisor
        from_blue = np.float32(4) + (red - green) / divisor
        sector = from_red if value == red else (from_green if value == green else from_blue)
        turned = sector / six + shift
        turned = _multiply(turned - np.floor(turned), six)
        reds[at] = _channel(value, fall, turned, np.float32(5))
        greens[at] = _channel(value, fall, turned, np.float32(3))
        blues[at] = _channel(value, fall, turned, one)


@_compile
def _channel(value: Level, fall: Level, turned: Level, offset: Level) -> Level:
    """Return the level of a channel whose hue lies `offset` sixths of a circle from the color's (Smith's hexcone)."""
    distance = turned + offset
    distance = distance - (np.float32(6) if distance >= np.float32(6) else np.float32(0))
    share = min(max(min(distance, np.float32(4) - distance), np.float32(0)), np.float32(1))
    return np.floor(min(max(value - _multiply(fall, share), np.float32(0)), np.float32(1)) * np.float32(255.999))


@_compile
def _blur(planes: Array, weights: Array, row: Array, blurred: Array, table: Array, out: Array) -> None:
    """Blur row by row: first along the columns, then along the resulting row. Write the normalized values.

    `weights` are the center's weight and those of one side.
    """
    side = planes.shape[1]
    middle = row[BLUR_RADIUS : BLUR_RADIUS + side]
    for y in range(side):
        for channel in range(3):
            _blur_columns(planes[channel], y, weights, middle)
            for tap in range(1, BLUR_RADIUS + 1):
                row[BLUR_RADIUS - tap] = middle[0]
                row[BLUR_RADIUS + side - 1 + tap] = middle[side - 1]
            _blur_row(row, weights, blurred[channel])
        _store_row(blurred[0], blurred[1], blurred[2], table, out[y])


# Many taps are in one expression: to add each to a sum in memory would take three times as long. It takes eight rows at
# a time: with more, the compiler stops proving that none of them overlaps the sum.


@_compile
def _blur_columns(plane: Array, y: int, w: Array, out: Array) -> None:
    """Write row `y` of a plane, blurred along the columns."""
    side = len(plane)
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    a1, a2, a3 = plane[_clamp(y - 1, side)], plane[_clamp(y - 2, side)], plane[_clamp(y - 3, side)]
    b1, b2, b3 = plane[_clamp(y + 1, side)], plane[_clamp(y + 2, side)], plane[_clamp(y + 3, side)]
    center = plane[y]
    for x in range(side):
        out[x] = w0 * center[x] + w1 * (a1[x] + b1[x]) + w2 * (a2[x] + b2[x]) + w3 * (a3[x] + b3[x])
    a4, a5 = plane[_clamp(y - 4, side)], plane[_clamp(y - 5, side)]
    b4, b5 = plane[_clamp(y + 4, side)], plane[_clamp(y + 5, side)]
    a6, a7 = plane[_clamp(y - 6, side)], plane[_clamp(y - 7, side)]
    b6, b7 = plane[_clamp(y + 6, side)], plane[_clamp(y + 7, side)]
    for x in range(side):
        out[x] += w4 * (a4[x] + b4[x]) + w5 * (a5[x] + b5[x]) + w6 * (a6[x] + b6[x]) + w7 * (a7[x] + b7[x])


@_compile
def _blur_row(row: Array, w: Array, out: Array) -> None:
    """Blur along a row that reaches BLUR_RADIUS beyond `out` on either side."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for x in range(len(out)):
        out[x] = (
            w0 * row[x + 7] + w1 * (row[x + 6] + row[x + 8]) + w2 * (row[x + 5] + row[x + 9])
            + w3 * (row[x + 4] + row[x + 10]) + w4 * (row[x + 3] + row[x + 11]) + w5 * (row[x + 2] + row[x + 12])
            + w6 * (row[x + 1] + row[x + 13]) + w7 * (row[x] + row[x + 14])
        )  # fmt: skip


@_compile
def _clamp(place: int, side: int) -> int:
    """Return the place of the nearest pixel inside."""
    return min(max(place, 0), side - 1)
