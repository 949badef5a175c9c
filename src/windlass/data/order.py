"""The order of samples and the random numbers of augmentation, as functions of counters.

Theory of operation.  An epoch is a permutation of range(length) that is never stored: a Feistel network keyed
by (seed, epoch) permutes the smallest power-of-two range holding `length`, and a value that falls outside is
sent through again until it falls inside (cycle walking; Black and Rogaway, *Ciphers with arbitrary finite
domains*, CT-RSA 2002).  The two halves of the word take turns: each is xored with a hash of the other, which
is a bijection whatever the hash, also when the halves differ in width by one bit.

So position p of epoch e is known in O(1) without what came before: resuming is a seek, and every rank
computes its own slice of a global batch.  Random numbers are hashes of (seed, epoch, stream, counter) in
the same way (splitmix64; Steele, Lea and Flood, *Fast splittable pseudorandom number generators*, OOPSLA
2014), so they do not depend on ranks, threads or the order of calls.

Nothing here may know what a sample is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CHUNK = 8192
"""Positions that `EpochOrder` permutes in one call: 64 KiB of words, which stay in cache."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_NUM_ROUNDS = 8
_MIN_BITS = 4


def mix64(value: int) -> int:
    """The splitmix64 finaliser of one integer, modulo 2**64.

    >>> hex(mix64(0x9E3779B97F4A7C15))
    '0xe220a8397b1dcdaf'
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def combine(*parts: int) -> int:
    """One 64-bit key made of several integers; their order matters."""
    key = 0
    for part in parts:
        key = mix64(key + _GOLDEN + mix64(part + _GOLDEN))
    return key


def uniforms(counters: NDArray[np.int64], *, seed: int, epoch: int, stream: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), each a hash of (seed, epoch, stream, counter).

    Args:
        counters: sample ids or other counters, an array of one or more dimensions.
        seed: of the run.
        epoch: whose numbers these are.
        stream: tells apart the independent numbers that one counter needs.

    Returns:
        Multiples of 2**-53, in the shape of `counters`.
    """
    h = counters.astype(np.uint64)
    h *= np.uint64(_GOLDEN)
    h += np.uint64(combine(seed, epoch, stream))
    h ^= h >> np.uint64(30)
    h *= np.uint64(_MIX_1)
    h ^= h >> np.uint64(27)
    h *= np.uint64(_MIX_2)
    h ^= h >> np.uint64(31)
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(positions: NDArray[np.int64], *, length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where the permutation of range(length) keyed by (seed, epoch) sends `positions`.

    Args:
        positions: numbers in range(length), an array of one or more dimensions.
        length: how many numbers are permuted, at least 1.
        seed: first half of the key.
        epoch: second half of the key.

    Returns:
        Numbers in range(length); distinct positions have distinct images.

    >>> sorted(permute(np.arange(5), length=5, seed=1, epoch=0).tolist())
    [0, 1, 2, 3, 4]
    """
    keys = [combine(seed, epoch, round_) for round_ in range(_NUM_ROUNDS)]
    num_bits = max(_MIN_BITS, (length - 1).bit_length())
    values = _feistel(positions.astype(np.uint64), keys, num_bits=num_bits)
    outside = np.nonzero(values >= length)
    while outside[0].size:
        again = _feistel(values[outside], keys, num_bits=num_bits)
        values[outside] = again
        still = again >= length
        outside = tuple(axis[still] for axis in outside)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: list[int], *, num_bits: int) -> NDArray[np.uint64]:
    """A keyed bijection of range(2**num_bits); the halves have num_bits // 2 and the remaining bits."""
    low_bits = num_bits // 2
    high_bits = num_bits - low_bits
    low = values & np.uint64((1 << low_bits) - 1)
    high = values >> np.uint64(low_bits)
    for even, odd in zip(keys[::2], keys[1::2], strict=True):
        low ^= _hash(high, even, num_bits=low_bits)
        high ^= _hash(low, odd, num_bits=high_bits)
    high <<= np.uint64(low_bits)
    high |= low
    return high


def _hash(values: NDArray[np.uint64], key: int, *, num_bits: int) -> NDArray[np.uint64]:
    """The upper `num_bits` of a keyed multiply, xor-shift, multiply."""
    h = values + np.uint64(key)
    h *= np.uint64(_MIX_1)
    h ^= h >> np.uint64(32)
    h *= np.uint64(_MIX_2)
    h >>= np.uint64(64 - num_bits)
    return h


class EpochOrder:
    """The sample ids at any positions of any epoch; the same for every rank, and safe to call from threads.

    Args:
        length: number of samples.
        seed: of the run.
        shuffle: False serves the ids in their own order, in every epoch.
    """

    def __init__(self, length: int, *, seed: int, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        # Two epochs are touched at a boundary, and threads may run some chunks ahead.
        self._chunk = lru_cache(maxsize=8)(self._compute_chunk)

    def _compute_chunk(self, epoch: int, index: int) -> NDArray[np.int64]:
        positions = np.arange(index * CHUNK, min((index + 1) * CHUNK, self.length))
        ids = permute(positions, length=self.length, seed=self.seed, epoch=epoch) if self.shuffle else positions
        ids.flags.writeable = False
        return ids

    def ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Ids at positions start ≤ p < stop of `epoch`, read-only; 0 ≤ start ≤ stop ≤ length."""
        first, last = start // CHUNK, max(start, stop - 1) // CHUNK
        if first == last:
            return self._chunk(epoch, first)[start - first * CHUNK : stop - first * CHUNK]
        chunks = np.concatenate([self._chunk(epoch, index) for index in range(first, last + 1)])
        return chunks[start - first * CHUNK : stop - first * CHUNK]


def shard(start: int, stop: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous slice of positions start ≤ p < stop that `rank` serves.

    The slices of all ranks follow one another, cover the range, and differ in size by at most one.

    >>> [shard(10, 15, rank=r, world_size=3) for r in range(3)]
    [(10, 11), (11, 13), (13, 15)]
    """
    count = stop - start
    return start + count * rank // world_size, start + count * (rank + 1) // world_size
