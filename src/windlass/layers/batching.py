"""`torch.vmap` of the operators: one call for the whole batch, where the algorithm allows it.

A batch of inputs with the same weights is a larger batch.  Different weights of one input are more output
channels; otherwise every sample becomes a group of its own.  An algorithm that does not take the convolution
so regrouped (Winograd's do not take depthwise ones) computes sample by sample.

Legend: B is the dimension of `vmap`, moved to the front of its tensor; G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.layers.choice import AUTO, resolve
from windlass.layers.operators import BACKWARD_INPUT, BACKWARD_WEIGHT, CONV2D, LIBRARY, shape_of

Dims = tuple[int | None, ...]
Batched = tuple[Tensor, int]


def _vmap_conv2d(
    info: Any, dims: Dims, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, algorithm: str, relu: bool,
) -> Batched:  # fmt: skip
    size, (dim_x, dim_weight, dim_bias) = info.batch_size, dims[:3]
    geometry = (stride, padding, dilation)
    if dim_bias is not None:  # added to each sample's own result
        assert bias is not None
        if dim_x is None and dim_weight is None:
            y = CONV2D(x, weight, None, *geometry, groups, algorithm, False)
        else:
            unbiased = (dim_x, dim_weight, None, *dims[3:])
            y, dim = _vmap_conv2d(info, unbiased, x, weight, None, *geometry, groups, algorithm, False)
            y = y.movedim(dim, 0)
        y = y + bias.movedim(dim_bias, 0)[:, None, :, None, None]
        return (y.relu() if relu else y), 0
    if dim_weight is None:
        assert dim_x is not None
        y = CONV2D(_into_batch(x, dim_x), weight, bias, *geometry, groups, algorithm, relu)
        return y.unflatten(0, (size, y.shape[0] // size)), 0
    weights = weight.movedim(dim_weight, 0).flatten(0, 1)
    biases = None if bias is None else bias.repeat(size)
    if dim_x is None and groups == 1:
        y = CONV2D(x, weights, biases, *geometry, 1, algorithm, relu)
        return y.unflatten(1, (size, y.shape[1] // size)), 1
    inputs = _into_channels(x, dim_x, size)
    if not _takes(algorithm, inputs.shape, weights.shape, geometry, size * groups):
        return _one_by_one(CONV2D, info, dims, (x, weight, bias, *geometry, groups, algorithm, relu))
    y = CONV2D(inputs, weights, biases, *geometry, size * groups, algorithm, relu)
    return y.unflatten(1, (size, y.shape[1] // size)), 1


def _vmap_backward_input(
    info: Any, dims: Dims, grad: Tensor, weight: Tensor, out: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, algorithm: str, channels_last: bool, kept: Tensor | None = None,
) -> Batched:  # fmt: skip
    size, (dim_grad, dim_weight) = info.batch_size, dims[:2]
    geometry = (stride, padding, dilation)
    if dim_weight is None:
        assert dim_grad is not None
        whole = kept if dims[9:] in ((), (None,)) else None  # it depends on the weights alone
        dx = BACKWARD_INPUT(
            _into_batch(grad, dim_grad), weight, out, *geometry, groups, algorithm, channels_last, whole
        )  # fmt: skip
        return dx.unflatten(0, (size, dx.shape[0] // size)), 0
    grads, weights = _into_channels(grad, dim_grad, size), weight.movedim(dim_weight, 0).flatten(0, 1)
    x = (grads.shape[0], weights.shape[1] * size * groups, *out)
    if not _takes(algorithm, x, weights.shape, geometry, size * groups):
        rest = (out, *geometry, groups, algorithm, channels_last)
        return _one_by_one(BACKWARD_INPUT, info, dims[:9], (grad, weight, *rest))
    dx = BACKWARD_INPUT(grads, weights, out, *geometry, size * groups, algorithm, channels_last)
    return dx.unflatten(1, (size, dx.shape[1] // size)), 1


def _vmap_backward_weight(
    info: Any, dims: Dims, x: Tensor, grad: Tensor, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, algorithm: str, channels_last: bool,
) -> Batched:  # fmt: skip
    size, (dim_x, dim_grad) = info.batch_size, dims[:2]
    geometry = (stride, padding, dilation)
    if dim_grad is None and groups == 1:  # every input channel of every sample is one of a wider convolution
        dw = BACKWARD_WEIGHT(
            _into_channels(x, dim_x, size), grad, kernel, *geometry, 1, algorithm, channels_last
        )  # fmt: skip
        return dw.unflatten(1, (size, dw.shape[1] // size)), 1
    if dim_x is None and groups == 1:
        dw = BACKWARD_WEIGHT(
            x, _into_channels(grad, dim_grad, size), kernel, *geometry, 1, algorithm, channels_last
        )  # fmt: skip
        return dw.unflatten(0, (size, dw.shape[0] // size)), 0
    inputs, grads = _into_channels(x, dim_x, size), _into_channels(grad, dim_grad, size)
    weights = (grads.shape[1], inputs.shape[1] // (size * groups), *kernel)
    if not _takes(algorithm, inputs.shape, weights, geometry, size * groups):
        rest = (kernel, *geometry, groups, algorithm, channels_last)
        return _one_by_one(BACKWARD_WEIGHT, info, dims, (x, grad, *rest))
    dw = BACKWARD_WEIGHT(inputs, grads, kernel, *geometry, size * groups, algorithm, channels_last)
    return dw.unflatten(0, (size, dw.shape[0] // size)), 0


def _into_batch(tensor: Tensor, dim: int) -> Tensor:
    """B and N as one batch."""
    return tensor.movedim(dim, 0).flatten(0, 1)


def _into_channels(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(N, B · channels, ., .); a tensor without B is repeated."""
    moved = tensor[:, None].expand(-1, size, -1, -1, -1) if dim is None else tensor.movedim(dim, 1)
    return moved.flatten(1, 2)


def _takes(
    algorithm: str, x: tuple[int, ...], weight: tuple[int, ...], geometry: tuple[list[int], ...], groups: int
) -> bool:
    """Whether the algorithm computes the regrouped convolution."""
    if algorithm == AUTO:
        return True
    stride, padding, dilation = (tuple(values) for values in geometry)
    try:
        resolve(algorithm, shape_of(x, weight, stride, padding, dilation, groups))
    except ConfigError:
        return False
    return True


def _one_by_one(op: Any, info: Any, dims: Dims, args: tuple[Any, ...]) -> Batched:
    def of(index: int) -> tuple[Any, ...]:
        # The dims of lists are lists of None.
        return tuple(
            arg.select(dim, index) if isinstance(dim, int) else arg for arg, dim in zip(args, dims, strict=True)
        )

    return torch.stack([op(*of(index)) for index in range(info.batch_size)]), 0


torch.library.register_vmap("windlass::conv2d", _vmap_conv2d, lib=LIBRARY)
torch.library.register_vmap("windlass::conv2d_backward_input", _vmap_backward_input, lib=LIBRARY)
torch.library.register_vmap("windlass::conv2d_backward_weight", _vmap_backward_weight, lib=LIBRARY)
