"""Refuses a schedule of a collective operation that would hang, mix up messages or give a wrong result.

Theory of operation.  Messages from one rank to another arrive in the order in which they were sent, so which send
meets which receive is known before anything runs: the k-th send from q to r meets the k-th receive of q's on r.
Four passes follow, each relying on those before:

1. every message by itself, and what the messages of one step do to each other;
2. send meets receive: as many, with the same chunks;
3. progress: a step ends when all ranks it speaks with have reached the steps that speak with it.  Messages are
   not buffered here, which is the hardest case: what passes runs with messages of any size;
4. contributions: every rank's part of every chunk is followed as a set of ranks through all additions and copies,
   and the sets are compared with what the collective promises.  (A sum of ones could not see a wrong source.)

A contribution that is added twice is refused at once, even where the sum would be overwritten later.
The idea of a postcondition that counts contributions is msccl-tools' (Cowan et al., "MSCCLang", ASPLOS 2023).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NoReturn, Protocol

from windlass.errors import CheckError
from windlass.plan.collective import Receive, Send, Step

Links = Collection[tuple[int, int]] | Callable[[int, int], bool]
Place = tuple[int, int]
"""A rank and the number of one of its steps."""

OPS = ("copy", "add", "fold")
REDUCING = ("allreduce", "reduce_scatter", "reduce")
"""Collectives to which every rank brings a part of every chunk."""

NAMED_WAITS = 8
"""So many waiting ranks are named of a deadlock."""


class Rooted(Protocol):
    """What is needed of a schedule's setting."""

    @property
    def root(self) -> int:
        """Where a broadcast begins and a reduction ends."""


class Checkable(Protocol):
    """What is needed of a schedule: `plan.collective.Schedule` has it, and so has a spoilt one in a test."""

    @property
    def collective(self) -> str:
        """What it promises."""

    @property
    def size(self) -> int:
        """How many ranks."""

    @property
    def num_chunks(self) -> int:
        """Into how many chunks the buffer is cut."""

    @property
    def setting(self) -> Rooted:
        """Where its root is."""

    def steps(self, rank: int) -> Sequence[Step]:
        """What a rank does, step by step."""


def check_schedule(schedule: Checkable, *, links: Links | None = None) -> None:
    """Raises CheckError, naming schedule, rank, step and chunk, unless the schedule does what its collective promises.

    Args:
        schedule: any schedule, perhaps written by hand.
        links: directed pairs of ranks that may speak, or a function that says so; None: all may.
    """
    run = _Run(schedule, [tuple(schedule.steps(rank)) for rank in range(schedule.size)])
    _check_messages(run, _allowed(links))
    partners = _match(run)
    order = _progress(run, partners)
    _check_contributions(run, order)


def starts(schedule: Checkable) -> list[list[list[int]]]:
    """When each message of each step of each rank begins, if every message takes one unit of time.

    A message begins when both its ranks have reached its step; a step ends with the last of its messages.

    >>> from windlass.plan.collective import make_schedule
    >>> starts(make_schedule("broadcast", "binomial", 4))
    [[[0], [1]], [[1]], [[0], [1]], [[1]]]

    Raises:
        CheckError: sends and receives do not meet, or a deadlock.
    """
    run = _Run(schedule, [tuple(schedule.steps(rank)) for rank in range(schedule.size)])
    partners = _match(run)
    reached: dict[Place, int] = {(rank, 0): 0 for rank in range(schedule.size)}
    found: list[list[list[int]]] = [[] for _ in range(schedule.size)]
    for rank, step in _progress(run, partners):
        mine = reached[rank, step]
        begun = [max(mine, reached[place]) for place in partners[rank][step]]
        found[rank].append(begun)
        reached[rank, step + 1] = max((begin + 1 for begin in begun), default=mine)
    return found


def brought(schedule: Checkable, rank: int) -> dict[int, int]:
    """The chunks that a rank brings, each with the set of ranks whose part it is (bit r: rank r)."""
    size, number = schedule.size, schedule.num_chunks
    if schedule.collective in REDUCING:
        return dict.fromkeys(range(number), 1 << rank)
    chunks = {
        "allgather": range(rank, rank + 1),
        "broadcast": range(number if rank == schedule.setting.root else 0),
        "alltoall": range(rank * size, (rank + 1) * size),
    }[schedule.collective]
    return dict.fromkeys(chunks, 1 << rank)


def promised(schedule: Checkable, rank: int) -> dict[int, int]:
    """The chunks that a rank has in the end, each with the set of ranks whose parts it must hold."""
    size, number, root = schedule.size, schedule.num_chunks, schedule.setting.root
    everybody = (1 << size) - 1
    return {
        "allreduce": lambda: dict.fromkeys(range(number), everybody),
        "reduce": lambda: dict.fromkeys(range(number if rank == root else 0), everybody),
        "reduce_scatter": lambda: {rank: everybody},
        "allgather": lambda: {chunk: 1 << chunk for chunk in range(number)},
        "broadcast": lambda: dict.fromkeys(range(number), 1 << root),
        "alltoall": lambda: {source * size + rank: 1 << source for source in range(size)},
    }[schedule.collective]()


@dataclass(slots=True)
class _Run:
    """A schedule and all its programs."""

    schedule: Checkable
    programs: list[tuple[Step, ...]]

    def refuse(self, rank: int, step: int | None, what: str, chunks: Collection[int] = ()) -> NoReturn:
        """Raises with the place."""
        name = f"{self.schedule.collective} {getattr(self.schedule, 'algorithm', 'schedule')}"
        place = f"rank {rank}" + ("" if step is None else f", step {step}") + (f", {_named(chunks)}" if chunks else "")
        raise CheckError(f"{name} of {self.schedule.size} ranks: {place}: {what}")

    def messages(self) -> Iterator[tuple[int, int, Send | Receive]]:
        """Every message with its rank and step."""
        for rank, program in enumerate(self.programs):
            for step, messages in enumerate(program):
                for message in messages:
                    yield rank, step, message


def _named(chunks: Collection[int]) -> str:
    """Chunks in words.

    >>> _named(range(2, 3)), _named((1, 4)), _named(range(99))
    ('chunk 2', 'chunks 1, 4', 'chunks 0, 1, 2, 3, 4, 5, 6, 7, ... (99)')
    """
    listed = ", ".join(map(str, list(chunks)[:8])) + (f", ... ({len(chunks)})" if len(chunks) > 8 else "")
    return f"{'chunk' if len(chunks) == 1 else 'chunks'} {listed or 'none'}"


def _ranks(members: int) -> str:
    """A set of ranks in words.

    >>> _ranks(0b1), _ranks(0b1010)
    ('rank 0', 'ranks 1, 3')
    """
    listed = [str(rank) for rank in range(members.bit_length()) if members >> rank & 1]
    return f"{'rank' if len(listed) == 1 else 'ranks'} {', '.join(listed)}"


# --- 1: messages by themselves, and within a step -----------------------------------------------------------


def _allowed(links: Links | None) -> Callable[[int, int], bool]:
    if links is None:
        return lambda source, to: True
    if callable(links):
        return links
    pairs = links if isinstance(links, (set, frozenset, dict)) else set(links)
    return lambda source, to: (source, to) in pairs


def _check_messages(run: _Run, allowed: Callable[[int, int], bool]) -> None:
    size, number = run.schedule.size, run.schedule.num_chunks
    for rank, step, message in run.messages():
        sends = isinstance(message, Send)
        peer = message.to if isinstance(message, Send) else message.source
        doing = "sends to" if sends else "receives from"
        if peer == rank:
            run.refuse(rank, step, f"{doing} itself", message.chunks)
        if not 0 <= peer < size:
            run.refuse(rank, step, f"{doing} rank {peer}; there are ranks 0 to {size - 1}", message.chunks)
        if not message.chunks:
            run.refuse(rank, step, f"{doing} rank {peer} a message without chunks")
        for chunk in message.chunks:
            if not 0 <= chunk < number:
                run.refuse(rank, step, f"{doing} rank {peer} what is none of chunks 0 to {number - 1}", [chunk])
        if isinstance(message, Receive) and message.op not in OPS:
            run.refuse(rank, step, f"{message.op!r} is none of {', '.join(OPS)}", message.chunks)
        if sends and not allowed(rank, peer):
            run.refuse(rank, step, f"there is no link from rank {rank} to rank {peer}", message.chunks)
    for rank, program in enumerate(run.programs):
        for step, messages in enumerate(program):
            _check_uses(run, rank, step, messages)


def _check_uses(run: _Run, rank: int, step: int, messages: Step) -> None:
    """A chunk that is overwritten in a step has no other use in it; one that is folded is not otherwise added to."""
    sent = {chunk for message in messages if isinstance(message, Send) for chunk in message.chunks}
    received = [(chunk, message) for message in messages if isinstance(message, Receive) for chunk in message.chunks]
    count, folds = (
        Counter(chunk for chunk, _ in received),
        Counter(chunk for chunk, message in received if message.op == "fold"),
    )
    for chunk, message in received:
        what = f"what arrives from rank {message.source} would overwrite it while"
        if message.op == "copy" and chunk in sent:
            run.refuse(rank, step, f"{what} it is being sent", [chunk])
        if message.op == "copy" and count[chunk] > 1:
            run.refuse(rank, step, f"{what} it is received a second time", [chunk])
        if message.op == "add" and folds[chunk]:
            run.refuse(rank, step, "it is added to and folded in one step", [chunk])


# --- 2: send meets receive ----------------------------------------------------------------------------------


def _match(run: _Run) -> list[list[list[Place]]]:
    """For each rank, step and message: the place of its other end."""
    found: list[list[list[Place]]] = [[[(-1, -1)] * len(step) for step in program] for program in run.programs]
    sends: dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]] = {}
    receives: dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]] = {}
    for rank, program in enumerate(run.programs):
        for step, messages in enumerate(program):
            for number, message in enumerate(messages):
                if isinstance(message, Send):
                    sends.setdefault((rank, message.to), []).append((step, number, message.chunks))
                else:
                    receives.setdefault((message.source, rank), []).append((step, number, message.chunks))
    for source, to in sorted(sends.keys() | receives.keys()):
        for sent, got in zip_longest(sends.get((source, to), ()), receives.get((source, to), ())):
            if got is None:
                run.refuse(source, sent[0], f"sends to rank {to} what that never receives", sent[2])
            if sent is None:
                run.refuse(to, got[0], f"waits for rank {source}, which never sends it", got[2])
            if sent[2] != got[2] and tuple(sent[2]) != tuple(got[2]):
                what = f"rank {source} sends {_named(sent[2])} in its step {sent[0]}"
                run.refuse(to, got[0], f"is awaited from rank {source}, but {what}", got[2])
            found[source][sent[0]][sent[1]] = (to, got[0])
            found[to][got[0]][got[1]] = (source, sent[0])
    return found


# --- 3: progress --------------------------------------------------------------------------------------------


def _progress(run: _Run, partners: list[list[list[Place]]]) -> list[Place]:
    """All steps in an order in which they can end."""
    reached, order = [0] * run.schedule.size, list[Place]()
    ready = deque(range(run.schedule.size))
    while ready:
        rank = ready.popleft()
        mine = partners[rank]
        while reached[rank] < len(mine) and all(reached[peer] >= step for peer, step in mine[reached[rank]]):
            order.append((rank, reached[rank]))
            reached[rank] += 1
            if reached[rank] < len(mine):
                ready.extend(peer for peer, _ in mine[reached[rank]])
    stuck = [rank for rank, program in enumerate(run.programs) if reached[rank] < len(program)]
    if stuck:
        _refuse_deadlock(run, partners, reached, stuck)
    return order


def _refuse_deadlock(run: _Run, partners: list[list[list[Place]]], reached: list[int], stuck: list[int]) -> NoReturn:
    waits = []
    for rank in stuck[:NAMED_WAITS]:
        step = reached[rank]
        for (peer, needed), message in zip(partners[rank][step], run.programs[rank][step], strict=True):
            if reached[peer] < needed:
                way = "to" if isinstance(message, Send) else "from"
                waits.append(f"rank {rank}, step {step} waits for rank {peer} ({_named(message.chunks)} {way} it)")
                break
    more = f"; and {len(stuck) - NAMED_WAITS} more" if len(stuck) > NAMED_WAITS else ""
    run.refuse(stuck[0], reached[stuck[0]], f"deadlock: {'; '.join(waits)}{more}")


# --- 4: contributions ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Ledger:
    """Whose parts each rank's chunks hold, who wrote them last, and what was overwritten where."""

    held: list[dict[int, int]]
    written: dict[Place, int] = field(default_factory=dict)
    lost: dict[Place, tuple[int, Place]] = field(default_factory=dict)


def _check_contributions(run: _Run, order: list[Place]) -> None:
    size = run.schedule.size
    ledger = _Ledger([brought(run.schedule, rank) for rank in range(size)])
    box: dict[tuple[int, int], deque[tuple[int, ...]]] = {}
    for rank in range(size):
        _post(run, ledger, box, rank, 0)
    for rank, step in order:
        for message in run.programs[rank][step]:
            if isinstance(message, Receive):
                arrived = box[message.source, rank].popleft()
                _store(run, ledger, rank, step, message, arrived)
        _post(run, ledger, box, rank, step + 1)
    for rank in range(size):
        _check_promise(run, ledger, rank)


def _post(run: _Run, ledger: _Ledger, box: dict[tuple[int, int], deque[tuple[int, ...]]], rank: int, step: int) -> None:
    """Sends what a step sends, as it stands when the step begins."""
    held = ledger.held[rank]
    for message in run.programs[rank][step] if step < len(run.programs[rank]) else ():
        if isinstance(message, Send):
            for chunk in message.chunks:
                if chunk not in held:
                    run.refuse(rank, step, f"sends to rank {message.to} what this rank does not have yet", [chunk])
            box.setdefault((rank, message.to), deque()).append(tuple(held[chunk] for chunk in message.chunks))


def _store(run: _Run, ledger: _Ledger, rank: int, step: int, message: Receive, arrived: tuple[int, ...]) -> None:
    held = ledger.held[rank]
    for chunk, parts in zip(message.chunks, arrived, strict=True):
        own = held.get(chunk, 0)
        if message.op == "copy":
            held[chunk] = parts
            if own & ~parts:
                ledger.lost[rank, chunk] = (own & ~parts, (rank, step))
        else:
            if not own:
                run.refuse(rank, step, f"adds rank {message.source}'s to what this rank does not have yet", [chunk])
            if own & parts:
                what = f"the contribution of {_ranks(own & parts)} is added twice"
                run.refuse(rank, step, f"{what} with what arrives from rank {message.source}", [chunk])
            held[chunk] = own | parts
        ledger.written[rank, chunk] = step


def _check_promise(run: _Run, ledger: _Ledger, rank: int) -> None:
    for chunk, wanted in promised(run.schedule, rank).items():
        parts = ledger.held[rank].get(chunk, 0)
        if parts == wanted:
            continue
        last = ledger.written.get((rank, chunk), max(len(run.programs[rank]) - 1, 0))
        if not parts:
            run.refuse(rank, last, "never arrives here", [chunk])
        what = f"ends without the contribution of {_ranks(wanted & ~parts)}"
        run.refuse(rank, last, f"{what}{_where_lost(ledger, chunk, wanted & ~parts)}", [chunk])


def _where_lost(ledger: _Ledger, chunk: int, missing: int) -> str:
    """Where a missing contribution was overwritten, if it was."""
    for (_, lost_chunk), (parts, (rank, step)) in ledger.lost.items():
        if lost_chunk == chunk and parts & missing:
            return f", which rank {rank} overwrote in its step {step}"
    return ""
