"""Windlass trains convolutional networks fast, with every lever behind one plan."""

from typing import TYPE_CHECKING

from windlass.config import TrainConfig
from windlass.plan.plan import Plan
from windlass.train import Result, train

if TYPE_CHECKING:
    from windlass.tuning.accelerate import accelerate

__all__ = ["Plan", "Result", "TrainConfig", "accelerate", "train"]


def __getattr__(name: str) -> object:
    """`accelerate` brings PyTorch, which takes a second: it comes when it is asked for."""
    if name == "accelerate":
        from windlass.tuning.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
