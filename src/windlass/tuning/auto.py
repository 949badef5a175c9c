"""Lets the algorithm ``auto`` of Windlass's layers and functions mean what was measured, not a rule of thumb."""

from __future__ import annotations

from windlass.layers import set_chooser
from windlass.layers.choice import Chooser
from windlass.plan.convolution import DIRECTIONS, ConvChoice, ConvShape
from windlass.tuning.convolution import OnEvent, Tuner, make_tuner
from windlass.tuning.cost import Layout
from windlass.tuning.results import ConvCase, Settings


def tune_auto(
    *,
    tune: str = "measure",
    accuracy: str = "standard",
    workspace_mb: int = 64,
    threads: int | None = None,
    on_event: OnEvent = lambda event: None,
) -> None:
    """From now on ``auto`` asks the chooser, which measures each size of convolution when it first comes.

    Args:
        tune: ``measure``, ``model``, or ``off`` for PyTorch's own.
        accuracy: how much an algorithm may round.
        workspace_mb: scratch memory that an algorithm may take, MiB per thread.
        threads: None: those that PyTorch has now.
        on_event: told what is measured.

    Raises:
        ConfigError: an unknown name.
    """
    import torch

    settings = Settings(tune=tune, accuracy=accuracy, workspace_mb=workspace_mb)
    set_chooser(chooser(make_tuner(settings, threads=threads or torch.get_num_threads(), on_event=on_event)))


def chooser(tuner: Tuner) -> Chooser:
    """What `windlass.layers.set_chooser` takes."""

    def choose(shape: ConvShape, *, layout: Layout, grad: bool) -> ConvChoice:
        case = ConvCase(
            shape=shape, layout=layout, weight_layout=layout, directions=DIRECTIONS if grad else ("forward",)
        )
        (tuning,) = tuner.tune_all({str(shape): [case]})
        return tuning.choice

    return choose
