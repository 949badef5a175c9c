"""Sums over ranks of numbers that travel in 16 bits and are added in 32.

Every rank is sent its part of all ranks' buffers, adds them up in 32 bits, turns the sum back into 16 bits once, and
sends it to all.  Both exchanges together move 2 (P-1)/P of a buffer of 16-bit numbers, half of what float32 would.
Codes of fixed point are added as whole numbers, which is exact, and saturate once at the end; float16 and bfloat16
are added in float32.

Two communicators keep the two exchanges apart, and the second one of a buffer begins after that of the buffer before,
so all ranks call MPI in one order however fast each is.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from windlass.engine.world import NUM_SPINS, SLEEP_S, MpiWorld, losses_named
from windlass.plan.number import Fixed, NumberFormat

WORD = np.dtype(np.int16)
CHUNK = 1 << 16
"""Numbers that are added at once: their sums stay in the second cache."""


class NarrowSums:
    """Sums buffers of one 16-bit format; stands where `engine.allreduce.Allreduce` does.

    Args:
        world: the ranks; making this object is collective.
        number: the format of what is summed.
    """

    def __init__(self, world: MpiWorld, number: NumberFormat) -> None:
        self.number = number
        self._rank, self._size = world.rank, world.size
        self._scatter, self._gather = world.comm.Dup(), world.comm.Dup()
        self._pending: list[NarrowSum] = []
        self._room: dict[int, list[NDArray[Any]]] = {}
        self._sent = self._told = self._count = 0

    def start(self, send: NDArray[Any], receive: NDArray[Any]) -> NarrowSum:
        """Starts summing `send` over all ranks into `receive`; both int16, or float16 and bfloat16 seen as such."""
        found = NarrowSum(self, send.view(WORD), receive.view(WORD))
        self._pending.append(found)
        self._sent += found.sent_bytes
        self._count += 1
        return found

    def room(self, numbers: int) -> NDArray[Any]:
        """Room for so many numbers of every rank and of their sum: new memory costs more than what is sent into it."""
        free = self._room.setdefault(numbers, [])
        return free.pop() if free else np.empty((self._size + 1, numbers), WORD)

    def give_back(self, room: NDArray[Any]) -> None:
        """Nobody needs this room now."""
        self._room[room.shape[1]].append(room)

    def move(self) -> None:
        """Moves all sums on."""
        while self._pending and self._pending[0].move():
            self._pending.pop(0)

    def new_bytes(self) -> tuple[int, int]:
        """Bytes that this rank has handed over since the last call, twice: nothing else is predicted."""
        new, self._told = self._sent - self._told, self._sent
        return new, new

    def describe(self) -> str:
        """What was used, in words."""
        return f"{self._count} sums of {self.number}, exchanged in 16 bits and added in 32"

    def close(self) -> None:
        """Frees the communicators; collective."""
        self._scatter.Free()
        self._gather.Free()


class NarrowSum:
    """One sum under way."""

    def __init__(self, sums: NarrowSums, send: NDArray[Any], receive: NDArray[Any]) -> None:
        self._sums, self._receive = sums, receive
        size, rank = sums._size, sums._rank
        bounds = [send.size * part // size for part in range(size + 1)]
        self._counts = [stop - start for start, stop in pairwise(bounds)]
        self._starts = bounds[:-1]
        mine = self._counts[rank]
        self._room = sums.room(mine)
        self.sent_bytes = WORD.itemsize * (send.size - mine + mine * (size - 1))
        with losses_named("an exchange of 16-bit gradients"):
            self._request = sums._scatter.Ialltoallv(
                [send, (self._counts, self._starts), _word()],
                [self._room[:size], ([mine] * size, [part * mine for part in range(size)]), _word()],
            )
        self._is_gathering = self._is_done = False

    def move(self) -> bool:
        """Goes on as far as it can without waiting; whether the next sum may begin its second exchange."""
        with losses_named("an exchange of 16-bit gradients"):
            if not self._is_gathering and self._request.Test():
                mine = self._room[-1]
                _add(torch.from_numpy(self._room[:-1]), torch.from_numpy(mine), self._sums.number)
                self._request = self._sums._gather.Iallgatherv(
                    [mine, _word()], [self._receive, (self._counts, self._starts), _word()]
                )
                self._is_gathering = True
        return self._is_gathering

    def test(self) -> bool:
        """Moves it on and says whether it is complete."""
        self._sums.move()
        if self._is_gathering and not self._is_done:
            with losses_named("an exchange of 16-bit gradients"):
                self._is_done = bool(self._request.Test())
            if self._is_done:
                self._sums.give_back(self._room)
        return self._is_done

    def wait(self) -> None:
        """Returns when it is complete."""
        for _ in range(NUM_SPINS):
            if self.test():
                return
        while not self.test():
            time.sleep(SLEEP_S)


def _word() -> Any:
    from mpi4py import MPI

    return MPI.SHORT


def _add(parts: torch.Tensor, out: torch.Tensor, number: NumberFormat) -> None:
    """`out` becomes the ranks' parts, added in 32 bits, in 16 bits again."""
    for part, sums in zip(torch.split(parts, CHUNK, dim=1), torch.split(out, CHUNK), strict=True):
        if isinstance(number, Fixed):
            sums.copy_(part.sum(0, dtype=torch.int32).clamp_(*number.codes))
        else:
            dtype = torch.float16 if number.storage == "float16" else torch.bfloat16
            wide = part.view(dtype).sum(0, dtype=torch.float32)
            sums.view(dtype).copy_(wide.clamp_(number.lowest, number.highest))
