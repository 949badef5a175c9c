"""Spoilt schedules, the ways to spoil one, and a judge of its own who says which still work."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from windlass.check.collective import brought, promised
from windlass.plan.collective import Receive, Schedule, Send, Setting, Step

Programs = list[list[list[Send | Receive]]]


@dataclass(frozen=True)
class Spoilt:
    """A schedule with other programs."""

    schedule: Schedule
    programs: Programs

    @property
    def collective(self) -> str:
        return self.schedule.collective

    @property
    def algorithm(self) -> str:
        return self.schedule.algorithm

    @property
    def size(self) -> int:
        return self.schedule.size

    @property
    def num_chunks(self) -> int:
        return self.schedule.num_chunks

    @property
    def setting(self) -> Setting:
        return self.schedule.setting

    def steps(self, rank: int) -> tuple[Step, ...]:
        return tuple(tuple(step) for step in self.programs[rank] if step)


def spoilt(schedule: Schedule) -> Spoilt:
    """A copy that can be spoilt."""
    return Spoilt(schedule, [[list(step) for step in schedule.steps(rank)] for rank in range(schedule.size)])


# --- an independent judge -----------------------------------------------------------------------------------


def is_right(schedule: Spoilt | Schedule) -> bool:
    """Runs a schedule with counted contributions, messages without buffers, and step by step; says if it works.

    Written on its own, to judge the check: it moves real counters, and lets a step end when every message of it
    is at the head of its queue on both sides.
    """
    size = schedule.size
    held = [{c: Counter(parts_of(parts)) for c, parts in brought(schedule, rank).items()} for rank in range(size)]
    programs = [deque(schedule.steps(rank)) for rank in range(size)]
    sends: dict[tuple[int, int], deque[tuple[int, ...]]] = {}
    data: dict[tuple[int, int], deque[list[Counter[int]]]] = {}
    posted = [False] * size
    done_sends = Counter[tuple[int, int]]()
    sent_until: list[dict[int, int]] = [{} for _ in range(size)]
    asked = Counter[tuple[int, int]]()
    moved = True
    while any(programs):
        if not moved:
            return False
        moved = False
        for rank, program in enumerate(programs):
            if not program:
                continue
            step = program[0]
            if not posted[rank]:
                posted[rank] = moved = True
                for m in step:
                    if isinstance(m, Send):
                        if any(c not in held[rank] for c in m.chunks):
                            return False
                        sends.setdefault((rank, m.to), deque()).append(tuple(m.chunks))
                        data.setdefault((rank, m.to), deque()).append([Counter(held[rank][c]) for c in m.chunks])
                        done_sends[rank, m.to] += 1
                        sent_until[rank][m.to] = done_sends[rank, m.to]
                    else:
                        asked[m.source, rank] += 1
            if all(
                asked[rank, m.to] >= sent_until[rank][m.to]
                if isinstance(m, Send)
                else done_sends[m.source, rank] >= asked[m.source, rank]
                for m in step
            ):
                used = Counter(c for m in step if isinstance(m, Receive) for c in m.chunks)
                out = {c for m in step if isinstance(m, Send) for c in m.chunks}
                for m in step:
                    if not isinstance(m, Receive):
                        continue
                    if sends[m.source, rank].popleft() != tuple(m.chunks):
                        return False
                    for c, parts in zip(m.chunks, data[m.source, rank].popleft(), strict=True):
                        if m.op == "copy":
                            if used[c] > 1 or c in out:
                                return False
                            held[rank][c] = parts
                        elif c not in held[rank]:
                            return False
                        else:
                            held[rank][c] = held[rank][c] + parts
                program.popleft()
                posted[rank], moved = False, True
    if any(data.values()):
        return False
    return all(
        held[rank].get(chunk) == Counter(parts_of(parts))
        for rank in range(size)
        for chunk, parts in promised(schedule, rank).items()
    )


def parts_of(parts: int) -> list[int]:
    return [rank for rank in range(parts.bit_length()) if parts >> rank & 1]


# --- ways to spoil one ---------------------------------------------------------------------------------------

Spot = tuple[int, int, int]
"""Rank, step, message."""


def spots(schedule: Schedule, kind: type, most: int) -> list[Spot]:
    """Where the sends or receives are; of many, some that depend on the schedule alone."""
    found = [
        (rank, step, number)
        for rank in range(schedule.size)
        for step, messages in enumerate(schedule.steps(rank))
        for number, message in enumerate(messages)
        if isinstance(message, kind)
    ]
    return found if len(found) <= most else random.Random(f"{schedule}").sample(found, most)


def drop(mutant: Spoilt, spot: Spot) -> bool:
    rank, step, number = spot
    del mutant.programs[rank][step][number]
    return True


def swap_op(mutant: Spoilt, spot: Spot) -> bool:
    rank, step, number = spot
    message = mutant.programs[rank][step][number]
    assert isinstance(message, Receive)
    mutant.programs[rank][step][number] = replace(message, op="add" if message.op == "copy" else "copy")
    return True


def wrong_peer(mutant: Spoilt, spot: Spot) -> bool:
    """The next rank that is neither itself nor the right one."""
    rank, step, number = spot
    message = mutant.programs[rank][step][number]
    right = message.to if isinstance(message, Send) else message.source
    others = [(right + i) % mutant.size for i in range(1, mutant.size) if (right + i) % mutant.size != rank]
    if not others:
        return False
    changed = replace(message, **{"to" if isinstance(message, Send) else "source": others[0]})  # type: ignore[arg-type]
    mutant.programs[rank][step][number] = changed
    return True


def itself(mutant: Spoilt, spot: Spot) -> bool:
    rank, step, number = spot
    message = mutant.programs[rank][step][number]
    mutant.programs[rank][step][number] = replace(
        message,
        **{"to" if isinstance(message, Send) else "source": rank},  # type: ignore[arg-type]
    )
    return True


def nobody(mutant: Spoilt, spot: Spot) -> bool:
    rank, step, number = spot
    message = mutant.programs[rank][step][number]
    mutant.programs[rank][step][number] = replace(
        message,
        **{"to" if isinstance(message, Send) else "source": mutant.size},  # type: ignore[arg-type]
    )
    return True


def wrong_chunk(mutant: Spoilt, spot: Spot) -> bool:
    """One chunk of the message becomes the next one; where there is but one, one that does not exist."""
    rank, step, number = spot
    message = mutant.programs[rank][step][number]
    chunks = list(message.chunks)
    chunks[0] = (chunks[0] + 1) % mutant.num_chunks if mutant.num_chunks > 1 else 1
    mutant.programs[rank][step][number] = replace(message, chunks=tuple(chunks))
    return True


def other_end(mutant: Spoilt, spot: Spot) -> Spot:
    """Where a send is received: the k-th from one rank to another meets the k-th that this one asks of it."""
    rank, step, number = spot
    message = mutant.programs[rank][step][number]
    assert isinstance(message, Send)

    def all_of(owner: int, kind: type, peer: int) -> list[Spot]:
        return [
            (owner, s, n)
            for s, messages in enumerate(mutant.programs[owner])
            for n, m in enumerate(messages)
            if isinstance(m, kind) and (m.to if isinstance(m, Send) else m.source) == peer
        ]

    return all_of(message.to, Receive, rank)[all_of(rank, Send, message.to).index(spot)]


def wrong_chunk_on_both_ends(mutant: Spoilt, spot: Spot) -> bool:
    far = other_end(mutant, spot)
    return wrong_chunk(mutant, spot) and wrong_chunk(mutant, far)


def drop_both_ends(mutant: Spoilt, spot: Spot) -> bool:
    far = other_end(mutant, spot)
    return drop(mutant, spot) and drop(mutant, far)


def duplicate(mutant: Spoilt, spot: Spot) -> bool:
    rank, step, number = spot
    mutant.programs[rank][step].append(mutant.programs[rank][step][number])
    return True


def duplicate_both_ends(mutant: Spoilt, spot: Spot) -> bool:
    far = other_end(mutant, spot)
    return duplicate(mutant, spot) and duplicate(mutant, far)


MUTATIONS: dict[str, tuple[type, Callable[[Spoilt, Spot], bool]]] = {
    "drop a send": (Send, drop),
    "drop a receive": (Receive, drop),
    "drop a message": (Send, drop_both_ends),
    "swap add and copy": (Receive, swap_op),
    "send to the wrong peer": (Send, wrong_peer),
    "receive from the wrong peer": (Receive, wrong_peer),
    "send to itself": (Send, itself),
    "receive from itself": (Receive, itself),
    "send to nobody": (Send, nobody),
    "receive from nobody": (Receive, nobody),
    "send the wrong chunk": (Send, wrong_chunk),
    "receive the wrong chunk": (Receive, wrong_chunk),
    "pass the wrong chunk": (Send, wrong_chunk_on_both_ends),
    "duplicate a send": (Send, duplicate),
    "duplicate a receive": (Receive, duplicate),
    "duplicate a message": (Send, duplicate_both_ends),
}
