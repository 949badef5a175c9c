"""Which algorithm a convolution takes: by name, by family, or "auto" by the chooser.

A text is one name of `CONV_ALGORITHMS`, a family ("winograd", "fft": its best member for the shape), three of
these for forward/input/weight, or "auto".  "auto" asks the chooser that `windlass.tuning` sets, which knows
measurements; without one a rule of thumb answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, Protocol, TypeVar, cast

from torch.utils._python_dispatch import _disable_current_modes

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import (
    ACCURACIES,
    CONV_ALGORITHMS,
    DIRECTIONS,
    WINOGRAD_ERRORS,
    ConvChoice,
    ConvShape,
    candidates,
)

Layout = Literal["contiguous", "channels_last"]
"""The memory format in which the result is written: PyTorch's rule for its own convolution."""

AUTO = "auto"
TORCH = ConvChoice()

MIN_CHANNELS = 32
"""Channels in and out of a group below which a transform is not worth its additions."""

MIN_TILES = 64
"""Winograd tiles over the batch below which its small matrix products are too narrow."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Chooser(Protocol):
    """Chooses the algorithms of one convolution."""

    def __call__(self, shape: ConvShape, *, layout: Layout, grad: bool) -> ConvChoice:
        """The choice for `shape`; `grad` says whether a backward pass will follow."""
        ...


_chooser: Chooser | None = None
_forgetters: list[Callable[[], None]] = []


def set_chooser(chooser: Chooser | None) -> None:
    """Lets `chooser` answer "auto" from now on; None brings the rule of thumb back.

    All remembered choices are forgotten.  Compiled and exported graphs keep what they were built with.
    """
    global _chooser
    _chooser = chooser
    for forget in _forgetters:
        forget()


def remembered(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Caches a function of sizes and texts until the chooser changes."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _forgetters.append(cached.cache_clear)
    return cast(Callable[_P, _R], cached)  # lru_cache's own type forgets the parameters


def choice_for(shape: ConvShape, *, layout: Layout = "contiguous", grad: bool = True) -> ConvChoice:
    """What "auto" means for `shape`: the chooser's answer, or the rule of thumb's.

    Args:
        shape: the convolution.
        layout: memory format of its output.
        grad: whether a backward pass will follow; without one only `forward` counts.

    Raises:
        ConfigError: the chooser names an algorithm that cannot compute `shape`.
    """
    if _chooser is None:
        return rule_of_thumb(shape)
    # A chooser may measure; under a mode (fake tensors, tracing) its tensors would be fake or recorded.
    with _disable_current_modes():
        choice = _chooser(shape, layout=layout, grad=grad)
    return checked(choice, shape)


def rule_of_thumb(shape: ConvShape) -> ConvChoice:
    """A choice without measurements: one algorithm for all directions.

    - Winograd F(4×4, 3×3) for 3×3 filters with stride and dilation 1, at least 32 channels in and out of each
      group, and at least 64 tiles in the batch;
    - Fourier tiles for filters from 7×7 with at least 32 channels in and out of each group, and for depthwise
      filters from 15×15: the smallest tile of at least twice the filter's extent, else the largest;
    - PyTorch's own otherwise.

    >>> shape = ConvShape(batch=1, in_channels=64, height=56, width=56, out_channels=64, kernel=(3, 3))
    >>> str(rule_of_thumb(shape))
    'winograd-4x4'
    """
    wide = min(shape.group_in, shape.group_out) >= MIN_CHANNELS
    smallest = min(shape.kernel)
    name = "torch"
    if shape.kernel == (3, 3):
        tiles = shape.batch * -(-shape.out_height // 4) * -(-shape.out_width // 4)
        if wide and tiles >= MIN_TILES:
            name = "winograd-4x4"
    elif (wide and smallest >= 7) or (shape.is_depthwise and smallest >= 15):
        name = _fft(shape)
    return ConvChoice.parse(name) if name in {algorithm.name for algorithm in candidates(shape)} else TORCH


def resolve(text: str, shape: ConvShape, *, layout: Layout = "contiguous", grad: bool = True) -> ConvChoice:
    """The choice that a text stands for.

    >>> shape = ConvShape(batch=1, in_channels=8, height=9, width=9, out_channels=8, kernel=(5, 5))
    >>> str(resolve("winograd", shape)), str(resolve("fft/direct/torch", shape))
    ('winograd-2x2', 'fft-16/direct/torch')

    Raises:
        ConfigError: there is no such algorithm, or it cannot compute `shape`, e.g.
            ``winograd-4x4: needs stride 1, got 2``.
    """
    check_text(text)
    if text == AUTO:
        return choice_for(shape, layout=layout, grad=grad)
    names = [FAMILIES[name](shape) if name in FAMILIES else name for name in text.split("/")]
    return checked(ConvChoice.parse("/".join(names)), shape)


def check_text(text: str) -> None:
    """Refuses what `resolve` could not read for any shape.

    Raises:
        ConfigError: there is no such algorithm.
    """
    if text == AUTO:
        return
    names = text.split("/")
    for name in names:
        if name not in CONV_ALGORITHMS and name not in FAMILIES:
            raise ConfigError(unknown("convolution algorithm", name, (*CONV_ALGORITHMS, *FAMILIES, AUTO)))
    if len(names) not in (1, 3):
        raise ConfigError(f"convolution algorithm {text!r}: needs one name, or three for forward/input/weight")


def checked(choice: ConvChoice, shape: ConvShape) -> ConvChoice:
    """The choice itself, if each of its algorithms can compute `shape`.

    Raises:
        ConfigError: one cannot.
    """
    for direction in DIRECTIONS:
        algorithm = CONV_ALGORITHMS[choice.of(direction)]
        refusal = algorithm.refusal(shape)
        if refusal is not None:
            raise ConfigError(f"{algorithm.name}: {refusal}")
    return choice


def _winograd(shape: ConvShape) -> str:
    """F(4×4, r×r) where its error fits standard accuracy, else F(2×2, r×r)."""
    points = 4 + max(shape.kernel) - 1
    return "winograd-4x4" if WINOGRAD_ERRORS.get(points, 1e9) <= ACCURACIES["standard"] else "winograd-2x2"


def _fft(shape: ConvShape) -> str:
    """The smallest tile of which the filter takes at most half, else the largest."""
    extent = max(d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel, strict=True))
    tiles = sorted(algorithm.tile for algorithm in CONV_ALGORITHMS.values() if algorithm.family == "fft")
    return f"fft-{next((tile for tile in tiles if tile >= 2 * extent), tiles[-1])}"


FAMILIES: dict[str, Callable[[ConvShape], str]] = {"winograd": _winograd, "fft": _fft}
"""Families by name, with the function that picks their member for a shape."""
