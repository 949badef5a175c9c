"""`windlass.accelerate`: any model's convolutions by the fastest algorithms, in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from windlass.plan.convolution import candidates
from windlass.tuning.convolution import OnEvent, Tuner, make_tuner
from windlass.tuning.cost import Layout, predicted_s
from windlass.tuning.observe import Observed, observe
from windlass.tuning.report import ConvolutionPlan
from windlass.tuning.results import ConvCase, LayerTuning, Settings
from windlass.tuning.swap import Swap, refusal, swap_convolutions

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYOUT_GAIN = 1.05
"""How many times faster channels_last must be predicted before it is advised."""


def accelerate(
    model: ModelT,
    example_input: object,
    *,
    accuracy: str = "standard",
    training: bool = True,
    tune: str = "measure",
    workspace_mb: int = 64,
    on_event: OnEvent | None = None,
) -> ModelT:
    """Gives every 2-D convolution of `model` its fastest algorithm, in place, and returns the model.

    The model runs once on the example, to see the shapes and memory formats of its convolutions; random
    generators, running statistics and gradients are put back.  Each convolution that another algorithm than
    PyTorch's computes faster becomes a `windlass.layers.Conv2d` with the same parameters, hooks and state_dict
    keys; in an `nn.Sequential`, a ReLU right behind it is computed with it, and an `nn.Identity` takes its place.
    Subclasses of Conv2d, convolutions that the example does not reach, and those that are not float32 on the CPU
    are left alone.  What was done, and why, stands in ``model.windlass_plan``: print it.

    The choice holds for the example's batch size, memory format and number of threads; results do not depend on
    it beyond rounding (docs/convolution.md, Accuracy).

    Args:
        model: any module.
        example_input: a batch as in training: a tensor, a tuple of arguments or a mapping of keyword arguments.
        accuracy: ``exact`` (PyTorch's own everywhere), ``strict``, ``standard`` or ``fast``.
        training: whether gradients will be wanted; False chooses for inference.
        tune: ``measure``, ``model`` (the cost model alone) or ``off``.
        workspace_mb: scratch memory that an algorithm may take, MiB per thread.
        on_event: told what is measured, as mappings with a ``kind``; None: warnings alone, as Python's.

    Raises:
        ConfigError: an unknown name, or the model fails on the example.
    """
    settings = Settings(tune=tune, accuracy=accuracy, workspace_mb=workspace_mb)
    observed = observe(model, example_input, training=training)
    tuner = None
    if tune != "off" and accuracy != "exact":
        import torch

        tuner = make_tuner(settings, threads=torch.get_num_threads(), on_event=on_event or _warn)
    plan = plan_observed(observed, settings, tuner)
    swaps = {
        observed.convolutions[layer.name]: Swap(layer.choice, layer.activation)
        for layer in plan.layers
        if layer.directions
    }
    found = swap_convolutions(model, swaps, relus=observed.fusable)
    found.windlass_plan = plan  # type: ignore[assignment]
    return found  # type: ignore[return-value]


def plan_observed(observed: Observed, settings: Settings, tuner: Tuner | None) -> ConvolutionPlan:
    """The choice for every convolution of an observed model; without a tuner all are PyTorch's."""
    cases: dict[str, Sequence[ConvCase]] = {}
    alone: dict[str, str] = {}
    for path, conv in observed.convolutions.items():
        why = refusal(conv)
        if why is None and conv not in observed.cases:
            why = "the example input does not reach it"
        if why is None and tuner is None:
            why = "tuning is off" if settings.tune == "off" else f"accuracy {settings.accuracy} leaves PyTorch's own"
        if why is None:
            cases[path] = observed.cases[conv]
        else:
            alone[path] = why
    tuned = {layer.name: layer for layer in tuner.tune_all(cases)} if tuner is not None else {}
    layers = [
        _fused(tuned[path], conv in observed.fusable) if path in tuned else LayerTuning(name=path, reason=alone[path])
        for path, conv in observed.convolutions.items()
    ]
    return ConvolutionPlan(
        layers=tuple(layers),
        settings=settings,
        machine=tuner.machine if tuner is not None else None,
        advice=layout_advice(cases, tuner) if tuner is not None else (),
    )


def _fused(layer: LayerTuning, fusable: bool) -> LayerTuning:
    """With the ReLU behind it, where Windlass computes the forward pass; PyTorch has no kernel for both."""
    return replace(layer, activation="relu") if fusable and layer.choice.forward != "torch" else layer


def layout_advice(layers: Mapping[str, Sequence[ConvCase]], tuner: Tuner) -> tuple[str, ...]:
    """A line where channels_last would make the convolutions faster, by the model."""
    cases = [case for layer in layers.values() for case in layer]
    if not any(case.layout == "contiguous" for case in cases):
        return ()
    now = sum(_best_s(case, case.layout, tuner) for case in cases)
    then = sum(_best_s(case, "channels_last", tuner) for case in cases)
    if now < LAYOUT_GAIN * then:
        return ()
    return (
        f"channels_last is predicted to make these convolutions {now / then:.2f} times as fast: "
        "model.to(memory_format=torch.channels_last), and the same for its inputs",
    )


def _best_s(case: ConvCase, layout: Layout, tuner: Tuner) -> float:
    names = [algorithm.name for algorithm in candidates(case.shape, accuracy=tuner.settings.accuracy)]
    return sum(
        min(predicted_s(name, direction, case.shape, machine=tuner.machine, layout=layout) for name in names)
        for direction in case.directions
    )


def _warn(event: dict[str, Any]) -> None:
    if event["kind"] == "warning":
        warnings.warn(str(event["message"]), stacklevel=2)
