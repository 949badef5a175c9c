"""`Quantizer`: a module that rounds activations on the way forward and gradients on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from windlass.plan.number import FLOAT32, NumberFormat, Rounding, check_rounding, parse_format
from windlass.precision.counters import Counters
from windlass.precision.quantize import Randomness, quantize


class Quantizer(nn.Module):
    """Rounds its input to one format and the gradient that comes back to another.

    Args:
        forward: format of the output; None: as it came.
        backward: format of the input's gradient; None: as it came.
        forward_rounding: "stochastic", "nearest" or "floor".
        backward_rounding: likewise.
        clamping_grad_zero: whether the gradient of numbers that saturated is 0, as the derivative of saturation is;
            otherwise it goes through (straight-through).
        generator: a `torch.Generator` or a `Key` of both directions; None: PyTorch's own generator.

    Attributes:
        forward_counters, backward_counters: None, or `Counters` that grow.

    >>> quantizer = Quantizer("<4,4>", forward_rounding="nearest")
    >>> quantizer(torch.tensor([0.3, 9.0]))
    tensor([0.3125, 7.9375])
    """

    def __init__(
        self, forward: NumberFormat | str | None = None, backward: NumberFormat | str | None = None, *,
        forward_rounding: Rounding = "stochastic", backward_rounding: Rounding = "stochastic",
        clamping_grad_zero: bool = False, generator: Randomness | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.forward_number = FLOAT32 if forward is None else parse_format(forward)
        self.backward_number = FLOAT32 if backward is None else parse_format(backward)
        self.forward_rounding = check_rounding(forward_rounding)
        self.backward_rounding = check_rounding(backward_rounding)
        self.clamping_grad_zero = clamping_grad_zero
        self.generator = generator
        self.forward_counters: Counters | None = None
        self.backward_counters: Counters | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded; its gradient will be rounded too."""
        result: Tensor = _Both.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """Formats and roundings."""
        return (
            f"forward={self.forward_number} {self.forward_rounding}, "
            f"backward={self.backward_number} {self.backward_rounding}"
            + (", clamping_grad_zero" if self.clamping_grad_zero else "")
        )


class _Both(torch.autograd.Function):
    """Rounds on both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Quantizer) -> Tensor:
        ctx.module = module
        number = module.forward_number
        if module.clamping_grad_zero and number != FLOAT32:
            ctx.save_for_backward((x < number.lowest) | (x > number.highest))
        return quantize(x, number, module.forward_rounding, module.generator, counters=module.forward_counters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        module: Quantizer = ctx.module
        gradient = gradients[0]
        if ctx.saved_tensors:
            gradient = gradient.masked_fill(ctx.saved_tensors[0], 0.0)
        number, counters = module.backward_number, module.backward_counters
        return quantize(gradient, number, module.backward_rounding, module.generator, counters=counters), None
