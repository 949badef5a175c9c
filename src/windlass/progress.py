"""Where a run is, what its ranks agree on after a step, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Where a run is; three integers and running sums, the same on every rank."""

    epoch: int = 0
    position: int = 0
    """Steps of this epoch that are done."""
    step: int = 0
    loss_sum: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    epoch_s: float = 0.0
    data_s: float = 0.0
    best: float | None = None
    best_epoch: int = -1

    def running(self) -> dict[str, float]:
        """The epoch so far: loss over its samples, its pace, and the share of waiting for data."""
        if not self.seen:
            return dict.fromkeys(("loss", "images_per_s", "data_share"), math.nan)
        seconds = max(self.epoch_s, 1e-9)
        return {
            "loss": self.loss_sum / self.seen,
            "images_per_s": self.seen / seconds,
            "data_share": self.data_s / seconds,
        }

    def epochs_since_best(self, value: float, *, min_delta: float) -> int:
        """Takes this epoch's value of the watched metric, better when lower; epochs since it last improved."""
        if self.best is None or value < self.best - min_delta:
            self.best, self.best_epoch = value, self.epoch
        return self.epoch - self.best_epoch

    def begin_epoch(self) -> None:
        """Empties the sums of the epoch."""
        self.loss_sum = self.correct = self.seen = self.epoch_s = self.data_s = 0.0


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after a step: sums over the ranks."""

    loss: float
    correct: float
    seen: float
    stop: bool
    bad: bool
    checkpoint: bool
    failed: bool


@dataclass(frozen=True)
class Summary:
    """How a rank's training ended: ``done``, or ``early`` when the watched metric no longer improved."""

    status: str
    step: int
    seconds: float
    metrics: dict[str, Any]
