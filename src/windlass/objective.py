"""What training descends: cross-entropy, of auxiliary heads too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def main_output(outputs: Any) -> torch.Tensor:
    """The network's main output: the first, where it returns several (GoogLeNet's auxiliary heads follow)."""
    main = outputs[0] if isinstance(outputs, tuple | list) else outputs
    assert isinstance(main, torch.Tensor)
    return main


def objective(module: nn.Module, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the main output, plus `module.auxiliary_weight` times that of every other."""
    loss = functional.cross_entropy(main_output(outputs), labels, reduction="sum")
    others = outputs[1:] if isinstance(outputs, tuple | list) else ()
    for other in others:
        loss = loss + getattr(module, "auxiliary_weight", 0.3) * functional.cross_entropy(
            other, labels, reduction="sum"
        )
    return loss
