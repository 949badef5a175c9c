"""PyTorch's optimizer for an update rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from windlass.optim.rules import UPDATE_RULES, UpdateRule


def build_optimizer(rule: UpdateRule, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """PyTorch's own optimizer over `parameters`, in its fused form (one pass over memory a step)."""
    entry = UPDATE_RULES[rule.name]
    arguments: dict[str, object] = dict(rule.hyper_parameters())
    if "beta1" in arguments:
        arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
    cls = getattr(torch.optim, entry.torch_class)
    optimizer: torch.optim.Optimizer = cls(list(parameters), fused=True, **entry.fixed, **arguments)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
