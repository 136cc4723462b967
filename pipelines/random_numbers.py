"""Draw random numbers from counters. This is the only randomness in the data path.

A number is a pure function of (seed, stream, epoch, sample, view, number of the draw). So any image of any step can be
computed again anywhere and in any order. The generator is Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), vectorized in numpy.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# 32-bit words. They are kept in 64 bits, so that products do not overflow.
Words: TypeAlias = npt.NDArray[np.uint64] | np.uint64

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# Each use of a seed has a stream of its own, so that no two uses draw the same numbers.
ORDER_STREAM, WINDOW_STREAM, AUGMENT_STREAM, DROP_PATH_STREAM = 0, 1, 2, 3


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Apply ten rounds of Philox-4x32 to four broadcastable arrays of 32-bit words. The key is two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply(multiplier: np.uint64, word: Words) -> tuple[Words, Words]:
    """Return the high and the low 32 bits of the product."""
    product = multiplier * word
    return product >> _SHIFT, product & _LOW


def derive_key(seed: int, stream: int) -> tuple[int, int]:
    """Return the key of a stream (below 256) under a seed (below 2**56), as two 32-bit words."""
    return seed & 0xFFFFFFFF, (seed >> 32 << 8 | stream) & 0xFFFFFFFF


def draw_uniform(
    seed: int, stream: int, epoch: int, samples: npt.ArrayLike, views: npt.ArrayLike, draws: int
) -> npt.NDArray[np.float64]:
    """Return independent uniform numbers in (0, 1), float64 [*S, draws].

    `samples` and `views` (0 to 65535) are integer arrays that broadcast together to some shape S. A sample gets the
    same numbers alone as in any batch.
    """
    sample, view = np.broadcast_arrays(np.asarray(samples, np.uint64), np.asarray(views, np.uint64))
    blocks = np.arange(-(-draws // 4), dtype=np.uint64)
    sample, view = sample[..., None], view[..., None]
    counter = (sample & _LOW, sample >> _SHIFT, np.uint64(epoch) & _LOW, (view << np.uint64(16)) | blocks)
    words = np.stack(np.broadcast_arrays(*philox(counter, derive_key(seed, stream))), -1)
    words = words.reshape(*sample.shape[:-1], 4 * len(blocks))[..., :draws]
    return (words.astype(np.float64) + 0.5) * 2.0**-32
