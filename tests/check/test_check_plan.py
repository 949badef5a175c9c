"""Mutants: a plan that fits its network, spoiled in every part."""

from dataclasses import replace
from typing import Any

import pytest

from windlass.check.plan import check_plan
from windlass.errors import ConfigError
from windlass.plan.graph import INPUT, Graph, Layer
from windlass.plan.levers import LEVERS, spell
from windlass.plan.plan import Choice, LayerChoice, Plan


def layer(name: str, kind: str, source: str, shape: tuple[int, ...], **attributes: object) -> Layer:
    return Layer(
        name=name, kind=kind, inputs=(source,), output_shape=shape, num_parameters=1, forward_macs=1,
        backward_macs=1, kept_bytes=1, weight_bytes=1, output_grad_bytes=1, weight_grad_bytes=1,
        attributes=tuple(attributes.items()),
    )  # fmt: skip


def conv(name: str, source: str, channels: int, *, stride: int) -> Layer:
    return layer(
        name, "conv2d", source, (4, 4, 4, 4), in_channels=channels, out_channels=4, kernel_size=(3, 3),
        stride=(stride, stride), padding=(1, 1), dilation=(1, 1), groups=1,
    )  # fmt: skip


GRAPH = Graph(
    network="small",
    input_shape=(4, 1, 8, 8),
    layers=(
        conv("c1", INPUT, 1, stride=2),
        layer("relu", "relu", "c1", (4, 4, 4, 4)),
        conv("c2", "relu", 4, stride=1),
        conv("c2#2", "c2", 4, stride=1),
        layer("block.conv2d", "conv2d", "c2#2", (4, 4, 4, 4)),
        layer("fc", "linear", "block.conv2d", (4, 10)),
    ),
    input_bytes=1,
    peak_bytes=1,
    peak_at="c1",
)
PLAN = Plan(
    network="small",
    graph=GRAPH.digest(),
    input_shape=(1, 8, 8),
    workers=2,
    batch=8,
    levers={name: Choice(lever.default, "") for name, lever in LEVERS.items()},
    layers=(LayerChoice("c1", "conv2d", "torch"), LayerChoice("c2", "conv2d", "torch")),
)


def with_lever(value: str) -> dict[str, Choice]:
    return {**PLAN.levers, "convolution": Choice(value, "")}


def refused(plan: Plan) -> str:
    with pytest.raises(ConfigError) as caught:
        check_plan(plan, GRAPH, where="p.yaml")
    return str(caught.value)


def test_the_plan_itself_passes_whatever_the_workers_share() -> None:
    check_plan(PLAN, GRAPH)
    check_plan(PLAN, replace(GRAPH, input_shape=(64, 1, 8, 8)))
    check_plan(replace(PLAN, layers=()), GRAPH)
    check_plan(replace(PLAN, layers=(LayerChoice("c2", "", "torch"),)), GRAPH)


@pytest.mark.parametrize("value", ["winograd-4x4", "winograd-2x2", "direct", "im2col", "auto", "torch"])
def test_an_algorithm_for_all_may_fit_some_only(value: str) -> None:
    check_plan(replace(PLAN, levers=with_lever(value), layers=()), GRAPH)


def test_layers_have_algorithms_of_their_own_per_direction() -> None:
    rows = (
        LayerChoice("c1", "conv2d", "direct/torch/im2col"),
        LayerChoice("c2", "conv2d", "winograd-4x4/winograd-6x6/winograd-2x2"),
        LayerChoice("c2#2", "conv2d", "winograd-4x4/winograd-6x6/winograd-2x2"),
        LayerChoice("block.conv2d", "conv2d", "torch"),
    )
    check_plan(replace(PLAN, levers=with_lever("auto"), layers=rows), GRAPH)


@pytest.mark.parametrize("name", LEVERS)
def test_an_impossible_lever_is_refused_with_its_path_and_choices(name: str) -> None:
    for value in ("nonsense", 0, None):
        spoiled: Any = Choice(value, "")  # type: ignore[arg-type]
        line = refused(replace(PLAN, levers={**PLAN.levers, name: spoiled}))
        assert line.startswith(f"p.yaml: levers.{name}: {value!r}")
        assert all(spell(choice) in line for choice in LEVERS[name].values)


@pytest.mark.parametrize("name", LEVERS)
def test_a_missing_lever_is_refused(name: str) -> None:
    levers = {other: choice for other, choice in PLAN.levers.items() if other != name}
    assert refused(replace(PLAN, levers=levers)).startswith(f"p.yaml: levers.{name}: is missing")


def test_an_unknown_lever_is_refused_with_the_near_one() -> None:
    line = refused(replace(PLAN, levers={**PLAN.levers, "allredcue": Choice("library", "")}))
    assert line.startswith("p.yaml: levers: unknown lever 'allredcue'; did you mean 'allreduce'")


MUTANTS: list[tuple[dict[str, Any], str]] = [
    ({"network": "other"}, "p.yaml: network: the plan is for other, this run trains small"),
    ({"input_shape": (3, 8, 8)}, "p.yaml: input_shape: the plan is for samples of shape 3×8×8, this run has 1×8×8"),
    ({"graph": "sha256:00"}, "p.yaml: graph: the plan is for another form of small (sha256:00; this run's is "
     f"{GRAPH.digest()})"),
    ({"batch": 1}, "p.yaml: batch: 2 workers need a batch of at least 2, got 1"),
    ({"layers": (LayerChoice("c3", "conv2d", "torch"),)},
     "p.yaml: layers: unknown convolution 'c3'; did you mean 'c2' or 'c1'? There are: block.conv2d, "
     "c1, c2, c2#2"),
    ({"levers": with_lever("fft-16"), "layers": ()}, "p.yaml: levers.convolution: no layer takes fft-16: none is in"),
    ({"levers": with_lever("direct"), "layers": (*PLAN.layers, LayerChoice("c2#2", "", "torch"))},
     "p.yaml: levers.convolution: no layer takes direct: none is in its domain, or all have algorithms of their own"),
    ({"layers": (LayerChoice("fc", "linear", "torch"),)}, "p.yaml: layers: unknown convolution 'fc'"),
    ({"layers": (LayerChoice("c2", "conv3d", "torch"),)},
     "p.yaml: layers.c2.kind: the plan says conv3d, the network has conv2d"),
    ({"layers": (LayerChoice("c1", "conv2d", "magic"),)},
     "p.yaml: layers.c1.convolution: unknown convolution algorithm 'magic'"),
    ({"layers": (LayerChoice("c1", "conv2d", "direct/direct"),)},
     "p.yaml: layers.c1.convolution: convolution algorithm 'direct/direct': needs one name, or three"),
    ({"layers": (LayerChoice("c1", "conv2d", "winograd-4x4"),)},
     "p.yaml: layers.c1.convolution: winograd-4x4 needs stride 1, got 2"),
    ({"layers": (LayerChoice("c2", "conv2d", "torch/fft-16/torch"),)},
     "p.yaml: layers.c2.convolution: fft-16 needs filters with sides from 5, got 3x3"),
    ({"layers": (LayerChoice("block.conv2d", "", "direct"),)},
     "p.yaml: layers.block.conv2d.convolution: only torch computes it: it is no module"),
    ({"layers": (LayerChoice("c2#2", "conv2d", "direct"), LayerChoice("c2", "conv2d", "torch"))},
     "p.yaml: layers.c2#2.convolution: it is c2 called again, and that has torch, not direct"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "start"), MUTANTS)
def test_a_spoiled_plan_is_refused_at_its_place(change: dict[str, Any], start: str) -> None:
    assert refused(replace(PLAN, **change)).startswith(start)


def test_another_form_of_the_network_refuses_the_plan() -> None:
    other = replace(GRAPH, layers=GRAPH.layers[:-1])
    with pytest.raises(ConfigError, match=r"^plan: graph: the plan is for another form of small"):
        check_plan(PLAN, other)
