"""`torch.nn.functional.conv2d` by algorithm.

Whatever Windlass does not compute goes to PyTorch's function with the arguments as they came: other devices,
dtypes and layouts, calls that PyTorch refuses (so that its own errors are raised), and convolutions for which
its own kernels were chosen (so that nothing is lost by asking).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from windlass.layers.aten import is_channels_last
from windlass.layers.choice import AUTO, TORCH, check_text, remembered, resolve
from windlass.layers.operators import CONV2D, STORED, shape_of
from windlass.plan.convolution import Padding, Pair

Sizes = tuple[int, ...]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    algorithm: str = AUTO,
    *,
    relu: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv2d`, computed by `algorithm`.

    float32 on a CPU is computed by Windlass's kernels; float16 and bfloat16 too where an algorithm is named
    ("auto" knows times for float32 only), in float32.  Other dtypes and devices are PyTorch's own convolution
    whatever the algorithm.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (K, C / groups, R, S).
        bias: (K,), or None.
        stride: of the filter; one number or (vertical, horizontal).
        padding: zeros on each side, "same" or "valid".
        dilation: distance of the filter's taps.
        groups: divides C and K.
        algorithm: "auto", a name of `windlass.plan.convolution.CONV_ALGORITHMS`, "winograd" or "fft" (their
            best member for the shape), or three of these for forward/input/weight.
        relu: return max(y, 0), for less than a pass of its own would cost.

    Returns:
        (N, K, P, Q) or (K, P, Q), in the memory format that PyTorch's convolution would choose.

    Raises:
        ConfigError: there is no such algorithm, or it cannot compute this convolution.
        RuntimeError, TypeError, ValueError: as PyTorch's.

    >>> x, w = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    >>> conv2d(x, w, padding="same", algorithm="winograd").shape
    torch.Size([1, 3, 4, 4])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d, (input, weight, bias), input, weight, bias, stride, padding, dilation, groups, algorithm, relu=relu
        )
    if _has_kernels(input, weight, bias, algorithm):
        x = input if input.dim() == 4 else input.unsqueeze(0)
        bound = _bind(x, weight, bias, _pair(stride), padding, _pair(dilation), groups, algorithm)
        if bound is not None:
            y: Tensor = CONV2D(x, weight, bias, _pair(stride), bound[0], _pair(dilation), groups, bound[1], relu)
            return y if x is input else y.squeeze(0)
    elif algorithm != AUTO:
        check_text(algorithm)
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return y.relu_() if relu else y


def _has_kernels(input: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> bool:
    """Whether these are tensors for Windlass; the sizes are looked at later."""
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        return False
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        same = input.dtype in STORED and weight.dtype in STORED and (bias is None or bias.dtype in STORED)
    else:
        dtype = input.dtype
        same = weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    return (
        same
        and (dtype is torch.float32 or (dtype in STORED and algorithm != AUTO))
        and input.is_cpu
        and weight.is_cpu
        and (bias is None or (bias.is_cpu and bias.dim() == 1))
        and input.layout is torch.strided
        and weight.layout is torch.strided
        and input.dim() in (3, 4)
        and weight.dim() == 4
    )


Bound = tuple[Padding, str]
"""Zeros on four sides and the algorithms' text."""


def _bind(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair | None,
    padding: int | Sequence[int] | str,
    dilation: Pair | None,
    groups: int,
    algorithm: str,
) -> Bound | None:
    """What the operator is to be told, or None where PyTorch is to compute or to refuse."""
    zeros = padding if isinstance(padding, str) else _pair(padding)
    if stride is None or dilation is None or zeros is None or _whole(groups) is None:
        return None
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._is_tracing():  # TorchScript is to run without Python
        return None
    grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    num_biases = None if bias is None else bias.shape[0]
    geometry = (stride, zeros, dilation, groups)
    channels_last = is_channels_last(x) or is_channels_last(weight)
    if compiling:
        return _traced(x.shape, weight.shape, num_biases, geometry, algorithm, channels_last, grad)
    try:
        return _bound(x.shape, weight.shape, num_biases, geometry, algorithm, channels_last, grad)
    except TypeError:  # sizes that are still symbols cannot be looked up
        return _unbound(weight.shape, geometry, algorithm)


_Geometry = tuple[Pair, Pair | str, Pair, int]


@remembered
def _bound(
    x: Sizes,
    weight: Sizes,
    num_biases: int | None,
    geometry: _Geometry,
    algorithm: str,
    channels_last: bool,
    grad: bool,
) -> Bound | None:
    stride, zeros, dilation, groups = geometry
    padding = _padding(zeros, weight, stride, dilation)
    if padding is None or 0 in x or 0 in weight or num_biases not in (None, weight[0]):
        return None
    try:
        shape = shape_of(x, weight, stride, padding, dilation, groups)
    except RuntimeError:  # there is no such convolution, which PyTorch says in its own words
        return None
    choice = resolve(algorithm, shape, layout="channels_last" if channels_last else "contiguous", grad=grad)
    if choice == TORCH or (choice.forward == "torch" and not grad):
        return None
    return padding, str(choice)


def _traced(
    x: Sizes,
    weight: Sizes,
    num_biases: int | None,
    geometry: _Geometry,
    algorithm: str,
    channels_last: bool,
    grad: bool,
) -> Bound | None:
    """`_bind` while a graph is traced: choices are made now where the sizes are known, else when it runs."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, and there by now

    if all(has_static_value(size) for size in (*x, *weight)):
        sizes = tuple(int(size) for size in x), tuple(int(size) for size in weight)
        text = _constant_text(*sizes, num_biases, geometry, algorithm, channels_last, grad)
        padding = _padding(geometry[1], weight, geometry[0], geometry[2])
        return (padding, text) if text and padding is not None else None
    return _unbound(weight, geometry, algorithm)


def _constant_text(*key: Any) -> str:
    bound = _bound(*key)
    return "" if bound is None else bound[1]


# As torch.compiler.assume_constant_result, which would import the compiler for everyone: it calls the function
# once while tracing, and does not look inside.
_constant_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unbound(weight: Sizes, geometry: _Geometry, algorithm: str) -> Bound | None:
    """Sizes are not known yet: the operator resolves the text whenever it runs."""
    check_text(algorithm)
    padding = _padding(geometry[1], weight, geometry[0], geometry[2])
    return None if algorithm == "torch" or padding is None else (padding, algorithm)


def _pair(value: int | Sequence[int] | str) -> Pair | None:
    """(vertical, horizontal), or None for what only PyTorch can judge."""
    if type(value) is int:
        return value, value
    if isinstance(value, tuple | list) and len(value) in (1, 2):
        vertical, horizontal = _whole(value[0]), _whole(value[-1])
        return None if vertical is None or horizontal is None else (vertical, horizontal)
    number = _whole(value)
    return None if number is None else (number, number)


def _whole(value: Any) -> int | None:
    """An int, also from NumPy's and PyTorch's scalars, but not from a bool."""
    if type(value) is int:
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _padding(zeros: Pair | str, weight: Sizes, stride: Pair, dilation: Pair) -> Padding | None:
    """Zeros at (top, bottom, left, right); of an odd number "same" puts one more at the end."""
    if zeros == "valid":
        return 0, 0, 0, 0
    if zeros == "same" and stride == (1, 1):
        total = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
    if isinstance(zeros, str):
        return None
    return zeros[0], zeros[0], zeros[1], zeros[1]
