"""What training descends: cross-entropy, of auxiliary heads too, or a network's own objective.

A network that learns without labels brings a method ``own_loss(outputs, images)``: its objective, summed over the
samples, of what it returned for those images.  It must not use parameters: what needs them belongs into the forward
pass, where a network that is divided among workers has its own part of them.  No accuracy is counted then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from windlass.config import TrainConfig
from windlass.errors import ConfigError


def main_output(outputs: Any) -> torch.Tensor:
    """The network's main output: the first, where it returns several (GoogLeNet's auxiliary heads follow)."""
    main = outputs[0] if isinstance(outputs, tuple | list) else outputs
    assert isinstance(main, torch.Tensor)
    return main


def objective(
    module: nn.Module, outputs: Any, labels: torch.Tensor, *, images: torch.Tensor | None = None
) -> torch.Tensor:
    """The network's own objective of `images`, where it brings one; else summed cross-entropy.

    That is the main output's, plus `module.auxiliary_weight` times that of every other.
    """
    if has_own_loss(module):
        own = module.own_loss(outputs, images)  # type: ignore[operator]
        assert isinstance(own, torch.Tensor)
        return own
    loss = functional.cross_entropy(main_output(outputs), labels, reduction="sum")
    others = outputs[1:] if isinstance(outputs, tuple | list) else ()
    for other in others:
        loss = loss + getattr(module, "auxiliary_weight", 0.3) * functional.cross_entropy(
            other, labels, reduction="sum"
        )
    return loss


def has_own_loss(module: nn.Module) -> bool:
    """Whether the network brings an objective of its own, so that labels and accuracy mean nothing."""
    return callable(getattr(module, "own_loss", None))


def loss_of(module: nn.Module, outputs: Any, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The objective summed over the samples, and how many were right (0 where the objective is the network's own).

    Args:
        module: the network.
        outputs: what it returned.
        images: what it was given.
        labels: class numbers, one a sample.
    """
    loss = objective(module, outputs, labels, images=images)
    if has_own_loss(module):
        return loss, 0.0
    return loss, float((main_output(outputs).detach().argmax(dim=1) == labels).sum())


def accuracy_of(module: nn.Module, correct: float, seen: float) -> float | None:
    """The share that was right; None where nothing can be right or wrong."""
    return None if has_own_loss(module) else correct / seen


def check_metrics(module: nn.Module, config: TrainConfig) -> None:
    """Refuses to watch the accuracy of a network that has none.

    Raises:
        ConfigError: the key and the metric that it must not name.
    """
    watched = {"checkpoint.monitor": config.checkpoint.monitor}
    if config.early_stop.patience:
        watched["early_stop.metric"] = config.early_stop.metric
    for key, metric in watched.items():
        if has_own_loss(module) and "accuracy" in metric:
            raise ConfigError(
                f"{key}: {metric} means nothing for network {config.network}, which learns without labels: "
                f"--set {key}=test_loss"
            )
