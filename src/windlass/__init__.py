"""Windlass trains convolutional networks fast, with every lever behind one plan."""

from importlib import import_module
from typing import TYPE_CHECKING

from windlass.backend.register import register as _register_backend
from windlass.config import TrainConfig
from windlass.engine.memory import keep_freed_memory
from windlass.plan.plan import Plan
from windlass.train import Result, train

if TYPE_CHECKING:
    from windlass import backend, functional, layers, parallel, precision
    from windlass.tuning.accelerate import accelerate

__all__ = [
    "Plan",
    "Result",
    "TrainConfig",
    "accelerate",
    "backend",
    "functional",
    "keep_freed_memory",
    "layers",
    "parallel",
    "precision",
    "train",
]

_register_backend()  # torch.distributed.init_process_group("windlass"), now or when PyTorch comes


def __getattr__(name: str) -> object:
    """What brings PyTorch, which takes a second, comes when it is asked for."""
    if name == "accelerate":
        from windlass.tuning.accelerate import accelerate

        return accelerate
    if name in ("backend", "functional", "layers", "parallel", "precision"):
        return import_module(f"windlass.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
