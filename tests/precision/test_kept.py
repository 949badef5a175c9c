from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.networks import build_network
from windlass.precision import apply, quantize
from windlass.precision.kept import SMALL_PLANE, Kept


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], features: int = 8) -> None:
        super().__init__()
        self.run = run
        self.one, self.two = nn.Linear(features, features), nn.Linear(features, features)
        self.relu, self.tanh, self.pool = nn.ReLU(), nn.Tanh(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def net(run: Callable[[Any, Tensor], Tensor], recipe: str = "fixed16") -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    model = Net(run)
    kept: list[tuple[Tensor, Tensor]] = []
    apply(model, None, recipe).forward.kept.on_keep = lambda x, of: kept.append((x.detach().clone(), of))
    return model, kept


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (16, 8)), generator=torch.Generator().manual_seed(2))


def test_a_result_is_kept_once_in_its_own_format() -> None:
    model, kept = net(lambda net, x: net.two(net.relu(net.one(x))))
    x = inputs()
    y = model(x)
    assert [(of.dtype, of.shape) for _, of in kept] == [(torch.float32, (16, 8)), (torch.int16, (16, 8))]
    assert kept[0][1].data_ptr() == x.data_ptr()
    assert torch.equal(kept[1][1], (kept[1][0] * 2**10).to(torch.int16))
    y.sum().backward()


def test_a_layer_that_keeps_its_result_keeps_it_as_it_was_rounded() -> None:
    model, kept = net(lambda net, x: net.two(net.tanh(net.one(x))))
    model(inputs())
    assert [of.dtype for _, of in kept] == [torch.float32, torch.int16]
    model, kept = net(lambda net, x: functional.softmax(net.one(x), 1))
    model(inputs())
    assert [of.dtype for _, of in kept] == [torch.float32, torch.int16]


def test_what_is_inside_a_layer_is_kept_in_half_precision() -> None:
    for recipe, dtype in (("fixed16", torch.float16), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model, kept = net(lambda net, x: functional.silu(functional.gelu(net.one(x))), recipe)
        model.one.weight.requires_grad_(True)
        model(inputs())
        assert {of.dtype for _, of in kept[1:]} == {torch.int16 if recipe == "fixed16" else dtype}

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 3).exp() * 0.1

    model, kept = net(lambda net, x: Inside.forward(net, x))
    inner = nn.Sequential(nn.Linear(8, 8), Inside())
    lowered = apply(inner)
    kept = []
    lowered.forward.kept.on_keep = lambda x, of: kept.append((x, of))
    inner(inputs())
    assert [of.dtype for _, of in kept] == [torch.float32, torch.float16]


def test_weights_are_not_kept_and_must_not_change_meanwhile() -> None:
    torch.manual_seed(1)
    model = Net(lambda net, x: net.two(net.one(x)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    apply(model, optimizer)
    x = inputs().requires_grad_()
    one, other = model(x).sum(), model(x).sum()
    one.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"two.weight was changed between the forward and the backward pass"):
        other.backward()


def test_a_change_after_saving_is_noticed() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.one(x)
        z: Tensor = y.sigmoid()
        return z

    class Spoils(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.sigmoid()
            y.mul_(2.0)
            return y

    model = nn.Sequential(nn.Linear(8, 8), Spoils())
    apply(model)
    loss = model(inputs()).sum()
    with pytest.raises(RuntimeError, match="changed in place after it was saved"):
        loss.backward()
    model_, _ = net(run)
    model_(inputs()).sum().backward()


@pytest.mark.parametrize(
    ("run", "shape", "dtype"),
    [
        (lambda x: functional.max_pool2d(x, 2), (2, 3, 8, 8), torch.int16),
        (lambda x: functional.max_pool2d(x, 8, 1), (1, 1, 256, 256), torch.int16),
        (lambda x: functional.max_pool2d(x, 8, 1), (1, 1, 257, 256), torch.int32),
        (lambda x: functional.max_pool3d(x, 2), (1, 2, 50, 50, 50), torch.int32),
        (lambda x: functional.max_pool3d(x, 2), (1, 2, 8, 6, 4), torch.int16),
        (lambda x: functional.max_pool1d(x, 2), (2, 3, 80), torch.int16),
        (lambda x: functional.adaptive_max_pool2d(x, 3), (2, 3, 20, 20), torch.int16),
        (lambda x: nn.MaxPool2d(3, return_indices=True)(x)[0], (3, 12, 12), torch.int16),
    ],
)
def test_indices_of_pooling_point_where_they_did(run: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    class Pools(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = run(x * 1.0)
            return y

    model = Pools()
    lowered = apply(model, None, "activations=float16")
    kept: list[Tensor] = []
    lowered.forward.kept.on_keep = lambda x, of: kept.append(of)
    x = inputs(*shape)
    x, plain = x.half().float().requires_grad_(), x.half().float().requires_grad_()
    model(x).square().sum().backward()
    run(plain).square().sum().backward()
    assert x.grad is not None and plain.grad is not None
    torch.testing.assert_close(x.grad, plain.grad, rtol=2**-9, atol=0)
    assert dtype in {of.dtype for of in kept} and SMALL_PLANE == 256 * 256


def test_other_indices_stay() -> None:
    index = torch.full((16, 8, 2), 7)

    def run(net: Any, x: Tensor) -> Tensor:
        return net.one(x).unsqueeze(2).expand(16, 8, 2).gather(1, index)  # type: ignore[no-any-return]

    model, kept = net(run)
    model(inputs()).sum().backward()
    assert all(of.dtype != torch.int64 or of.data_ptr() == index.data_ptr() for _, of in kept)
    assert not any(of.dtype == torch.int32 for _, of in kept)


def test_numbers_of_no_format_lose_their_knowledge() -> None:
    mask = torch.arange(8) > 3
    model, kept = net(lambda net, x: net.one(x).masked_fill(mask, -1e3).square() * 0.001)
    x = inputs()
    model(x).sum().backward()
    filled = [of for _, of in kept if of.dtype == torch.float16]
    assert filled and float(filled[0].min()) == -1000.0


def test_views_are_kept_in_the_storage_that_they_share() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.one(x)
        a, b = y.chunk(2, 1)
        return a.sigmoid() * b.T.reshape(4, 16).T  # type: ignore[no-any-return]

    model, kept = net(run)
    twin = Net(run)
    twin.load_state_dict(model.state_dict())
    x = inputs()
    for network in (model, twin):
        network(x).sum(1).mean().backward()
    one, other = model.one.weight.grad, twin.one.weight.grad
    assert one is not None and other is not None
    torch.testing.assert_close(one, other, atol=0.002, rtol=0)
    assert sum(of.numel() == 128 and of.dtype == torch.int16 for _, of in kept) <= 2


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of everything that a graph keeps and nobody else holds: what letting go of the graph gives back."""
    seen: dict[int, int] = {}

    def visit(fn: Any, done: set[Any]) -> None:
        if fn is None or fn in done:
            return
        done.add(fn)
        for name in dir(fn):
            if name.startswith("_raw_saved"):
                raws = getattr(fn, name)
                for raw in raws if isinstance(raws, tuple) else [raws]:
                    held.append(raw)
        for next_fn, _ in fn.next_functions:
            visit(next_fn, done)

    def keep(x: Tensor) -> Tensor:
        kept.append((x, x))
        return x

    held: list[Any] = []
    kept: list[tuple[Tensor, Tensor]] = []
    lowered = getattr(model.forward, "forward", None)
    if lowered is not None:
        lowered.kept.on_keep = lambda x, of: kept.append((x, of))
        y = model(x)
        seen = {of.untyped_storage().data_ptr(): of.untyped_storage().nbytes() for _, of in kept}
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)
        weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        seen = {of.untyped_storage().data_ptr(): of.untyped_storage().nbytes() for _, of in kept}
        seen = {key: value for key, value in seen.items() if key not in weights}
    seen.pop(x.untyped_storage().data_ptr(), None)
    visit(y.grad_fn, set())
    assert held
    return sum(seen.values())


@pytest.mark.parametrize(("name", "channels", "size"), [("resnet18", 3, 32), ("lenet5", 1, 32)])
@pytest.mark.parametrize("recipe", ["fixed16", "bfloat16"])
def test_what_is_kept_really_halves(name: str, channels: int, size: int, recipe: str) -> None:
    x = inputs(16, channels, size, size)
    plain = build_network(name, num_classes=10, in_channels=channels, image_size=size)
    lowered = build_network(name, num_classes=10, in_channels=channels, image_size=size)
    apply(lowered, None, recipe)
    before, after = saved_bytes(plain, x), saved_bytes(lowered, x)
    assert 0.4 * before < after < 0.56 * before


def test_the_graph_lets_go_of_what_it_kept() -> None:
    model, _ = net(lambda net, x: net.two(net.tanh(net.one(x))))
    kept: Kept = model.forward.forward.kept  # type: ignore[attr-defined]
    kept.on_keep = None
    loss = model(inputs()).sum()
    assert kept._known
    loss.backward()
    del loss
    gc.collect()
    assert not kept._known and not kept._waiting


def test_backward_may_be_taken_twice() -> None:
    model, _ = net(lambda net, x: net.two(net.tanh(net.one(x))))
    x = inputs().requires_grad_()
    loss = model(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, again)


def test_half_precision_saturates_and_does_not_become_infinite() -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1e5).square().sqrt() * 1e-5

    model = nn.Sequential(nn.Linear(8, 8), Inside())
    lowered = apply(model)
    halves: list[Tensor] = []
    lowered.forward.kept.on_keep = lambda x, of: halves.append(of)
    model(inputs()).sum().backward()
    half = next(of for of in halves if of.dtype == torch.float16)
    assert half.isfinite().all() and float(half.max()) == 65504.0
    assert torch.equal(quantize(half.float(), "float16", "nearest").half(), half)
