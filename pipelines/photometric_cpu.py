"""The photometric stage on CPU cores: picture by picture, only the operations that a picture's parameters ask for.

The semantics are those of the reference in `photometric.py`. Machine code by numba, which works without the GIL, so
that threads scale. Levels are kept as whole numbers in float32 planes, on which loops become vector instructions; the
last step looks every level up in a table of normalised values, so that any float type comes out exactly rounded.
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
    NONE,
    SATURATION,
    SOLARIZE_THRESHOLD,
    Colours,
    active_operations,
    blur_weights,
    normalised_levels,
)

Array: TypeAlias = npt.NDArray[Any]
Level: TypeAlias = Any  # float32: numpy's own type for one is no good to mypy
Scratch: TypeAlias = tuple[Array, Array, Array]

_BITS = {2: torch.int16, 4: torch.int32}  # integers that stand for the floats of a table
_CHUNK = 8  # pictures of one task

_scratch = threading.local()


def augment(pictures: Tensor, colours: Colours, out: Tensor, pool: Executor) -> None:
    """All views of one resolution: `pictures` uint8 [B, V, S, S, 3] and their `colours` [V, B], normalised into `out`
    [V·B, 3, S, S], channels-last, a float type of 2 or 4 bytes; view-major. On the CPU, over the threads of `pool`."""
    batch, views, side = pictures.shape[:3]
    bits = _BITS[out.element_size()]
    plain = normalised_levels(out.dtype)
    solarized = torch.where(torch.arange(256) < SOLARIZE_THRESHOLD, plain, plain.flip(1))
    tables = torch.stack([plain, solarized]).view(bits).numpy()
    levels = pictures.numpy()
    target = out.permute(0, 2, 3, 1).view(bits).numpy().reshape(views, batch, side, side, 3)
    plan = (
        colours.flip,
        active_operations(colours),
        colours.factor.astype(np.float32),
        (1 - colours.factor).astype(np.float32),
        colours.grey,
        colours.sigma > 0,
        blur_weights(colours.sigma).astype(np.float32)[..., BLUR_RADIUS:],
        colours.solarize.astype(np.int64),
    )

    def work(first: int) -> None:
        _augment(levels, *plan, tables, target, first, min(first + _CHUNK, batch), _working_memory(side))

    list(pool.map(work, range(0, batch, _CHUNK)))


def _working_memory(side: int) -> Scratch:
    """This thread's, float32: the planes of a picture, a row with room for the blur's edges, a row of each channel."""
    if getattr(_scratch, "side", None) != side:
        _scratch.side = side
        shapes = (3, side, side), (side + 2 * BLUR_RADIUS,), (3, side)
        _scratch.arrays = tuple(np.empty(shape, np.float32) for shape in shapes)
    arrays: Scratch = _scratch.arrays
    return arrays


# "numpy": a division by zero gives inf and no exception, for which no vector instruction could be used. "contract":
# multiply-add in one instruction, which rounds once where two round twice.
_options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiled when it is first called, and kept beside this file or in the user's cache."""
    try:
        return njit(cache=True, **_options)(function)
    except RuntimeError:  # neither can be written: then every process compiles for itself, some seconds
        return njit(**_options)(function)


@_compiled
def _augment(
    pictures: Array, flip: Array, operations: Array, factor: Array, rest: Array, grey: Array, blur: Array,
    weights: Array, solarize: Array, tables: Array, out: Array, first: int, last: int, scratch: Scratch,
) -> None:  # fmt: skip
    """Pictures first … last − 1 in all their views."""
    planes, row, blurred = scratch
    for place in range(first, last):
        for view in range(len(flip)):
            at = view, place
            table = tables[solarize[at]]
            coloured = grey[at] or operations[at][0] != NONE
            if not coloured and not blur[at]:
                _look_up(pictures[place, view], flip[at], table, out[at])
                continue
            _load(pictures[place, view], flip[at], planes)
            for operation in operations[at]:
                if operation != NONE:
                    _jitter(planes, operation, factor[at][operation], rest[at][operation])
            if grey[at]:
                _grey(planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1))
            if blur[at]:
                _blur(planes, weights[at], row, blurred, table, out[at])
            else:
                _store(planes, table, out[at])


@_compiled
def _load(picture: Array, flip: bool, planes: Array) -> None:
    side = len(picture)
    for y in range(side):
        for x in range(side):
            source = picture[y, side - 1 - x if flip else x]
            for channel in range(3):
                planes[channel, y, x] = source[channel]


@_compiled
def _look_up(picture: Array, flip: bool, table: Array, out: Array) -> None:
    side = len(picture)
    for y in range(side):
        for x in range(side):
            source = picture[y, side - 1 - x if flip else x]
            for channel in range(3):
                out[y, x, channel] = table[channel, np.int32(source[channel])]


@_compiled
def _store(planes: Array, table: Array, out: Array) -> None:
    for y in range(len(out)):
        _store_row(planes[0, y], planes[1, y], planes[2, y], table, out[y])


@_compiled
def _store_row(red: Array, green: Array, blue: Array, table: Array, out: Array) -> None:
    """Levels of a row, rounded, to their normalised values."""
    for x in range(len(out)):
        out[x, 0] = table[0, np.int32(np.rint(red[x]))]
        out[x, 1] = table[1, np.int32(np.rint(green[x]))]
        out[x, 2] = table[2, np.int32(np.rint(blue[x]))]


@_compiled
def _jitter(planes: Array, operation: int, factor: Level, rest: Level) -> None:
    """One operation on all planes. They are handed on one by one: rows of one array could overlap, for all the compiler
    knows, and it would not vectorise."""
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    if operation == BRIGHTNESS:
        for plane in (red, green, blue):
            _blend(plane, factor, np.float32(0), rest)
    elif operation == CONTRAST:
        mean = np.float32(_luma_sum(red, green, blue)) / np.float32(len(red))
        for plane in (red, green, blue):
            _blend(plane, factor, mean, rest)
    elif operation == SATURATION:
        _saturation(red, green, blue, factor, rest)
    elif operation == HUE:
        _hue(red, green, blue, factor)


@njit(nogil=True, error_model="numpy")
def _times(one: Level, other: Level) -> Level:
    """A product that is rounded by itself, where torch rounds it so: where the exact result is a whole number, another
    rounding is another level."""
    return one * other


@_compiled
def _cut(value: Level) -> Level:
    """Clamped and cut to a whole level."""
    return np.floor(min(max(value, np.float32(0)), np.float32(255)))


@_compiled
def _luma(red: Level, green: Level, blue: Level) -> Level:
    return np.floor(_times(red, np.float32(0.2989)) + green * np.float32(0.587) + blue * np.float32(0.114))


@_compiled
def _blend(plane: Array, factor: Level, other: Level, rest: Level) -> None:
    for at in range(len(plane)):
        plane[at] = _cut(_times(plane[at], factor) + other * rest)


@_compiled
def _luma_sum(red: Array, green: Array, blue: Array) -> int:
    total = 0  # of whole numbers: exact in any order
    for at in range(len(red)):
        total += np.int32(_luma(red[at], green[at], blue[at]))  # type: ignore[assignment]
    return total


@_compiled
def _saturation(red: Array, green: Array, blue: Array, factor: Level, rest: Level) -> None:
    for at in range(len(red)):
        luma = _luma(red[at], green[at], blue[at])
        red[at] = _cut(_times(red[at], factor) + luma * rest)
        green[at] = _cut(_times(green[at], factor) + luma * rest)
        blue[at] = _cut(_times(blue[at], factor) + luma * rest)


@_compiled
def _grey(red: Array, green: Array, blue: Array) -> None:
    for at in range(len(red)):
        luma = _luma(red[at], green[at], blue[at])
        red[at], green[at], blue[at] = luma, luma, luma


@_compiled
def _hue(reds: Array, greens: Array, blues: Array, shift: Level) -> None:
    """Through HSV, as in `photometric.hue`.

    Written so that every choice is one between two finished values: otherwise the loop is not vectorised, at fifteen
    times the cost.
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
        turned = _times(turned - np.floor(turned), six)
        reds[at] = _channel(value, fall, turned, np.float32(5))
        greens[at] = _channel(value, fall, turned, np.float32(3))
        blues[at] = _channel(value, fall, turned, one)


@_compiled
def _channel(value: Level, fall: Level, turned: Level, offset: Level) -> Level:
    """The level of a channel whose hue lies `offset` sixths of a circle from the colour's (Smith's hexcone)."""
    distance = turned + offset
    distance = distance - (np.float32(6) if distance >= np.float32(6) else np.float32(0))
    share = min(max(min(distance, np.float32(4) - distance), np.float32(0)), np.float32(1))
    return np.floor(min(max(value - _times(fall, share), np.float32(0)), np.float32(1)) * np.float32(255.999))


@_compiled
def _blur(planes: Array, weights: Array, row: Array, blurred: Array, table: Array, out: Array) -> None:
    """Row by row: along the columns, then along the row that comes of it. `weights`: the centre's, and one side's."""
    side = planes.shape[1]
    middle = row[BLUR_RADIUS : BLUR_RADIUS + side]
    for y in range(side):
        for channel in range(3):
            _blur_columns(planes[channel], y, weights, middle)
            for tap in range(1, BLUR_RADIUS + 1):
                row[BLUR_RADIUS - tap] = middle[tap]
                row[BLUR_RADIUS + side - 1 + tap] = middle[side - 1 - tap]
            _blur_row(row, weights, blurred[channel])
        _store_row(blurred[0], blurred[1], blurred[2], table, out[y])


# One expression for many taps: a sum in memory for each would cost three times as much. Eight rows at a time: with
# more, the compiler gives up proving that none overlaps the sum.


@_compiled
def _blur_columns(plane: Array, y: int, w: Array, out: Array) -> None:
    """Row `y` of a plane that is blurred along its columns."""
    side = len(plane)
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    a1, a2, a3 = plane[_mirrored(y - 1, side)], plane[_mirrored(y - 2, side)], plane[_mirrored(y - 3, side)]
    b1, b2, b3 = plane[_mirrored(y + 1, side)], plane[_mirrored(y + 2, side)], plane[_mirrored(y + 3, side)]
    centre = plane[y]
    for x in range(side):
        out[x] = w0 * centre[x] + w1 * (a1[x] + b1[x]) + w2 * (a2[x] + b2[x]) + w3 * (a3[x] + b3[x])
    a4, a5 = plane[_mirrored(y - 4, side)], plane[_mirrored(y - 5, side)]
    b4, b5 = plane[_mirrored(y + 4, side)], plane[_mirrored(y + 5, side)]
    a6, a7 = plane[_mirrored(y - 6, side)], plane[_mirrored(y - 7, side)]
    b6, b7 = plane[_mirrored(y + 6, side)], plane[_mirrored(y + 7, side)]
    for x in range(side):
        out[x] += w4 * (a4[x] + b4[x]) + w5 * (a5[x] + b5[x]) + w6 * (a6[x] + b6[x]) + w7 * (a7[x] + b7[x])


@_compiled
def _blur_row(row: Array, w: Array, out: Array) -> None:
    """A row that reaches BLUR_RADIUS beyond `out` on either side."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for x in range(len(out)):
        out[x] = (
            w0 * row[x + 7] + w1 * (row[x + 6] + row[x + 8]) + w2 * (row[x + 5] + row[x + 9])
            + w3 * (row[x + 4] + row[x + 10]) + w4 * (row[x + 3] + row[x + 11]) + w5 * (row[x + 2] + row[x + 12])
            + w6 * (row[x + 1] + row[x + 13]) + w7 * (row[x] + row[x + 14])
        )  # fmt: skip


@_compiled
def _mirrored(place: int, side: int) -> int:
    """A place beyond the edge, mirrored at the outermost pixel."""
    place = -place if place < 0 else place
    return 2 * (side - 1) - place if place >= side else place
