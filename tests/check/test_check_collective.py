"""Every schedule does what its collective promises; spoilt ones are refused, and the place is named."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from schedule_mutants import MUTATIONS, Spoilt, is_right, spoilt, spots

from windlass.check.collective import brought, check_schedule, promised, starts
from windlass.errors import CheckError
from windlass.plan.collective import SCHEDULES, Receive, Schedule, Send, Setting, Step, make_schedule

NAMES = [(collective, name) for collective, table in SCHEDULES.items() for name in table]
MUTANT_SIZES = [*range(2, 10), 16, 17]
PLACE = re.compile(r"^(\w+) ([\w-]+) of \d+ ranks: rank \d+, step \d+, chunks? \d+")
DEADLOCK = re.compile(r"^\w+ [\w-]+ of \d+ ranks: rank \d+, step \d+: deadlock: rank \d+, step \d+ waits for rank \d+")


def refusal(schedule: Spoilt) -> str:
    """What the check says."""
    with pytest.raises(CheckError) as caught:
        check_schedule(schedule)
    return str(caught.value)


def variants(collective: str, name: str, size: int) -> Iterator[Schedule]:
    """A schedule with every root, number of pieces, hosts and inner schedule that makes a difference."""
    roots = sorted({0, size // 2, size - 1}) if collective in ("broadcast", "reduce") else [0]
    pieces = [1, 3, 8] if name == "pipelined-tree" else [8]
    for root in roots:
        for count in pieces:
            yield make_schedule(collective, name, size, root=root, pieces=count)


# --- what is right passes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_every_schedule_passes_for_any_number_of_ranks(collective: str, name: str) -> None:
    for size in [*range(1, 34), 64]:
        for schedule in variants(collective, name, size):
            check_schedule(schedule)


INNER = [name for name in SCHEDULES["allreduce"] if name != "hierarchical"]


@pytest.mark.parametrize("inner", INNER)
def test_hierarchical_passes_for_any_hosts_and_inner(inner: str) -> None:
    for num_hosts in range(1, 8):
        for width in range(1, 5):
            size = num_hosts * width
            blocks = [range(host * width, (host + 1) * width) for host in range(num_hosts)]
            strided = [range(host, size, num_hosts) for host in range(num_hosts)]
            for hosts in (blocks, strided):
                for pieces in (1, 3, 8):
                    check_schedule(
                        make_schedule("allreduce", "hierarchical", size, hosts=hosts, inner=inner, pieces=pieces)
                    )
    for hosts_ in (
        [(0, 1, 2), (3,), (4, 5)],
        [(5,), (4, 0), (1, 3, 2)],
        [(0,), (1, 2, 3, 4, 5, 6)],
        [(6, 0), (1, 2, 3, 4, 5)],
    ):
        size = sum(map(len, hosts_))
        check_schedule(make_schedule("allreduce", "hierarchical", size, hosts=hosts_, inner=inner, pieces=3))


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_links_are_respected(collective: str, name: str) -> None:
    schedule = make_schedule(collective, name, 6)
    pairs = {(rank, m.to) for rank in range(6) for step in schedule.steps(rank) for m in step if isinstance(m, Send)}
    check_schedule(schedule, links=pairs)
    check_schedule(schedule, links=lambda source, to: (source, to) in pairs)
    for source, to in sorted(pairs):
        with pytest.raises(CheckError, match=rf"rank {source}, step \d+, .*no link from rank {source} to rank {to}"):
            check_schedule(schedule, links=sorted(pairs - {(source, to)}))


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_the_judge_finds_every_schedule_right(collective: str, name: str) -> None:
    for size in MUTANT_SIZES:
        assert all(map(is_right, variants(collective, name, size)))


# --- what is spoilt is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_mutants_are_refused_with_their_place(collective: str, name: str, mutation: str) -> None:
    kind, spoil = MUTATIONS[mutation]
    count = 0
    for size in MUTANT_SIZES:
        schedule = mutable_schedule(collective, name, size)
        for spot in spots(schedule, kind, 64 if size < 6 else 12):
            mutant = spoilt(schedule)
            if spoil(mutant, spot):
                count += 1
                message = refusal(mutant)
                assert PLACE.match(message), (spot, message)
                assert message.startswith(f"{collective} {name} of {size} ranks: ")
    assert count >= 10


def mutable_schedule(collective: str, name: str, size: int) -> Schedule:
    """A schedule in which all of its parts have something to do."""
    width = next(width for width in (3, 2, 1) if size % width == 0)
    hosts = [range(start, start + width) for start in range(0, size, width)]
    root = size // 2 if collective in ("broadcast", "reduce") else 0
    return make_schedule(collective, name, size, root=root, pieces=3, hosts=hosts if name == "hierarchical" else ())


EQUIVALENT = {
    ("allreduce", "binomial"): "a rank adds two children's buffers in the other order, or serves them in another",
    ("reduce", "binomial"): "the same",
    ("broadcast", "binomial"): "the root serves another child first",
    ("broadcast", "scatter-allgather"): "the same, while it deals out",
    ("allgather", "bruck"): "both rounds pass on what the rank brought itself",
    ("alltoall", "bruck"): "both rounds pass on what the rank brought itself",
    ("alltoall", "pairwise"): "no step needs what another one brought, and the partners wait",
}
"""Schedules of which some steps may change places, and why: their result is still that of the collective, though an
addition may round otherwise.  Everywhere else a swap is refused."""


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_swapped_steps_are_refused_where_it_matters(collective: str, name: str) -> None:
    """Two neighbouring steps of one rank change places; the check and the judge agree on what still works."""
    refused = passed = 0
    for size in MUTANT_SIZES:
        schedule = mutable_schedule(collective, name, size)
        places = [(rank, step) for rank in range(size) for step in range(len(schedule.steps(rank)) - 1)]
        for rank, step in places if len(places) <= 40 else random.Random(size).sample(places, 40):
            mutant = spoilt(schedule)
            program = mutant.programs[rank]
            program[step], program[step + 1] = program[step + 1], program[step]
            if is_right(mutant):
                check_schedule(mutant)
                passed += 1
            else:
                message = refusal(mutant)
                assert PLACE.match(message) or DEADLOCK.match(message), message
                refused += 1
    has_steps = any(len(make_schedule(collective, name, 8).steps(rank)) > 1 for rank in range(8))
    assert (refused > 0) == has_steps
    assert passed == 0 or (collective, name) in EQUIVALENT


# --- the words ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """A schedule written out."""

    collective: str
    programs: tuple[tuple[Step, ...], ...]
    num_chunks: int = 1
    setting: Setting = field(default_factory=lambda: Setting(1))

    @property
    def size(self) -> int:
        return len(self.programs)

    def steps(self, rank: int) -> tuple[Step, ...]:
        return self.programs[rank]


def to(rank: int, *chunks: int) -> Send:
    return Send(rank, chunks or (0,))


def got(rank: int, *chunks: int, op: str = "copy") -> Receive:
    return Receive(rank, chunks or (0,), op)  # type: ignore[arg-type]


def added(rank: int, *chunks: int) -> Receive:
    return got(rank, *chunks, op="add")


SPOILT_BY_HAND: dict[str, tuple[ByHand, str]] = {
    "deadlock": (
        ByHand("allreduce", (((to(1),), (added(1),)), ((to(0),), (added(0),)))),
        "rank 0, step 0: deadlock: rank 0, step 0 waits for rank 1 (chunk 0 to it); rank 1, step 0 waits for rank 0 ",
    ),
    "a longer deadlock": (
        ByHand("broadcast", (((got(2),), (to(1),)), ((got(0),), (to(2),)), ((got(1),), (to(0),)))),
        "rank 0, step 0: deadlock: rank 0, step 0 waits for rank 2 (chunk 0 from it); rank 1, step 0 waits for rank 0",
    ),
    "never sent": (
        ByHand("broadcast", ((), ((got(0),),))),
        "rank 1, step 0, chunk 0: waits for rank 0, which never sends it",
    ),
    "never received": (
        ByHand("broadcast", (((to(1),), (to(1),)), ((got(0),),))),
        "rank 0, step 1, chunk 0: sends to rank 1 what that never receives",
    ),
    "other chunks": (
        ByHand("broadcast", (((to(1, 0, 1),),), ((got(0, 1, 0),),)), num_chunks=2),
        "rank 1, step 0, chunks 1, 0: is awaited from rank 0, but rank 0 sends chunks 0, 1 in its step 0",
    ),
    "overwritten in flight": (
        ByHand("allreduce", (((to(1), got(1)),), ((to(0), got(0)),))),
        "rank 0, step 0, chunk 0: what arrives from rank 1 would overwrite it while it is being sent",
    ),
    "received twice": (
        ByHand("broadcast", (((to(1), to(1)),), ((got(0), got(0)),))),
        "rank 1, step 0, chunk 0: what arrives from rank 0 would overwrite it while it is received a second time",
    ),
    "added and folded": (
        ByHand("allreduce", (((added(1), got(1, op="fold")),), ((to(0), to(0)),))),
        "rank 0, step 0, chunk 0: it is added to and folded in one step",
    ),
    "not there yet": (
        ByHand("broadcast", (((got(1),),), ((to(0),),))),
        "rank 1, step 0, chunk 0: sends to rank 0 what this rank does not have yet",
    ),
    "added to nothing": (
        ByHand("broadcast", (((to(1),),), ((added(0),),))),
        "rank 1, step 0, chunk 0: adds rank 0's to what this rank does not have yet",
    ),
    "added twice": (
        ByHand("allreduce", (((to(1), added(1)), (to(1), added(1))), ((to(0), added(0)), (to(0), added(0))))),
        "rank 1, step 1, chunk 0: the contribution of ranks 0, 1 is added twice with what arrives from rank 0",
    ),
    "missing": (
        ByHand("allreduce", (((to(1), added(1)),), ((to(0), added(0)),), ())),
        "rank 0, step 0, chunk 0: ends without the contribution of rank 2",
    ),
    "overwritten": (
        ByHand("reduce", (((got(1),),), ((to(0),),))),
        "rank 0, step 0, chunk 0: ends without the contribution of rank 0, which rank 0 overwrote in its step 0",
    ),
    "never arrives": (
        ByHand("allgather", (((to(1, 0),),), ((got(0, 0),),)), num_chunks=2),
        "rank 0, step 0, chunk 1: never arrives here",
    ),
    "no chunks": (
        ByHand("broadcast", (((Send(1, ()),),), ((Receive(0, ()),),))),
        "rank 0, step 0: sends to rank 1 a message without chunks",
    ),
    "a chunk that is not": (
        ByHand("broadcast", (((to(1, 3),),), ((got(0, 3),),))),
        "rank 0, step 0, chunk 3: sends to rank 1 what is none of chunks 0 to 0",
    ),
    "an op that is not": (
        ByHand("broadcast", (((to(1),),), ((got(0, op="xor"),),))),
        "rank 1, step 0, chunk 0: 'xor' is none of copy, add, fold",
    ),
    "itself": (ByHand("broadcast", (((to(0), got(0)),), ())), "rank 0, step 0, chunk 0: sends to itself"),
    "nobody": (
        ByHand("broadcast", ((), ((got(-1),),))),
        "rank 1, step 0, chunk 0: receives from rank -1; there are ranks 0 to 1",
    ),
}


@pytest.mark.parametrize("case", SPOILT_BY_HAND)
def test_the_place_is_named(case: str) -> None:
    schedule, words = SPOILT_BY_HAND[case]
    with pytest.raises(CheckError) as caught:
        check_schedule(schedule)
    head = f"{schedule.collective} schedule of {schedule.size} ranks: "
    assert str(caught.value).startswith(head + words), str(caught.value)


def test_a_long_deadlock_names_some_ranks_and_counts_the_others() -> None:
    ring = ByHand("allreduce", tuple(((to((r + 1) % 20),), (added((r - 1) % 20),)) for r in range(20)))
    with pytest.raises(CheckError, match=r"rank 7, step 0 waits for rank 8 \(chunk 0 to it\); and 12 more$"):
        check_schedule(ring)


def test_what_is_brought_and_promised_by_hand() -> None:
    def of(collective: str, name: str, rank: int) -> tuple[dict[int, int], dict[int, int]]:
        schedule = make_schedule(collective, name, 2, root=1 if collective in ("broadcast", "reduce") else 0)
        return brought(schedule, rank), promised(schedule, rank)

    assert of("allreduce", "ring", 1) == ({0: 0b10, 1: 0b10}, {0: 0b11, 1: 0b11})
    assert of("reduce_scatter", "ring", 1) == ({0: 0b10, 1: 0b10}, {1: 0b11})
    assert of("allgather", "ring", 1) == ({1: 0b10}, {0: 0b01, 1: 0b10})
    assert of("broadcast", "scatter-allgather", 0) == ({}, {0: 0b10, 1: 0b10})
    assert of("broadcast", "scatter-allgather", 1) == ({0: 0b10, 1: 0b10}, {0: 0b10, 1: 0b10})
    assert of("reduce", "binomial", 0) == ({0: 0b01}, {})
    assert of("reduce", "binomial", 1) == ({0: 0b10}, {0: 0b11})
    # Chunk 2s + d goes from s to d.
    assert of("alltoall", "bruck", 0) == ({0: 0b01, 1: 0b01}, {0: 0b01, 2: 0b10})
    assert of("alltoall", "bruck", 1) == ({2: 0b10, 3: 0b10}, {1: 0b01, 3: 0b10})


# --- time in units ------------------------------------------------------------------------------------------


def length(schedule: Schedule) -> int:
    return 1 + max((begin for rank in starts(schedule) for step in rank for begin in step), default=-1)


def test_units_of_time_are_those_of_the_textbook() -> None:
    for size in (1, 2, 3, 4, 6, 8, 13, 16):
        rounds = (size - 1).bit_length()
        assert length(make_schedule("allreduce", "ring", size)) == 2 * (size - 1)
        assert length(make_schedule("allgather", "bruck", size)) == rounds
        assert length(make_schedule("broadcast", "binomial", size)) == rounds
        assert length(make_schedule("reduce", "binomial", size)) == rounds
        assert length(make_schedule("alltoall", "pairwise", size)) == size - 1
        assert length(make_schedule("alltoall", "bruck", size)) == rounds
    for size in (2, 4, 8, 16):
        rounds = size.bit_length() - 1
        assert length(make_schedule("allreduce", "recursive-doubling", size)) == rounds
        assert length(make_schedule("allreduce", "rabenseifner", size)) == 2 * rounds
    for size in (3, 7, 15):
        for pieces in (1, 4):
            depth = size.bit_length() - 1
            schedule = make_schedule("allreduce", "pipelined-tree", size, pieces=pieces)
            assert length(schedule) == 2 * depth + pieces - 1


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_both_ends_of_a_message_begin_together(collective: str, name: str) -> None:
    schedule = mutable_schedule(collective, name, 12)
    begun = starts(schedule)
    sends, receives = Counter[tuple[int, int, int, tuple[int, ...]]](), Counter[tuple[int, int, int, tuple[int, ...]]]()
    for rank in range(12):
        for messages, times in zip(schedule.steps(rank), begun[rank], strict=True):
            for m, time in zip(messages, times, strict=True):
                if isinstance(m, Send):
                    sends[time, rank, m.to, tuple(m.chunks)] += 1
                else:
                    receives[time, m.source, rank, tuple(m.chunks)] += 1
    assert sends == receives
