"""A fully connected layer by ranges of its outputs: what the layer at once gives, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from windlass import precision
from windlass.precision import forward, rows
from windlass.precision.stored import Stored

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
RANGES = {
    1 << 20: [],
    20: [(0, 2), (0, 4), (2, 4), (4, 6), (4, 8), (6, 7), (8, 9)],
    40: [(0, 4), (0, 8), (4, 7), (8, 9)],
}
"""Of 9 outputs from 5 numbers and of 7 from 9, by how many weights may be float32 at once."""


class Watched:
    """A small network under a recipe, whose ranges are noted as their gradients come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, large: int, **settings: Any) -> None:
        for module in (forward, rows):
            monkeypatch.setattr(module, "LARGE", large)
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Linear(7, 2, bias=False))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        settings = {"store_gradients": True, **settings}
        self.under = precision.apply(self.model, self.optimizer, "fixed16", **settings)
        self.ranges: list[tuple[int, int]] = []
        self._take = self.under.forward.take_rows
        if self._take is not None:
            monkeypatch.setattr(self.under.forward, "take_rows", self._note)

    def _note(self, entry: Stored, part: slice, gradient: Tensor) -> None:
        assert self._take is not None
        self.ranges.append((part.start, part.stop))
        self._take(entry, part, gradient)

    def gradients(self) -> list[Tensor]:
        return [entry.wide_gradient(torch.empty(entry.codes.shape)) for entry in self.under.stored]

    def run(self) -> Tensor:
        output: Tensor = self.model(X)
        output.square().mean().backward()  # type: ignore[no-untyped-call]
        return output


@pytest.mark.parametrize("large", [20, 40])
@pytest.mark.parametrize("times", [1, 2])
def test_ranges_are_the_whole(large: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Watched(monkeypatch, 1 << 20)
    for _ in range(times):
        expected = whole.run()
    ranged = Watched(monkeypatch, large)
    for _ in range(times):
        found = ranged.run()
    assert sorted(whole.ranges) == [] and sorted(ranged.ranges) == sorted(RANGES[large] * times)
    # a narrower product may add in another order, after which a number may be rounded the other way
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-9)
    for ours, theirs in zip(ranged.gradients(), whole.gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-10)
        assert theirs.abs().max() > 2**-6
    for place, counters in whole.under.counters.items():
        assert ranged.under.counters[place].elements == counters.elements, place
    ranged.optimizer.step()
    assert [entry.rounded for entry in ranged.under.stored] == [0] * 5


def test_rounds_of_a_step_draw_their_own_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 20)
    for count in (1, 2):
        watched.run()
        assert [entry.rounded for entry in watched.under.stored] == [count] * 5
    codes = watched.gradients()
    again = Watched(monkeypatch, 20)
    again.run()
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(codes, again.gradients(), strict=True))


def test_gradients_in_float32_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 20, store_gradients=False)
    watched.run()
    assert watched.ranges == [] and all(p.grad is not None for p in watched.model.parameters())


def test_evaluation_and_shown_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ranged = Watched(monkeypatch, 1 << 20), Watched(monkeypatch, 20)
    with torch.no_grad():
        outputs = [watched.model.eval()(X) for watched in (whole, ranged)]
    torch.testing.assert_close(*outputs, rtol=0, atol=2**-9)
    with ranged.under.weights():
        ranged.model(X).sum().backward()
    assert ranged.ranges == []


def test_weights_that_changed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, 20)
    loss = watched.model(X).sum()
    with watched.under.weights():
        pass
    with pytest.raises(RuntimeError, match="was changed between"):
        loss.backward()
