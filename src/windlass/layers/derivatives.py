"""Derivatives of the operators, of any order, forward and backward, also under `torch.func`.

Convolution is bilinear, so the derivatives of each operator are the two others:

    y  = conv(x, w)       dx = input(dy, w)    dw = weight(x, dy)
    dx = input(g, w)      dg = conv(ddx, w)    dw = weight(ddx, g)
    dw = weight(x, g)     dx = input(g, ddw)   dg = conv(x, ddw)

Theory of operation.  Each operator has a Python kernel at PyTorch's Autograd key, in place of
`torch.library.register_autograd`, for three reasons.  It is faster: where no mode, transform or subclass is
at work (the key set says so) it calls the CPU's kernel itself instead of dispatching again.  It works under
`torch.func`: as PyTorch's own derivatives do, it records at the present level of transforms and sends the
operator to the levels below.  And it differentiates forward (`jvp`).

Where the gradient of the input will want what the forward pass has made of the weights (their spectra), a plain
call saves it beside the weights.  It belongs to that call alone and goes with it; weights that have changed since
are refused by autograd's own count of versions.  Everywhere else (graphs, transforms, subclasses) it is made anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad

from windlass.layers.aten import is_channels_last
from windlass.layers.operators import BACKWARD_INPUT, BACKWARD_WEIGHT, CONV2D, KERNELS, LIBRARY, conv2d_keeping

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset
_PLAIN = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU).add(torch._C.DispatchKey.AutogradCPU).raw_repr()
"""The key set of a call on plain CPU tensors with no mode or transform at work."""

_threshold_backward = torch.ops.aten.threshold_backward.default

Lower = tuple[Any, bool]
"""The keys below autograd, and whether gradients are on; None for a plain call."""


class _Conv2d(torch.autograd.Function):
    """y = max(conv(x, weight) + bias, 0), the maximum only with `relu`."""

    @staticmethod
    def forward(
        ctx: Any, lower: Lower | None, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[1:3]
        if lower is None and needs_x:
            y, kept = conv2d_keeping(x, weight, bias, *geometry)
        else:
            y, kept = _call(CONV2D, KERNELS["conv2d"], lower, (x, weight, bias, *geometry)), None
        relu = geometry[-1]
        ctx.set_materialize_grads(False)
        # Only what the wanted gradients need is kept alive; max(., 0) is undone by the output's own zeros.
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, y if relu else None, kept)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(x, weight, y)
        ctx.geometry, ctx.relu = geometry[:-1], relu
        last = is_channels_last(weight)
        ctx.formats = last or is_channels_last(x), last
        ctx.sizes = x.shape[2:], weight.shape[2:]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 10
        x, weight, y, kept = ctx.saved_tensors
        if y is not None:
            grad = _threshold_backward(grad, y, 0)
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        (size, kernel), (x_format, weight_format) = ctx.sizes, ctx.formats
        dx = BACKWARD_INPUT(grad, weight, size, *ctx.geometry, x_format, kept) if needs_x else None
        dw = BACKWARD_WEIGHT(x, grad, kernel, *ctx.geometry, weight_format) if needs_weight else None
        db = grad.sum((0, 2, 3)) if needs_bias else None
        return (None, dx, dw, db, *(None,) * 6)

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, *__: None) -> Tensor:
        x, weight, y = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(CONV2D(dx, weight, None, *ctx.geometry, False))
        if dw is not None:
            terms.append(CONV2D(x, dw, None, *ctx.geometry, False))
        if db is not None:
            terms.append(db[:, None, None] + torch.zeros_like(y))
        dy = _sum(terms)
        return _threshold_backward(dy, y, 0) if ctx.relu else dy


class _BackwardInput(torch.autograd.Function):
    """dx, from the output's gradient and the weights."""

    @staticmethod
    def forward(
        ctx: Any, lower: Lower | None, grad: Tensor, weight: Tensor, size: list[int], stride: list[int],
        padding: list[int], dilation: list[int], groups: int, algorithm: str, channels_last: bool, *kept: Tensor,
    ) -> Tensor:  # fmt: skip
        geometry = (stride, padding, dilation, groups, algorithm)
        args = (grad, weight, size, *geometry, channels_last, *kept)
        dx = _call(BACKWARD_INPUT, KERNELS["conv2d_backward_input"], lower, args)
        needs_grad, needs_weight = ctx.needs_input_grad[1:3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad if needs_weight else None, weight if needs_grad else None)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(grad, weight)
        ctx.geometry, ctx.format = geometry, channels_last
        ctx.sizes = size, weight.shape[2:]
        ctx.weight_format = is_channels_last(weight)
        return dx

    @staticmethod
    def backward(ctx: Any, ddx: Tensor | None) -> tuple[Any, ...]:
        if ddx is None:
            return (None,) * len(ctx.needs_input_grad)
        grad, weight = ctx.saved_tensors
        _, needs_grad, needs_weight = ctx.needs_input_grad[:3]
        dg = CONV2D(ddx, weight, None, *ctx.geometry, False) if needs_grad else None
        dw = BACKWARD_WEIGHT(ddx, grad, ctx.sizes[1], *ctx.geometry, ctx.weight_format) if needs_weight else None
        return (None, dg, dw, *(None,) * (len(ctx.needs_input_grad) - 3))

    @staticmethod
    def jvp(ctx: Any, _: None, dg: Tensor | None, dw: Tensor | None, *__: None) -> Tensor:
        grad, weight = ctx.saved_tensors
        terms = []
        if dg is not None:
            terms.append(BACKWARD_INPUT(dg, weight, ctx.sizes[0], *ctx.geometry, ctx.format))
        if dw is not None:
            terms.append(BACKWARD_INPUT(grad, dw, ctx.sizes[0], *ctx.geometry, ctx.format))
        return _sum(terms)


class _BackwardWeight(torch.autograd.Function):
    """dw, from the input and the output's gradient."""

    @staticmethod
    def forward(ctx: Any, lower: Lower | None, x: Tensor, grad: Tensor, kernel: list[int], *geometry: Any) -> Tensor:
        dw = _call(BACKWARD_WEIGHT, KERNELS["conv2d_backward_weight"], lower, (x, grad, kernel, *geometry))
        needs_x, needs_grad = ctx.needs_input_grad[1:3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if needs_grad else None, grad if needs_x else None)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(x, grad)
        ctx.geometry, ctx.format = geometry[:-1], geometry[-1]
        ctx.sizes = x.shape[2:], kernel
        ctx.x_format = is_channels_last(x)
        return dw

    @staticmethod
    def backward(ctx: Any, ddw: Tensor | None) -> tuple[Any, ...]:
        if ddw is None:
            return (None,) * 10
        x, grad = ctx.saved_tensors
        _, needs_x, needs_grad = ctx.needs_input_grad[:3]
        dx = BACKWARD_INPUT(grad, ddw, ctx.sizes[0], *ctx.geometry, ctx.x_format) if needs_x else None
        dg = CONV2D(x, ddw, None, *ctx.geometry, False) if needs_grad else None
        return (None, dx, dg, *(None,) * 7)

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor | None, dg: Tensor | None, *__: None) -> Tensor:
        x, grad = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(BACKWARD_WEIGHT(dx, grad, ctx.sizes[1], *ctx.geometry, ctx.format))
        if dg is not None:
            terms.append(BACKWARD_WEIGHT(x, dg, ctx.sizes[1], *ctx.geometry, ctx.format))
        return _sum(terms)


def _sum(terms: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _call(op: Any, kernel: Callable[..., Tensor], lower: Lower | None, args: tuple[Any, ...]) -> Tensor:
    """The operator below autograd; a plain call goes straight to the CPU's kernel."""
    if lower is None:
        return kernel(*args)
    keys, grad_enabled = lower
    # A Function's forward runs with gradients off, but levels of torch.func below this one may record too.
    with (
        torch.set_grad_enabled(grad_enabled),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        result: Tensor = op.redispatch(keys, *args)
    return result


def _autograd(op: Any, kernel: Callable[..., Tensor], function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """The operator's kernel at the Autograd key."""
    # torch.autograd.Function.apply refuses torch.func; the one below it records at the present level alone.
    apply: Callable[..., Tensor] = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(keys: Any, *args: Any) -> Tensor:
        plain = keys.raw_repr() == _PLAIN
        grad_enabled = torch.is_grad_enabled()
        if (grad_enabled and torch._C._any_requires_grad(*args)) or forward_ad._current_level >= 0:
            lower = None if plain else (keys & _BELOW_AUTOGRAD, grad_enabled)
            if torch._C._are_functorch_transforms_active():
                with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
                    return apply(lower, *args)
            return apply(lower, *args)
        if plain:
            return kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            result: Tensor = op.redispatch(keys & _BELOW_AUTOGRAD, *args)
        return result

    return call


def _autocast(op: Any, device: str, key: str) -> Callable[..., Tensor]:
    """The operator's kernel under autocast: in the lower precision, as PyTorch's convolution."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        cast = [_lowered(arg, dtype, device) if isinstance(arg, Tensor) else arg for arg in args]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = op(*cast)
        return result

    return call


def _lowered(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    eligible = tensor.device.type == device and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor


for _op, _name, _function in (
    (CONV2D, "conv2d", _Conv2d),
    (BACKWARD_INPUT, "conv2d_backward_input", _BackwardInput),
    (BACKWARD_WEIGHT, "conv2d_backward_weight", _BackwardWeight),
):
    LIBRARY.impl(_name, _autograd(_op, KERNELS[_name], _function), "Autograd", with_keyset=True)

for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    LIBRARY.impl("conv2d", _autocast(CONV2D, _device, _key), _key)
