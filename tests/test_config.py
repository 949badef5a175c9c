"""Configuration: layers, types, ranges, YAML out and in."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from windlass import config as config_module
from windlass.config import (
    EPOCH_METRICS,
    TrainConfig,
    assignment,
    better_when_lower,
    config_file,
    config_from_layers,
    read_yaml,
    saved_config,
)
from windlass.errors import ConfigError, DataError
from windlass.optim.rules import UPDATE_RULES
from windlass.runs.files import to_yaml
from windlass.typed import build_config


@pytest.fixture
def no_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "RECIPES", {})


def configured(text: str) -> TrainConfig:
    return config_from_layers([assignment(text)])


def refused(*layers: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_layers(list(layers))
    return str(caught.value)


# --- layers -----------------------------------------------------------------------------------------------


def test_no_layer_gives_the_defaults(no_recipes: None) -> None:
    assert config_from_layers([]) == TrainConfig()


def test_the_later_layer_wins_key_by_key_at_every_depth() -> None:
    config = config_from_layers(
        [
            {"epochs": 3, "batch": 32, "data": {"source": "synthetic", "holdout": 0.1}},
            {"epochs": 4, "data": {"holdout": 0.3}},
            {"data": {"threads": 2}},
        ]
    )
    assert (config.epochs, config.batch) == (4, 32)
    assert (config.data.source, config.data.holdout, config.data.threads) == ("synthetic", 0.3, 2)


def test_layers_are_left_as_they_were() -> None:
    below, above = {"data": {"holdout": 0.1}}, {"data": {"holdout": 0.3}}
    config_from_layers([below, above])
    assert (below, above) == ({"data": {"holdout": 0.1}}, {"data": {"holdout": 0.3}})


RECIPE = {
    "epochs": 7,
    "data": {"augment": ["flip"]},
    "update": {"name": "nesterov", "lr": 0.02, "momentum": 0.8},
    "schedule": {"name": "linear", "floor": 0.1},
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config_module.RECIPES, "vgg11", RECIPE)


def test_a_recipe_stands_between_defaults_and_layers(recipe: None) -> None:
    config = config_from_layers([{"network": "vgg11", "data": {"holdout": 0.5}, "update": {"lr": 0.5}}])
    assert (config.epochs, config.data.augment, config.data.holdout) == (7, ("flip",), 0.5)
    assert (config.update.name, config.update.lr, config.update.momentum) == ("nesterov", 0.5, 0.8)
    assert (config.schedule.name, config.schedule.floor) == ("linear", 0.1)
    assert config_from_layers([{"network": "vgg11"}, {"epochs": 1}]).epochs == 1


@pytest.mark.parametrize("network", config_module.RECIPES)
def test_every_recipe_is_a_configuration_and_changes_something(network: str) -> None:
    with_recipe = config_from_layers([{"network": network}])
    assert with_recipe != TrainConfig(network=network)


def test_a_recipe_is_of_one_network_only(recipe: None) -> None:
    assert config_from_layers([{"network": "vgg16"}]).epochs == TrainConfig().epochs


def test_another_rule_or_schedule_by_name_drops_the_recipe_of_it_alone(recipe: None) -> None:
    config = config_from_layers([{"network": "vgg11", "update": {"name": "adam"}}])
    assert config.update.hyper_parameters() == UPDATE_RULES["adam"].defaults
    assert config.schedule.name == "linear"
    config = config_from_layers([{"network": "vgg11", "schedule": {"name": "cosine"}}])
    assert (config.schedule.name, config.schedule.floor) == ("cosine", 0.0)
    assert config.update.lr == 0.02


def test_another_update_rule_starts_from_its_own_defaults() -> None:
    below = {"update": {"name": "momentum", "lr": 0.3, "momentum": 0.8}}
    config = config_from_layers([below, {"update": {"name": "adam"}}])
    assert config.update.hyper_parameters() == UPDATE_RULES["adam"].defaults
    config = config_from_layers([below, {"update": {"name": "adam", "beta1": 0.8}}, {"update": {"lr": 0.1}}])
    assert config.update.hyper_parameters() == UPDATE_RULES["adam"].defaults | {"beta1": 0.8, "lr": 0.1}


def test_another_schedule_starts_from_its_own_defaults() -> None:
    below = {"schedule": {"name": "step", "factor": 0.5, "every_epochs": 3, "warmup_epochs": 2}}
    config = config_from_layers([below, {"schedule": {"name": "exponential"}}])
    assert config.schedule == TrainConfig(schedule=type(config.schedule)(name="exponential")).schedule


def test_the_same_rule_named_again_keeps_its_numbers() -> None:
    named = {"update": {"name": "momentum", "lr": 0.3}, "schedule": {"name": "cosine", "floor": 0.2}}
    unnamed = {"update": {"lr": 0.3}, "schedule": {"floor": 0.2}}  # momentum and cosine are the defaults
    for below in (named, unnamed):
        config = config_from_layers([below, {"update": {"name": "momentum"}, "schedule": {"name": "cosine"}}])
        assert (config.update.lr, config.schedule.floor) == (0.3, 0.2)


def test_numbers_of_the_unnamed_default_rule_are_not_another_rules() -> None:
    config = config_from_layers([{"update": {"lr": 0.3, "momentum": 0.5}}, {"update": {"name": "adam"}}])
    assert config.update.hyper_parameters() == UPDATE_RULES["adam"].defaults


def test_on_resume_what_is_given_overrides_the_saved_and_the_rest_stays() -> None:
    saved = config_from_layers(
        [{"update": {"name": "adam", "beta1": 0.8}, "schedule": {"name": "step", "factor": 0.5}, "seed": 4}]
    ).to_mapping()
    config = config_from_layers([saved, {"out": "there", "plan": ""}, {"epochs": 30, "update": {"lr": 0.01}}])
    assert (config.out, config.epochs, config.seed) == ("there", 30, 4)
    assert (config.update.lr, config.update.beta1, config.update.name) == (0.01, 0.8, "adam")
    assert config.schedule.factor == 0.5


# --- types ------------------------------------------------------------------------------------------------

TEXTS: list[tuple[str, Any]] = [
    ("epochs=3", 3),
    ("stall_s=1e-3", 1e-3),  # YAML 1.1 reads this as a text
    ("stall_s=5", 5.0),
    ("update.lr=1e-3", 1e-3),
    ("update.lr=0.5", 0.5),
    ("data.augment=shift:2, flip", ("shift:2", "flip")),
    ("data.augment=[shift:2, flip]", ("shift:2", "flip")),
    ("data.augment=", ()),
    ("out=12", "12"),
    ("network_args={width: 2, wide: true}", {"width": 2, "wide": True}),
    ("network_args.width=2", {"width": 2}),
]


@pytest.mark.parametrize(("text", "value"), TEXTS)
def test_values_come_as_their_type(text: str, value: Any) -> None:
    found: Any = configured(text)
    for name in text.partition("=")[0].split("."):
        if not isinstance(found, dict):
            found = getattr(found, name)
    assert found == value and type(found) is type(value)


WRONG_TYPES = [
    ("epochs=3.5", "epochs: needs a whole number, got 3.5"),
    ("epochs='3.5'", "epochs: needs a whole number, got '3.5'"),
    ("epochs='3'", "epochs: needs a whole number, got '3'"),
    ("epochs=true", "epochs: needs a whole number, got True"),
    ("epochs=", "epochs: needs a whole number, got ''"),
    ("epochs=null", "epochs: needs a whole number, got None"),
    ("stall_s=true", "stall_s: needs a number, got True"),
    ("stall_s=soon", "stall_s: needs a number, got 'soon'"),
    ("stall_s=[1]", r"stall_s: needs a number, got [1]"),
    (f"stall_s=1{'0' * 400}", "stall_s: needs a number, got 1000"),
    ("update.lr=fast", "update.lr: needs a number, got 'fast'"),
    ("update.lr=no", "update.lr: needs a number, got False"),
    ("out=true", "out: needs a text, got True"),
    ("network=[lenet5]", "network: needs a text, got ['lenet5']"),
    ("data.augment=3", "data.augment: needs a list, got 3"),
    ("data.augment=[[flip]]", "data.augment: needs a text, got ['flip']"),
    ("data=digits", "data: needs keys of its own (data.KEY=VALUE), got 'digits'"),
    ("network_args=3", "network_args: needs a mapping, got 3"),
]


@pytest.mark.parametrize(("text", "line"), WRONG_TYPES)
def test_values_of_another_type_are_refused(text: str, line: str) -> None:
    assert refused(assignment(text)).startswith(line)


@pytest.mark.parametrize("key", ["update", "schedule", "checkpoint", "early_stop", "data"])
@pytest.mark.parametrize("value", [None, 3, "adam", ["name"]])
def test_a_part_that_is_no_mapping_is_refused(key: str, value: Any) -> None:
    assert refused({key: value}).startswith(f"{key}: needs keys of its own")


@dataclass(frozen=True, kw_only=True)
class Switch:
    on: bool = False


def test_a_boolean_must_be_one() -> None:
    assert build_config(Switch, {"on": True}, "").on is True
    for value in (1, "true", None):
        with pytest.raises(ConfigError, match=r"^lamp\.on: needs true or false, got"):
            build_config(Switch, {"on": value}, "lamp.")


# --- unknown keys -----------------------------------------------------------------------------------------

UNKNOWN: list[tuple[Any, str, str]] = [
    ({"epoch": 3}, "unknown configuration key 'epoch'; did you mean 'epochs'", "workers"),
    ({"data": {"sorce": ""}}, "unknown configuration key 'data.sorce'; did you mean 'data.source'", "data.holdout"),
    ({"update": {"learn": 1}}, "unknown configuration key 'update.learn'", "update.momentum"),
    ({"checkpoint": {"keep": 1}}, "unknown configuration key 'checkpoint.keep'", "checkpoint.keep_best"),
    ({1: 2}, "unknown configuration key '1'. There are", "epochs"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "start", "listed"), UNKNOWN)
def test_an_unknown_key_is_refused_with_the_near_and_all_names(layer: Any, start: str, listed: str) -> None:
    line = refused(layer)
    assert line.startswith(start)
    assert listed in line.partition("There are: ")[2].split(", ")


# --- ranges -----------------------------------------------------------------------------------------------

AT_LEAST: list[tuple[str, float]] = [
    ("workers", 1), ("epochs", 1), ("batch", 1), ("log_every", 1), ("seed", 0), ("threads", 0),
    ("data.image_size", 0), ("data.threads", 0),
    ("checkpoint.every_epochs", 0), ("checkpoint.every_steps", 0), ("checkpoint.every_minutes", 0),
    ("checkpoint.keep_best", 0), ("checkpoint.keep_last", 1),
    ("early_stop.patience", 0), ("early_stop.min_delta", 0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "lowest"), AT_LEAST)
def test_counts_have_a_lowest_value(key: str, lowest: int) -> None:
    configured(f"{key}={lowest}")
    assert refused(assignment(f"{key}={lowest - 1}")).startswith(f"{key}: needs a number of at least {lowest}")


@pytest.mark.parametrize("key", ["checkpoint.every_minutes", "early_stop.min_delta", "stall_s", "data.holdout"])
def test_nan_is_in_no_range(key: str) -> None:
    assert refused(assignment(f"{key}=.nan")).startswith(f"{key}: needs")


OUT_OF_RANGE = [
    ({"data": {"holdout": 0}}, "data.holdout: needs a share between 0 and 1, got 0"),
    ({"data": {"holdout": 1}}, "data.holdout: needs a share between 0 and 1, got 1"),
    ({"data": {"source": "digit"}}, "unknown data source 'digit'; did you mean 'digits'"),
    ({"data": {"source": "mnist"}}, "mnist needs the place of its files"),
    ({"data": {"augment": ["flop"]}}, "unknown augmentation 'flop'; did you mean 'flip'"),
    ({"checkpoint": {"monitor": "test_acuracy"}}, "checkpoint.monitor: unknown metric 'test_acuracy'; did you mean"),
    ({"early_stop": {"metric": "loss"}}, "early_stop.metric: unknown metric 'loss'"),
    ({"network": "lenet"}, "unknown network 'lenet'; did you mean 'lenet5'"),
    ({"stall_s": 0}, "stall_s: needs a number above 0, got 0"),
    ({"workers": 5, "batch": 4}, "batch: 5 workers need a batch of at least 5, got 4"),
    ({"epochs": 2, "schedule": {"warmup_epochs": 2.5}}, "schedule.warmup_epochs: 2.5 is longer than the run of 2"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "start"), OUT_OF_RANGE)
def test_what_cannot_run_is_refused(layer: dict[str, Any], start: str) -> None:
    assert refused(layer).startswith(start)


def test_the_edges_of_what_can_run() -> None:
    assert config_from_layers([{"workers": 4, "batch": 4}]).batch == 4
    assert config_from_layers([{"epochs": 2, "schedule": {"warmup_epochs": 2}}]).epochs == 2


def test_metrics_with_loss_in_their_name_are_better_when_lower() -> None:
    assert [name for name in EPOCH_METRICS if better_when_lower(name)] == ["train_loss", "test_loss"]


# --- command line, files ----------------------------------------------------------------------------------

ASSIGNMENTS: list[tuple[str, dict[str, Any]]] = [
    ("epochs=3", {"epochs": 3}),
    (" epochs =3", {"epochs": 3}),
    ("a.b.c=x=y", {"a": {"b": {"c": "x=y"}}}),
    ("out=", {"out": ""}),
    ("out= ", {"out": ""}),
    ("out=[half", {"out": "[half"}),  # not YAML: the text itself
    ("plan=null", {"plan": None}),
    ("a={b: 1}", {"a": {"b": 1}}),
]


@pytest.mark.parametrize(("text", "mapping"), ASSIGNMENTS)
def test_assignment(text: str, mapping: dict[str, Any]) -> None:
    assert assignment(text) == mapping


@pytest.mark.parametrize("text", ["", "epochs", "=3", " =3"])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set: needs key=value"):
        assignment(text)


def test_to_mapping_goes_through_yaml_and_back() -> None:
    config = config_from_layers(
        [
            {
                "network": "resnet18", "network_args": {"width": 1.5, "wide": True, "name": "a: b"},
                "data": {"source": "synthetic:1x8x8:2:40", "augment": ["shift:2", "flip"]},
                "update": {"name": "adamw", "lr": 3e-5}, "schedule": {"name": "step", "warmup_epochs": 0.5},
                "checkpoint": {"monitor": "test_loss", "every_minutes": 0.25}, "out": "Läufe/1", "workers": 3,
            }
        ]
    )  # fmt: skip
    mapping = config.to_mapping()
    again = yaml.safe_load(to_yaml(mapping))
    assert again == mapping
    assert config_from_layers([again]).to_mapping() == mapping
    numbers = {**UPDATE_RULES["adamw"].defaults, "lr": 3e-5}
    assert mapping["update"] == {"name": "adamw", **numbers, "scaling": "none", "base_batch": 128}


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_every_update_rule_filled_in_is_accepted_again(name: str) -> None:
    config = config_from_layers([{"update": {"name": name}}])
    again = config_from_layers([config.to_mapping()])
    assert again.update.hyper_parameters() == config.update.hyper_parameters()


def test_a_configuration_file_is_a_mapping_or_empty(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 3\nupdate:\n  lr: 1e-3\n")
    assert config_from_layers([config_file(path)]).update.lr == 1e-3
    path.write_text("")
    assert config_file(path) == {}
    path.write_text("- epochs\n")
    with pytest.raises(ConfigError, match="needs a mapping of keys to values"):
        config_file(path)


def test_a_file_that_cannot_be_read_as_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=r"plan .*c\.yaml: no such file"):
        read_yaml(path, "plan")
    path.write_text("a: [1\nb: }")
    with pytest.raises(ConfigError, match=r"plan .*c\.yaml: is not YAML: ") as caught:
        read_yaml(path, "plan")
    assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match=r"plan .*c\.yaml: (cannot be read|is not YAML)"):
        read_yaml(path, "plan")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path, "plan")


def test_resuming_where_there_is_no_run_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no run to resume here"):
        saved_config(tmp_path)
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    assert saved_config(tmp_path) == {"epochs": 3}


def test_infinite_times_are_allowed() -> None:
    assert configured("stall_s=.inf").stall_s == math.inf
