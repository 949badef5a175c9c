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


LARGEST_KEPT = 72 << 20
"""Bytes of spectra that a layer keeps from its forward pass to its backward pass, at most.

It holds those of 64 × 64 filters in tiles of 64, of 128 × 128 in tiles of 32, and of 256 × 256 in tiles of 16.
"""


def forward(
    algorithm: str, x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, threads: int,
    relu: bool = False, kept: Array | None = None,
) -> None:  # fmt: skip
    """Writes y = conv(x, w) + bias, and max(y, 0) with `relu`; NaN stays NaN.

    `kept`, of `kept_floats` numbers aligned to 64 bytes, is filled with what `backward_input` can use again.
    """
    module, options = _kernel(algorithm, shape)
    if kept is not None:
        options["kept"] = kept
    module.forward(x, w, bias, y, shape=shape, threads=threads, relu=relu, **options)


def backward_input(
    algorithm: str, dy: Array, w: Array, dx: Array, *, shape: ConvShape, threads: int, kept: Array | None = None
) -> None:
    """Writes the gradient of the input; `kept` is what `forward` left there for the same weights, or None."""
    module, options = _kernel(algorithm, shape)
    if kept is not None:
        options["kept"] = kept
    module.backward_input(dy, w, dx, shape=shape, threads=threads, **options)


def kept_floats(algorithm: str, *, shape: ConvShape) -> int:
    """How many numbers `forward` should keep for `backward_input`, if that is by the same algorithm.

    They are the spectra of the weights where they save time and take `LARGEST_KEPT` bytes or less; otherwise 0.
    """
    if _algorithm(algorithm).family != "fft":
        return 0
    module, options = _kernel(algorithm, shape)
    num = int(module.kept_floats(shape=shape, **options))
    return num if 4 * num <= LARGEST_KEPT and module.keeping_pays(shape=shape, **options) else 0


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
