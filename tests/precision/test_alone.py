from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from windlass.precision import apply
from windlass.precision.alone import is_alone


def asked(run: Callable[[Tensor], Tensor], *, gradient: Tensor | None = None) -> list[bool]:
    """What a hook of `run`'s argument finds at every call."""
    found: list[bool] = []
    x = torch.randn(4, 6, requires_grad=True) * 1
    x.register_hook(lambda g: found.append(is_alone(g)))  # type: ignore[no-untyped-call]
    run(x).backward(gradient)  # type: ignore[no-untyped-call]
    return found


class Hoarder(torch.autograd.Function):
    """Passes its gradient on, and keeps it."""

    kept: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        Hoarder.kept.append(gradients[0])
        return gradients[0]


def test_what_an_operator_has_made_for_one_is_alone() -> None:
    assert asked(lambda x: (x.tanh() ** 2).sum()) == [True]
    assert asked(lambda x: (x**2).sum() + (x**3).sum()) == [True]


def test_what_somebody_else_has_is_not() -> None:
    ones = torch.ones(4, 6)
    assert asked(lambda x: x, gradient=ones) == [False]
    assert asked(lambda x: x.sum()) == [False], "expanded from one number"
    assert asked(lambda x: (x.view(24) ** 2).sum()) == [False], "a view of another gradient"
    assert asked(lambda x: (Hoarder.apply(x) ** 2).sum()) == [False]  # type: ignore[no-untyped-call]


def test_a_gradient_that_an_earlier_hook_keeps_is_not() -> None:
    kept: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        y = x.view(4, 6)
        z = y + 0
        z.register_hook(kept.append)  # type: ignore[no-untyped-call]
        return (z**2).sum()

    assert asked(run) == [False]
    assert torch.isfinite(kept[0]).all()


def test_both_branches_of_a_sum_have_one_gradient() -> None:
    found: list[bool] = []
    a, b = (torch.randn(4, 6, requires_grad=True) * 1 for _ in range(2))
    for x in (a, b):
        x.register_hook(lambda g: found.append(is_alone(g)))  # type: ignore[no-untyped-call]
    ((a + b) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    assert found == [False, True], "the first finds the second waiting"


def test_a_retained_gradient_is_not_written() -> None:
    found: list[tuple[bool, int]] = []
    a = torch.randn(4, 6, requires_grad=True) * 1
    a.register_hook(lambda g: found.append((is_alone(g), g.data_ptr())))  # type: ignore[no-untyped-call]
    b = a + 0
    b.retain_grad()
    (b**2).sum().backward()  # type: ignore[no-untyped-call]
    assert b.grad is not None
    alone, address = found[0]
    assert not alone or address != b.grad.data_ptr(), "autograd keeps a copy"


class Branches(nn.Module):
    """Sums, a concatenation, a view and a fan-out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.relu, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Of 8x8 images."""
        x = self.relu(self.first(x))
        left, right = self.left(x), self.right(x)
        both = torch.cat([left + right + x, self.relu(right)], dim=1)
        logits: Tensor = self.last(self.pool(both).flatten(1))
        return logits


def test_a_network_learns_the_same_where_gradients_are_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []
    for written in (True, False):
        if not written:
            monkeypatch.setattr("windlass.precision.sites.is_alone", lambda gradient: False)
        torch.manual_seed(3)
        model = Branches()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        lowered = apply(model, optimizer, "fixed16")
        kept: list[Tensor] = []
        for _ in range(3):
            output = model(torch.randn(4, 1, 8, 8))
            output.register_hook(lambda g, kept=kept: kept.append(g))
            torch.nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0])).backward()  # type: ignore[no-untyped-call]
            kept[-1] = kept[-1].clone()
            optimizer.step()
            optimizer.zero_grad()
        learned.append([entry.codes for entry in lowered.stored] + kept)
    for written_one, other in zip(*learned, strict=True):
        assert torch.equal(written_one, other)
