"""The operators ``windlass::conv2d``, ``conv2d_backward_input`` and ``conv2d_backward_weight``.

They take what PyTorch's convolution takes, zeros at (top, bottom, left, right), and `algorithm`, a text of
`windlass.layers.choice`; the text stands for all three directions, so that any of them can call the others.
float32 on a CPU goes to `windlass.kernels.convolve`; float16 and bfloat16 are converted to float32 and the
result back, where the text names an algorithm ("auto" knows times for float32 only).  Everything else (other
devices, other dtypes, empty tensors, the algorithm "torch") is PyTorch's own convolution.

Derivatives are in `windlass.layers.derivatives`, `vmap` in `windlass.layers.batching`.

Legend: x is N, C, H, W; weight is K, C/G, R, S; grad, the gradient of the output, is N, K, P, Q.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.kernels import convolve
from windlass.kernels.workspace import ALIGNMENT, lasting
from windlass.layers import aten
from windlass.layers.aten import is_channels_last, memory_format
from windlass.layers.choice import AUTO, remembered, resolve
from windlass.plan.convolution import ConvShape, Direction

_GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups, str algorithm"

SCHEMAS: dict[str, str] = {
    "conv2d": f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, bool relu) -> Tensor",
    "conv2d_backward_input": (
        f"(Tensor grad, Tensor weight, SymInt[2] size, {_GEOMETRY}, bool channels_last, Tensor? kept=None) -> Tensor"
    ),
    "conv2d_backward_weight": f"(Tensor x, Tensor grad, SymInt[2] kernel, {_GEOMETRY}, bool channels_last) -> Tensor",
}
"""The operators and what they take.

`channels_last` is the memory format of the result; `kept` is what `conv2d_keeping` gave for the same weights.
"""

STORED = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""The dtypes that Windlass's kernels compute, all in float32."""

LIBRARY: Any = torch.library.Library("windlass", "FRAGMENT")  # type: ignore[no-untyped-call]
_check: Any = torch._check

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

Sizes = tuple[int, ...]


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, relu: bool,
) -> Tensor:  # fmt: skip
    """Returns y = conv(x, weight) + bias, on a CPU."""
    return _forward(x, weight, bias, stride, padding, dilation, groups, algorithm, relu, keep=False)[0]


def conv2d_keeping(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, relu: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Returns y and what `conv2d_backward_input` can use again, or None (see `windlass.kernels.convolve`)."""
    return _forward(x, weight, bias, stride, padding, dilation, groups, algorithm, relu, keep=True)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, relu: bool, *, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if not _has_kernels(x, weight, bias):
        return aten.forward(x, weight, bias, stride, padding, dilation, groups, relu), None
    channels_last = is_channels_last(x) or is_channels_last(weight)
    text = "torch" if algorithm == AUTO and x.dtype is not torch.float32 else algorithm
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    shape, name = _plan("forward", x.shape, weight.shape, None, geometry, text, channels_last)
    if name == "torch":
        return aten.forward(x, weight, bias, stride, padding, dilation, groups, relu), None
    if bias is not None and bias.shape != (shape.out_channels,):
        raise RuntimeError(f"windlass::conv2d: needs a bias of {shape.out_channels} numbers, got {tuple(bias.shape)}")
    y = _empty((shape.batch, shape.out_channels, shape.out_height, shape.out_width), channels_last)
    num_kept = convolve.kept_floats(name, shape=shape) if keep else 0
    if num_kept and _plan("input", x.shape, weight.shape, None, geometry, text, channels_last)[1] != name:
        num_kept = 0
    kept = torch.from_numpy(lasting(num_kept)) if num_kept else None
    convolve.forward(
        name, _array(x), _array(weight), None if bias is None else _array(bias), y.numpy(),
        shape=shape, threads=torch.get_num_threads(), relu=relu, kept=None if kept is None else kept.numpy(),
    )  # fmt: skip
    return (y if x.dtype is torch.float32 else y.to(x.dtype)), kept


def conv2d_backward_input(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, channels_last: bool, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the input, of height and width `size`, on a CPU."""
    if not _has_kernels(grad, weight):
        return aten.backward_input(grad, weight, size, stride, padding, dilation, groups, channels_last)
    text = "torch" if algorithm == AUTO and grad.dtype is not torch.float32 else algorithm
    shape, name = _plan(
        "input", (grad.shape[0], weight.shape[1] * groups, *size), weight.shape, grad.shape,
        (tuple(stride), tuple(padding), tuple(dilation), groups), text, channels_last,
    )  # fmt: skip
    if name == "torch":
        return aten.backward_input(grad, weight, size, stride, padding, dilation, groups, channels_last)
    dx = _empty((shape.batch, shape.in_channels, shape.height, shape.width), channels_last)
    convolve.backward_input(
        name, _array(grad), _array(weight), dx.numpy(), shape=shape, threads=torch.get_num_threads(),
        kept=None if kept is None else _usable(kept, convolve.kept_floats(name, shape=shape)),
    )  # fmt: skip
    return dx if grad.dtype is torch.float32 else dx.to(grad.dtype)


def conv2d_backward_weight(
    x: Tensor, grad: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the weights, for filters of height and width `kernel`, on a CPU."""
    if not _has_kernels(x, grad):
        return aten.backward_weight(x, grad, kernel, stride, padding, dilation, groups, channels_last)
    text = "torch" if algorithm == AUTO and x.dtype is not torch.float32 else algorithm
    shape, name = _plan(
        "weight", x.shape, (grad.shape[1], x.shape[1] // max(groups, 1), *kernel), grad.shape,
        (tuple(stride), tuple(padding), tuple(dilation), groups), text, is_channels_last(x),
    )  # fmt: skip
    if name == "torch":
        return aten.backward_weight(x, grad, kernel, stride, padding, dilation, groups, channels_last)
    dw = _empty((shape.out_channels, shape.group_in, *shape.kernel), channels_last)
    convolve.backward_weight(name, _array(x), _array(grad), dw.numpy(), shape=shape, threads=torch.get_num_threads())
    return dw if x.dtype is torch.float32 else dw.to(x.dtype)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "conv2d": conv2d,
    "conv2d_backward_input": conv2d_backward_input,
    "conv2d_backward_weight": conv2d_backward_weight,
}
"""The CPU's kernel of each operator."""


def _has_kernels(first: Tensor, second: Tensor, bias: Tensor | None = None) -> bool:
    """Whether Windlass computes these tensors itself; for the others PyTorch computes, or says what is wrong."""
    dtype = first.dtype
    return (
        dtype in STORED
        and second.dtype is dtype
        and (bias is None or bias.dtype is dtype)
        and first.numel() != 0
        and second.numel() != 0
    )


_Geometry = tuple[Sizes, Sizes, Sizes, int]


@remembered
def _plan(
    direction: Direction,
    x: Sizes,
    weight: Sizes,
    grad: Sizes | None,
    geometry: _Geometry,
    text: str,
    channels_last: bool,
) -> tuple[ConvShape, str]:
    """The convolution that the sizes describe, and its algorithm in one direction."""
    shape = shape_of(x, weight, *geometry)
    expected = (shape.batch, shape.out_channels, shape.out_height, shape.out_width)
    if grad is not None and grad != expected:
        raise RuntimeError(f"windlass::conv2d: {shape} needs gradients of {expected}, got {tuple(grad)}")
    layout = "channels_last" if channels_last else "contiguous"
    return shape, resolve(text, shape, layout=layout).of(direction)  # type: ignore[arg-type]


def shape_of(
    x: Sizes, weight: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int, /
) -> ConvShape:  # fmt: skip
    """The convolution of an input and weights of these sizes.

    Raises:
        RuntimeError: there is none.
    """
    if len(x) != 4 or len(weight) != 4:
        raise RuntimeError(f"windlass::conv2d: needs 4-dimensional tensors, got {tuple(x)} and {tuple(weight)}")
    if x[1] != weight[1] * groups:
        raise RuntimeError(
            f"windlass::conv2d: weights of {tuple(weight)} with {groups} groups need {weight[1] * groups} input "
            f"channels, got {x[1]}"
        )
    try:
        return ConvShape(
            batch=x[0], in_channels=x[1], height=x[2], width=x[3],
            out_channels=weight[0], kernel=(weight[2], weight[3]), stride=(stride[0], stride[1]),
            padding=(padding[0], padding[1], padding[2], padding[3]), dilation=(dilation[0], dilation[1]),
            groups=groups,
        )  # fmt: skip
    except ConfigError as error:
        raise RuntimeError(f"windlass::conv2d: {error}") from None


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    """The elements as NumPy sees them, in place where they are float32 already."""
    stored = tensor if tensor.dtype is torch.float32 else tensor.float()
    array: npt.NDArray[np.float32] = stored.numpy(force=True)  # which also takes tensors that require a gradient
    return array


def _usable(kept: Tensor, num: int) -> npt.NDArray[np.float32] | None:
    """What was kept, if it is still as it was made and for this algorithm; their number tells the algorithm."""
    if num == 0 or kept.dtype is not torch.float32 or kept.shape != (num,) or not kept.is_contiguous():
        return None
    array: npt.NDArray[np.float32] = kept.numpy(force=True)
    return array if array.ctypes.data % ALIGNMENT == 0 else None


def _empty(size: Sizes, channels_last: bool) -> Tensor:
    # Defaults for dtype and device can be changed by the user, so both are stated.
    return torch.empty(size, dtype=torch.float32, device="cpu", memory_format=memory_format(channels_last))


def _conv2d_elsewhere(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, relu: bool,
) -> Tensor:  # fmt: skip
    return aten.forward(x, weight, bias, stride, padding, dilation, groups, relu)


def _backward_input_elsewhere(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, channels_last: bool, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return aten.backward_input(grad, weight, size, stride, padding, dilation, groups, channels_last)


def _backward_weight_elsewhere(
    x: Tensor, grad: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, channels_last: bool,
) -> Tensor:  # fmt: skip
    return aten.backward_weight(x, grad, kernel, stride, padding, dilation, groups, channels_last)


ELSEWHERE: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d_elsewhere,
    "conv2d_backward_input": _backward_input_elsewhere,
    "conv2d_backward_weight": _backward_weight_elsewhere,
}
"""Each operator on every device but the CPU."""


def _fake_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, relu: bool,
) -> Tensor:  # fmt: skip
    _check(x.dim() == 4 and weight.dim() == 4, lambda: "windlass::conv2d: needs 4-dimensional tensors")
    _check(
        x.shape[1] == weight.shape[1] * groups,
        lambda: f"windlass::conv2d: needs {weight.shape[1] * groups} input channels, got {x.shape[1]}",
    )
    (top, bottom, left, right), (height, width) = padding, x.shape[2:]
    out_height = (height + top + bottom - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    out_width = (width + left + right - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    _check(
        out_height >= 1 and out_width >= 1,
        lambda: f"windlass::conv2d: filters of {tuple(weight.shape)} do not fit an input of {tuple(x.shape)}",
    )
    return _fake(
        x, (x.shape[0], weight.shape[0], out_height, out_width), is_channels_last(x) or is_channels_last(weight)
    )


def _fake_backward_input(
    grad: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, channels_last: bool, kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _fake(grad, (grad.shape[0], weight.shape[1] * groups, size[0], size[1]), channels_last)


def _fake_backward_weight(
    x: Tensor, grad: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, algorithm: str, channels_last: bool,
) -> Tensor:  # fmt: skip
    return _fake(x, (grad.shape[1], x.shape[1] // groups, kernel[0], kernel[1]), channels_last)


def _fake(like: Tensor, size: Sizes, channels_last: bool) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


FAKES: dict[str, Callable[..., Tensor]] = {
    "conv2d": _fake_conv2d,
    "conv2d_backward_input": _fake_backward_input,
    "conv2d_backward_weight": _fake_backward_weight,
}
"""Each operator's result without its elements, for tracing."""

for _name in SCHEMAS:
    LIBRARY.impl(_name, KERNELS[_name], "CPU")
    LIBRARY.impl(_name, ELSEWHERE[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"windlass::{_name}", FAKES[_name], lib=LIBRARY)

CONV2D: Any = torch.ops.windlass.conv2d.default
BACKWARD_INPUT: Any = torch.ops.windlass.conv2d_backward_input.default
BACKWARD_WEIGHT: Any = torch.ops.windlass.conv2d_backward_weight.default
