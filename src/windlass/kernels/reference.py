"""What every convolution kernel must compute: the definition, in plain NumPy, tap by tap.

Arrays are indexed N, C, H, W (weights K, C/G, R, S; outputs N, K, P, Q) and computed in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.plan.convolution import ConvShape

Array = npt.NDArray[Any]


def forward(x: Array, w: Array, bias: Array | None, *, shape: ConvShape, relu: bool = False) -> Array:
    """y[n,k,p,q] = Σ_{c,r,s} x[n, c, p·stride + r·dilation - pad, …] · w[k,c,r,s] + bias[k]."""
    y = np.zeros((shape.batch, shape.out_channels, shape.out_height, shape.out_width), x.dtype)
    padded = _padded(x, shape)
    for inputs, outputs in _groups(shape):
        for r, s, window in _taps(padded[:, inputs], shape):
            y[:, outputs] += np.einsum("nchw,kc->nkhw", window, w[outputs, :, r, s], optimize=True)
    if bias is not None:
        y += bias[:, None, None]
    return np.maximum(y, 0) if relu else y


def backward_input(dy: Array, w: Array, *, shape: ConvShape) -> Array:
    """dx: the adjoint of `forward` in x."""
    top, bottom, left, right = shape.padding
    padded = np.zeros(
        (shape.batch, shape.in_channels, shape.height + top + bottom, shape.width + left + right), dy.dtype
    )
    for inputs, outputs in _groups(shape):
        for r, s, window in _taps(padded[:, inputs], shape):
            window += np.einsum("nkhw,kc->nchw", dy[:, outputs], w[outputs, :, r, s], optimize=True)
    return padded[:, :, top : top + shape.height, left : left + shape.width].copy()


def backward_weight(x: Array, dy: Array, *, shape: ConvShape) -> Array:
    """dw: the adjoint of `forward` in w."""
    dw = np.zeros((shape.out_channels, shape.group_in, *shape.kernel), x.dtype)
    padded = _padded(x, shape)
    for inputs, outputs in _groups(shape):
        for r, s, window in _taps(padded[:, inputs], shape):
            dw[outputs, :, r, s] = np.einsum("nchw,nkhw->kc", window, dy[:, outputs], optimize=True)
    return dw


def _padded(x: Array, shape: ConvShape) -> Array:
    top, bottom, left, right = shape.padding
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))


def _groups(shape: ConvShape) -> Iterator[tuple[slice, slice]]:
    for g in range(shape.groups):
        yield (
            slice(g * shape.group_in, (g + 1) * shape.group_in),
            slice(g * shape.group_out, (g + 1) * shape.group_out),
        )


def _taps(padded: Array, shape: ConvShape) -> Iterator[tuple[int, int, Array]]:
    """Each tap (r, s) with the view of the padded images that it multiplies."""
    (stride_h, stride_w), (dilation_h, dilation_w) = shape.stride, shape.dilation
    for r in range(shape.kernel[0]):
        for s in range(shape.kernel[1]):
            h, w = r * dilation_h, s * dilation_w
            yield (
                r,
                s,
                padded[
                    :,
                    :,
                    h : h + (shape.out_height - 1) * stride_h + 1 : stride_h,
                    w : w + (shape.out_width - 1) * stride_w + 1 : stride_w,
                ],
            )
