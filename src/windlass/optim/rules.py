"""The update rule g as data: its name, its hyper-parameters, and what each rule accepts.

Standard library only, so that a configuration is refused before PyTorch is imported.  `optim.build` turns a
rule into PyTorch's own optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from windlass.errors import ConfigError, unknown


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """One row of `UPDATE_RULES`: PyTorch's class, its fixed arguments, and defaults of what may be set."""

    torch_class: str
    fixed: dict[str, bool]
    defaults: dict[str, float]


UPDATE_RULES: dict[str, RuleEntry] = {
    "sgd": RuleEntry("SGD", {}, {"lr": 0.1, "weight_decay": 0.0}),
    "momentum": RuleEntry("SGD", {}, {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}),
    "nesterov": RuleEntry("SGD", {"nesterov": True}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}),
    "adagrad": RuleEntry("Adagrad", {}, {"lr": 0.01, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0}),
    "adam": RuleEntry("Adam", {}, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
    "adamw": RuleEntry("AdamW", {}, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}),
}  # fmt: skip
"""Every update rule by name."""


def _unscaled(lr: float, weight_decay: float, times: float) -> tuple[float, float]:
    return lr, weight_decay


def _scaled_linearly(lr: float, weight_decay: float, times: float) -> tuple[float, float]:
    return lr * times, weight_decay


def _scaled_by_root(lr: float, weight_decay: float, times: float) -> tuple[float, float]:
    """One large step forgets as much as so many small ones: (1 - εw)^k = 1 - ε'w' with ε' = √k ε."""
    scaled_lr = math.sqrt(times) * lr
    forgotten = -math.expm1(times * math.log1p(-lr * weight_decay)) if lr * weight_decay < 1 else 1.0
    return scaled_lr, forgotten / scaled_lr if scaled_lr else math.sqrt(times) * weight_decay


SCALINGS: dict[str, Callable[[float, float, float], tuple[float, float]]] = {
    "none": _unscaled,
    "linear": _scaled_linearly,
    "sqrt": _scaled_by_root,
}
"""How learning rate and weight decay follow the batch: (both at the base batch, k) to both at a batch k times as
large.  Krizhevsky 2014, section 4: √k keeps the variance of an update, k is what worked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRule:
    """An update rule and the hyper-parameters set by hand; None means the rule's own default.

    Attributes:
        name: one of `UPDATE_RULES`.
        scaling: how learning rate and weight decay follow the batch, one of `SCALINGS`.
        base_batch: the batch that they are meant for.
        lr, momentum, dampening, weight_decay, beta1, beta2, eps, lr_decay: hyper-parameters.

    Raises:
        ConfigError: the rule is unknown, or does not have a hyper-parameter that was set, or a value is out of
            range.

    >>> UpdateRule(name="momentum", lr=0.02).hyper_parameters()
    {'lr': 0.02, 'momentum': 0.9, 'dampening': 0.0, 'weight_decay': 0.0}
    """

    name: str = "momentum"
    lr: float | None = None
    momentum: float | None = None
    dampening: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    lr_decay: float | None = None
    scaling: str = "none"
    base_batch: int = 128

    def __post_init__(self) -> None:
        """Refuses what the rule does not have and what is out of range."""
        if self.name not in UPDATE_RULES:
            raise ConfigError(f"update.name: {unknown('update rule', self.name, UPDATE_RULES)}")
        if self.scaling not in SCALINGS:
            raise ConfigError(f"update.scaling: {unknown('scaling', self.scaling, SCALINGS)}")
        if self.base_batch < 1:
            raise ConfigError(f"update.base_batch: needs a number of at least 1, got {self.base_batch}")
        accepted = UPDATE_RULES[self.name].defaults
        for name, value in self._given().items():
            if name not in accepted:
                raise ConfigError(f"update.{name}: {self.name} has no {name}; it has: {', '.join(accepted)}")
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"update.{name}: needs a finite number of at least 0, got {value}")
            if name in ("momentum", "beta1", "beta2") and value >= 1:
                raise ConfigError(f"update.{name}: needs a number below 1, got {value}")
            if self.name == "nesterov" and name == "momentum" and value == 0:
                raise ConfigError(f"update.momentum: nesterov needs a number above 0, got {value}; sgd has none")

    def _given(self) -> dict[str, float]:
        others = ("name", "scaling", "base_batch")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}
        return {name: value for name, value in values.items() if value is not None}

    def hyper_parameters(self) -> dict[str, float]:
        """The rule's hyper-parameters: what was set by hand, otherwise its defaults."""
        return UPDATE_RULES[self.name].defaults | self._given()

    def for_batch(self, batch: int) -> UpdateRule:
        """The rule with learning rate and weight decay as they are for this batch.

        Krizhevsky's example, from 128 to 1024:

        >>> rule = UpdateRule(lr=0.01, weight_decay=0.0005, scaling="sqrt").for_batch(1024)
        >>> round(rule.base_lr, 6), round(rule.hyper_parameters()["weight_decay"], 7)
        (0.028284, 0.0014142)
        """
        given = self.hyper_parameters()
        lr, decay = SCALINGS[self.scaling](given["lr"], given["weight_decay"], batch / self.base_batch)
        return replace(self, lr=lr, weight_decay=decay, scaling="none")

    @property
    def base_lr(self) -> float:
        """The learning rate that schedules scale."""
        return self.hyper_parameters()["lr"]


def _step(done: float, schedule: Schedule, epochs: int) -> float:
    return float(schedule.factor ** math.floor(done / schedule.every_epochs))


def _milestones(done: float, schedule: Schedule, epochs: int) -> float:
    return float(schedule.factor ** sum(done >= epochs * share for share in (0.25, 0.5, 0.75)))


def _cosine(done: float, schedule: Schedule, epochs: int) -> float:
    share = min(done / epochs, 1.0)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * share))


def _linear(done: float, schedule: Schedule, epochs: int) -> float:
    return schedule.floor + (1 - schedule.floor) * (1 - min(done / epochs, 1.0))


SCHEDULES: dict[str, Callable[[float, Schedule, int], float]] = {
    "constant": lambda done, schedule, epochs: 1.0,
    "step": _step,
    "exponential": lambda done, schedule, epochs: float(schedule.factor**done),
    "milestones": _milestones,
    "cosine": _cosine,
    "linear": _linear,
}
"""Every schedule by name: (epochs done, schedule, epochs in all) to the factor on the base learning rate.

``milestones`` multiplies by ``factor`` after 25, 50 and 75 % of training, as Krizhevsky 2014 (section 5) does
with 250^(-1/3).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How the learning rate changes over the run.

    Attributes:
        name: one of `SCHEDULES`.
        warmup_epochs: the rate rises linearly from 0 over these first epochs (fractions allowed).
        factor: what ``step``, ``exponential`` and ``milestones`` multiply by.
        every_epochs: how many epochs ``step`` waits.
        floor: the lowest share of the base rate that ``cosine`` and ``linear`` end at.
    """

    name: str = "cosine"
    warmup_epochs: float = 0.0
    factor: float = 0.1
    every_epochs: float = 30.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Refuses an unknown schedule and numbers out of range."""
        if self.name not in SCHEDULES:
            raise ConfigError(f"schedule.name: {unknown('schedule', self.name, SCHEDULES)}")
        for name in ("warmup_epochs", "factor", "floor"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"schedule.{name}: needs a finite number of at least 0, got {value}")
        if self.floor > 1:
            raise ConfigError(f"schedule.floor: needs a share of at most 1, got {self.floor}")
        if not self.every_epochs > 0:
            raise ConfigError(f"schedule.every_epochs: needs a number above 0, got {self.every_epochs}")

    def rate(self, base_lr: float, *, step: int, steps_per_epoch: int, epochs: int) -> float:
        """The learning rate of the step with this number (from 0) in a run of so many epochs.

        >>> Schedule(name="linear").rate(0.1, step=50, steps_per_epoch=10, epochs=10)
        0.05
        >>> Schedule(name="constant", warmup_epochs=1).rate(0.1, step=4, steps_per_epoch=10, epochs=10)
        0.05
        """
        warmup_steps = self.warmup_epochs * steps_per_epoch
        warmth = min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0
        return base_lr * warmth * SCHEDULES[self.name](step / steps_per_epoch, self, epochs)
