"""What the chooser is asked and what it answers, as data: calls of convolutions, times, choices with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import ACCURACIES, DIRECTIONS, ConvChoice, ConvShape, Direction
from windlass.tuning.cost import Layout

TUNES: dict[str, str] = {
    "off": "PyTorch's own convolution everywhere",
    "model": "the cost model chooses, nothing is measured",
    "measure": "the most promising are measured beside PyTorch's own",
    "auto": "measure where a run is long enough to win from it",
}
"""How convolutions are chosen."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvCase:
    """One call of a convolution as it will really be made.

    Attributes:
        shape: its sizes.
        layout: of its images.
        weight_layout: of its weights.
        bias: whether a bias is added.
        directions: those that a step needs; the first layer's input has no gradient, inference has none at all.
    """

    shape: ConvShape
    layout: Layout = "contiguous"
    weight_layout: Layout = "contiguous"
    bias: bool = True
    directions: tuple[Direction, ...] = DIRECTIONS

    @property
    def key(self) -> str:
        """Names everything that its times depend on; of the directions, only whether it is inference."""
        shape = self.shape
        sizes = [shape.batch, shape.in_channels, shape.height, shape.width, shape.out_channels]
        rest = [*shape.kernel, *shape.stride, *shape.padding, *shape.dilation, shape.groups]
        numbers = "x".join(map(str, sizes)) + "/" + ",".join(map(str, rest))
        words = [numbers, self.layout, self.weight_layout, "bias" if self.bias else "plain"]
        return "/".join(words if self.is_training else [*words, "inference"])

    @property
    def is_training(self) -> bool:
        """Whether a gradient is wanted."""
        return self.directions != ("forward",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a person asks of the chooser.

    Attributes:
        tune: a key of `TUNES`.
        accuracy: a key of `plan.convolution.ACCURACIES`.
        workspace_mb: scratch memory that an algorithm may take, MiB per thread.
    """

    tune: str = "measure"
    accuracy: str = "standard"
    workspace_mb: int = 64

    def __post_init__(self) -> None:
        """Refuses unknown names, saying which there are, and a limit below zero."""
        if self.tune not in TUNES:
            raise ConfigError(f"tune: {unknown('way to tune', self.tune, TUNES)}")
        if self.accuracy not in ACCURACIES:
            raise ConfigError(f"accuracy: {unknown('accuracy', self.accuracy, ACCURACIES)}")
        if self.workspace_mb < 0:
            raise ConfigError(f"workspace_mb: needs a number of at least 0, got {self.workspace_mb}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionTuning:
    """One direction's choice.

    Attributes:
        direction: which.
        algorithm: the chosen one.
        reason: why.
        predicted: seconds by algorithm, of every candidate.
        measured: seconds by algorithm, of those that were measured.
    """

    direction: Direction
    algorithm: str = "torch"
    reason: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> Mapping[str, float]:
        """The best knowledge there is: what was measured, else what was predicted."""
        return {**self.predicted, **self.measured}

    def to_mapping(self) -> dict[str, object]:
        """For JSON."""
        return {
            "algorithm": self.algorithm,
            "reason": self.reason,
            "predicted_s": dict(self.predicted),
            "measured_s": dict(self.measured),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTuning:
    """One layer's choice.

    Attributes:
        name: the layer's.
        cases: its calls in one step; empty for a layer that was left alone.
        directions: the choice for every direction that is needed.
        reason: why it was left alone.
        activation: ``relu`` where the activation behind it is computed with it.
    """

    name: str
    cases: tuple[ConvCase, ...] = ()
    directions: tuple[DirectionTuning, ...] = ()
    reason: str = ""
    activation: Literal["relu"] | None = None

    @property
    def choice(self) -> ConvChoice:
        """The algorithms; a direction that is not needed is PyTorch's."""
        return ConvChoice(**{row.direction: row.algorithm for row in self.directions})

    def seconds(self, *, torch: bool = False) -> float:
        """Seconds of all directions together, by the choice or by PyTorch's own."""
        return sum(row.seconds.get("torch" if torch else row.algorithm, 0.0) for row in self.directions)

    @property
    def summary(self) -> str:
        """Why, in one line: the reason it shares, or each direction's."""
        if self.reason or not self.directions:
            return self.reason
        reasons = {row.direction: row.reason for row in self.directions}
        if len(set(reasons.values())) == 1:
            return self.directions[0].reason
        return "; ".join(f"{direction}: {reason}" for direction, reason in reasons.items())

    def to_mapping(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "calls": [str(case.shape) for case in self.cases],
            "layout": sorted({case.layout for case in self.cases}),
            "convolution": str(self.choice),
            "activation": self.activation,
            "reason": self.reason,
            "seconds": self.seconds(),
            "torch_seconds": self.seconds(torch=True),
            "directions": {row.direction: row.to_mapping() for row in self.directions},
        }
