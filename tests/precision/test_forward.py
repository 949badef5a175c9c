from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from windlass.errors import ConfigError
from windlass.networks import NETWORKS, build_network
from windlass.precision import Key, apply, fixed, quantize

ACTIVATIONS = fixed(16, 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Runs a function of its layers."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.run = run
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.register_buffer("table", torch.full((4,), 0.123))

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def net(run: Callable[[Any, Any], Any]) -> Net:
    torch.manual_seed(1)
    return Net(run)


def images(count: int = 4, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(seed))


def is_rounded(x: Tensor) -> bool:
    steps = x.detach() * 2**10
    return torch.equal(steps, steps.round())


def is_off(model: nn.Module) -> bool:
    """Whether the network has left nothing switched on."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return not modes and torch._C._autograd._top_saved_tensors_default_hooks(True) is None


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


CASES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in-place ReLU": lambda net, x: functional.relu_(net.conv(x)),
    "in-place sum": lambda net, x: net.conv(x).add_(net.bn(net.conv(x))),
    "augmented sum": lambda net, x: augmented(net.conv(x), x),
    "view": lambda net, x: net.conv(x)[:, :2].transpose(1, 2),
    "view of a layer": lambda net, x: net.conv(x).flatten(1).chunk(2, 1)[1] * 0.3,
    "tuple": lambda net, x: (net.conv(x), [net.bn(net.conv(x))]),
    "named tuple": lambda net, x: Pair(net.conv(x), net.conv(x) * 0.7),
    "mapping": lambda net, x: {"y": net.conv(x), "n": 3},
    "keywords": lambda net, x: functional.conv2d(input=x, weight=net.conv.weight, bias=net.conv.bias),
    "weights in a list": lambda net, x: functional.conv2d(x, torch.cat([net.conv.weight, net.conv.weight])) * 0.3,
    "weight's attribute": lambda net, x: functional.linear(x.mean((2, 3)), (net.fc.weight.T @ net.fc.weight)[:3].T),
    "weight without gradient": lambda net, x: net.conv(x) * net.conv.weight.detach().norm(),
    "weight read before": lambda net, x: net.conv(x) * no_grad(lambda: net.conv.weight.norm()),
    "mean of everything": lambda net, x: net.conv(x).square().mean(),
    "maximum": lambda net, x: torch.max(net.conv(x), 1),
    "channels_last": lambda net, x: net.conv(x.contiguous(memory_format=torch.channels_last)),
    "padding": lambda net, x: net.conv(functional.pad(net.conv(x)[:, :3], (1, 1), value=0.3)),
    "splitting": lambda net, x: torch.cat([net.fc(part) for part in net.conv(x).flatten(2).mT.split(7, 1)], 1),
}


def augmented(y: Tensor, x: Tensor) -> Tensor:
    y += x.sum(1, keepdim=True)
    y *= 0.3
    return y


def no_grad(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [x for part in values for x in floats(part)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_results_are_rounded_and_gradients_come_to_weights(name: str, training: bool) -> None:
    model, twin = net(CASES[name]), net(CASES[name])
    lowered = apply(model, None, "activations=<6,10>,errors=<2,20>,weights=<2,22>")
    x, plain = images().requires_grad_(), images().requires_grad_()
    found, expected = model.train(training)(x), twin.train(training)(plain)
    assert type(found) is type(expected)
    for one, other in zip(floats(found), floats(expected), strict=True):
        assert is_rounded(one) and one.shape == other.shape and one.stride() == other.stride()
        torch.testing.assert_close(one, other, atol=0.02 * max(1.0, other.abs().max().item()), rtol=0)
    sum(y.square().mean() for y in floats(found)).backward()  # type: ignore[union-attr]
    sum(y.square().mean() for y in floats(expected)).backward()  # type: ignore[union-attr]
    for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), path
        if parameter.grad is not None and other.grad is not None:
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, other.grad, atol=0.05 * max(scale, 0.1), rtol=0)
    assert torch.equal(x, images()) and x.grad is not None and is_off(model)
    assert torch.equal(model.get_buffer("table"), twin.get_buffer("table"))
    assert bool(lowered.rows()) == training


def test_what_a_layer_was_given_stays_as_it_is() -> None:
    """A network whose first layer hands its input on, and one that hands out a buffer."""

    class Through(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Through(), nn.Linear(5, 5), Through(), nn.Dropout(0.0))
    apply(model)
    x = images()[..., :5]
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert is_rounded(model(x)) and torch.equal(x, images())
            through = Through()
            apply(through)
            assert torch.equal(through(x), images()) or context is torch.inference_mode
            assert torch.equal(x, images())

    table = net(lambda net, x: net.table)
    apply(table)
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            table(x)
            assert torch.equal(table.get_buffer("table"), torch.full((4,), 0.123))


def test_evaluation_rounds_to_nearest_and_counts_nothing() -> None:
    model = net(lambda net, x: net.fc(net.bn(net.conv(x)).mean((2, 3))))
    lowered = apply(model, seed=3)
    first = model(images())
    assert not torch.equal(first, model(images()))  # stochastic, another call
    lowered.reset_counters()
    model.eval()
    results = []
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            results += [model(images()) for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results) and lowered.rows() == []

    weights = model.state_dict()
    y = quantize(
        functional.conv2d(images(), weights["conv.weight"], weights["conv.bias"], padding=1), "<6,10>", "nearest"
    )
    stats = weights["bn.running_mean"], weights["bn.running_var"], weights["bn.weight"], weights["bn.bias"]
    y = quantize(functional.batch_norm(y, *stats), "<6,10>", "nearest")
    y = quantize(y.mean((2, 3)), "<6,10>", "nearest")
    y = quantize(functional.linear(y, weights["fc.weight"], weights["fc.bias"]), "<6,10>", "nearest")
    assert torch.equal(results[0], y)


def test_evaluation_in_between_does_not_disturb_training() -> None:
    states = []
    for between in (False, True):
        model = net(lambda net, x: net.fc(net.conv(x).mean((2, 3))))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        apply(model, optimizer, seed=3)
        for _ in range(2):
            model(images()).square().mean().backward()
            if between:
                model.eval()(images())
                model.train()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bits_depend_on_neither_threads_nor_workers(layout: torch.memory_format) -> None:
    def run(threads: int, *spans: tuple[int, int]) -> Tensor:
        torch.set_num_threads(threads)
        parts = []
        model = net(lambda net, x: functional.relu(net.conv(x)) * 0.7)
        lowered = apply(model, seed=3)
        for start, stop in spans:
            lowered.sites.tell(step=4, first_sample=start, batch=64)
            parts.append(model(big[start:stop].contiguous(memory_format=layout)))
        return torch.cat(parts)

    big = torch.randn(64, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    whole = run(1, (0, 64))
    assert torch.equal(whole, run(2, (0, 64)))
    assert torch.equal(whole, run(1, (0, 32), (32, 64))) and torch.equal(whole, run(2, (0, 7), (7, 20), (20, 64)))
    assert not torch.equal(whole[:32], run(1, (32, 64)))


def test_the_key_of_a_layers_bits_is_documented() -> None:
    from zlib import crc32

    model = net(lambda net, x: net.fc(net.fc.weight[:, :4] @ x[:4, :4]))
    lowered = apply(model, seed=1 << 40, recipe="activations=<6,10>")
    lowered.sites.tell(step=9)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = net(lambda net, x: net.fc.weight[:, :4] @ x[:4, :4])(x)
    y = quantize(y, "<6,10>", "stochastic", Key(1 << 40, crc32(b"activations/matmul#0"), 9))
    twin = net(lambda net, x: x)
    assert torch.equal(model(x), quantize(twin.fc(y).detach(), "<6,10>", "stochastic",
                                          Key(1 << 40, crc32(b"activations/fc#0"), 9)))  # fmt: skip
    again = model(x)
    assert not torch.equal(again, quantize(twin.fc(y).detach(), "<6,10>", "stochastic",
                                           Key(1 << 40, crc32(b"activations/fc#0"), 9)))  # fmt: skip


class TroubleError(Exception):
    pass


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("trouble", [TroubleError, Interrupt, ConfigError])
@pytest.mark.parametrize("inside", [True, False])
def test_after_an_exception_the_network_is_usable(trouble: type[BaseException], inside: bool) -> None:
    class Fails(nn.Module):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise trouble
            return x

    model = nn.Sequential(
        nn.Linear(5, 5), Fails() if inside else nn.Sequential(Fails(), nn.Identity()), nn.Linear(5, 2)
    )
    lowered = apply(model)
    for _ in range(2):
        with pytest.raises(trouble):
            model(torch.ones(3, 5))
        assert is_off(model)
    Fails.fails = False
    model(torch.ones(3, 5)).sum().backward()
    assert all(entry.parameter.grad is not None for entry in lowered.stored)


def test_an_exception_that_the_network_catches_is_no_trouble() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        try:
            net.conv(x[:, :2])
        except RuntimeError:
            x = net.conv(x)
        y: Tensor = net.fc(x.mean((2, 3)))
        return y

    model = net(run)
    lowered = apply(model)
    assert is_rounded(model(images())) and ("activations", "mean") in lowered.counters
    assert model.fc.weight.isnan().all() and is_off(model)


def test_a_submodule_runs_by_itself() -> None:
    model = net(lambda net, x: net.bn(net.conv(x)))
    lowered = apply(model, seed=3)
    y = model.conv(images())
    y.sum().backward()
    assert is_rounded(y) and model.conv.weight.grad is not None
    assert [row["layer"] for row in lowered.rows()][:2] == ["conv", "conv"]
    assert is_rounded(model.conv.forward(images()))


def test_weights_are_not_written_inside_the_network() -> None:
    for run in (lambda net, x: no_grad(lambda: net.fc.weight.clamp_(-1, 1)), lambda net, x: no_grad(
        lambda: torch.add(x, 1, out=net.fc.weight))):  # fmt: skip
        model = net(run)
        apply(model)
        with pytest.raises(ConfigError, match=r"fc.weight is written inside the network"):
            model(images())
        assert is_off(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_running_again_in_the_backward_pass_is_refused(reentrant: bool) -> None:
    model = net(lambda net, x: net.fc(checkpoint(net.conv, x, use_reentrant=reentrant).mean((2, 3))))
    apply(model)
    loss = model(images().requires_grad_()).sum()
    with pytest.raises(ConfigError, match="cannot run again within a backward pass"):
        loss.backward()
    assert is_off(model)


def test_second_derivatives_are_refused() -> None:
    model = net(lambda net, x: net.conv(x))
    apply(model)
    x = images().requires_grad_()
    with pytest.raises(ConfigError, match="no second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_computing_in_another_type_is_refused() -> None:
    model = net(lambda net, x: net.conv(x).double().exp())
    apply(model)
    with pytest.raises(ConfigError, match=r"layer (double|exp): .* computes in float32, got torch.float64"):
        model(images())
    with pytest.raises(ConfigError, match=r"layer conv: .*got torch.bfloat16"), torch.autocast("cpu", torch.bfloat16):
        net_apply(lambda net, x: net.conv(x))(images())


def net_apply(run: Callable[[Any, Any], Any]) -> Net:
    model = net(run)
    apply(model)
    return model


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 5, batch_first=True),
        nn.GRU(6, 5, 2, batch_first=True),
        nn.MultiheadAttention(6, 2, batch_first=True),
        nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True),
        parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.Embedding(9, 6),
        nn.Bilinear(6, 6, 3),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose1d(4, 3, 2),
        nn.PReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_run_too(layer: nn.Module) -> None:
    torch.manual_seed(4)
    x = torch.randn(3, 4, 6)
    inputs: list[Tensor] = [x]
    if isinstance(layer, nn.MultiheadAttention):
        inputs = [x, x, x]
    if isinstance(layer, nn.Bilinear):
        inputs = [x, x]
    if isinstance(layer, nn.Embedding):
        inputs = [torch.arange(9).view(3, 3)]
    expected = floats(layer(*inputs))
    apply(layer, None, "fixed16,errors=<2,20>,weights=<4,12>")
    found = floats(layer(*inputs))
    for one, other in zip(found, expected, strict=True):
        assert is_rounded(one)
        torch.testing.assert_close(one, other, atol=0.01, rtol=0)
    found[0].square().mean().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_inputs_may_be_given_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, scale: float, x: Tensor | None = None) -> Tensor:
            assert x is not None
            y: Tensor = self.fc(x) * scale
            return y

    model = Two()
    lowered = apply(model)
    y = model(0.5, x=torch.randn(8, 6))
    y.sum().backward()
    formats = {row["role"]: row["format"] for row in lowered.rows()}
    assert formats["errors"] == "fixed(16,17)"  # eight samples: three bits
    with pytest.raises(ConfigError, match=r"got an input of torch.float64"):
        model(0.5, x=torch.randn(8, 6, dtype=torch.float64))


def loss_of(outputs: Any) -> Tensor:
    """Of the classifier, and of GoogLeNet's two others."""
    heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.stack([functional.cross_entropy(head, torch.tensor([1, 2])) for head in heads]).sum()


SIZES = {"lenet5": (1, 32), "coates": (3, 18), "alexnet": (3, 63), "resnet50": (3, 32), "googlenet": (3, 64)}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_built_in_network_takes_a_step(name: str) -> None:
    channels, size = SIZES.get(name, (3, 32))
    torch.manual_seed(1)
    model = build_network(name, num_classes=10, in_channels=channels, image_size=size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    lowered = apply(model, optimizer, store_gradients=True)
    before = model.state_dict()
    x = torch.randn(2, channels, size, size)
    own: Any = getattr(model, "own_loss", None)
    outputs = model(x)
    loss = own(outputs, x) if own else loss_of(outputs)
    loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert math.isfinite(loss.item()) and all(value.isfinite().all() for value in after.values())
    trained = [name for name, p in model.named_parameters() if ("updates", name) in lowered.counters]
    assert any(not torch.equal(before[name], after[name]) for name in trained)
    assert sum(row["elements"] for row in lowered.rows() if row["role"] == "updates") > 0
