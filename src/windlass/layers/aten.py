"""PyTorch's own convolution in three directions, with zeros on any side and a stated memory format.

This is the algorithm "torch", and the way for every device and dtype that Windlass has no kernels for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor

_aten: Any = torch.ops.aten


def is_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch takes a tensor as channels_last, which only four dimensions can be.

    The strides decide as in ``is_channels_last_strides_2d`` (c10/core/MemoryFormat.h), which is stricter than
    `Tensor.is_contiguous(memory_format=...)` where sizes of 1 leave both readings open.
    """
    if tensor.dim() != 4:
        return False
    n, c, h, w = tensor.shape
    stride_n, stride_c, stride_h, stride_w = tensor.stride()
    lowest = stride_c * c if c > 1 else stride_c
    if stride_w < lowest or stride_c == 0:
        return False
    lowest = stride_w * w if w > 1 else stride_w
    if stride_h < lowest:
        return False
    lowest = stride_h * h if h > 1 else stride_h
    return stride_n >= lowest and lowest != stride_c and c != 0 and h != 0 and w != 0 and n != 0


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's name for one of the two layouts."""
    return torch.channels_last if channels_last else torch.contiguous_format


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    """Returns y = conv(x, weight) + bias, then max(y, 0) with `relu`."""
    channels_last = is_channels_last(x) or is_channels_last(weight)
    x, symmetric = _padded(x, padding)
    y: Tensor = _aten.convolution(x, weight, bias, stride, symmetric, dilation, False, (0, 0), groups)
    y = y.contiguous(memory_format=memory_format(channels_last))
    return y.relu_() if relu else y


def backward_input(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, channels_last: bool,
) -> Tensor:  # fmt: skip
    """dx, of height and width `size`."""
    symmetric, extra = _split(padding)
    height, width = size[0] + extra[0] + extra[1], size[1] + extra[2] + extra[3]
    x = _unread(grad, (grad.shape[0], weight.shape[1] * groups, height, width), channels_last)
    dx = _backward(grad, x, weight, (stride, symmetric, dilation, groups), (True, False, False))[0]
    if any(extra):
        dx = dx[:, :, extra[0] : extra[0] + size[0], extra[2] : extra[2] + size[1]]
    return dx.contiguous(memory_format=memory_format(channels_last))


def backward_weight(
    x: Tensor, grad: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, channels_last: bool,
) -> Tensor:  # fmt: skip
    """dw, for filters of height and width `kernel`."""
    weight = _unread(x, (grad.shape[1], x.shape[1] // groups, *kernel), channels_last)
    x, symmetric = _padded(x, padding)
    dw = _backward(grad, x, weight, (stride, symmetric, dilation, groups), (False, True, False))[1]
    return dw.contiguous(memory_format=memory_format(channels_last))


_Geometry = tuple[Sequence[int], tuple[int, int], Sequence[int], int]


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, symmetric, dilation, groups = geometry
    result: tuple[Tensor, Tensor, Tensor] = _aten.convolution_backward(
        grad, x, weight, None, stride, symmetric, dilation, False, (0, 0), groups, mask
    )
    return result


def _unread(like: Tensor, size: tuple[int, ...], channels_last: bool) -> Tensor:
    """A tensor of which the backward pass looks at sizes and strides only."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def _padded(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """The input with the zeros that PyTorch's symmetric padding cannot give, and that padding."""
    symmetric, (top, bottom, left, right) = _split(padding)
    return (F.pad(x, (left, right, top, bottom)) if top or bottom or left or right else x), symmetric


def _split(padding: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Symmetric padding, and zeros to put first at (top, bottom, left, right)."""
    top, bottom, left, right = padding
    symmetric = min(top, bottom), min(left, right)
    return symmetric, (top - symmetric[0], bottom - symmetric[0], left - symmetric[1], right - symmetric[1])
