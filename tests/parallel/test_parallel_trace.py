"""Networks as ops: names, shapes, in-place calls, and what cannot be divided."""

from collections.abc import Callable

import pytest
import torch
from placement_cases import build, input_shape
from torch import Tensor, nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.networks.capture import capture
from windlass.parallel import NullTransport, apply, trace
from windlass.plan.mesh import Mesh

ONE = NullTransport(Mesh.parse("one:1"), 0)


@pytest.mark.parametrize("net", ["lenet5", "alexnet", "googlenet_heads", "resnet18"])
def test_ops_are_the_layers_of_the_captured_graph(net: str) -> None:
    network = build(net, torch.float32)
    traced = trace(network, input_shape(net))
    graph = capture(network, input_shape(net), name=net, num_classes=10)
    shapes = {op.name: (op.kind, op.output_shape) for op in traced.ops}
    assert len(shapes) == len(traced.ops)
    for layer in graph.layers:
        assert shapes.pop(layer.name) == (layer.kind.lower(), layer.output_shape)
    assert {kind for kind, _ in shapes.values()} <= {"flatten", "identity", "dropout"}
    full = {f"{traced.calls[op.name].path}.{name}": shape for op in traced.ops for name, shape in op.parameters}
    assert full == {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


class Tangle(nn.Module):
    """An in-place ReLU before a branch, a module called twice, a parameter of its own, a function of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.relu(y)
        z = self.relu(self.conv(y) + y)
        w = y * self.scale
        w += z
        z = functional.max_pool2d(w, 2).view(x.size(0), 3, -1).view(x.shape[0], -1)
        return functional.linear(z, self.fc.weight)


def test_in_place_repeated_and_functional_calls() -> None:
    network = Tangle()
    traced = trace(network, (2, 3, 8, 8))
    assert [(op.name, op.kind, op.inputs) for op in traced.ops] == [
        ("conv", "conv2d", ("input",)),
        ("relu", "relu", ("conv",)),
        ("conv#2", "conv2d", ("relu",)),
        ("add", "add", ("conv#2", "relu")),
        ("relu#2", "relu", ("add",)),
        ("mul", "functional_mul", ("relu",)),
        ("add#2", "add", ("mul", "relu#2")),
        ("max_pool2d", "max_pool2d", ("add#2",)),
        ("view", "view", ("max_pool2d",)),
        ("flatten", "flatten", ("view",)),
        ("linear", "functional_linear", ("flatten",)),
    ]
    assert dict(traced.ops[7].attributes)["kernel_size"] == (2, 2)
    assert traced.ops[5].parameters == (("scale", (1,)),)
    assert traced.ops[2].parameters == ()
    placed = apply(network, "data", input_shape=(2, 3, 8, 8), transport=ONE)
    placed.begin_step(0, 5)  # another batch than the traced one
    images = torch.randn(5, 3, 8, 8)
    for model in (network, placed):
        model(images).square().sum().backward()
    used = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in placed.named_parameters()}
    assert used.keys() == found.keys()  # the unused bias belongs to no op
    for name, grad in used.items():
        torch.testing.assert_close(found[name], grad)


class Calls(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.ReLU()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "its forward"),
        (lambda x: x.view(2, -1, 8).mean(1), "whose first dim alone should be the batch's"),
        (lambda x: x * x.size(0), "takes a size that changes with the batch"),
        (lambda x: x.chunk(2, 1)[0], "returns several tensors"),
        (lambda x: (x, 3), "must return a tensor or a tuple of tensors"),
        (lambda x: x.view(-1, 5), "fails on an input of shape (2, 3, 8, 8) in its forward"),
    ],
)
def test_what_cannot_be_divided_is_said(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trace(Calls(function), (2, 3, 8, 8))
    assert message in str(caught.value)


def test_the_network_is_left_as_it_was() -> None:
    network = build("resnet18").eval()
    network.get_submodule("layer1").train()
    flags = [child.training for child in network.modules()]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_state = torch.get_rng_state()
    trace(network, input_shape("resnet18"))
    apply(network, "data", input_shape=input_shape("resnet18"), transport=ONE)
    assert [child.training for child in network.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
