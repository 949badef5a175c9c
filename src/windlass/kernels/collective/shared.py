"""A reduction through memory that the processes of one host share: the schedule ``direct``, piece by piece.

Theory of operation.  The buffer is cut into pieces, and each piece into one slice per rank.  For every piece a
rank (1) copies the others' slices of its own buffer into its area of the shared memory, (2) reduces its own
slice from its own buffer and all areas, in the order of ranks, into its result and into the shared one, (3)
copies the others' reduced slices from there.  Per rank and element that is about one read and one write of
the shared memory, which stays in the caches, beside one read and one write of the caller's memory.

There are `slots` areas per rank, used in turn.  Three counters per rank, each in its own cache line, say how many
pieces it has copied in, reduced, and taken out; they only grow, over all operations.  A piece is reduced when all
have copied it in, taken when all have reduced it, and its slot is used again when all have taken it.

A small buffer goes in one go (`make_one_shot`): every rank puts all of it into its own place, of which there are two
in turn, says so, waits until all have said so, and reduces everything itself, again in the order of ranks.  A rank
begins the operation after next only when all have ended this one, so two places are enough.

`progress` does what can be done without waiting, waits a little, and returns: the caller decides what to do
meanwhile, and nobody waits for ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from windlass.kernels.collective.atomics import load_acquire, relax, store_release, view
from windlass.kernels.collective.combine import make_steps
from windlass.kernels.jit import kernel

COUNTERS = 4
"""Counters of a rank: pieces copied in, reduced, taken; and operations in one go that it has begun."""
LINE = 16
"""Counters of 8 bytes from one used to the next: two cache lines, since processors fetch pairs."""
ALIGN = 64
"""Slices begin at multiples of so many elements."""


def num_counters(size: int) -> int:
    """Length of the array of counters."""
    return size * COUNTERS * LINE


def slot_elements(size: int, piece: int) -> int:
    """Elements of a slot: an area for each rank, and the result."""
    return (size + 1) * piece


@kernel
def slice_bounds(rank: int, size: int, n: int) -> tuple[int, int]:
    """The slice of a piece of n elements that a rank reduces."""
    each = ((n + size - 1) // size + 63) // 64 * 64
    return min(n, rank * each), min(n, (rank + 1) * each)


@kernel
def _least(counters, which, size):
    least = load_acquire(counters, which * 16)  # LINE
    for rank in range(1, size):
        least = min(least, load_acquire(counters, (rank * 4 + which) * 16))
    return least


@cache
def make_progress(kind: int) -> Any:
    """The kernel ``progress`` for one storage (`combine.kind_of`).

    ``progress(counters, data, x, out, acc, state, rank, size, slots, piece, op, mean, spins, crowded)``:

    - counters (int64), data (storage): the shared memory;
    - x, out: this rank's buffer and its result, which may be the same;
    - acc: scratch of the wide type;
    - state: [base, copied in, reduced, taken] pieces, of which `progress` keeps the last three, and how many elements
      it has written into the shared memory;
    - mean: whether the result is divided by `size`;
    - spins: turns of waiting before it returns; crowded: more ranks than cores.

    Returns whether all is done.
    """
    take, fold, give = make_steps(kind)

    def copy_in(data, x, at, first, n, rank, size, piece):
        low, high = slice_bounds(rank, size, n)
        area = at + rank * piece
        data[area : area + low] = x[first : first + low]
        data[area + high : area + n] = x[first + high : first + n]

    def reduce(data, x, out, acc, at, first, n, rank, size, piece, op, mean):
        low, high = slice_bounds(rank, size, n)
        result = at + size * piece
        for start in range(low, high, acc.size):
            width = min(acc.size, high - start)
            if rank == 0:
                take(acc, x, first + start, width)
            else:
                take(acc, data, at + start, width)
            for other in range(1, size):
                if other == rank:
                    fold(acc, x, first + start, width, op)
                else:
                    fold(acc, data, at + other * piece + start, width, op)
            give(acc, data, result + start, width)
            if mean:  # of the sum as it is stored, as everywhere
                take(acc, data, result + start, width)
                for i in range(width):
                    acc[i] = acc[i] / size
                give(acc, data, result + start, width)
            give(acc, out, first + start, width)

    def copy_out(data, out, at, first, n, rank, size, piece):
        low, high = slice_bounds(rank, size, n)
        result = at + size * piece
        out[first : first + low] = data[result : result + low]
        out[first + high : first + n] = data[result + high : result + n]

    copying_in = kernel(copy_in, key=(kind,))
    reducing = kernel(reduce, key=(kind,))
    copying_out = kernel(copy_out, key=(kind,))

    def progress(counters, data, x, out, acc, state, rank, size, slots, piece, op, mean, spins, crowded):
        length = x.size
        pieces = (length + piece - 1) // piece
        base = state[0]
        mine = rank * 4 * 16
        idle = 0
        while state[3] < pieces:
            moved = False
            number = state[1]
            if number < pieces and _least(counters, 2, size) >= base + number - slots + 1:
                first, at = number * piece, (base + number) % slots * (size + 1) * piece
                low, high = slice_bounds(rank, size, min(piece, length - first))
                state[4] += min(piece, length - first) - (high - low)
                copying_in(data, x, at, first, min(piece, length - first), rank, size, piece)
                state[1] = number + 1
                store_release(counters, mine, base + number + 1)
                moved = True
            number = state[2]
            if number < state[1] and _least(counters, 0, size) >= base + number + 1:
                first, at = number * piece, (base + number) % slots * (size + 1) * piece
                low, high = slice_bounds(rank, size, min(piece, length - first))
                state[4] += high - low
                reducing(data, x, out, acc, at, first, min(piece, length - first), rank, size, piece, op, mean)
                state[2] = number + 1
                store_release(counters, mine + 16, base + number + 1)
                moved = True
            number = state[3]
            if number < state[2] and _least(counters, 1, size) >= base + number + 1:
                first, at = number * piece, (base + number) % slots * (size + 1) * piece
                copying_out(data, out, at, first, min(piece, length - first), rank, size, piece)
                state[3] = number + 1
                store_release(counters, mine + 32, base + number + 1)
                moved = True
            if moved:
                idle = 0
            else:
                idle += 1
                if idle > spins:
                    return False
                relax(crowded)
        return True

    return kernel(progress, key=(kind,))


DESCRIPTOR = (
    "counters", "num_counters", "data", "num_data", "x", "out", "length", "acc", "rank", "size", "place", "number",
    "op", "mean", "spins", "crowded", "begun", "written",
)  # fmt: skip
"""What an operation in one go is described by: addresses, lengths and numbers, all as int64, since one argument is
unpacked faster than many."""
ENTRY = {name: index for index, name in enumerate(DESCRIPTOR)}


@cache
def make_one_shot(kind: int) -> Any:
    """The kernel ``one_shot(descriptor, like, wide)`` for one storage.

    `like` and `wide` are empty arrays of the storage's type and of the wide one.  `place` is how many elements a
    rank's place holds, `number` counts operations in one go, `begun` is kept by the kernel and begins as 0.  Returns
    whether all is done; if not, somebody has not come yet.
    """
    take, fold, give = make_steps(kind)

    def one_shot(d, like, wide):
        counters = view(d[0], d[1], d)
        data = view(d[2], d[3], like)
        length, rank, size, place, number = d[6], d[8], d[9], d[10], d[11]
        x, out, acc = view(d[4], length, like), view(d[5], length, like), view(d[7], 1024, wide)
        base = number % 2 * size * place
        if d[16] == 0:
            mine = base + rank * place
            data[mine : mine + length] = x[:length]
            d[17] += length
            store_release(counters, (rank * 4 + 3) * 16, number + 1)
            d[16] = 1
        for other in range(size):
            idle = 0
            while load_acquire(counters, (other * 4 + 3) * 16) <= number:
                idle += 1
                if idle > d[14]:
                    return False
                relax(d[15] != 0)
        for start in range(0, length, 1024):
            width = min(1024, length - start)
            take(acc, data, base + start, width)
            for other in range(1, size):
                fold(acc, data, base + other * place + start, width, d[12])
            give(acc, out, start, width)
            if d[13] != 0:
                take(acc, out, start, width)
                for i in range(width):
                    acc[i] = acc[i] / size
                give(acc, out, start, width)
        return True

    return kernel(one_shot, key=(kind,))
