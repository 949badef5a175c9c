"""Every convolution kernel by its algorithm's name: one way to call them all.

Arrays are float32, four-dimensional and indexed N, C, H, W (weights K, C/G, R, S), with any strides; a channel
stride of 1 (channels_last) or a width stride of 1 (contiguous) is read and written where it stands.
Results are written in whole, into `y`, `dx` or `dw`.  `threads` threads work; the bits do not depend on them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import CONV_ALGORITHMS, ConvAlgorithm, ConvShape, Direction

Array = npt.NDArray[np.float32]

MODULES = {
    "direct": "windlass.kernels.direct",
    "im2col": "windlass.kernels.im2col",
    "winograd": "windlass.kernels.winograd",
    "fft": "windlass.kernels.fft",
}
"""The module of each family, with functions forward, backward_input, backward_weight and workspace_bytes."""


def forward(
    algorithm: str, x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, threads: int,
    relu: bool = False,
) -> None:  # fmt: skip
    """Writes y = conv(x, w) + bias, and max(y, 0) with `relu`; NaN stays NaN."""
    module, options = _kernel(algorithm, shape)
    module.forward(x, w, bias, y, shape=shape, threads=threads, relu=relu, **options)


def backward_input(algorithm: str, dy: Array, w: Array, dx: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes the gradient of the input."""
    module, options = _kernel(algorithm, shape)
    module.backward_input(dy, w, dx, shape=shape, threads=threads, **options)


def backward_weight(algorithm: str, x: Array, dy: Array, dw: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes the gradient of the weights."""
    module, options = _kernel(algorithm, shape)
    module.backward_weight(x, dy, dw, shape=shape, threads=threads, **options)


def workspace_bytes(algorithm: str, direction: Direction, *, shape: ConvShape, threads: int) -> int:
    """Scratch memory that the kernel takes, over all threads."""
    if _algorithm(algorithm).family == "torch":
        return 0
    module, options = _kernel(algorithm, shape)
    return int(module.workspace_bytes(direction, shape=shape, threads=threads, **options))


def _algorithm(name: str) -> ConvAlgorithm:
    if name not in CONV_ALGORITHMS:
        raise ConfigError(unknown("convolution algorithm", name, CONV_ALGORITHMS))
    return CONV_ALGORITHMS[name]


@cache
def _module(family: str) -> Any:
    """Imported when first used: each brings its own kernels."""
    return import_module(MODULES[family])


def _kernel(name: str, shape: ConvShape) -> tuple[Any, dict[str, Any]]:
    """The module that computes it and its options; refuses what lies outside the domain."""
    algorithm = _algorithm(name)
    if algorithm.family == "torch":
        raise ConfigError("the algorithm 'torch' is PyTorch's own convolution: there is no kernel of ours")
    refusal = algorithm.refusal(shape)
    if refusal:
        raise ConfigError(f"{name}: {refusal}")
    options: dict[str, Any] = {"winograd": {"m": algorithm.tile}, "fft": {"tile": algorithm.tile}}.get(
        algorithm.family, {}
    )
    return _module(algorithm.family), dict(options)
