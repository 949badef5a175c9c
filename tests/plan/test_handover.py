"""Rounds send every sample once, and the variable batch updates after the samples it says."""

from __future__ import annotations

import itertools

import pytest

from windlass.errors import ConfigError
from windlass.plan.handover import make_rounds, variable_batch
from windlass.plan.placement import Handover

COUNTS = [(4, 4), (4, 3), (5,), (3, 3, 2), (1, 0), (7, 7, 6, 6)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("scheme", ["b", "c"])
def test_every_sample_is_sent_once_and_in_order(scheme: str, counts: tuple[int, ...]) -> None:
    rounds = make_rounds(Handover(scheme, "fc"), counts)
    for member, count in enumerate(counts):
        sent = [index for round_ in rounds for index in range(*round_.spans[member])]
        assert sent == list(range(count))
    assert sum(round_.size for round_ in rounds) == sum(counts)
    assert rounds[-1].updates and [round_.updates for round_ in rounds].count(True) == 1
    assert {round_.share for round_ in rounds} == {sum(counts)}


def test_scheme_b_is_one_sender_a_round_and_c_all_in_every_round() -> None:
    for round_, (start, stop) in itertools.product(make_rounds(Handover("c", "fc"), (8, 8)), [(0, 4)]):
        assert [b - a for a, b in round_.spans] == [stop - start] * 2
    assert [[b - a for a, b in r.spans] for r in make_rounds(Handover("b", "fc"), (8, 8))] == [[8, 0], [0, 8]]


@pytest.mark.parametrize("scheme", ["b", "c"])
@pytest.mark.parametrize(
    ("batch", "head", "members"),
    [(256, 128, 2), (512, 128, 4), (512, 256, 4), (256, 128, 1), (256, 64, 2), (240, 80, 4)],
)
def test_the_head_is_updated_after_its_batch(scheme: str, batch: int, head: int, members: int) -> None:
    counts = [batch // members] * members
    if scheme == "b" and members % (batch // head):
        with pytest.raises(ConfigError, match="take hybrid:c"):
            variable_batch(scheme, "fc", batch=batch, head_batch=head, members=members)
        return
    rounds = make_rounds(variable_batch(scheme, "fc", batch=batch, head_batch=head, members=members), counts)
    seen = 0
    for round_ in rounds:
        seen += round_.size
        assert round_.share == head
        if round_.updates:
            assert seen == head
            seen = 0
    assert seen == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="take hybrid:b or hybrid:c"):
        variable_batch("a", "fc", batch=256, head_batch=128, members=2)
    with pytest.raises(ConfigError, match="must divide"):
        variable_batch("c", "fc", batch=256, head_batch=100, members=2)
    with pytest.raises(ConfigError, match="each of the 2 members sends once"):
        make_rounds(Handover("b", "fc", rounds=3), (4, 4))
