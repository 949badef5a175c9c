"""Collective operations as schedules: which rank sends which chunk to whom, step by step.

A buffer is cut into numbered chunks.  A rank's program is a sequence of steps; a step posts its messages
together and ends when all of them are complete.  Rules that every engine keeps (`windlass.check` tests them):

- a send reads a chunk as it stood when the step began;
- ``copy`` stores what arrives, straight into its place: so nothing else may use that chunk in that step;
- ``add`` adds what arrives to what stands there when the step's sends are done; several in one step are added in
  the order in which they are listed;
- ``fold`` sums all that arrives and this rank's own, in the order of the ranks' numbers;
- messages from one rank to another arrive in the order in which they were sent.

The order of additions is thereby fixed, so every engine returns the same bits.

Sources: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA 2005
(recursive doubling and halving, Rabenseifner, Bruck, binomial, pairwise, van de Geijn's scatter-allgather);
Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 2009 (ring).
This module knows no engine, and no time: `plan.topology` and the cost model do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from windlass.errors import ConfigError, unknown

Op = Literal["copy", "add", "fold"]
Collective = Literal["allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "alltoall"]


@dataclass(frozen=True, slots=True)
class Send:
    """Chunks for another rank."""

    to: int
    chunks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Receive:
    """Chunks from another rank, and what is done with them."""

    source: int
    chunks: Sequence[int]
    op: Op = "copy"


Step = tuple[Send | Receive, ...]
Program = Iterator[Step]


# --- ring ---------------------------------------------------------------------------------------------------


def ring_reduce_scatter(rank: int, size: int) -> Program:
    """Every chunk travels once around the ring and gathers a contribution at each stop; chunk r ends on rank r."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for step in range(size - 1):
        yield Send(right, _one(rank - step - 1, size)), Receive(left, _one(rank - step - 2, size), "add")


def ring_allgather(rank: int, size: int) -> Program:
    """Every chunk travels once around the ring."""
    right, left = (rank + 1) % size, (rank - 1) % size
    for step in range(size - 1):
        yield Send(right, _one(rank - step, size)), Receive(left, _one(rank - step - 1, size))


def ring_allreduce(rank: int, size: int) -> Program:
    """Reduce-scatter, then allgather: each rank sends 2(p-1)/p of the buffer, the least there is (Patarasuk, Yuan)."""
    yield from ring_reduce_scatter(rank, size)
    yield from ring_allgather(rank, size)


# --- recursive doubling and halving -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Core:
    """The largest power of two of ranks; of the others, each even one of the first ranks is served by its right."""

    size: int

    @property
    def power(self) -> int:
        return 1 << (self.size.bit_length() - 1)

    @property
    def rest(self) -> int:
        return self.size - self.power

    def number(self, rank: int) -> int | None:
        """A rank's number within the core; None: it stands aside."""
        if rank >= 2 * self.rest:
            return rank - self.rest
        return rank // 2 if rank % 2 else None

    def rank(self, number: int) -> int:
        """The rank with this number within the core."""
        return 2 * number + 1 if number < self.rest else number + self.rest

    def chunks(self, start: int, stop: int) -> range:
        """The chunks of core members start..stop-1, and of those that they serve, of one chunk for every rank."""
        return range(start + min(start, self.rest), stop + min(stop, self.rest))

    def serves(self, rank: int) -> bool:
        """Whether another rank stands aside for this one."""
        return rank < 2 * self.rest and rank % 2 == 1


def recursive_doubling_allreduce(rank: int, size: int) -> Program:
    """Whole buffers are exchanged and added with partners 1, 2, 4, ... away: log2 p steps."""
    core, everything = _Core(size), range(1)
    number = core.number(rank)
    if number is None:
        yield (Send(rank + 1, everything),)
        yield (Receive(rank + 1, everything),)
        return
    if core.serves(rank):
        yield (Receive(rank - 1, everything, "add"),)
    for distance in _powers(core.power):
        peer = core.rank(number ^ distance)
        yield Send(peer, everything), Receive(peer, everything, "add")
    if core.serves(rank):
        yield (Send(rank - 1, everything),)


def _halving(number: int, core: _Core, chunks: Callable[[int, int], range]) -> Program:
    """Within the core: send the half that the partner keeps, add the half that it sends, and go on with that."""
    start, stop = 0, core.power
    while stop - start > 1:
        middle = (start + stop) // 2
        peer = core.rank(number ^ (middle - start))
        low, high = chunks(start, middle), chunks(middle, stop)
        if number < middle:
            yield Send(peer, high), Receive(peer, low, "add")
            stop = middle
        else:
            yield Send(peer, low), Receive(peer, high, "add")
            start = middle


def _doubling(number: int, core: _Core, chunks: Callable[[int, int], range]) -> Program:
    """Within the core: exchange all that is known with partners 1, 2, 4, ... away."""
    for distance in _powers(core.power):
        mine, other = number & -distance, (number ^ distance) & -distance
        peer = core.rank(number ^ distance)
        yield Send(peer, chunks(mine, mine + distance)), Receive(peer, chunks(other, other + distance))


def rabenseifner_allreduce(rank: int, size: int) -> Program:
    """Recursive halving to reduce-scatter, recursive doubling to allgather: 2 log2 p steps, 2(p-1)/p of the buffer."""
    core = _Core(size)
    number, everything = core.number(rank), range(core.power)
    if number is None:
        yield (Send(rank + 1, everything),)
        yield (Receive(rank + 1, everything),)
        return
    if core.serves(rank):
        yield (Receive(rank - 1, everything, "add"),)
    yield from _halving(number, core, range)
    yield from _doubling(number, core, range)
    if core.serves(rank):
        yield (Send(rank - 1, everything),)


def recursive_halving_reduce_scatter(rank: int, size: int) -> Program:
    """Recursive halving; a rank that stands aside gets its chunk from the one that serves it."""
    core = _Core(size)
    number = core.number(rank)
    if number is None:
        yield (Send(rank + 1, range(size)),)
        yield (Receive(rank + 1, range(rank, rank + 1)),)
        return
    if core.serves(rank):
        yield (Receive(rank - 1, range(size), "add"),)
    yield from _halving(number, core, core.chunks)
    if core.serves(rank):
        yield (Send(rank - 1, range(rank - 1, rank)),)


def recursive_doubling_allgather(rank: int, size: int) -> Program:
    """Recursive doubling; a rank that stands aside hands its chunk in and gets all in the end."""
    core = _Core(size)
    number = core.number(rank)
    if number is None:
        yield (Send(rank + 1, range(rank, rank + 1)),)
        yield (Receive(rank + 1, _without(rank, size)),)
        return
    if core.serves(rank):
        yield (Receive(rank - 1, range(rank - 1, rank)),)
    yield from _doubling(number, core, core.chunks)
    if core.serves(rank):
        yield (Send(rank - 1, _without(rank - 1, size)),)


# --- trees --------------------------------------------------------------------------------------------------


def binomial_broadcast(rank: int, size: int, root: int = 0) -> Program:
    """Who has the buffer hands it to a rank 2^k further on; all have it after ceil(log2 p) steps."""
    place, everything = (rank - root) % size, range(1)
    lowest = place & -place if place else _above(size)
    if place:
        yield (Receive((rank - lowest) % size, everything),)
    for distance in reversed(list(_powers(lowest))):
        if place + distance < size:
            yield (Send((rank + distance) % size, everything),)


def binomial_reduce(rank: int, size: int, root: int = 0) -> Program:
    """The broadcast backwards: buffers are added on the way to the root."""
    place, everything = (rank - root) % size, range(1)
    lowest = place & -place if place else _above(size)
    for distance in _powers(lowest):
        if place + distance < size:
            yield (Receive((rank + distance) % size, everything, "add"),)
    if place:
        yield (Send((rank - lowest) % size, everything),)


def binomial_allreduce(rank: int, size: int) -> Program:
    """Reduce to rank 0, then broadcast."""
    yield from binomial_reduce(rank, size)
    yield from binomial_broadcast(rank, size)


def pipelined_tree_allreduce(rank: int, size: int, chunks: int) -> Program:
    """Up a binary tree and down again, chunk behind chunk: about 2 log2 p + k steps of 1/k of the buffer each.

    Rank r's children are 2r+1 and 2r+2.  At time t a rank of depth d in a tree of depth D adds chunk t-(D-d-1) of
    its children and sends chunk t-(D-d) up, gets chunk t-(D+d-1) from above and sends chunk t-(D+d) down.
    """
    depth, deepest = (rank + 1).bit_length() - 1, size.bit_length() - 1
    parent, children = (rank - 1) // 2, [child for child in (2 * rank + 1, 2 * rank + 2) if child < size]
    for time in range(2 * deepest + chunks):
        messages: list[Send | Receive] = []
        for child in children:
            messages += [Receive(child, one, "add") for one in _within(time - (deepest - depth - 1), chunks)]
            messages += [Send(child, one) for one in _within(time - (deepest + depth), chunks)]
        if rank:
            messages += [Send(parent, one) for one in _within(time - (deepest - depth), chunks)]
            messages += [Receive(parent, one) for one in _within(time - (deepest + depth - 1), chunks)]
        if messages:
            yield tuple(messages)


def scatter_allgather_broadcast(rank: int, size: int, root: int = 0) -> Program:
    """The root deals its chunks out down a binomial tree, then they go around a ring (van de Geijn)."""
    place = (rank - root) % size
    lowest = place & -place if place else _above(size)
    if place:
        yield (Receive((rank - lowest) % size, range(place, min(place + lowest, size))),)
    for distance in reversed(list(_powers(lowest))):
        if place + distance < size:
            chunks = range(place + distance, min(place + 2 * distance, size))
            yield (Send((rank + distance) % size, chunks),)
    right, left = (rank + 1) % size, (rank - 1) % size
    held = set(range(place, min(place + lowest, size)))
    # What a rank holds from the dealing out is not sent to it again.
    for step in range(size - 1):
        sent, got = (place - step) % size, (place - step - 1) % size
        messages: list[Send | Receive] = []
        if sent not in _dealt((place + 1) % size, size):
            messages.append(Send(right, range(sent, sent + 1)))
        if got not in held:
            messages.append(Receive(left, range(got, got + 1)))
        if messages:
            yield tuple(messages)


# --- straight -----------------------------------------------------------------------------------------------


def naive_allreduce(rank: int, size: int) -> Program:
    """All send to rank 0, which adds and sends the sum to all: what everything else is measured against."""
    everything = range(1)
    others = range(1, size)
    if rank:
        yield (Send(0, everything),)
        yield (Receive(0, everything),)
    elif size > 1:
        yield tuple(Receive(other, everything, "add") for other in others)
        yield tuple(Send(other, everything) for other in others)


def direct_reduce_scatter(rank: int, size: int) -> Program:
    """Everybody sends everybody its chunk, and sums its own in the order of ranks."""
    others = [(rank + distance) % size for distance in range(1, size)]
    if others:
        yield (
            *(Send(other, range(other, other + 1)) for other in others),
            *(Receive(other, range(rank, rank + 1), "fold") for other in sorted(others)),
        )


def direct_allgather(rank: int, size: int) -> Program:
    """Everybody sends everybody its chunk."""
    others = [(rank + distance) % size for distance in range(1, size)]
    if others:
        yield (
            *(Send(other, range(rank, rank + 1)) for other in others),
            *(Receive(other, range(other, other + 1)) for other in others),
        )


def direct_allreduce(rank: int, size: int) -> Program:
    """Each rank sums one slice from all in the order of ranks, then reads the others': two steps."""
    yield from direct_reduce_scatter(rank, size)
    yield from direct_allgather(rank, size)


# --- Bruck and pairwise -------------------------------------------------------------------------------------


def bruck_allgather(rank: int, size: int) -> Program:
    """What is known is doubled by asking the rank 1, 2, 4, ... further on: ceil(log2 p) steps for any p."""
    for distance in _powers(size):
        count = min(distance, size - distance)
        wanted = rank + distance
        yield (
            Send((rank - distance) % size, tuple((rank + i) % size for i in range(count))),
            Receive(wanted % size, tuple((wanted + i) % size for i in range(count))),
        )


def pairwise_alltoall(rank: int, size: int) -> Program:
    """With the partner i to the right and the partner i to the left, for every i; chunk s*p + d goes from s to d."""
    for distance in range(1, size):
        to, source = (rank + distance) % size, (rank - distance) % size
        yield Send(to, _block(rank, to, size)), Receive(source, _block(source, rank, size))


def bruck_alltoall(rank: int, size: int) -> Program:
    """Blocks travel by the binary digits of their distance: ceil(log2 p) steps, about p/2 blocks in each."""
    for distance in _powers(size):
        travels = [way for way in range(size) if way & distance]
        done = distance - 1  # the part of its way that a block has behind it
        to, source = (rank + distance) % size, (rank - distance) % size
        yield (
            Send(to, tuple(_block_id(rank - (way & done), way, size) for way in travels)),
            Receive(source, tuple(_block_id(source - (way & done), way, size) for way in travels)),
        )


# --- within hosts, then between them ------------------------------------------------------------------------


def hierarchical_allreduce(rank: int, hosts: Sequence[Sequence[int]], inner: str, pieces: int) -> Program:
    """Within each host, then between hosts, then within each host.

    With as many ranks on each host: slices are summed within the host (direct), each rank runs `inner` on its
    slice with the ranks of its place on other hosts, and slices are handed round.  Otherwise the first rank of
    each host sums everything of its host, and `inner` runs between those.
    """
    host = next(index for index, ranks in enumerate(hosts) if rank in ranks)
    ranks = hosts[host]
    place, width = ranks.index(rank), len(ranks)
    if len({len(each) for each in hosts}) == 1:
        per_slice = SCHEDULES["allreduce"][inner].num_chunks(len(hosts), pieces)
        slices = [range(i * per_slice, (i + 1) * per_slice) for i in range(width)]
        yield from _renamed(direct_reduce_scatter(place, width), ranks, slices)
        peers = [each[place] for each in hosts]
        between = SCHEDULES["allreduce"][inner].program(host, Setting(len(hosts), pieces=pieces))
        yield from _renamed(between, peers, [range(chunk, chunk + 1) for chunk in slices[place]])
        yield from _renamed(direct_allgather(place, width), ranks, slices)
        return
    leaders = [each[0] for each in hosts]
    number = SCHEDULES["allreduce"][inner].num_chunks(len(hosts), pieces)
    everything = range(number)
    others = ranks[1:]
    if place:
        yield (Send(ranks[0], everything),)
        yield (Receive(ranks[0], everything),)
        return
    if others:
        yield tuple(Receive(other, everything, "add") for other in others)
    between = SCHEDULES["allreduce"][inner].program(host, Setting(len(hosts), pieces=pieces))
    yield from _renamed(between, leaders, [range(chunk, chunk + 1) for chunk in everything])
    if others:
        yield tuple(Send(other, everything) for other in others)


def _renamed(program: Program, ranks: Sequence[int], chunks: Sequence[range]) -> Program:
    """The same among other ranks, each chunk standing for a run of others."""

    def rename(message: Send | Receive) -> Send | Receive:
        named = message.chunks
        first, last = chunks[named[0]], chunks[named[-1]]
        whole = range(first.start, last.stop)
        listed: Sequence[int] = whole if isinstance(named, range) else tuple(c for n in named for c in chunks[n])
        if isinstance(message, Send):
            return Send(ranks[message.to], listed)
        return Receive(ranks[message.source], listed, message.op)

    for step in program:
        yield tuple(rename(message) for message in step)


# --- small words --------------------------------------------------------------------------------------------


def _one(chunk: int, size: int) -> range:
    return range(chunk % size, chunk % size + 1)


def _block_id(source: int, way: int, size: int) -> int:
    return (source % size) * size + (source + way) % size


def _block(source: int, to: int, size: int) -> range:
    return range(source * size + to, source * size + to + 1)


def _powers(limit: int) -> Iterator[int]:
    """1, 2, 4, ... below `limit`."""
    power = 1
    while power < limit:
        yield power
        power *= 2


def _above(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _within(chunk: int, chunks: int) -> list[range]:
    return [range(chunk, chunk + 1)] if 0 <= chunk < chunks else []


def _without(rank: int, size: int) -> tuple[int, ...]:
    return tuple(chunk for chunk in range(size) if chunk != rank)


def _dealt(place: int, size: int) -> range:
    """The chunks that a binomial dealing out leaves at a place, those included that it handed on."""
    lowest = place & -place if place else _above(size)
    return range(place, min(place + lowest, size))


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What a schedule is built for.

    Attributes:
        size: how many ranks.
        root: where a broadcast begins and a reduction ends.
        pieces: chunks of a pipelined schedule.
        hosts: the ranks of each host; empty: all on one.
        inner: the schedule between hosts of a hierarchical one.
    """

    size: int
    root: int = 0
    pieces: int = 8
    hosts: tuple[tuple[int, ...], ...] = ()
    inner: str = "ring"

    @property
    def all_hosts(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host, one host if nothing was said."""
        return self.hosts or (tuple(range(self.size)),)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A schedule for any number of ranks.

    Attributes:
        program: the steps of a rank.
        chunks: into how many chunks the buffer is cut.
        meaning: one line for a person.
        symmetric: whether all ranks do the same at the same time, for this many ranks.
        ordered: whether contributions are added in the order of ranks, whatever the size and the chunks.
    """

    program: Callable[[int, Setting], Program]
    chunks: Callable[[Setting], int]
    meaning: str
    symmetric: Callable[[int], bool] = lambda size: False
    ordered: bool = False

    def num_chunks(self, size: int, pieces: int) -> int:
        """Chunks for so many ranks."""
        return self.chunks(Setting(size, pieces=pieces))


def _flat(function: Callable[[int, int], Program]) -> Callable[[int, Setting], Program]:
    return lambda rank, setting: function(rank, setting.size)


def _rooted(function: Callable[[int, int, int], Program]) -> Callable[[int, Setting], Program]:
    return lambda rank, setting: function(rank, setting.size, setting.root)


def _whole(setting: Setting) -> int:
    return 1


def _by_rank(setting: Setting) -> int:
    return setting.size


def _by_core(setting: Setting) -> int:
    return _Core(setting.size).power


def _by_pair(setting: Setting) -> int:
    return setting.size * setting.size


def _by_host(setting: Setting) -> int:
    hosts = setting.all_hosts
    width = len(hosts[0]) if len({len(each) for each in hosts}) == 1 else 1
    return width * SCHEDULES["allreduce"][setting.inner].num_chunks(len(hosts), setting.pieces)


def _always(size: int) -> bool:
    return True


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


SCHEDULES: dict[str, dict[str, Algorithm]] = {
    "allreduce": {
        "naive": Algorithm(_flat(naive_allreduce), _whole, "all to rank 0, which adds, and back", ordered=True),
        "direct": Algorithm(_flat(direct_allreduce), _by_rank, "each rank sums a slice of all", _always, ordered=True),
        "ring": Algorithm(_flat(ring_allreduce), _by_rank, "chunks go round twice", _always),
        "recursive-doubling": Algorithm(
            _flat(recursive_doubling_allreduce), _whole, "whole buffers with partners 1, 2, 4 away", _power_of_two
        ),
        "rabenseifner": Algorithm(
            _flat(rabenseifner_allreduce), _by_core, "recursive halving, then doubling", _power_of_two
        ),
        "binomial": Algorithm(_flat(binomial_allreduce), _whole, "up a binomial tree and down"),
        "pipelined-tree": Algorithm(
            lambda rank, setting: pipelined_tree_allreduce(rank, setting.size, setting.pieces),
            lambda setting: setting.pieces,
            "up a binary tree and down, chunk behind chunk",
        ),
        "hierarchical": Algorithm(
            lambda rank, setting: hierarchical_allreduce(rank, setting.all_hosts, setting.inner, setting.pieces),
            _by_host,
            "within the host, between hosts, within the host",
        ),
    },
    "reduce_scatter": {
        "direct": Algorithm(_flat(direct_reduce_scatter), _by_rank, "everybody to everybody", _always, ordered=True),
        "ring": Algorithm(_flat(ring_reduce_scatter), _by_rank, "chunks go round and are summed", _always),
        "recursive-halving": Algorithm(
            _flat(recursive_halving_reduce_scatter), _by_rank, "halves to partners", _power_of_two
        ),
    },
    "allgather": {
        "direct": Algorithm(_flat(direct_allgather), _by_rank, "everybody to everybody", _always),
        "ring": Algorithm(_flat(ring_allgather), _by_rank, "chunks go round", _always),
        "recursive-doubling": Algorithm(
            _flat(recursive_doubling_allgather),
            _by_rank,
            "all that is known, with partners 1, 2, 4 away",
            _power_of_two,
        ),
        "bruck": Algorithm(_flat(bruck_allgather), _by_rank, "all that is known, from 1, 2, 4 further on", _always),
    },
    "broadcast": {
        "binomial": Algorithm(_rooted(binomial_broadcast), _whole, "down a binomial tree"),
        "scatter-allgather": Algorithm(
            _rooted(scatter_allgather_broadcast), _by_rank, "dealt out down a tree, then round a ring"
        ),
    },
    "reduce": {
        "binomial": Algorithm(_rooted(binomial_reduce), _whole, "up a binomial tree"),
    },
    "alltoall": {
        "pairwise": Algorithm(_flat(pairwise_alltoall), _by_pair, "one partner after the other", _always),
        "bruck": Algorithm(_flat(bruck_alltoall), _by_pair, "by the binary digits of the distance", _always),
    },
}
"""Every schedule by collective and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One collective operation, complete: data that engines run, and that is checked, costed, printed and drawn.

    Attributes:
        collective, algorithm: its names in `SCHEDULES`.
        setting: ranks, root, hosts and pieces.

    Raises:
        ConfigError: no such schedule, or ranks, root, hosts or pieces that cannot be.
    """

    collective: str
    algorithm: str
    setting: Setting

    def __post_init__(self) -> None:
        """Refuses what cannot be."""
        if self.collective not in SCHEDULES:
            raise ConfigError(unknown("collective", self.collective, SCHEDULES))
        if self.algorithm not in SCHEDULES[self.collective]:
            raise ConfigError(unknown(f"schedule of {self.collective}", self.algorithm, SCHEDULES[self.collective]))
        setting = self.setting
        if setting.size < 1:
            raise ConfigError(f"a schedule needs at least 1 rank, got {setting.size}")
        if not 0 <= setting.root < setting.size:
            raise ConfigError(f"root {setting.root} is not one of ranks 0 to {setting.size - 1}")
        if setting.pieces < 1:
            raise ConfigError(f"a schedule needs at least 1 piece, got {setting.pieces}")
        if sorted(rank for host in setting.all_hosts for rank in host) != list(range(setting.size)):
            raise ConfigError(f"hosts {setting.hosts} do not hold each of ranks 0 to {setting.size - 1} once")
        if self.algorithm == "hierarchical":
            inner = [name for name in SCHEDULES["allreduce"] if name != "hierarchical"]
            if setting.inner not in inner:
                raise ConfigError(unknown("schedule between hosts", setting.inner, inner))

    @property
    def size(self) -> int:
        """How many ranks."""
        return self.setting.size

    @property
    def num_chunks(self) -> int:
        """Into how many chunks the buffer is cut."""
        return self._algorithm.chunks(self.setting)

    @property
    def symmetric(self) -> bool:
        """Whether all ranks do the same at the same time."""
        return self._algorithm.symmetric(self.size)

    @property
    def ordered(self) -> bool:
        """Whether contributions are added in the order of ranks, for any buffer."""
        return self._algorithm.ordered

    @property
    def _algorithm(self) -> Algorithm:
        return SCHEDULES[self.collective][self.algorithm]

    def steps(self, rank: int) -> tuple[Step, ...]:
        """What a rank does, step by step."""
        return _steps(self, rank)

    def bounds(self, length: int) -> list[int]:
        """Where the chunks of a buffer of `length` elements begin, and its end: chunk c is [bounds[c], bounds[c+1]).

        Chunks differ by one element at most, longer ones first; of a hierarchical schedule likewise.
        """
        return cut(length, self.num_chunks)


@lru_cache(maxsize=4096)
def _steps(schedule: Schedule, rank: int) -> tuple[Step, ...]:
    algorithm = SCHEDULES[schedule.collective][schedule.algorithm]
    return tuple(algorithm.program(rank, schedule.setting))


def cut(length: int, parts: int) -> list[int]:
    """Bounds of `parts` even parts of `length` elements, longer ones first.

    >>> cut(10, 4)
    [0, 3, 6, 8, 10]
    """
    part, more = divmod(length, parts)
    return [i * part + min(i, more) for i in range(parts + 1)]


def make_schedule(
    collective: str,
    algorithm: str,
    size: int,
    *,
    root: int = 0,
    pieces: int = 8,
    hosts: Sequence[Sequence[int]] = (),
    inner: str = "ring",
) -> Schedule:
    """A schedule by its names.

    >>> make_schedule("allreduce", "ring", 3).steps(0)[0]
    (Send(to=1, chunks=range(2, 3)), Receive(source=2, chunks=range(1, 2), op='add'))
    """
    setting = Setting(size, root, pieces, tuple(tuple(host) for host in hosts), inner)
    return Schedule(collective=collective, algorithm=algorithm, setting=setting)
