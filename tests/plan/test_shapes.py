"""Convolutions of a graph as shapes, and what a plan says of them."""

from dataclasses import replace
from typing import Any

import pytest

from windlass.errors import ConfigError
from windlass.plan.convolution import ConvChoice, ConvShape
from windlass.plan.graph import INPUT, Graph, Layer
from windlass.plan.levers import LEVERS
from windlass.plan.plan import Choice, LayerChoice, Plan
from windlass.plan.shapes import conv_choices, default_choice, graph_convolutions, module_name, same_padding


def layer(name: str, source: str, shape: tuple[int, ...], kind: str = "conv2d", **attributes: object) -> Layer:
    return Layer(
        name=name, kind=kind, inputs=(source,), output_shape=shape, num_parameters=1, forward_macs=1,
        backward_macs=1, kept_bytes=1, weight_bytes=1, output_grad_bytes=1, weight_grad_bytes=1,
        attributes=tuple(attributes.items()),
    )  # fmt: skip


PLAIN: dict[str, Any] = {
    "in_channels": 3, "kernel_size": (3, 5), "stride": (1, 1), "padding": (1, 2), "dilation": (1, 1), "groups": 1,
}  # fmt: skip


def graph(*layers: Layer) -> Graph:
    return Graph(
        network="n", input_shape=(2, 3, 9, 9), layers=layers, input_bytes=1, peak_bytes=1, peak_at="a"
    )  # fmt: skip


def plan(found: Graph, lever: str, *rows: LayerChoice) -> Plan:
    levers = {name: Choice(lever.default, "") for name, lever in LEVERS.items()} | {"convolution": Choice(lever, "")}
    return Plan(
        network="n", graph=found.digest(), input_shape=(3, 9, 9), workers=1, batch=2, levers=levers, layers=rows
    )


def test_every_size_is_found() -> None:
    found = graph(
        layer("a", INPUT, (2, 6, 9, 9), **PLAIN),
        layer("relu", "a", (2, 6, 9, 9), "relu"),
        layer("b", "relu", (2, 4, 4, 4), **{**PLAIN, "in_channels": 6, "kernel_size": (3, 3), "stride": (2, 2),
              "padding": (0, 0), "groups": 2}),
        layer("b#2", "b", (2, 4, 4, 4), **{**PLAIN, "in_channels": 4, "kernel_size": (2, 2), "padding": "same"}),
    )  # fmt: skip
    assert graph_convolutions(found) == {
        "a": ConvShape(batch=2, in_channels=3, height=9, width=9, out_channels=6, kernel=(3, 5), padding=(1, 1, 2, 2)),
        "b": ConvShape(
            batch=2, in_channels=6, height=9, width=9, out_channels=4, kernel=(3, 3), stride=(2, 2), groups=2
        ),
        "b#2": ConvShape(
            batch=2, in_channels=4, height=4, width=4, out_channels=4, kernel=(2, 2), padding=(0, 1, 0, 1)
        ),
    }


@pytest.mark.parametrize(
    "odd",
    [
        layer("a", INPUT, (2, 6, 9, 9)),  # called as a function: no attributes
        layer("a", INPUT, (2, 6, 8, 9), **PLAIN),  # the output is not that of this input
        layer("a", INPUT, (2, 6, 9, 9), **{**PLAIN, "in_channels": 12}),  # the input was folded on its way
        layer("a", INPUT, (6, 9, 9), **PLAIN),  # no batch
        layer("a", "unknown", (2, 6, 9, 9), **PLAIN),
        replace(layer("a", INPUT, (2, 6, 9, 9), **PLAIN), inputs=("x", "y")),
        layer("a", INPUT, (2, 6, 9, 9), **{**PLAIN, "padding": "reflect"}),
        layer("a", INPUT, (2, 6, 9, 9), "conv1d", **PLAIN),
    ],
)
def test_what_the_graph_does_not_tell_is_left_out(odd: Layer) -> None:
    assert graph_convolutions(graph(odd)) == {}
    assert conv_choices(plan(graph(odd), "direct"), graph(odd)) == {}


def test_a_row_holds_and_the_lever_fills_the_rest_where_it_can() -> None:
    found = graph(
        layer("a", INPUT, (2, 6, 9, 9), **PLAIN),
        layer("b", "a", (2, 6, 9, 9), **{**PLAIN, "in_channels": 6, "kernel_size": (3, 3), "padding": (1, 1)}),
    )
    for lever, rows, expected in [
        ("torch", (), ("torch", "torch")),
        ("auto", (), ("torch", "torch")),
        ("direct", (), ("direct", "direct")),
        ("winograd-4x4", (), ("torch", "winograd-4x4")),  # a is 3x5
        ("winograd-4x4", (LayerChoice("b", "", "torch/direct/torch"),), ("torch", "torch/direct/torch")),
        ("torch", (LayerChoice("a", "", "direct"),), ("direct", "torch")),
    ]:
        choices = conv_choices(plan(found, lever, *rows), found)
        assert tuple(str(choices[name]) for name in ("a", "b")) == expected


def test_a_default_is_the_same_in_all_directions() -> None:
    shape = ConvShape(batch=1, in_channels=1, height=8, width=8, out_channels=1, kernel=(3, 3))
    assert default_choice("im2col", shape) == ConvChoice("im2col", "im2col", "im2col")
    assert default_choice("fft-16", shape) == ConvChoice()


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "zeros"),
    [
        ((1, 2), (3, 3), (1, 1), (1, 1, 2, 2)),
        ("valid", (3, 3), (1, 1), (0, 0, 0, 0)),
        ("same", (3, 3), (1, 1), (1, 1, 1, 1)),
        ("same", (4, 2), (1, 1), (1, 2, 0, 1)),
        ("same", (3, 5), (2, 3), (2, 2, 6, 6)),
    ],
)
def test_padding_in_pytorch_s_words(
    padding: object, kernel: tuple[int, int], dilation: tuple[int, int], zeros: tuple[int, ...]
) -> None:
    assert same_padding(padding, kernel=kernel, dilation=dilation) == zeros


@pytest.mark.parametrize("padding", ["reflect", 1, (1,), (1.0, 1.0), None])
def test_other_padding_is_refused(padding: object) -> None:
    with pytest.raises(TypeError, match="two whole numbers"):
        same_padding(padding, kernel=(3, 3), dilation=(1, 1))


def test_a_second_call_is_of_the_same_module() -> None:
    assert [module_name(name) for name in ("a.b", "a.b#2", "a.b#13")] == ["a.b"] * 3


def test_an_unknown_name_in_a_row_is_refused() -> None:
    found = graph(layer("a", INPUT, (2, 6, 9, 9), **PLAIN))
    with pytest.raises(ConfigError, match="unknown convolution algorithm"):
        conv_choices(plan(found, "torch", LayerChoice("a", "", "magic")), found)
