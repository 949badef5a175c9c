"""The rounds in which a batch passes from a data-parallel trunk to a model-parallel head.

Source: A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997v2, 2014,
section 4, schemes (b) and (c), and section 4.2, the variable batch.  K members have each a part of the batch:

- b: in round k member k sends its whole part to the others, and all compute the head on it;
- c: in every round each member sends one part in R of what it has (the paper: R = K).

Backward, each member's addend of the gradient goes to the samples' owner, who adds: the mirror.  Scheme (a) is one
round of everything, and needs no rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from windlass.errors import ConfigError
from windlass.plan.layout import bounds
from windlass.plan.placement import Handover

Span = tuple[int, int]
"""Start and stop among a member's own samples."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    Attributes:
        spans: which of its own samples each member sends.
        updates: whether the head's weights are updated after it.
        share: the samples since the update before, up to the next one: what the head's gradient is the mean over.
    """

    spans: tuple[Span, ...]
    updates: bool
    share: int

    @property
    def size(self) -> int:
        """Samples of the round, all members' together."""
        return sum(stop - start for start, stop in self.spans)


def make_rounds(handover: Handover, counts: Sequence[int]) -> tuple[Round, ...]:
    """The rounds of one batch.

    Args:
        handover: scheme b or c.
        counts: each member's samples.

    >>> [round.spans for round in make_rounds(Handover("c", "fc6"), [4, 3])]
    [((0, 2), (0, 2)), ((2, 4), (2, 3))]
    >>> [round.spans for round in make_rounds(Handover("b", "fc6"), [4, 3])]
    [((0, 4), (0, 0)), ((0, 0), (0, 3))]
    """
    number = num_rounds(handover, len(counts))
    if handover.scheme == "b":
        spans = [
            tuple((0, count) if member == turn else (0, 0) for member, count in enumerate(counts))
            for turn in range(number)
        ]
    else:
        cuts = [bounds(count, number) for count in counts]
        spans = [tuple((cut[turn], cut[turn + 1]) for cut in cuts) for turn in range(number)]
    every = handover.update_every or number
    rounds = []
    for turn, own in enumerate(spans):
        first = turn - turn % every
        share = sum(stop - start for other in spans[first : first + every] for start, stop in other)
        rounds.append(Round(own, updates=turn % every == every - 1 or turn == number - 1, share=share))
    return tuple(rounds)


def num_rounds(handover: Handover, members: int) -> int:
    """How many rounds a handover has.

    Raises:
        ConfigError: scheme b with another number of rounds than members.
    """
    if handover.scheme == "b" and handover.rounds not in (0, members):
        raise ConfigError(
            f"handover: in scheme b each of the {members} members sends once, so rounds is {members}, "
            f"got {handover.rounds}"
        )
    return handover.rounds or members


def variable_batch(scheme: str, before: str, *, batch: int, head_batch: int, members: int) -> Handover:
    """The handover whose head is updated after every `head_batch` of `batch` samples.

    Raises:
        ConfigError: the sizes do not fit one another or the scheme.
    """
    if not head_batch or head_batch == batch:
        return Handover(scheme, before)
    if scheme == "a":
        raise ConfigError(
            f"--batch {batch},{head_batch}: scheme a hands all {batch} samples over at once; take hybrid:b or hybrid:c"
        )
    if head_batch > batch or batch % head_batch:
        raise ConfigError(f"--batch {batch},{head_batch}: the second must divide the first")
    updates = batch // head_batch
    if scheme == "c":
        rounds = updates if members % updates else members
        return Handover(scheme, before, rounds=rounds, update_every=rounds // updates)
    if members % updates:
        raise ConfigError(
            f"--batch {batch},{head_batch}: in scheme b the head is updated after whole members' shares of "
            f"{batch // members}; {head_batch} is no multiple of that: take hybrid:c"
        )
    return Handover(scheme, before, update_every=members // updates)
