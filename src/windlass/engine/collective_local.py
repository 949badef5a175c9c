"""Runs a schedule of a collective operation in one process, one rank after the other: the definition.

What this engine returns is what a schedule means, and every other engine returns the same bits.  Each ``add`` takes
its two numbers to the wide type (float32 for float16 and bfloat16, otherwise their own), adds there, and rounds to
nearest even to the storage type; ``fold`` accumulates in the wide type in the order of ranks and rounds once.  That a
sum of two halves is rounded twice does no harm: float32's 24 bits are at least twice a half's 11 or 8, plus two
(Figueroa, "When is double rounding innocuous?", SIGNUM Newsletter 1995).

- Integers wrap.
- ``mean`` is the sum, divided at the end by the number of ranks in the wide type.  Integers are rounded towards zero,
  as NCCL does; Gloo refuses them.
- ``max`` and ``min`` are NaN where any contribution is, as `torch.maximum` has it; of equals (0 and -0) the second
  is taken, which is what arrives.
- Of a NaN it is defined that it is one, not its other bits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.check.collective import REDUCING, Checkable, check_schedule, promised
from windlass.errors import ConfigError, unknown
from windlass.plan.collective import Receive, Send, Step, cut

Array = npt.NDArray[Any]

STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int16": np.int16,
    "int32": np.int32,
}
"""How a dtype's numbers lie in a NumPy array; NumPy has no bfloat16, so those are the upper halves of float32."""


def _greater(a: Array, b: Array) -> Array:
    return np.where((a > b) | (a != a), a, b)


def _less(a: Array, b: Array) -> Array:
    return np.where((a < b) | (a != a), a, b)


OPS: dict[str, Callable[[Array, Array], Array]] = {
    "sum": np.add,
    "mean": np.add,
    "max": _greater,
    "min": _less,
    "prod": np.multiply,
}
"""What a reduction does with what stands there and what arrives."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a collective operation returned.

    Attributes:
        values: the buffer of each rank.  Chunks of which the collective promises nothing, such as those of others
            after a reduce_scatter, hold whatever the schedule left there.
        trace: every message in the order in which it was done: rank, step, message.
        seconds: how long it took; 0 where an engine knows no clock.
    """

    values: list[Array]
    trace: list[tuple[int, int, Send | Receive]] = field(repr=False)
    seconds: float = 0.0


def widen(values: Array, dtype: str) -> Array:
    """Numbers as they are added: float32 for the halves, otherwise as they are."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32) if dtype == "float16" else values


def narrow(values: Array, dtype: str) -> Array:
    """Numbers as they are stored, rounded to nearest even; a NaN stays one."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)
    return values.astype(STORAGE[dtype])


def run_local(schedule: Checkable, buffers: Sequence[Array], *, op: str = "sum", dtype: str | None = None) -> Result:
    """Runs a schedule on one buffer per rank; the buffers stay as they are.

    Args:
        schedule: of any collective.
        buffers: 1-D, all of one length; the chunks of an alltoall are the size² blocks from each to each.
        op: sum, mean, max, min or prod; without meaning where nothing is reduced.
        dtype: what the numbers are, one of `STORAGE`; default: as NumPy says.

    Raises:
        ConfigError: buffers that do not fit, or an unknown op or dtype.
        CheckError: the schedule cannot be run to its end.
    """
    dtype = _checked(schedule, buffers, op, dtype)
    memory = _Memory([buffer.copy() for buffer in buffers], cut(len(buffers[0]), schedule.num_chunks), op, dtype)
    programs = [deque(enumerate(schedule.steps(rank))) for rank in range(schedule.size)]
    posted = [-1] * schedule.size
    with np.errstate(all="ignore"):
        while any(programs):
            moved = False
            for rank, program in enumerate(programs):
                while program:
                    number, step = program[0]
                    if posted[rank] < number:
                        memory.post(rank, number, step)
                        posted[rank], moved = number, True
                    if not memory.arrived(rank, step):
                        break
                    memory.store(rank, number, step)
                    program.popleft()
                    moved = True
            if not moved:
                check_schedule(schedule)
                raise AssertionError("a schedule without fault stood still")
        if op == "mean" and schedule.collective in REDUCING:
            for rank in range(schedule.size):
                memory.divide(rank, promised(schedule, rank), schedule.size)
    return Result(memory.values, memory.trace)


def _checked(schedule: Checkable, buffers: Sequence[Array], op: str, dtype: str | None) -> str:
    """The dtype, once everything fits."""
    if op not in OPS:
        raise ConfigError(unknown("reduction", op, OPS))
    if len(buffers) != schedule.size:
        raise ConfigError(f"a schedule of {schedule.size} ranks needs as many buffers, got {len(buffers)}")
    name = dtype or buffers[0].dtype.name
    if name not in STORAGE:
        raise ConfigError(unknown("dtype", name, STORAGE))
    for rank, buffer in enumerate(buffers):
        if buffer.dtype != STORAGE[name] or buffer.shape != (len(buffers[0]),):
            needed = f"{np.dtype(STORAGE[name])} of shape ({len(buffers[0])},)"
            raise ConfigError(f"the buffer of rank {rank} needs {needed}, got {buffer.dtype} of shape {buffer.shape}")
    return name


@dataclass(slots=True)
class _Memory:
    """The ranks' buffers, and the messages that are under way."""

    values: list[Array]
    bounds: list[int]
    op: str
    dtype: str
    box: dict[tuple[int, int], deque[list[Array]]] = field(default_factory=dict)
    trace: list[tuple[int, int, Send | Receive]] = field(default_factory=list)

    def chunk(self, rank: int, chunk: int) -> Array:
        """A view of a rank's chunk."""
        return self.values[rank][self.bounds[chunk] : self.bounds[chunk + 1]]

    def post(self, rank: int, number: int, step: Step) -> None:
        """Sends what a step sends, as it stands now."""
        for message in step:
            if isinstance(message, Send):
                sent = [self.chunk(rank, chunk).copy() for chunk in message.chunks]
                self.box.setdefault((rank, message.to), deque()).append(sent)
                self.trace.append((rank, number, message))

    def arrived(self, rank: int, step: Step) -> bool:
        """Whether all that a step receives is there."""
        awaited = Counter(message.source for message in step if isinstance(message, Receive))
        return all(len(self.box.get((source, rank), ())) >= count for source, count in awaited.items())

    def store(self, rank: int, number: int, step: Step) -> None:
        """Copies, adds and folds what a step receives, in the order in which it is listed."""
        folds: dict[int, list[tuple[int, Array]]] = {}
        for message in step:
            if not isinstance(message, Receive):
                continue
            for chunk, got in zip(message.chunks, self.box[message.source, rank].popleft(), strict=True):
                place = self.chunk(rank, chunk)
                if message.op == "copy":
                    place[:] = got
                elif message.op == "add":
                    place[:] = self.combined([place, got])
                else:
                    folds.setdefault(chunk, [(rank, place.copy())]).append((message.source, got))
            self.trace.append((rank, number, message))
        for chunk, parts in folds.items():
            self.chunk(rank, chunk)[:] = self.combined([part for _, part in sorted(parts, key=lambda pair: pair[0])])

    def combined(self, parts: Sequence[Array]) -> Array:
        """Parts combined from the first to the last in the wide type, and rounded once."""
        total = widen(parts[0], self.dtype)
        for part in parts[1:]:
            total = OPS[self.op](total, widen(part, self.dtype))
        return narrow(total, self.dtype)

    def divide(self, rank: int, chunks: Iterable[int], divisor: int) -> None:
        """Divides the chunks that hold a rank's results, in the wide type; integers are rounded towards zero."""
        for chunk in chunks:
            place = self.chunk(rank, chunk)
            wide = widen(place, self.dtype)
            exact = wide.dtype.kind == "i"  # float64 holds the quotient of two int32 closely enough for its whole part
            place[:] = (
                np.trunc(wide / np.float64(divisor)) if exact else narrow(wide / wide.dtype.type(divisor), self.dtype)
            )
