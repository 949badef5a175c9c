"""The configuration of a training run: frozen dataclasses, validated when made, YAML in and out.

Nothing here imports PyTorch, so a mistyped key is refused at once.  Values come, each overriding the one
before, from the defaults, the network's recipe, a configuration file, the command's options and ``--set``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from windlass.data import parse_spec
from windlass.data.augment import parse_augment
from windlass.errors import ConfigError, DataError, unknown
from windlass.networks import check_network_name
from windlass.optim.rules import Schedule, UpdateRule
from windlass.plan.levers import LEVERS, PARALLEL
from windlass.plan.mesh import Mesh
from windlass.plan.pick import AUTO
from windlass.plan.recipe import parse_recipe
from windlass.plan.sizes import parse_bytes
from windlass.tuning.results import Settings
from windlass.typed import build_config

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and what is done to them.

    Attributes:
        source: ``digits``, ``mnist:PATH``, … (`windlass.data.SOURCES`).
        augment: augmentations by name, e.g. ``("shift:2", "flip")``.
        image_size: side of the square images that the network gets; 0 leaves it to network and data.
        holdout: share of the samples held out for testing when the source brings no test set of its own.
        threads: threads a rank decodes image files with; 0: its share of the cores.
    """

    source: str = "digits"
    augment: tuple[str, ...] = ()
    image_size: int = 0
    holdout: float = 0.2
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuses unknown sources and augmentations."""
        parse_spec(self.source)
        parse_augment(self.augment)
        _at_least("data.image_size", self.image_size, 0)
        _at_least("data.threads", self.threads, 0)
        if not 0 < self.holdout < 1:
            raise ConfigError(f"data.holdout: needs a share between 0 and 1, got {self.holdout}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every_epochs, every_steps, every_minutes: 0 switches the trigger off.
        keep_last: how many of the newest stay.
        keep_best: how many of the best by `monitor` stay besides.
        monitor: the metric of an epoch that says what is best; a name with ``loss`` in it is better when lower.
    """

    every_epochs: int = 1
    every_steps: int = 0
    every_minutes: float = 0.0
    keep_last: int = 2
    keep_best: int = 1
    monitor: str = "test_accuracy"

    def __post_init__(self) -> None:
        """Refuses negative counts and an unknown metric."""
        for name in ("every_epochs", "every_steps", "every_minutes", "keep_best"):
            _at_least(f"checkpoint.{name}", getattr(self, name), 0)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _check_metric("checkpoint.monitor", self.monitor)


@dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """Stops a run whose metric no longer improves.

    Attributes:
        patience: epochs without improvement after which the run ends; 0 switches it off.
        metric: the metric of an epoch that is watched.
        min_delta: what counts as an improvement.
    """

    patience: int = 0
    metric: str = "test_loss"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        """Refuses negative numbers and an unknown metric."""
        _at_least("early_stop.patience", self.patience, 0)
        _at_least("early_stop.min_delta", self.min_delta, 0)
        _check_metric("early_stop.metric", self.metric)


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """What a run does when a rank dies.

    Attributes:
        enabled: go on without it, in the same processes where MPI can, else from the last checkpoint.
        spares: ranks started beside the workers that wait to take a dead one's place.
        max_restarts: how often the run is started again from its last checkpoint, where going on is impossible.
        record_samples: write which samples each rank took in each step to ``samples/`` in the run folder.
    """

    enabled: bool = False
    spares: int = 0
    max_restarts: int = 3
    record_samples: bool = False

    def __post_init__(self) -> None:
        """Refuses negative counts, and spares that nobody would call."""
        _at_least("elastic.spares", self.spares, 0)
        _at_least("elastic.max_restarts", self.max_restarts, 0)
        if self.spares and not self.enabled:
            raise ConfigError("elastic.spares: spare ranks wait for a death that ends a run: add --elastic")


LEVERS_SET = ("number_format", "parallel", "mesh", "accumulate", "recompute")
"""Levers of the plan that a configuration sets; a plan file says the same or nothing else is said."""

DEFAULT_TUNE = "auto"
"""How convolutions are chosen where nobody says otherwise, a key of `tuning.results.TUNES`."""


EPOCH_METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
"""Metrics of an epoch that can be monitored."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that defines a run.

    Attributes:
        network: built-in name or ``package.module:function``.
        network_args: further arguments of the network's constructor.
        data: where samples come from.
        workers: ranks that share the work.
        epochs: passes over the training data.
        batch: global batch: samples of one step over all workers.
        head_batch: samples after which the model-parallel head is updated, where `parallel` is hybrid:b, hybrid:c
            or a file with such a handover; 0: the same as `batch`.
        number_format: how numbers are kept: float32, fixed16, float16, bfloat16, or a recipe by role
            (`plan.recipe.parse_recipe`).
        parallel: what the workers divide: data, model, hybrid, hybrid:a, hybrid:b, hybrid:c, tiles, or the file of
            a placement.
        mesh: the workers in rows, as in ``node:2,device:2``; auto: as the placement says.
        accumulate: micro-batches of a step, whose gradients add up.
        memory_limit: most memory of a worker's tensors, as in ``500MiB``; a run that is predicted to need more is
            refused; empty: what the host has.
        recompute: ``blocks``: the network's blocks keep their inputs only and are computed again in the backward
            pass; or ``none``.
        seed: of everything random.
        out: the run folder; empty: the next free ``runs/NETWORK-DATA-NNN``.
        plan: a plan file; empty: Windlass chooses.
        tune: how it chooses the algorithms of convolutions: ``off`` (PyTorch's own), ``model``, ``measure``,
            or ``auto``: measured where the run is long enough to win from it.
        accuracy: how much an algorithm may round: ``exact``, ``strict``, ``standard`` or ``fast``.
        workspace_mb: scratch memory that an algorithm may take, MiB per thread.
        update, schedule, checkpoint, early_stop, elastic: see there.
        threads: threads of a rank's tensor operations; 0: its share of the cores.
        log_every: a row of metrics every so many steps.
        stall_s: seconds without progress after which a run is given up (exit status 6).
    """

    network: str = "lenet5"
    network_args: dict[str, Scalar] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    workers: int = 1
    epochs: int = 20
    batch: int = 64
    head_batch: int = 0
    number_format: str = str(LEVERS["number_format"].default)
    parallel: str = str(LEVERS["parallel"].default)
    mesh: str = str(LEVERS["mesh"].default)
    accumulate: int = 1
    recompute: str = str(LEVERS["recompute"].default)
    memory_limit: str = ""
    seed: int = 0
    out: str = ""
    plan: str = ""
    tune: str = DEFAULT_TUNE
    accuracy: str = "standard"
    workspace_mb: int = 64
    update: UpdateRule = field(default_factory=UpdateRule)
    schedule: Schedule = field(default_factory=Schedule)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    threads: int = 0
    log_every: int = 1
    stall_s: float = 300.0

    def __post_init__(self) -> None:
        """Refuses what cannot run, whatever the machine."""
        check_network_name(self.network)
        for name in ("workers", "epochs", "batch", "log_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)
        _at_least("threads", self.threads, 0)
        self.convolution_settings()
        if not self.stall_s > 0:
            raise ConfigError(f"stall_s: needs a number above 0, got {self.stall_s}")
        self._check_levers()
        if self.memory_limit:
            _check_size("memory_limit", self.memory_limit)
        self._check_division()
        if self.schedule.warmup_epochs > self.epochs:
            raise ConfigError(
                f"schedule.warmup_epochs: {self.schedule.warmup_epochs} is longer than the run of {self.epochs} epochs"
            )

    def _check_levers(self) -> None:
        for name in LEVERS_SET:
            refusal = LEVERS[name].refusal(getattr(self, name))
            if refusal:
                raise ConfigError(f"{name}: {refusal}")
        self._check_number_format()
        if self.parallel == "data":
            return
        for name, plain in (("accumulate", 1), ("recompute", "none")):
            if getattr(self, name) != plain:
                raise ConfigError(f"{name}: is there for parallel data, not for parallel {self.parallel}")
        if self.elastic.enabled:
            raise ConfigError(
                f"elastic: the workers of parallel {self.parallel} hold parts that die with them; only those of "
                f"parallel data can go on without one"
            )

    def _check_number_format(self) -> None:
        if parse_recipe(self.number_format).is_plain:
            return
        if self.parallel != "data":
            raise ConfigError(
                f"number_format: {self.number_format} is there for parallel data, not for parallel {self.parallel}"
            )
        if self.recompute != "none":
            raise ConfigError(
                f"recompute: what is computed again would be rounded again; it is there for float32, not for number "
                f"format {self.number_format}"
            )
        if self.elastic.enabled:
            raise ConfigError(f"elastic: is there for float32, not for number format {self.number_format}")

    def _check_division(self) -> None:
        """The batch and its parts against workers and micro-batches."""
        if self.parallel == "data" and self.batch < self.workers:
            raise ConfigError(
                f"batch: {self.workers} workers need a batch of at least {self.workers}, got {self.batch}"
            )
        if self.accumulate > 1 and self.accumulate * self.workers > self.batch:
            raise ConfigError(
                f"accumulate: a batch of {self.batch} on {self.workers} worker(s) has no {self.accumulate} "
                f"micro-batches a worker"
            )
        if self.mesh != AUTO and Mesh.parse(self.mesh).size != self.workers:
            raise ConfigError(f"mesh: {self.mesh} has {Mesh.parse(self.mesh).size} workers, the run {self.workers}")
        _at_least("head_batch", self.head_batch, 0)
        if not self.head_batch or self.head_batch == self.batch:
            return
        if self.parallel in PARALLEL and self.parallel not in ("hybrid:b", "hybrid:c"):
            raise ConfigError(
                f"head_batch: parallel {self.parallel} updates all weights at once; hybrid:b and hybrid:c update "
                f"the head by itself"
            )
        if self.workers == 1:
            raise ConfigError("head_batch: one worker hands nothing over in rounds; more --workers do")
        if self.head_batch > self.batch or self.batch % self.head_batch:
            raise ConfigError(f"head_batch: {self.head_batch} does not divide the batch of {self.batch}")

    @property
    def num_ranks(self) -> int:
        """Ranks that are started: the workers and the spares."""
        return self.workers + self.elastic.spares

    def convolution_settings(self) -> Settings:
        """What the chooser of convolutions is asked for."""
        return Settings(tune=self.tune, accuracy=self.accuracy, workspace_mb=self.workspace_mb)

    def to_mapping(self) -> dict[str, Any]:
        """The configuration as plain mappings and lists; what the update rule leaves open is filled in."""
        mapping = _plain(dataclasses.asdict(self))
        scaling = {"scaling": self.update.scaling, "base_batch": self.update.base_batch}
        mapping["update"] = {"name": self.update.name, **self.update.hyper_parameters(), **scaling}
        assert isinstance(mapping, dict)
        return mapping


def _recipe(lr: float, weight_decay: float) -> dict[str, Any]:
    return {"update": {"name": "momentum", "lr": lr, "weight_decay": weight_decay}}


RECIPES: dict[str, dict[str, Any]] = {
    "lenet5": {**_recipe(0.1, 5e-4), "data": {"augment": ["shift:1"]}},
    "alexnet": _recipe(0.01, 5e-4),  # Krizhevsky 2014, at batch 128
    **dict.fromkeys(("vgg11", "vgg16", "vgg19"), _recipe(0.01, 5e-4)),  # Simonyan and Zisserman 2015
    "googlenet": _recipe(0.01, 2e-4),
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _recipe(0.05, 1e-4)),
    "coates": {
        "update": {"name": "adam", "lr": 5e-3},
        "data": {"source": "patches"},
        "checkpoint": {"monitor": "test_loss"},  # nothing is right or wrong without labels
    },
}
"""What a network trains well with where nobody says otherwise, as configuration mappings by network name."""


RULE_KEYS = {"update": UpdateRule().name, "schedule": Schedule().name}
"""Keys whose numbers belong to the rule named beside them, and the rule where none is named."""


def better_when_lower(metric: str) -> bool:
    """Whether a smaller value of this metric is the better one."""
    return "loss" in metric


def config_from_layers(layers: Sequence[Mapping[str, Any]]) -> TrainConfig:
    """A configuration from mappings, the later overriding the earlier, over the network's recipe.

    Raises:
        ConfigError: an unknown key (with the nearest names), a value of the wrong type or out of range.

    >>> config_from_layers([{"epochs": 3}, {"data": {"source": "digits"}, "epochs": 4}]).epochs
    4
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    recipe = RECIPES.get(str(merged.get("network", TrainConfig.network)), {})
    return build_config(TrainConfig, _merge(recipe, merged), "")


def assignment(text: str) -> dict[str, Any]:
    """The mapping that ``--set key=value`` means.

    >>> assignment("update.lr=1e-3")
    {'update': {'lr': '1e-3'}}
    >>> assignment("data.augment=[shift, flip]")
    {'data': {'augment': ['shift', 'flip']}}
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set: needs key=value, e.g. update.lr=0.01, got {text!r}")
    try:
        parsed = yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError:
        parsed = value
    for name in reversed(key.strip().split(".")):
        parsed = {name: parsed}
    assert isinstance(parsed, dict)
    return parsed


def join(mappings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One mapping from several that were said in one breath, such as a command's options and its ``--set``.

    >>> join([{"update": {"lr": 0.1}}, {"update": {"name": "adam"}}])
    {'update': {'lr': 0.1, 'name': 'adam'}}
    """
    joined: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            under = joined.get(key)
            if isinstance(under, Mapping) and isinstance(value, Mapping):
                joined[key] = join([under, value])
            else:
                joined[key] = value
    return joined


def read_yaml(path: Path, what: str) -> Any:
    """The contents of a YAML file written by a person; ConfigError when it cannot be read as one."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{what} {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{what} {path}: is not YAML: {first}") from None


def config_file(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file."""
    mapping = read_yaml(path, "configuration file")
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"configuration file {path}: needs a mapping of keys to values")
    return mapping


def saved_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run folder was written with, for resuming it."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{folder}: there is no run to resume here (no config.yaml)")
    return config_file(path)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            # Another update rule or schedule starts from its own defaults, not from the other's numbers.
            before = under.get("name", RULE_KEYS.get(key))
            renamed = key in RULE_KEYS and value.get("name", before) != before
            merged[key] = dict(value) if renamed else _merge(under, value)
        else:
            merged[key] = value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _at_least(where: str, value: float, lowest: float) -> None:
    if not value >= lowest:
        raise ConfigError(f"{where}: needs a number of at least {lowest}, got {value}")


def _check_size(where: str, text: str) -> None:
    try:
        parse_bytes(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_metric(where: str, name: str) -> None:
    if name not in EPOCH_METRICS:
        raise ConfigError(f"{where}: {unknown('metric', name, EPOCH_METRICS)}")
