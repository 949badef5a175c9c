"""A run as asked for: what the launcher checks and hands to its ranks.  Nothing here imports PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from windlass.config import TrainConfig
from windlass.typed import build_config


@dataclass(frozen=True)
class Job:
    """What a rank is asked to do; goes to other processes as JSON.

    Attributes:
        config: the run's configuration.
        folder: the run folder.
        resume: whether to go on from a checkpoint in it.
        resume_from: which one; empty for the newest.
        dry_run: check everything, take one step, leave nothing behind.
    """

    config: TrainConfig
    folder: str
    resume: bool = False
    resume_from: str = ""
    dry_run: bool = False

    def to_mapping(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.__dict__, "config": self.config.to_mapping()}

    @staticmethod
    def from_mapping(mapping: dict[str, Any]) -> Job:
        """From JSON."""
        return Job(**{**mapping, "config": build_config(TrainConfig, mapping["config"], "")})
