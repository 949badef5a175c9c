"""Capture: the graph, its work and its memory, against PyTorch itself."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from windlass.errors import ConfigError
from windlass.networks import NETWORKS, build_network
from windlass.networks.capture import capture
from windlass.plan.graph import INPUT, Graph, Layer


def build(name: str, *, side: int | None = None) -> nn.Module:
    entry = NETWORKS[name]
    return build_network(
        name,
        num_classes=entry.num_classes,
        in_channels=entry.in_channels,
        image_size=side or entry.default_size,
    )


def graph_of(name: str, *, batch: int = 2, side: int | None = None, training: bool = True) -> Graph:
    entry = NETWORKS[name]
    side = side or entry.default_size
    shape = (batch, entry.in_channels, side, side)
    module = build(name, side=side)
    return capture(module, shape, name=name, num_classes=entry.num_classes, training=training)


def named(graph: Graph) -> dict[str, Layer]:
    layers = {layer.name: layer for layer in graph.layers}
    assert len(layers) == len(graph.layers)
    return layers


def small(module: nn.Module, shape: tuple[int, ...] = (2, 3, 8, 8), *, training: bool = True) -> Graph:
    return capture(module, shape, name="small", num_classes=2, training=training)


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "vgg11", "googlenet", "resnet18", "resnet50"])
def test_edges_point_back_and_nothing_is_lost(name: str) -> None:
    graph = graph_of(name)
    seen = {INPUT}
    for layer in graph.layers:
        assert layer.inputs and set(layer.inputs) <= seen, layer
        seen.add(layer.name)
    sinks = seen - {source for layer in graph.layers for source in layer.inputs}
    assert len(sinks) == (3 if name == "googlenet" else 1)
    network = build(name) if name in ("lenet5", "resnet18") else None
    if network is not None:
        assert graph.num_parameters == sum(p.numel() for p in network.parameters())
        tensors = [*network.parameters(), *network.buffers()]
        assert graph.memories()["W"] == sum(t.numel() * t.element_size() for t in tensors)


def test_resnet18_adds_join_two_layers() -> None:
    adds = [layer for layer in graph_of("resnet18").layers if layer.kind == "add"]
    assert len(adds) == 8
    assert [len(layer.inputs) for layer in adds] == [2] * 8
    assert adds[0].name == "layer1.0.add"
    assert adds[0].inputs == ("layer1.0.bn2", "stem.3")
    assert adds[2].inputs == ("layer2.0.bn2", "layer2.0.shortcut.1")


def test_googlenet_cats_join_four_branches() -> None:
    graph = graph_of("googlenet")
    cats = [layer for layer in graph.layers if layer.kind == "cat"]
    assert [len(layer.inputs) for layer in cats] == [4] * 9
    assert graph_of("googlenet", training=False).num_parameters == 6_998_552


@pytest.mark.parametrize(("name", "giga"), [("resnet50", 3.86), ("resnet101", 7.57), ("resnet152", 11.28)])
def test_multiply_adds_of_the_paper(name: str, giga: float) -> None:
    assert graph_of(name, training=False).forward_macs / 2e9 == pytest.approx(giga, abs=0.005)


def test_alexnet_shares() -> None:
    """Per-layer shares of the one-tower network: convolutions 91.8 % of 714 M multiply-adds."""
    graph = graph_of("alexnet")
    assert graph.forward_macs / 2 == pytest.approx(714e6, rel=1e-3)
    shares = [layer.forward_macs / graph.forward_macs for layer in graph.layers if layer.forward_macs]
    assert shares == pytest.approx([0.098, 0.314, 0.157, 0.209, 0.140, 0.053, 0.024, 0.006], abs=6e-4)


@pytest.mark.parametrize("name", ["lenet5", "alexnet", "resnet18", "googlenet"])
def test_multiply_adds_agree_with_pytorchs_counter(name: str) -> None:
    side = {"alexnet": 63, "resnet18": 32, "googlenet": 79}.get(name)
    entry = NETWORKS[name]
    module = build(name, side=side)
    side = side or entry.default_size
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(2, entry.in_channels, side, side))
    graph = graph_of(name, side=side)
    assert 2 * graph.forward_macs == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("groups", "stride", "dilation", "padding"),
    [(1, 1, 1, 0), (2, 1, 1, 1), (1, 2, 1, 1), (2, 3, 2, 0), (4, 1, 2, 1)],
)
def test_convolution_by_counting(groups: int, stride: int, dilation: int, padding: int) -> None:
    """Every multiply-add of the definition, padding zeros included, one by one."""
    conv = nn.Conv2d(4, 8, 3, groups=groups, stride=stride, dilation=dilation, padding=padding)
    side = (9 + 2 * padding - dilation * 2 - 1) // stride + 1
    outputs = itertools.product(range(2), range(8), range(side), range(side))
    count = sum(1 for _ in outputs for _ in itertools.product(range(4 // groups), range(3), range(3)))
    graph = small(nn.Sequential(conv, nn.Flatten()), (2, 4, 9, 9))
    assert graph.forward_macs == count
    assert graph.backward_macs == count  # the input wants no gradient
    twice = nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.Flatten())
    assert named(small(twice, (2, 4, 9, 9)))["1"].backward_macs == 2 * count  # also with groups


def test_transposed_convolution_counts_each_input() -> None:
    conv = nn.ConvTranspose2d(3, 4, 3, stride=2)
    graph = small(nn.Sequential(conv, nn.Flatten()), (2, 3, 5, 5))
    assert graph.forward_macs == 2 * 3 * 5 * 5 * 4 * 3 * 3


def test_frozen_weights_cost_no_backward_work() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    module[0].requires_grad_(False)
    layers = named(small(module))
    assert layers["0"].backward_macs == 0 and layers["0"].weight_grad_bytes == 0
    assert layers["2"].backward_macs == layers["2"].forward_macs == 2 * 144 * 2


class Tangle(nn.Module):
    """In-place ReLU before a branch, a module called twice, a parameter of a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(192, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        z = self.relu(self.conv(y) + y)
        z += y * self.scale
        return functional.linear(z.flatten(1), self.fc.weight)


def test_in_place_repeated_and_functional_operations() -> None:
    graph = small(Tangle())
    assert [(layer.name, layer.inputs) for layer in graph.layers] == [
        ("conv", ("input",)),
        ("relu", ("conv",)),
        ("conv#2", ("relu",)),
        ("add", ("conv#2", "relu")),
        ("relu#2", ("add",)),
        ("mul", ("relu",)),
        ("add#2", ("relu#2", "mul")),
        ("linear", ("add#2",)),
    ]
    layers = named(graph)
    assert layers["conv"].num_parameters == 84 and layers["conv#2"].num_parameters == 0
    assert layers["mul"].num_parameters == 1 and layers["linear"].num_parameters == 384
    assert dict(layers["conv"].attributes)["kernel_size"] == (3, 3)


def test_kept_activations_by_hand() -> None:
    """Conv keeps its input (the batch: not counted), ReLU its output, linear its input (the same storage)."""
    graph = small(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)))
    layers = named(graph)
    assert layers["0"].kept_bytes + layers["1"].kept_bytes == 2 * 144 * 4
    assert graph.memories()["D"] == 2 * 144 * 4
    assert layers["0"].output_grad_bytes == 2 * 144 * 4
    assert graph.memories()["∇W"] == 4 * graph.num_parameters
    assert graph.input_bytes == 2 * 3 * 8 * 8 * 4 + 2 * 8
    still = small(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), training=False)
    assert {still.memories()[key] for key in ("D", "∇D", "∇W")} == {0}
    assert still.backward_macs == 0


def test_module_is_left_as_it_was() -> None:
    module = build("resnet18", side=32)
    module.eval()
    module.get_submodule("layer1").train()
    parameter = next(module.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    flags = [child.training for child in module.modules()]
    ids = [id(p) for p in module.parameters()]
    random_state = torch.get_rng_state()
    capture(module, (2, 3, 32, 32), name="resnet18", num_classes=1000)
    after = module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert int(after["stem.1.num_batches_tracked"]) == 0
    assert [child.training for child in module.modules()] == flags
    assert [id(p) for p in module.parameters()] == ids
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in list(module.parameters())[1:])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not module._forward_hooks


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Chooses(), "from a tensor's elements"),
        (Selects(), "from a tensor's elements"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(5, 2)),
            "fails on an input of shape (2, 3, 8, 8) in module '1'",
        ),
        (nn.Conv2d(3, 4, 3), "must return logits of shape (2, 2), got (2, 4, 6, 6)"),
    ],
)
def test_what_cannot_be_captured_is_said(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(module)
    assert message in str(caught.value)
    small(nn.Flatten())  # and nothing is left behind


def step_peak(module: nn.Module, shape: tuple[int, ...], num_classes: int) -> int:
    """Most bytes that PyTorch's allocator had handed out in a real step, from its own record of events."""
    x, y = torch.randn(shape), torch.randint(0, num_classes, shape[:1])
    held = sum(t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers(), x, y))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        functional.cross_entropy(module(x), y).backward()  # type: ignore[no-untyped-call]
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 50
    totals = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return held + int(max(totals))


@pytest.mark.parametrize(
    ("name", "batch", "side"),
    [("lenet5", 64, 32), ("alexnet", 16, 224), ("resnet18", 16, 64), ("resnet18", 16, 32)],
)
def test_predicted_peak_is_what_pytorch_held(name: str, batch: int, side: int) -> None:
    """Within 5 %: what is left is small scratch space and how far a CPU's blocked layouts round channels."""
    entry = NETWORKS[name]
    module = build(name, side=side)
    shape = (batch, entry.in_channels, side, side)
    graph = capture(module, shape, name=name, num_classes=entry.num_classes)
    assert graph.peak_bytes == pytest.approx(step_peak(module, shape, entry.num_classes), rel=0.05)
    assert graph.peak_at.rpartition(" ")[2] in ("forward", "loss", "backward")
    assert graph.peak_at.rpartition(" ")[0] in {layer.name for layer in graph.layers}
