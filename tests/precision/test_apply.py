from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.networks import build_network
from windlass.networks.lenet import AMPLITUDE, SLOPE
from windlass.precision import FLOAT32, Counters, Key, apply, parse_recipe, quantize

SEED, BATCH = 7, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The definition: every rounding by hand


class By:
    """Rounds what `apply` should, where it should."""

    def __init__(self, recipe: str = "fixed16", seed: int = SEED) -> None:
        self.recipe, self.seed, self.step = parse_recipe(recipe), seed, 0
        self.counters: dict[tuple[str, str], Counters] = {}

    def rounded(self, x: Tensor, role: str, name: str, batch: int = 1) -> Tensor:
        of_error = role == "errors"
        number = self.recipe.error_number(name, 0.0, batch) if of_error else self.recipe.number(role, name)
        key = Key(self.seed, crc32(f"{role}/{name}#0".encode()), self.step)
        counters = None if number == FLOAT32 else self.counters.setdefault((role, name), Counters())
        return quantize(x.detach(), number, self.recipe.rounding, key, counters=counters)

    def site(self, x: Tensor, name: str) -> Tensor:
        y: Tensor = _Site.apply(x, name, self)  # type: ignore[no-untyped-call]
        return y

    def train(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        forward: Callable[[By, dict[str, nn.Parameter], Tensor], Tensor],
        batches: list[tuple[Tensor, Tensor]],
    ) -> None:
        for name, parameter in parameters.items():
            parameter.data = quantize(parameter.data, self.recipe.number("weights", name), "nearest")
        for x, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(forward(self, parameters, x), labels).backward()  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                parameter.grad = self.rounded(parameter.grad, "gradients", name)
            before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            optimizer.step()
            for name, parameter in parameters.items():
                update = self.rounded(parameter.data - before[name], "updates", name)
                parameter.data = self.rounded(before[name] + update, "weights", name)
            self.step += 1


class _Site(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, by: By) -> Tensor:
        ctx.name, ctx.by = name, by
        return by.rounded(x, "activations", name)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.by.rounded(gradients[0], "errors", ctx.name, batch=BATCH), None, None


class _Tanh(torch.autograd.Function):
    """Its result is kept as float16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.kept = y.half().float()
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(gradients[0], ctx.kept)  # type: ignore[no-any-return]


class _Addcmul(torch.autograd.Function):
    """Its first factor is kept as float16."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, sums: Tensor, coefficient: Tensor) -> Tensor:
        ctx.sums, ctx.coefficient = sums.half().float(), coefficient
        return torch.addcmul(bias, sums, coefficient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gradients[0], gradients[0] * ctx.coefficient, gradients[0] * ctx.sums


class Linear(nn.Module):
    shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.relu(self.a(x)))
        return y

    @staticmethod
    def by_hand(by: By, w: dict[str, nn.Parameter], x: Tensor) -> Tensor:
        x = by.site(functional.linear(x, w["a.weight"], w["a.bias"]), "a").relu()
        return by.site(functional.linear(x, w["b.weight"], w["b.bias"]), "b")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn(self.conv(x)) + x)
        return y


class Residual(nn.Module):
    shape = (2, 9, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.pool = nn.Conv2d(2, 4, 3, padding=1), Block(), nn.MaxPool2d(2)
        self.squash, self.head = nn.Sigmoid(), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.pool(self.block(self.stem(x))))
        y: Tensor = self.head(self.squash(x).flatten(1))
        return y

    @staticmethod
    def by_hand(by: By, w: dict[str, nn.Parameter], x: Tensor) -> Tensor:
        x = by.site(functional.conv2d(x, w["stem.weight"], w["stem.bias"], padding=1), "stem")
        y = by.site(functional.conv2d(x, w["block.conv.weight"], padding=1), "block.conv")
        stats = torch.zeros(4), torch.ones(4)
        y = by.site(functional.batch_norm(y, *stats, w["block.bn.weight"], w["block.bn.bias"], True), "block.bn")
        x = by.site(y + x, "block.add").relu()
        x = by.site(functional.gelu(functional.max_pool2d(x, 2)), "gelu")
        y = _Sigmoid.apply(x, by).flatten(1)  # type: ignore[no-untyped-call]
        return by.site(functional.linear(y, w["head.weight"], w["head.bias"]), "head")


class _Sigmoid(torch.autograd.Function):
    """A layer that keeps its own output keeps it as it was rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: By) -> Tensor:
        ctx.by, ctx.y = by, by.rounded(torch.sigmoid(x), "activations", "squash")
        out: Tensor = ctx.y.clone()
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        error = ctx.by.rounded(gradients[0], "errors", "squash", batch=BATCH)
        return torch.ops.aten.sigmoid_backward(error, ctx.y), None


def lenet() -> nn.Module:
    return build_network("lenet5", num_classes=10, in_channels=1, image_size=32)


def lenet_by_hand(by: By, w: dict[str, nn.Parameter], x: Tensor) -> Tensor:
    shape = lenet()

    def squash(x: Tensor, name: str) -> Tensor:
        return by.site(_Tanh.apply(x * SLOPE) * AMPLITUDE, name)  # type: ignore[no-untyped-call]

    def subsample(x: Tensor, name: str) -> Tensor:
        sums = functional.avg_pool2d(x, 2, divisor_override=1)
        bias, coefficient = w[f"{name}.bias"].view(-1, 1, 1), w[f"{name}.coefficient"].view(-1, 1, 1)
        return by.site(_Addcmul.apply(bias, sums, coefficient), name)  # type: ignore[no-untyped-call]

    x = squash(by.site(functional.conv2d(x, w["c1.weight"], w["c1.bias"]), "c1"), "squash1")
    x = squash(subsample(x, "s2"), "squash2")
    c3: Any = shape.c3
    dense = torch.zeros(c3.dense_shape).index_put((c3.wired_outputs, c3.wired_inputs), w["c3.weight"])
    x = squash(by.site(functional.conv2d(x, dense, w["c3.bias"]), "c3"), "squash3")
    x = squash(subsample(x, "s4"), "squash4")
    x = squash(by.site(functional.conv2d(x, w["c5.weight"], w["c5.bias"]), "c5"), "squash5").flatten(1)
    x = squash(by.site(functional.linear(x, w["f6.weight"], w["f6.bias"]), "f6"), "squash6")
    output: Any = shape.output
    return by.site(output(x), "output")


def network(kind: Callable[[], nn.Module] = Linear, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def batches(shape: tuple[int, ...], count: int = 3, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, *shape, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize(
    ("kind", "by_hand", "shape"),
    [
        (Linear, Linear.by_hand, Linear.shape),
        (Residual, Residual.by_hand, Residual.shape),
        (lenet, lenet_by_hand, (1, 32, 32)),
    ],
)
@pytest.mark.parametrize("store", [False, True])
def test_a_step_is_what_rounding_by_hand_gives(
    kind: Any, by_hand: Any, shape: Any, optimizer: Any, store: bool
) -> None:
    model, twin = network(kind), network(kind)
    stepper = optimizer(model.parameters())
    lowered = apply(model, stepper, "fixed16", seed=SEED, store_gradients=store)
    train(model, stepper, batches(shape))
    by = By()
    parameters = dict(twin.named_parameters())
    by.train(parameters, optimizer(parameters.values()), by_hand, batches(shape))
    state = model.state_dict()
    for name, parameter in parameters.items():
        assert torch.equal(state[name], parameter), name
    assert any(not torch.equal(state[name], value) for name, value in network(kind).named_parameters())
    found = {place: counters for place, counters in lowered.counters.items() if counters.elements}
    assert found.keys() == by.counters.keys()
    for place, counters in found.items():
        hand = by.counters[place]
        assert (counters.elements, counters.saturated, counters.zeroed) == (hand.elements, hand.saturated, hand.zeroed)
        assert math.isclose(counters.error_sum, hand.error_sum, rel_tol=1e-9)


@pytest.mark.parametrize("rounding", ["nearest", "floor"])
@pytest.mark.parametrize(
    "recipe",
    ["float16", "bfloat16", "fixed16", "fixed16,a.activations=<8,8>,b*.weights=<1,7>,errors=float16", "errors=<2,14>",
     "weights=<2,14>,updates=<2,14>", "gradients=<2,14>,activations=bfloat16"],
)  # fmt: skip
def test_every_recipe_is_what_rounding_by_hand_gives(recipe: str, rounding: str) -> None:
    recipe = f"{recipe},rounding={rounding}"
    model, twin = network(), network()
    optimizer = sgd(model.parameters())
    apply(model, optimizer, recipe, seed=SEED)
    train(model, optimizer, batches(Linear.shape))
    parameters = dict(twin.named_parameters())
    By(recipe).train(parameters, sgd(parameters.values()), Linear.by_hand, batches(Linear.shape))
    assert same(model.state_dict(), {name: p.detach() for name, p in parameters.items()})


# Optimizers


def optimizers() -> list[type[torch.optim.Optimizer]]:
    found = [value for name, value in vars(torch.optim).items() if isinstance(value, type)]
    return [
        value
        for value in found
        if issubclass(value, torch.optim.Optimizer) and value not in (torch.optim.Optimizer, torch.optim.SparseAdam)
    ]


def built(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.dim() == 2 or kind.__name__ != "Muon"]
    make: Any = kind
    return make(parameters, lr=0.1 if kind is torch.optim.LBFGS else 0.01)  # type: ignore[no-any-return]


def closed(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("kind", optimizers())
def test_every_optimizer_of_torch_trains_as_in_float32(kind: type[torch.optim.Optimizer], store: bool) -> None:
    model, twin = network(), network()
    optimizer, other = built(kind, model), built(kind, twin)
    lowered = apply(model, optimizer, "weights=<4,20>,updates=<2,22>,gradients=<2,22>", store_gradients=store)
    steps = 2 if kind is torch.optim.LBFGS else 5  # it extrapolates, and differences with it
    for batch in batches(Linear.shape, 1) * steps:
        optimizer.step(closed(model, optimizer, batch))  # type: ignore[arg-type]
        other.step(closed(twin, other, batch))  # type: ignore[arg-type]
    assert lowered.step == steps
    state = model.state_dict()
    for name, parameter in twin.named_parameters():
        assert not torch.equal(parameter, dict(network().named_parameters())[name]) or kind.__name__ == "Muon"
        # Sign-like rules take a whole step where a rounded gradient has become zero or not.
        torch.testing.assert_close(state[name], parameter, atol=0.02, rtol=0)
        assert (state[name] - parameter).abs().mean() < 2e-3


@pytest.mark.parametrize("kind", [kind for kind in optimizers() if kind is not torch.optim.LBFGS])
def test_a_closure_changes_nothing(kind: type[torch.optim.Optimizer]) -> None:
    states = []
    for with_closure in (False, True):
        model = network()
        optimizer = built(kind, model)
        apply(model, optimizer, seed=SEED)
        for batch in batches(Linear.shape):
            closure = closed(model, optimizer, batch)
            if with_closure:
                optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                optimizer.step()
        states.append(model.state_dict())
    assert same(*states)


@pytest.mark.parametrize("late", ["", ",late=0.5:+4"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_a_run_goes_on_with_the_same_bits(kind: type[torch.optim.Optimizer], late: str) -> None:
    data = batches(Linear.shape, 6)

    def begun(seed: int = SEED) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = network(seed=seed)
        optimizer = built(kind, model)
        return model, optimizer, apply(model, optimizer, f"fixed16{late}", seed=seed)

    model, optimizer, lowered = begun()
    lowered.share = 0.6
    for batch in data[:3]:
        optimizer.step(closed(model, optimizer, batch))  # type: ignore[arg-type]
    saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
    for batch in data[3:]:
        optimizer.step(closed(model, optimizer, batch))  # type: ignore[arg-type]

    other, second, again = begun(seed=11)
    state, second_state = pickle.loads(saved)
    other.load_state_dict(state)
    second.load_state_dict(second_state)
    assert again.step == 3 and again.share == 0.6
    for batch in data[3:]:
        second.step(closed(other, second, batch))  # type: ignore[arg-type]
    assert same(model.state_dict(), other.state_dict())


class Counting(torch.optim.SGD):
    """Not PyTorch's own: it counts its steps and looks at all parameters at once."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.norms: list[float] = []

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.stack(gradients).norm()))
        return super().step(closure)


@pytest.mark.parametrize("store", [False, True])
def test_another_optimizer_sees_everything_once(store: bool) -> None:
    model = network()
    optimizer = Counting(model.parameters())
    lowered = apply(model, optimizer, store_gradients=store)
    train(model, optimizer, batches(Linear.shape))
    assert len(optimizer.norms) == 3 and all(norm > 0 for norm in optimizer.norms) and lowered.step == 3
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_what_is_not_the_networks_is_stepped_once() -> None:
    model, own = network(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), own], lr=0.5)
    apply(model, optimizer)
    (loss_of(model, batches(Linear.shape)[0]) + own.sum()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert own.tolist() == [0.5, 0.5, 0.5] and own.grad is not None


def test_what_the_optimizer_does_not_have_stays() -> None:
    model = network()
    model.a.bias.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.b.parameters(), lr=0.5, weight_decay=0.1)  # type: ignore[union-attr]
    lowered = apply(model, optimizer)
    before = model.state_dict()
    train(model, optimizer, batches(Linear.shape))
    after = model.state_dict()
    assert torch.equal(before["a.weight"], after["a.weight"]) and torch.equal(before["a.bias"], after["a.bias"])
    assert not torch.equal(before["b.weight"], after["b.weight"])
    assert ("updates", "a.weight") not in lowered.counters
    optimizer.add_param_group({"params": [model.a.weight]})  # type: ignore[union-attr]
    train(model, optimizer, batches(Linear.shape))
    assert not torch.equal(before["a.weight"], model.state_dict()["a.weight"])


@pytest.mark.parametrize("store", [False, True])
def test_without_a_gradient_nothing_moves(store: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.5)
    lowered = apply(model, optimizer, store_gradients=store)
    before = model.state_dict()
    head: Any = model.b
    head(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["a.weight"], after["a.weight"]) and not torch.equal(before["b.weight"], after["b.weight"])
    assert ("updates", "a.weight") not in lowered.counters


# Gradients


def test_clipping_finds_the_gradients() -> None:
    model, twin = network(), network()
    for net, clip in ((model, 1e-3), (twin, 1e3)):
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        lowered = apply(net, optimizer, "fixed16,updates=float32,weights=<2,22>", seed=SEED)
        loss_of(net, batches(Linear.shape)[0]).backward()  # type: ignore[no-untyped-call]
        assert nn.utils.clip_grad_norm_(net.parameters(), clip) > 0.01
        before = net.state_dict()
        optimizer.step()
        moved = sum((net.state_dict()[name] - before[name]).square().sum() for name in before) ** 0.5
        assert (moved < 1.1e-3) == (clip < 1)
        assert all(p.grad is not None for p in net.parameters()) and lowered.step == 1


@pytest.mark.parametrize("store", [False, True])
def test_gradients_of_two_passes_are_rounded_once_more(store: bool) -> None:
    model, twin = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    lowered = apply(model, optimizer, "gradients=<4,12>", seed=SEED, store_gradients=store)
    data = batches(Linear.shape)
    expected: dict[str, Tensor] = {}
    for call, batch in enumerate(data[:2]):
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        twin.zero_grad()
        loss_of(twin, batch).backward()  # type: ignore[no-untyped-call]
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            key = Key(SEED, crc32(f"gradients/{name}#{call}".encode()), 0)
            expected[name] = quantize(expected.get(name, 0.0) + parameter.grad, "<4,12>", "stochastic", key)
    assert (model.a.weight.grad is None) == store  # type: ignore[union-attr]
    optimizer.step()
    state = model.state_dict()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(state[name], parameter - expected[name], atol=1e-6, rtol=0)
    assert lowered.counters["gradients", "a.weight"].elements == 2 * 120


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.b(self.a(x)), self.a.weight * self.scale)
        return functional.pad(x, (0, 4))


def test_tied_weights_have_one_gradient_and_one_update() -> None:
    states = []
    for store in (False, True):
        model = network(Tied)
        optimizer = sgd(model.parameters())
        lowered = apply(model, optimizer, seed=SEED, store_gradients=store)
        train(model, optimizer, batches(Linear.shape))
        states.append(model.state_dict())
        assert lowered.counters["gradients", "a.weight"].elements == 3 * 36
        assert ("activations", "linear") in lowered.counters and ("activations", "mul") in lowered.counters
    assert same(*states) and torch.equal(states[0]["a.weight"], states[0]["b.weight"])
    assert not torch.equal(states[0]["scale"], torch.ones(6))


def test_gradients_may_be_left_to_somebody_else() -> None:
    model, twin = network(), network()
    lowered = apply(model, None, "gradients=<4,12>", seed=SEED)
    lowered.defer_gradients = True
    for net in (model, twin):
        loss_of(net, batches(Linear.shape)[0]).backward()  # type: ignore[no-untyped-call]
    entry = lowered.stored[0]
    gradient, plain = entry.parameter.grad, next(twin.parameters()).grad
    assert gradient is not None and plain is not None and torch.equal(gradient, plain)
    lowered.round_gradient(entry, gradient)
    key = Key(SEED, crc32(b"gradients/a.weight#0"), 0)
    assert torch.equal(gradient, quantize(plain, "<4,12>", "stochastic", key))


def test_gradients_as_codes_can_be_forgotten() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    lowered = apply(model, optimizer, store_gradients=True)
    before = model.state_dict()
    loss_of(model, batches(Linear.shape)[0]).backward()  # type: ignore[no-untyped-call]
    lowered.forget_gradients()
    optimizer.step()
    assert same(before, model.state_dict())


# Weights


def test_weights_are_hidden_and_shown() -> None:
    model = network()
    lowered = apply(model, None, "fixed16")
    assert all(
        parameter.isnan().all() and parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters()
    )
    assert {entry.codes.dtype for entry in lowered.stored} == {torch.int16}
    with lowered.weights(), lowered.weights(), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.300001)
        assert same(model.state_dict(), {name: torch.full_like(p, 0.300001) for name, p in model.named_parameters()})
    nearest = round(0.3 * 2**14) / 2**14
    assert all((value == nearest).all() for value in model.state_dict().values())
    with pytest.raises(KeyError), lowered.weights():
        raise KeyError
    assert next(model.parameters()).isnan().all()


def test_within_weights_the_network_runs_with_what_is_shown() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    lowered = apply(model, optimizer, "weights=<2,14>")
    x = batches(Linear.shape)[0][0]
    with lowered.weights():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        expected = functional.linear(functional.linear(x, torch.full((20, 6), 0.1), torch.full((20,), 0.1)).relu(),
                                     torch.full((10, 20), 0.1), torch.full((10,), 0.1))  # fmt: skip
        assert torch.equal(model(x), expected)
        with pytest.raises(ConfigError, match="step cannot be taken within"):
            optimizer.step()
    assert not torch.equal(model(x), expected)


def test_a_submodule_gives_and_takes_its_state() -> None:
    model, twin = network(Residual), network(Residual, seed=9)
    lowered = apply(model)
    apply(twin)
    block, other = model.get_submodule("block"), twin.get_submodule("block")
    state = block.state_dict()
    assert not any(value.isnan().any() for value in state.values())
    other.load_state_dict(state)
    assert same(state, other.state_dict()) and not same(model.state_dict(), twin.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(network(Residual).state_dict() | {"stem.bias": torch.ones(5)})
    assert next(model.parameters()).isnan().all()
    with pytest.raises(ConfigError, match="assign=True"):
        model.load_state_dict(model.state_dict(), assign=True)
    assert next(model.parameters()).isnan().all() and lowered.step == 0


def test_late_the_word_grows_and_no_weight_changes() -> None:
    model = network()
    optimizer = sgd(model.parameters())
    lowered = apply(model, optimizer, "fixed16,late=0.5:+4,late=0.8:+6")
    train(model, optimizer, batches(Linear.shape))
    before = model.state_dict()
    for share, dtype, text in ((0.4, torch.int16, "fixed(16,14)"), (0.5, torch.int32, "fixed(20,18)"),
                               (0.9, torch.int32, "fixed(22,20)")):  # fmt: skip
        lowered.share = share
        assert same(before, model.state_dict())
        assert {entry.codes.dtype for entry in lowered.stored} == {dtype}
        assert {str(entry.gradient_number) for entry in lowered.stored} == {text}
    train(model, optimizer, batches(Linear.shape))
    rows = {(row["role"], row["layer"]): row["format"] for row in lowered.rows()}
    assert rows["updates", "a.weight"] == "fixed(22,20)" and rows["activations", "a"] == "fixed(22,16)"
    steps = model.state_dict()["a.weight"] * 2**14
    assert not torch.equal(steps, steps.round())


def test_updates_of_zero_are_seen() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    lowered = apply(model, optimizer, "fixed16,rounding=nearest")
    before = model.state_dict()
    train(model, optimizer, batches(Linear.shape))
    row = next(row for row in lowered.rows() if (row["role"], row["layer"]) == ("updates", "a.weight"))
    assert same(before, model.state_dict()) and row["moved"] == 0 and 0 < row["zeroed"] <= row["elements"] == 360
    lowered.reset_counters()
    assert lowered.rows() == []


def test_without_its_recipe_the_network_is_as_before() -> None:
    model = network(Residual)
    optimizer = sgd(model.parameters())
    keys = model.__dict__.keys() | set()
    lowered = apply(model, optimizer)
    train(model, optimizer, batches(Residual.shape))
    state = model.state_dict()
    lowered.remove()
    assert same(state, model.state_dict()) and model.__dict__.keys() == keys
    twin = copy.deepcopy(model)
    x = batches(Residual.shape)[0][0]
    assert torch.equal(model.eval()(x), twin.eval()(x)) and not next(model.parameters()).isnan().any()
    train(model, optimizer, batches(Residual.shape))
    apply(model, optimizer)


def test_a_recipe_of_float32_changes_nothing() -> None:
    model, twin = network(Residual), network(Residual)
    for net in (model, twin):
        optimizer = adam(net.parameters())
        if net is model:
            lowered = apply(net, optimizer, "float32")
        train(net, optimizer, batches(Residual.shape))
    assert same(model.state_dict(), twin.state_dict()) and lowered.rows() == []


def test_dropping_a_network_frees_it() -> None:
    model = network(Residual)
    optimizer = sgd(model.parameters())
    lowered = apply(model, optimizer)
    train(model, optimizer, batches(Residual.shape))
    codes = weakref.ref(lowered.stored[0].codes)
    watched = weakref.ref(lowered), weakref.ref(model), weakref.ref(next(model.parameters()))
    del model, optimizer, lowered
    gc.collect()
    assert codes() is None and [found() for found in watched] == [None, None, None]


# Refused


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fixed16,c9.activations=<8,8>", "unknown layer 'c9'"),
        ("fixed17", "unknown recipe 'fixed17'"),
        ("fixed16,weigths=<2,14>", "unknown role or setting 'weigths'"),
        ("fixed16,weights=<20,14>", "WL of a fixed-point format is 1 to 24, got 34"),
    ],
)
def test_bad_recipes_are_refused(recipe: str, message: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=message):
        apply(model, None, recipe)
    assert not next(model.parameters()).isnan().any() and "forward" not in model.__dict__


def test_bad_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a.weight: .* float32 parameters on the CPU, got torch.float64"):
        apply(network().double())
    with pytest.raises(ConfigError, match=r"got torch.complex64"):
        apply(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"needs a torch.nn.Module, got int"):
        apply(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"needs a torch.optim.Optimizer, got int"):
        apply(network(), 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none of the network's parameters"):
        apply(network(), sgd(network().parameters()))
    model = network()
    optimizer = sgd(model.parameters())
    apply(model, optimizer)
    for again in (model, nn.Sequential(model), model.a):
        with pytest.raises(ConfigError, match="under a recipe already"):
            apply(again)  # type: ignore[arg-type]
    for copied in (copy.deepcopy, pickle.dumps):
        for part in (model, model.a):
            with pytest.raises(ConfigError, match="neither copied nor pickled"):
                copied(part)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"got one of torch.jit.script"):
        apply(scripted)
    with pytest.raises(ConfigError, match="DataParallel"):
        apply(nn.DataParallel(nn.Linear(2, 2)))


def test_a_second_optimizer_of_one_network_is_refused() -> None:
    model = network()
    apply(model, sgd(model.a.parameters()))  # type: ignore[union-attr]
    other = sgd(model.b.parameters())  # type: ignore[union-attr]
    loss_of(model, batches(Linear.shape)[0]).backward()  # type: ignore[no-untyped-call]
    with pytest.raises((ConfigError, RuntimeError)):
        other.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_bad_inputs_are_refused(dtype: torch.dtype) -> None:
    model = network()
    apply(model)
    x = torch.zeros(2, 6, dtype=dtype)
    with pytest.raises(ConfigError, match=f"takes float32, got an input of {dtype}"):
        model(x)
    assert model(x.real.float()).isfinite().all()


class TroubleError(Exception):
    pass


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_step_that_breaks_off_can_be_taken_again(kind: type[torch.optim.Optimizer]) -> None:
    model = network()
    optimizer = built(kind, model)
    lowered = apply(model, optimizer)
    batch = batches(Linear.shape)[0]
    before = model.state_dict()

    def closure() -> Tensor:
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
        raise TroubleError

    with pytest.raises(TroubleError):
        optimizer.step(closure)  # type: ignore[arg-type]
    assert same(before, model.state_dict())
    optimizer.step(closed(model, optimizer, batch))  # type: ignore[arg-type]
    assert lowered.step == 1 and not same(before, model.state_dict())
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_an_optimizer_that_raises_leaves_the_weights() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lowered = apply(model, optimizer)
    train(model, optimizer, batches(Linear.shape))
    before = model.state_dict()
    states = {p: optimizer.state[p].pop("momentum_buffer") for p in model.parameters()}
    for parameter in states:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(3, 3, 3)
    loss_of(model, batches(Linear.shape)[0]).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert same(before, model.state_dict())
    for parameter, buffer in states.items():
        optimizer.state[parameter]["momentum_buffer"] = buffer
    train(model, optimizer, batches(Linear.shape))
    assert lowered.step == 6 and all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("store", [False, True])
def test_large_networks_are_stepped_in_parts(store: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for piece in (1 << 18, 100, 1):
        monkeypatch.setattr("windlass.precision.lowered.PIECE", piece)
        monkeypatch.setattr("windlass.precision.lowered.LARGE", piece)
        model, extra = network(Residual), nn.Parameter(torch.ones(3))
        optimizer = adam([*model.parameters(), extra])
        calls: list[int] = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        lowered = apply(model, optimizer, seed=SEED, store_gradients=store)
        for batch in batches(Residual.shape):
            optimizer.zero_grad()
            (loss_of(model, batch) + extra.sum()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        states.append(model.state_dict() | {"extra": extra.detach()})
        assert len(calls) >= 3 and lowered.step == 3
    assert same(states[0], states[1]) and same(states[0], states[2])
