"""A captured network's convolutions into a plan, and a plan's into the module."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from windlass.check.plan import check_plan
from windlass.errors import ConfigError
from windlass.layers import Conv2d
from windlass.networks.capture import capture
from windlass.plan.convolution import Direction
from windlass.plan.graph import Graph
from windlass.plan.plan import Choice, LayerChoice, Plan, plan_from_mapping
from windlass.tuning import convolution
from windlass.tuning.cache import TimesCache
from windlass.tuning.choose import choose_plan
from windlass.tuning.convolution import Tuner
from windlass.tuning.cost import Machine
from windlass.tuning.network import (
    apply_plan,
    complete,
    graph_cases,
    layer_refusals,
    plan_kept_bytes,
    tune_network,
    with_convolutions,
)
from windlass.tuning.results import ConvCase, Settings


class Net(nn.Module):
    """A Sequential with ReLUs, a module called twice, a convolution as a function, one padded with reflections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 32, 3))
        self.twice = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.reflect = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")
        self.weight = nn.Parameter(torch.randn(32, 32, 3, 3) * 0.05)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.twice(x)) + self.twice(nn.functional.max_pool2d(x, 3, 1, 1))
        x = self.reflect(x) + nn.functional.conv2d(x, self.weight, padding=1)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.fixture(autouse=True)
def all_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "BEHIND", 1e9)
    monkeypatch.setattr(convolution, "HOPELESS", 1e9)
    monkeypatch.setattr(convolution, "MEASURED", 99)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def captured(net: nn.Module, batch: int = 8) -> Graph:
    return capture(net, (batch, 1, 16, 16), name="net", num_classes=10)


def tuner(winner: str, asked: list[ConvCase] | None = None) -> Tuner:
    def measure(case: ConvCase, direction: Direction, names: Sequence[str]) -> dict[str, float]:
        if asked is not None:
            asked.append(case)
        return {name: 0.5 if name == winner else 1.0 for name in names}

    return Tuner(
        settings=Settings(),
        machine=Machine(1e9, 1e12, 2),
        cache=TimesCache({}, warn=lambda message: None, folder=None),
        measure=measure,
        workspace=lambda name, direction, case: 0,
    )


def tuned_plan(net: nn.Module, winner: str = "winograd-2x2") -> tuple[Plan, Graph]:
    graph = captured(net)
    plan = choose_plan(graph, workers=1, batch=8)
    return with_convolutions(plan, tune_network(graph, net, layout="contiguous", tuner=tuner(winner))), graph


def test_cases_know_bias_layout_and_which_gradients_are_wanted(net: Net) -> None:
    cases = graph_cases(captured(net), layout="channels_last")
    assert list(cases) == ["stem.0", "stem.2", "twice", "twice#2", "reflect"]
    assert (
        {case.layout for case in cases.values()} == {case.weight_layout for case in cases.values()} == {"channels_last"}
    )
    assert [case.bias for case in cases.values()] == [True, True, False, False, True]
    assert cases["stem.0"].directions == ("forward", "weight")
    assert cases["stem.2"].directions == ("forward", "input", "weight")
    assert cases["twice"].shape.batch == 8 and cases["twice"].shape.height == 14


def test_what_must_stay_pytorch_s_says_why(net: Net) -> None:
    assert layer_refusals(captured(net), net) == {
        "reflect": "pads with reflect, not with zeros",
        "conv2d": "it is no conv2d module of PyTorch's own class",
    }


def test_the_plan_has_a_row_and_a_reason_for_every_convolution(net: Net) -> None:
    plan, graph = tuned_plan(net)
    rows = {row.name: row for row in plan.layers}
    assert {name: row.convolution for name, row in rows.items()} == {
        "stem.0": "winograd-2x2/torch/winograd-2x2",
        "stem.2": "winograd-2x2",
        "twice": "winograd-2x2",
        "twice#2": "winograd-2x2",
        "reflect": "torch",
        "conv2d": "torch",
    }
    assert rows["stem.2"].reason == "2.00 times as fast as PyTorch's"
    assert rows["reflect"].reason == "pads with reflect, not with zeros"
    assert plan.levers["convolution"].value == "auto"
    assert plan.levers["convolution"].reason.startswith("3 of 5 convolutions by another algorithm than PyTorch's")
    check_plan(plan, graph)
    assert plan_from_mapping(plan.to_mapping(), where="p") == plan


def test_calls_of_one_module_are_chosen_together(net: Net) -> None:
    asked: list[ConvCase] = []
    graph = captured(net)
    found = tune_network(graph, net, layout="contiguous", tuner=tuner("direct", asked))
    (row,) = [layer for layer in found.layers if layer.name == "twice"]
    assert len(row.cases) == 2 and row.directions[0].measured["torch"] == 2.0


def test_an_applied_plan_computes_the_same_and_keeps_every_key(net: Net) -> None:
    plan, graph = tuned_plan(net)
    expected, keys, parameters = copy.deepcopy(net), list(net.state_dict()), dict(net.named_parameters())
    applied = apply_plan(plan, graph, net)
    assert applied is net
    assert {name for name, child in net.named_modules() if isinstance(child, Conv2d)} == {"stem.0", "stem.2", "twice"}
    assert list(net.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    x = torch.randn(8, 1, 16, 16)
    for model in (expected, net):
        model(x).square().mean().backward()
    torch.testing.assert_close(net(x), expected(x), rtol=1e-4, atol=1e-5)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_relu_comes_along_where_the_graph_shows_it_alone_reads(net: Net) -> None:
    plan, graph = tuned_plan(net)
    apply_plan(plan, graph, net)
    assert isinstance(net.stem[0], Conv2d) and net.stem[0].activation == "relu"
    assert type(net.stem[1]) is nn.Identity

    class Between(Net):
        def forward(self, x: Tensor) -> Tensor:
            between = self.stem[0](x)
            y: Tensor = self.head((self.stem[1](between) * between).mean((2, 3)))
            return y

    other: Any = Between()
    other.stem[1].inplace = False  # in place, what is read between is the ReLU's result already
    plan, graph = tuned_plan(other)
    apply_plan(plan, graph, other)
    assert isinstance(other.stem[0], Conv2d) and other.stem[0].activation is None
    assert type(other.stem[1]) is nn.ReLU


def test_a_plan_of_pytorch_s_own_touches_nothing(net: Net) -> None:
    graph = captured(net)
    plan = choose_plan(graph, workers=1, batch=8)
    children = dict(net.named_modules())
    assert apply_plan(plan, graph, net) is net
    assert dict(net.named_modules()) == children
    assert not any(isinstance(child, Conv2d) for child in net.modules())


@pytest.mark.parametrize("lever", ["direct", "im2col", "winograd-4x4", "winograd-6x6"])
def test_a_lever_alone_is_for_all_that_can(net: Net, lever: str) -> None:
    graph = captured(net)
    plan = choose_plan(graph, workers=1, batch=8)
    plan = replace(plan, levers={**plan.levers, "convolution": Choice(lever, "by hand")}, layers=())
    rows = {row.name: row.convolution for row in complete(plan, graph).layers}
    assert rows == {
        "stem.0": lever, "stem.2": lever, "twice": lever, "twice#2": lever, "reflect": lever, "conv2d": "torch",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"layers\.reflect\.convolution: .*: pads with reflect, not with zeros"):
        apply_plan(plan, graph, net)
    plan = replace(plan, layers=(LayerChoice("reflect", "conv2d", "torch"),))
    apply_plan(plan, graph, net)
    assert isinstance(net.twice, Conv2d) and net.twice.algorithm == lever


def test_kept_spectra_are_counted_where_a_gradient_of_the_input_uses_them() -> None:
    """32 × 32 filters of 7×7 in tiles of 16, for each call but the first layer's: 130 frequencies of 8 bytes."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Conv2d(1, 32, 7, padding=3), nn.Conv2d(32, 32, 7, padding=3)
            self.head = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.twice(self.twice(self.first(x))).mean((2, 3)))
            return y

    graph = captured(Large())
    plan = choose_plan(graph, workers=1, batch=8)
    assert plan_kept_bytes(plan, graph) == 0
    for algorithm, calls in (("fft-16", 2), ("fft-16/fft-16/torch", 2), ("fft-16/fft-32/fft-16", 0), ("direct", 0)):
        rows = tuple(LayerChoice(name, "conv2d", algorithm) for name in ("first", "twice", "twice#2"))
        num_bytes = plan_kept_bytes(replace(plan, layers=rows), graph)
        least = calls * 130 * 8 * 32 * 32
        assert least <= num_bytes <= 1.01 * least


def test_rows_of_one_s_own_stay_when_a_plan_is_completed(net: Net) -> None:
    graph = captured(net)
    plan = choose_plan(graph, workers=1, batch=8)
    own = LayerChoice("stem.2", "conv2d", "direct/torch/torch", "I said so")
    whole = complete(replace(plan, layers=(own,)), graph)
    assert own in whole.layers and len(whole.layers) == 6
    assert [row.name for row in whole.layers] == [row.name for row in plan.layers]


def test_other_batches_take_the_same_algorithms(net: Net) -> None:
    plan, graph = tuned_plan(net)
    apply_plan(plan, graph, net)
    for batch in (1, 3):
        assert net(torch.randn(batch, 1, 16, 16)).shape == (batch, 10)
