"""The definition of rounding in plain NumPy and float64, and of the random bits: slow and obvious.

Sources: Gupta et al. (ICML 2015), section 3, for stochastic rounding and saturation; Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), for Philox-4x32.

Random bits.  Philox-4x32 of 10 rounds turns a counter of four 32-bit words, under a key of two, into four words.  The
key is the seed (low word, high word); the counter is (block, low word; block, high word; stream; step).  Element i, in
the logical (row-major) order of its tensor, takes the lower (i even) or upper 16 bits of word (i mod 8) // 2 of block
i // 8: written to memory one after the other, lower halves first, 16-bit number i of the stream.

Rounding.  x is saturated, and divided by the step of the format at its magnitude, which gives y.  With the random
number u, 0 <= u < 2^16, "stochastic" rounds the magnitude of y up where (u + 1/2) / 2^16 is less than the share of y
behind the point.  That probability is right up to 2^-17, and exact where the share has 16 bits or fewer; numbers of the
format never change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Words = tuple[int, int, int, int]
"""A key: seed (low, high), stream, step."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF
HALVES = 8
"""Elements that one block of random bits serves."""


class Target(NamedTuple):
    """A format, as kernels know it.

    Attributes:
        low, high: the ends of the range.
        man: bits behind the leading one, or -1: fixed point.
        exponent: the step is 2^exponent, in floating point that of subnormal numbers.
    """

    low: float
    high: float
    man: int
    exponent: int


class Counts(NamedTuple):
    """What a rounding did: numbers out of range, not zero but rounded to zero, and NaN; the sum of errors.

    The error of a number is how far rounding has moved it, after saturation; NaN has none.
    """

    saturated: int
    zeroed: int
    not_a_number: int
    error: float


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Philox-4x32-10 of counters (n, 4) as uint32."""
    c = [counter[:, word].astype(np.uint64) for word in range(4)]
    k = [np.uint64(word) for word in key]
    mask, half = np.uint64(MASK), np.uint64(32)
    for _ in range(ROUNDS):
        first, second = np.uint64(MULTIPLIERS[0]) * c[0], np.uint64(MULTIPLIERS[1]) * c[2]
        c = [(second >> half) ^ c[1] ^ k[0], second & mask, (first >> half) ^ c[3] ^ k[1], first & mask]
        k = [np.uint64((int(word) + weyl) & MASK) for word, weyl in zip(k, WEYL, strict=True)]
    return np.stack(c, axis=1).astype(np.uint32)


def halves(words: Words, first: int, count: int) -> Array:
    """16-bit random numbers `first` to `first + count` of a key."""
    blocks = np.arange(first // HALVES, -(-(first + count) // HALVES), dtype=np.uint64)
    counter = np.zeros((blocks.size, 4), np.uint32)
    counter[:, 0] = blocks & np.uint64(MASK)
    counter[:, 1] = blocks >> np.uint64(32)
    counter[:, 2:] = words[2:]
    return philox(counter, words[:2]).astype("<u4").view("<u2").reshape(-1)[first % HALVES :][:count]


def steps(x: Array, target: Target) -> Array:
    """The step of the format at the magnitude of each number, in float64."""
    if target.man < 0:
        return np.full(x.shape, np.ldexp(1.0, target.exponent))
    _, exponent = np.frexp(np.where(np.isnan(x), 0.0, x))  # x = m 2^exponent with 1/2 <= |m| < 1
    found: Array = np.ldexp(1.0, np.maximum(exponent - 1 - target.man, target.exponent))
    return found


def rounded(x: Array, target: Target, rounding: str, noise: Array | None = None) -> tuple[Array, Counts]:
    """Numbers of the format, in float32, and what happened.

    Args:
        x: float32.
        target: the format.
        rounding: "stochastic", "nearest" or "floor".
        noise: 16-bit random numbers, one for each of `x`, for "stochastic".

    A zero of fixed point is +0, as it has one code; one of floating point keeps its sign.
    """
    wide = x.astype(np.float64)
    inside = np.where(np.isnan(wide), wide, np.clip(wide, target.low, target.high))
    step = steps(inside, target)
    y = inside / step
    if rounding == "nearest":
        k = np.rint(y)
    elif rounding == "floor":
        k = np.floor(y)
    else:
        assert noise is not None
        whole = np.trunc(y)
        up = (noise + 0.5) / 65536 < np.abs(y - whole)
        k = np.where(up, whole + np.copysign(1.0, y), whole)
    result = k * step
    if target.man < 0:
        result = result + 0.0
    nan = np.isnan(wide)
    return result.astype(np.float32), Counts(
        int(np.count_nonzero(~nan & (wide != inside))),
        int(np.count_nonzero((wide != 0) & (result == 0))),
        int(np.count_nonzero(nan)),
        float(np.abs(result - inside)[~nan].sum()),
    )


def encoded(values: Array, target: Target, dtype: str) -> Array:
    """Numbers of the format as they are stored: codes (NaN: 0), or the bits of float16 and bfloat16."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    codes = np.ldexp(values.astype(np.float64), -target.exponent)
    return np.where(np.isnan(codes), 0, codes).astype(dtype)
