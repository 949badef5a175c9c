"""The plan: every lever at its value, each with its reason, for one network on so many workers.

A plan is complete before it runs.  `tuning` chooses one, a person may edit it, `check` refuses what cannot
work, an engine runs it, `report` shows it.  It goes to YAML and back as plain mappings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import ConvChoice
from windlass.plan.levers import LEVERS, Value

SCHEMA = "windlass-plan/1"


@dataclass(frozen=True, slots=True)
class Choice:
    """A lever's value and why it was chosen."""

    value: Value
    reason: str


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What a plan says of one layer.

    Attributes:
        name: the layer's.
        kind: the layer's, e.g. ``conv2d``.
        convolution: its algorithms, as `ConvChoice` writes them, e.g. ``winograd-4x4/winograd-4x4/torch``.
        reason: why.
    """

    name: str
    kind: str
    convolution: str
    reason: str = ""

    def to_mapping(self) -> dict[str, object]:
        """The row in a plan file; a reason only where there is one."""
        reason = {"reason": self.reason} if self.reason else {}
        return {"kind": self.kind, "convolution": self.convolution, **reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every lever at its value.

    Attributes:
        network: the network's name.
        graph: digest of the network's structure (`Graph.digest`), so that a plan is not run on another one.
        input_shape: shape of one sample: channels, height, width.
        workers: how many ranks share the work.
        batch: global batch: samples of one step over all workers.
        levers: the choice for every lever of `LEVERS`, by name.
        layers: the choice for every layer that has one of its own.
    """

    network: str
    graph: str
    input_shape: tuple[int, ...]
    workers: int
    batch: int
    levers: Mapping[str, Choice]
    layers: tuple[LayerChoice, ...]

    def value(self, lever: str) -> Value:
        """The value of the lever with this name."""
        return self.levers[lever].value

    def to_mapping(self) -> dict[str, object]:
        """The plan as plain mappings and lists, in the order in which a person reads it."""
        return {
            "schema": SCHEMA,
            "network": self.network,
            "graph": self.graph,
            "input_shape": list(self.input_shape),
            "workers": self.workers,
            "batch": self.batch,
            "levers": {name: {"value": choice.value, "reason": choice.reason} for name, choice in self.levers.items()},
            "layers": {layer.name: layer.to_mapping() for layer in self.layers},
        }


def plan_from_mapping(mapping: object, *, where: str) -> Plan:
    """Reads a plan back from `Plan.to_mapping`'s form; `where` names the file in errors.

    Levers that are left out take their defaults.

    Raises:
        ConfigError: names the place in the plan and what is possible there.
    """
    table = _mapping(mapping, where)
    _only(table, where, ("schema", "network", "graph", "input_shape", "workers", "batch", "levers", "layers"))
    if table.get("schema") != SCHEMA:
        raise ConfigError(f"{where}: schema: needs {SCHEMA!r}, got {table.get('schema')!r}")
    return Plan(
        network=_text(table, "network", where),
        graph=_text(table, "graph", where),
        input_shape=_shape(table, where),
        workers=_count(table, "workers", where),
        batch=_count(table, "batch", where),
        levers=_levers(_mapping(table.get("levers", {}), f"{where}: levers"), f"{where}: levers"),
        layers=_layers(_mapping(table.get("layers", {}), f"{where}: layers"), f"{where}: layers"),
    )


def _levers(table: dict[str, object], where: str) -> dict[str, Choice]:
    for name in table:
        if name not in LEVERS:
            raise ConfigError(f"{where}: {unknown('lever', name, LEVERS)}")
    return {name: _choice(name, table.get(name), f"{where}.{name}") for name in LEVERS}


def _choice(name: str, given: object, where: str) -> Choice:
    if given is None:
        return Choice(LEVERS[name].default, "not in the plan file: the default")
    if not isinstance(given, dict):
        return Choice(_possible(name, given, where), "set by hand")
    _only(given, where, ("value", "reason"))
    return Choice(_possible(name, given.get("value"), where), str(given.get("reason", "")))


def _possible(name: str, value: object, where: str) -> Value:
    refusal = LEVERS[name].refusal(value)
    if refusal is not None or not isinstance(value, str | int):
        raise ConfigError(f"{where}: {refusal}")
    return value


def _layers(table: dict[str, object], where: str) -> tuple[LayerChoice, ...]:
    layers = []
    for name, given in table.items():
        row = _mapping(given, f"{where}.{name}")
        _only(row, f"{where}.{name}", ("kind", "convolution", "reason"))
        choice = conv_choice(row.get("convolution"), where=f"{where}.{name}.convolution")
        layers.append(LayerChoice(name, str(row.get("kind", "")), str(choice), str(row.get("reason", ""))))
    return tuple(layers)


def conv_choice(value: object, *, where: str) -> ConvChoice:
    """Reads a layer's algorithms; `where` names the place in errors.

    Raises:
        ConfigError: there is no such algorithm, or not one and not three of them.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{where}: needs an algorithm's name, or three for forward/input/weight, got {value!r}")
    try:
        return ConvChoice.parse(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _mapping(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: needs a mapping of names to values, got {type(value).__name__}")
    return value


def _only(table: Mapping[str, object], where: str, names: tuple[str, ...]) -> None:
    for name in table:
        if name not in names:
            raise ConfigError(f"{where}: {unknown('entry', name, names)}")


def _text(table: Mapping[str, object], name: str, where: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {name}: needs a text, got {value!r}")
    return value


def _count(table: Mapping[str, object], name: str, where: str) -> int:
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {name}: needs a whole number of at least 1, got {value!r}")
    return value


def _shape(table: Mapping[str, object], where: str) -> tuple[int, ...]:
    value = table.get("input_shape")
    if not isinstance(value, list) or not all(type(n) is int and n > 0 for n in value):
        raise ConfigError(f"{where}: input_shape: needs a list such as [1, 32, 32], got {value!r}")
    return tuple(value)
