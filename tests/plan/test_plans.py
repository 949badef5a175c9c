"""A plan to mappings and back, and every way of spoiling one."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from windlass.errors import ConfigError
from windlass.plan.levers import LEVERS, spell
from windlass.plan.plan import SCHEMA, Choice, LayerChoice, Plan, plan_from_mapping
from windlass.runs.files import to_yaml

PLAN = Plan(
    network="small",
    graph="sha256:0123456789abcdef",
    input_shape=(1, 8, 8),
    workers=2,
    batch=16,
    levers={name: Choice(lever.default, f"because of {name}: ∇W") for name, lever in LEVERS.items()},
    layers=(
        LayerChoice("c1", "conv2d", "torch"),
        LayerChoice("block.0.c2", "conv2d", "winograd-4x4/winograd-4x4/direct", "2.10 times as fast"),
    ),
)


def mapping() -> Any:
    return yaml.safe_load(to_yaml(PLAN.to_mapping()))


def refused(spoiled: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_from_mapping(spoiled, where="p.yaml")
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_plan_goes_through_yaml_and_back() -> None:
    assert mapping() == PLAN.to_mapping()
    assert plan_from_mapping(mapping(), where="p.yaml") == PLAN
    assert mapping()["schema"] == SCHEMA
    assert mapping()["layers"]["c1"] == {"kind": "conv2d", "convolution": "torch"}
    assert mapping()["layers"]["block.0.c2"]["reason"] == "2.10 times as fast"


def test_one_name_and_three_alike_are_the_same_choice() -> None:
    spoiled = mapping()
    spoiled["layers"]["c1"]["convolution"] = "direct/direct/direct"
    assert plan_from_mapping(spoiled, where="p.yaml").layers[0].convolution == "direct"


def test_a_value_is_found_by_its_lever() -> None:
    assert {name: PLAN.value(name) for name in LEVERS} == {name: lever.default for name, lever in LEVERS.items()}


@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_left_out_takes_its_default_and_says_so(name: str) -> None:
    spoiled = mapping()
    del spoiled["levers"][name]
    plan = plan_from_mapping(spoiled, where="p.yaml")
    assert plan.levers[name] == Choice(LEVERS[name].default, "not in the plan file: the default")
    assert list(plan.levers) == list(LEVERS)


@pytest.mark.parametrize("name", LEVERS)
def test_a_bare_value_is_set_by_hand(name: str) -> None:
    spoiled = mapping()
    spoiled["levers"][name] = LEVERS[name].default
    assert plan_from_mapping(spoiled, where="p.yaml").levers[name] == Choice(LEVERS[name].default, "set by hand")


def test_levers_and_layers_may_be_left_out_altogether() -> None:
    spoiled = mapping()
    del spoiled["levers"], spoiled["layers"]
    plan = plan_from_mapping(spoiled, where="p.yaml")
    assert set(plan.levers) == set(LEVERS) and plan.layers == ()


NONSENSE: tuple[Any, ...] = ("nonsense", 1.5, 0, [])
IMPOSSIBLE = [*((value, bare) for value in NONSENSE for bare in (False, True)), (None, False)]
"""A bare null leaves the lever out."""


@pytest.mark.parametrize("name", LEVERS)
@pytest.mark.parametrize(("value", "bare"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_with_place_and_choices(name: str, value: Any, bare: bool) -> None:
    spoiled = mapping()
    spoiled["levers"][name] = value if bare else {"value": value, "reason": ""}
    line = refused(spoiled)
    lever = LEVERS[name]
    assert line.startswith((f"p.yaml: levers.{name}: {value!r}", f"p.yaml: levers.{name}: 0 is out"))
    assert all(spell(choice) in line for choice in lever.values)
    assert lever.values or "whole number" in line


Spoil = Callable[[Any], None]


def put(*path: str, value: Any) -> Spoil:
    def spoil(table: Any) -> None:
        for name in path[:-1]:
            table = table[name]
        table[path[-1]] = value

    return spoil


MUTANTS: list[tuple[Spoil, str]] = [
    (put("schema", value="windlass-plan/2"), "p.yaml: schema: needs 'windlass-plan/1', got 'windlass-plan/2'"),
    (lambda table: table.pop("schema"), "p.yaml: schema: needs 'windlass-plan/1', got None"),
    (put("network", value=3), "p.yaml: network: needs a text, got 3"),
    (lambda table: table.pop("network"), "p.yaml: network: needs a text, got None"),
    (put("graph", value=""), "p.yaml: graph: needs a text, got ''"),
    (put("input_shape", value="1x8x8"), "p.yaml: input_shape: needs a list such as [1, 32, 32], got '1x8x8'"),
    (put("input_shape", value=[1, 8, 0]), "p.yaml: input_shape: needs a list"),
    (put("input_shape", value=[1, 8, 8.0]), "p.yaml: input_shape: needs a list"),
    (put("input_shape", value=[True, 8, 8]), "p.yaml: input_shape: needs a list"),
    (put("workers", value=0), "p.yaml: workers: needs a whole number of at least 1, got 0"),
    (put("workers", value=True), "p.yaml: workers: needs a whole number of at least 1, got True"),
    (put("batch", value="16"), "p.yaml: batch: needs a whole number of at least 1, got '16'"),
    (lambda table: table.pop("batch"), "p.yaml: batch: needs a whole number of at least 1, got None"),
    (put("levers", value=["overlap"]), "p.yaml: levers: needs a mapping of names to values, got list"),
    (put("levers", value={3: 4}), "p.yaml: levers: needs a mapping of names to values, got dict"),
    (put("levers", "overlp", value=True), "p.yaml: levers: unknown lever 'overlp'; did you mean 'overlap'"),
    (put("levers", "overlap", "valeu", value=True), "p.yaml: levers.overlap: unknown entry 'valeu'; did you mean"),
    (put("layers", value=3), "p.yaml: layers: needs a mapping of names to values, got int"),
    (put("layers", "c1", value="torch"), "p.yaml: layers.c1: needs a mapping of names to values, got str"),
    (put("layers", "c1", "algorithm", value="torch"), "p.yaml: layers.c1: unknown entry 'algorithm'. There"),
    (
        put("layers", "c1", "convolution", value="magic"),
        "p.yaml: layers.c1.convolution: unknown convolution algorithm 'magic'. There are: direct, fft-16",
    ),
    (
        put("layers", "c1", "convolution", value="direct/winograd4x4/torch"),
        "p.yaml: layers.c1.convolution: unknown convolution algorithm 'winograd4x4'; did you mean 'winograd-4x4'",
    ),
    (put("layers", "c1", "convolution", value="direct/torch"), "p.yaml: layers.c1.convolution: convolution algorithm "
     "'direct/torch': needs one name, or three for forward/input/weight"),
    (put("layers", "c1", "convolution", value=3), "p.yaml: layers.c1.convolution: needs an algorithm's name, or three"),
    (lambda table: table["layers"]["c1"].pop("convolution"), "p.yaml: layers.c1.convolution: needs an algorithm's"),
    (put("layers", "block.0.c2", "convolution", value=None), "p.yaml: layers.block.0.c2.convolution: needs an algo"),
    (put("wokers", value=2), "p.yaml: unknown entry 'wokers'; did you mean 'workers'"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "start"), MUTANTS)
def test_a_spoiled_plan_is_refused_at_its_place(spoil: Spoil, start: str) -> None:
    spoiled = mapping()
    spoil(spoiled)
    assert refused(spoiled).startswith(start)


@pytest.mark.parametrize("nothing", [None, [], "plan", 3])
def test_what_is_no_mapping_is_refused(nothing: Any) -> None:
    assert refused(nothing).startswith("p.yaml: needs a mapping of names to values, got ")
