"""Multiply-adds of tensor operations, by closed formulas.

`multiply_adds` looks at one ATen operation of the forward pass, as the dispatcher sees it.  The backward pass
of each of these is bilinear in the same two operands, so each operand's gradient costs as many multiply-adds
as the forward pass: backward work is the forward work times the number of operands that want a gradient.
(PyTorch's own counter ignores groups in a convolution's weight gradient, so it is not used for that.)

Operations that are not listed (normalisation, pooling, element by element) count as zero: they are bound by
memory, not by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor


def multiply_adds(operation: str, args: Sequence[object], out: object) -> tuple[int, int]:
    """Multiply-adds of the forward and of the backward pass of one ATen operation.

    Args:
        operation: its name without namespace and overload: ``convolution``, ``addmm``.
        args: its positional arguments.
        out: what it returned.

    >>> import torch
    >>> a, b = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    >>> multiply_adds("mm", (a, b), a @ b)
    (30, 30)
    """
    rule = RULES.get(operation)
    if rule is None:
        return 0, 0
    work, operands = rule(args, out)
    return work, work * sum(operand.requires_grad for operand in operands)


Counted = tuple[int, tuple[Tensor, ...]]


def _convolution(args: Sequence[object], out: object) -> Counted:
    """Each output (if transposed: each input) element meets one filter: (C / groups) R S multiply-adds."""
    x_NCHW, weight = _tensor(args[0]), _tensor(args[1])
    transposed = len(args) > 6 and bool(args[6])
    per_element = math.prod(weight.shape[1:])
    elements = x_NCHW.numel() if transposed else _tensor(out).numel()
    return elements * per_element, (x_NCHW, weight)


def _convolution_by_plan(args: Sequence[object], out: object) -> Counted:
    """``windlass::conv2d``: the definition's multiply-adds, whatever its algorithm saves of them."""
    x_NCHW, weight = _tensor(args[0]), _tensor(args[1])
    return _tensor(out).numel() * math.prod(weight.shape[1:]), (x_NCHW, weight)


def _product(first: int) -> Callable[[Sequence[object], object], Counted]:
    """(…, n, k) by (…, k, m) or by a vector; `first` is the place of the left factor among the arguments."""

    def rule(args: Sequence[object], out: object) -> Counted:
        left, right = _tensor(args[first]), _tensor(args[first + 1])
        columns = right.shape[-1] if right.dim() > 1 else 1
        return left.numel() * columns, (left, right)

    return rule


def _linear(args: Sequence[object], out: object) -> Counted:
    x, weight = _tensor(args[0]), _tensor(args[1])
    return x.numel() * weight.shape[0], (x, weight)


def _attention(args: Sequence[object], out: object) -> Counted:
    """Scores q kᵀ and their product with v; no saving for a causal mask.

    Fused kernels run the scores again in the backward pass; that is their choice and is not counted.
    """
    q, k, v = (_tensor(arg) for arg in args[:3])
    scores = q.numel() * k.shape[-2]
    values = q.numel() // q.shape[-1] * k.shape[-2] * v.shape[-1]
    wanted = q if q.requires_grad or k.requires_grad or v.requires_grad else None
    return scores + values, () if wanted is None else tuple(t for t in (q, k) if t.requires_grad)


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a tensor was wanted here, got {type(value).__name__}")
    return value


RULES: dict[str, Callable[[Sequence[object], object], Counted]] = {
    "convolution": _convolution,
    "conv2d": _convolution_by_plan,
    "mm": _product(0),
    "bmm": _product(0),
    "mv": _product(0),
    "dot": _product(0),
    "addmm": _product(1),
    "addmv": _product(1),
    "baddbmm": _product(1),
    "addbmm": _product(1),
    "linear": _linear,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_attention_math": _attention,
}
"""How to count each operation that multiplies and adds."""
