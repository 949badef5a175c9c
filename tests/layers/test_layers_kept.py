"""What the forward pass keeps of the weights for the gradient of the input: when, and that it changes nothing."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from windlass.kernels import convolve, workspace
from windlass.layers import conv2d
from windlass.layers.operators import BACKWARD_INPUT, conv2d_keeping
from windlass.plan.convolution import ConvShape

CASES: dict[str, tuple[int, int, int, int, str]] = {
    # channels in and out, groups, filter, algorithm
    "dense": (20, 33, 1, 5, "fft-16"),
    "grouped": (8, 12, 4, 7, "fft-32"),
    "depthwise": (20, 20, 20, 15, "fft-32"),
    "depthwise with a multiplier": (6, 18, 6, 15, "fft-32"),
}
ALL = pytest.mark.parametrize("name", CASES)
GEOMETRY: tuple[Any, ...] = ((1, 1), (2, 2, 2, 2), (1, 1), 1)
"""Of the case "dense", for the operators."""

KEEPING: Any = conv2d_keeping


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each gradient of an input was made of what was kept."""
    calls: list[bool] = []
    original = convolve.backward_input

    def counting(*args: Any, **named: Any) -> None:
        calls.append(named.get("kept") is not None)
        original(*args, **named)

    monkeypatch.setattr(convolve, "backward_input", counting)
    yield calls


def layer(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Any]]:
    into, out, groups, kernel, algorithm = CASES[name]
    x = torch.randn(2, into, 19, 23, dtype=dtype, requires_grad=True)
    weight = torch.randn(out, into // groups, kernel, kernel, dtype=dtype, requires_grad=True)
    return x, weight, {"padding": kernel // 2, "groups": groups, "algorithm": algorithm}


def gradients(x: Tensor, weight: Tensor, how: dict[str, Any]) -> tuple[Tensor, ...]:
    y = conv2d(x, weight, relu=True, **how)
    torch.manual_seed(1)
    return y, *torch.autograd.grad(y, (x, weight), torch.randn_like(y))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_changes_no_bit(name: str, dtype: torch.dtype, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, how = layer(name, dtype)
    kept = gradients(x, weight, how)
    monkeypatch.setattr(convolve, "LARGEST_KEPT", 0)
    anew = gradients(x, weight, how)
    assert used == [True, False]
    for one, other in zip(kept, anew, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("direction", ["input", "weight"])
def test_kept_is_only_what_will_be_used(direction: str, used: list[bool]) -> None:
    """Nothing without a gradient of the input by the same algorithm; too much is not kept either."""
    x, weight, how = layer("dense")
    how["algorithm"] = "fft-16/fft-32/fft-16" if direction == "input" else "fft-16/fft-16/direct"
    gradients(x, weight, how)
    assert used == [direction == "weight"]


def test_nothing_is_kept_without_a_gradient_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counting(size: int) -> Any:
        taken.append(size)
        return workspace.lasting(size)

    monkeypatch.setattr("windlass.layers.operators.lasting", counting)
    x, weight, how = layer("dense")
    conv2d(x.detach(), weight, **how)
    with torch.no_grad():
        conv2d(x, weight, **how)
    assert not taken
    conv2d(x, weight, **how)
    conv2d(x, weight.detach(), **how)
    assert len(taken) == 2


def test_no_more_is_kept_than_is_said() -> None:
    """Spectra take 8 bytes for each of n²/2 + 2 frequencies, at most 72 MiB; of 193 tiles and more none are kept."""
    for channels, algorithm, is_kept in ((64, "fft-64", True), (96, "fft-64", False), (256, "fft-16", True)):
        shape = ConvShape(batch=1, in_channels=channels, height=9, width=9, out_channels=channels, kernel=(5, 5))
        num = convolve.kept_floats(algorithm, shape=shape)
        n = int(algorithm[4:])
        least = 2 * (n**2 // 2 + 2) * channels**2
        assert (least <= num <= 1.02 * least) if is_kept else num == 0
        assert 4 * num <= convolve.LARGEST_KEPT
    shape = ConvShape(batch=192, in_channels=16, height=9, width=9, out_channels=16, kernel=(5, 5))
    assert convolve.kept_floats("fft-16", shape=shape) > 0
    assert convolve.kept_floats("fft-16", shape=dataclasses.replace(shape, batch=193)) == 0
    assert convolve.kept_floats("direct", shape=shape) == convolve.kept_floats("torch", shape=shape) == 0


def test_changed_weights_are_refused() -> None:
    x, weight, how = layer("dense")
    y = conv2d(x, weight, **how)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(y.sum())


def test_every_call_has_its_own(used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls before the first gradient, weights replaced between them, gradients in the other order."""
    x, weight, how = layer("dense")
    other = torch.randn_like(weight).requires_grad_()

    def both() -> list[Tensor]:
        first, second = conv2d(x, weight, **how), conv2d(x, other, **how)
        return [torch.autograd.grad(y.sum(), x)[0] for y in (second, first)]

    kept = both()
    monkeypatch.setattr(convolve, "LARGEST_KEPT", 0)
    anew = both()
    assert used == [True, True, False, False]
    for one, expected in zip(kept, anew, strict=True):
        assert torch.equal(one, expected)
    assert not torch.equal(*kept)


def test_it_goes_with_the_graph() -> None:
    """After the gradient its memory is the next call's; a graph that is retained keeps it."""
    workspace.free_scratch()
    x, weight, how = layer("dense")
    y = conv2d(x, weight, **how)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    gc.collect()
    assert not workspace._idle
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)
    del y
    gc.collect()
    assert sum(len(blocks) for blocks in workspace._idle.values()) == 1


@ALL
def test_gradients_of_the_gradients(name: str, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, how = layer(name)

    def second() -> tuple[Tensor, ...]:
        y = conv2d(x, weight, **how)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    kept = second()
    assert used[0]
    monkeypatch.setattr(convolve, "LARGEST_KEPT", 0)
    for one, other in zip(kept, second(), strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_gradients(used: list[bool]) -> None:
    """vmap of the backward pass: the same weights for all of them."""
    x, weight, how = layer("dense")
    y = conv2d(x, weight, **how)
    grads = torch.randn(3, *y.shape)
    (together,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    assert used
    assert all(used)
    for one, grad in zip(together, grads, strict=True):
        assert torch.equal(one, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


def test_transforms_make_it_anew(used: list[bool]) -> None:
    x, weight, how = layer("dense")
    (expected,) = torch.autograd.grad(conv2d(x, weight, **how).sum(), x)
    got = torch.func.grad(lambda x: conv2d(x, weight.detach(), **how).sum())(x.detach())
    assert used == [True, False]
    assert torch.equal(got, expected)


def test_what_hooks_have_changed_is_not_used(used: list[bool]) -> None:
    """Saved tensors stored in less are made anew; those that were only moved are used."""
    x, weight, how = layer("dense")
    (expected,) = torch.autograd.grad(conv2d(x, weight, **how).sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.double() if t.dim() == 1 else t):
        y = conv2d(x, weight, **how)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    with torch.autograd.graph.save_on_cpu():
        y = conv2d(x, weight, **how)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert used == [True, False, True]


def test_checkpointed_layers(used: list[bool]) -> None:
    x, weight, how = layer("dense")
    (expected,) = torch.autograd.grad(conv2d(x, weight, **how).sum(), x)
    for reentrant in (False, True):
        y: Any = checkpoint(lambda x: conv2d(x, weight, **how), x, use_reentrant=reentrant)
        x.grad = None
        torch.autograd.backward(y.sum())
        assert x.grad is not None
        assert torch.equal(x.grad, expected)
    assert used == [True] * 3


def test_opcheck() -> None:
    x, weight, _ = layer("dense")
    y, kept = KEEPING(x.detach(), weight.detach(), None, *GEOMETRY, "fft-16", False)
    assert kept is not None
    grad = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(BACKWARD_INPUT, (grad, weight, x.shape[2:], *GEOMETRY, "fft-16", False, kept))
    torch.library.opcheck(BACKWARD_INPUT, (grad, weight, x.shape[2:], *GEOMETRY, "fft-16", False))


def test_the_operator_ignores_what_is_of_another_algorithm(used: list[bool]) -> None:
    x, weight, _ = layer("dense")
    x, weight = x.detach(), weight.detach()
    y, kept = KEEPING(x, weight, None, *GEOMETRY, "fft-16", False)
    for algorithm, expected in (("fft-16", True), ("fft-32", False), ("direct", False)):
        used.clear()
        dx = BACKWARD_INPUT(y, weight, x.shape[2:], *GEOMETRY, algorithm, False, kept)
        assert used == [expected]
        assert torch.equal(dx, BACKWARD_INPUT(y, weight, x.shape[2:], *GEOMETRY, algorithm, False))


def test_a_batch_of_what_was_kept(used: list[bool]) -> None:
    """vmap over everything: every sample has weights of its own, and nothing kept is used."""
    weights = torch.randn(2, 33, 20, 5, 5)
    x = torch.randn(2, 1, 20, 9, 9)
    made = [KEEPING(*pair, None, *GEOMETRY, "fft-16", False) for pair in zip(x, weights, strict=True)]
    y, kept = (torch.stack([pair[i] for pair in made]) for i in (0, 1))

    def of(y: Tensor, weight: Tensor, kept: Tensor) -> Any:
        return BACKWARD_INPUT(y, weight, (9, 9), *GEOMETRY, "fft-16", False, kept)

    together = torch.vmap(of)(y, weights, kept)
    assert not any(used)
    for i in range(2):
        alone = of(y[i], weights[i], kept[i])
        # Groups are convolutions of their own: the same sums.
        assert np.array_equal(together[i].numpy(), alone.numpy())
