"""Runs a model once on an example and notes how its convolutions are called, leaving the model as it was.

The run is a real one, in the model's own modes: hooks of the user's own see one more forward pass.  Random
generators, buffers (BatchNorm's running statistics) and gradients are put back.
"""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.layers.aten import is_channels_last
from windlass.plan.convolution import ConvShape, Direction
from windlass.plan.shapes import same_padding
from windlass.tuning.cost import Layout
from windlass.tuning.results import ConvCase
from windlass.tuning.swap import Follower, convolutions, followers


@dataclass
class Observed:
    """How a model calls its convolutions.

    Attributes:
        convolutions: every one by path.
        cases: the calls of each that was reached, in order.
        fusable: the ReLUs that nothing but their convolution feeds and that alone read it.
    """

    convolutions: dict[str, nn.Conv2d]
    cases: dict[nn.Conv2d, list[ConvCase]] = field(default_factory=dict)
    fusable: dict[nn.Conv2d, Follower] = field(default_factory=dict)


def observe(model: nn.Module, example: object, *, training: bool) -> Observed:
    """Runs `model` on `example` (a tensor, a tuple of arguments, or a mapping of keyword arguments).

    Raises:
        ConfigError: the model fails on the example.
    """
    watcher = _Watcher(model, training=training)
    with left_as_it_was(model), watcher.hooks(), torch.set_grad_enabled(training):
        try:
            _call(model, example)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the model fails on the example input: {type(error).__name__}: {first}") from error
    observed = Observed(convolutions(model), watcher.cases)
    observed.fusable = {conv: follower for conv, follower in followers(model).items() if watcher.is_fusable(conv)}
    return observed


def _call(model: nn.Module, example: object) -> object:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


class _Watcher:
    """Notes calls; a ReLU may go with its convolution only if each call of the one fed one call of the other."""

    def __init__(self, model: nn.Module, *, training: bool) -> None:
        self.cases: dict[nn.Conv2d, list[ConvCase]] = {}
        self._training = training
        self._model = model
        self._calls: dict[nn.Module, int] = {}
        self._fed: dict[nn.Conv2d, int] = {}
        self._last: dict[nn.Conv2d, weakref.ref[Tensor]] = {}
        self._followers = followers(model)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for conv in convolutions(self._model).values():
                handles.append(conv.register_forward_hook(self._after_convolution))
            for follower in self._followers.values():
                handles.append(follower.sequential.register_forward_pre_hook(self._count))
                handles.append(follower.relu.register_forward_pre_hook(self._before_relu))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def is_fusable(self, conv: nn.Conv2d) -> bool:
        follower, calls = self._followers.get(conv), len(self.cases.get(conv, ()))
        if follower is None or not calls:
            return False
        # A Sequential holds several pairs: its hook ran once per pair, so calls are counted by pair.
        pairs = sum(1 for other in self._followers.values() if other.sequential is follower.sequential)
        return self._calls.get(follower.sequential, 0) == calls * pairs and self._fed.get(conv, 0) == calls

    def _after_convolution(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        assert isinstance(module, nn.Conv2d)
        x = args[0] if args else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.dim() != 4:
            return
        self.cases.setdefault(module, []).append(case_of(module, x, training=self._training))
        self._last[module] = weakref.ref(output)

    def _count(self, module: nn.Module, args: object) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1

    def _before_relu(self, module: nn.Module, args: tuple[object, ...]) -> None:
        for conv, follower in self._followers.items():
            if follower.relu is module and conv in self._last and args and self._last[conv]() is args[0]:
                self._fed[conv] = self._fed.get(conv, 0) + 1
                del self._last[conv]


def case_of(conv: nn.Conv2d, x: Tensor, *, training: bool) -> ConvCase:
    """The call of `conv` on `x`."""
    kernel, dilation = _two(conv.kernel_size), _two(conv.dilation)
    batch, channels, height, width = x.shape
    shape = ConvShape(
        batch=batch,
        in_channels=channels,
        height=height,
        width=width,
        out_channels=conv.out_channels,
        kernel=kernel,
        stride=_two(conv.stride),
        padding=same_padding(conv.padding, kernel=kernel, dilation=dilation),
        dilation=dilation,
        groups=conv.groups,
    )
    directions: list[Direction] = ["forward"]
    if training and x.requires_grad:
        directions.append("input")
    if training and conv.weight.requires_grad:
        directions.append("weight")
    return ConvCase(
        shape=shape,
        layout=layout_of(x),
        weight_layout=layout_of(conv.weight),
        bias=conv.bias is not None,
        directions=tuple(directions),
    )


def layout_of(tensor: Tensor) -> Layout:
    """The order of its dimensions, as PyTorch's convolution takes it."""
    return "channels_last" if is_channels_last(tensor) else "contiguous"


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back buffers, gradients and random generators, Python's and NumPy's included."""
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in model.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and not isinstance(buffer, nn.UninitializedBuffer)
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for child, name, buffer, values in buffers:
            child._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(values)
        for parameter, gradient in gradients:
            parameter.grad = gradient
