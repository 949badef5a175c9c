"""Runs one direction of a convolution the way a network will: through the layer, its operator and autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from windlass.layers import Conv2d
from windlass.plan.convolution import ConvChoice, Direction
from windlass.tuning.cost import Layout
from windlass.tuning.results import ConvCase

MEMORY_FORMATS: dict[Layout, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


class CaseRunner:
    """Tensors and weights of one case, made once for all algorithms."""

    def __init__(self, case: ConvCase) -> None:
        shape = case.shape
        self.case = case
        images, weights = MEMORY_FORMATS[case.layout], MEMORY_FORMATS[case.weight_layout]
        results = torch.channels_last if torch.channels_last in (images, weights) else images  # PyTorch's rule
        random = torch.Generator().manual_seed(0)
        outputs = (shape.batch, shape.out_channels, shape.out_height, shape.out_width)
        self._x = torch.randn((shape.batch, shape.in_channels, shape.height, shape.width), generator=random).contiguous(
            memory_format=images
        )
        self._dy = torch.randn(outputs, generator=random).contiguous(memory_format=results)
        with torch.random.fork_rng(devices=[]):
            self._conv = plain_conv(case)
        self._conv.to(memory_format=weights)  # type: ignore[call-overload]

    def runner(self, algorithm: str, direction: Direction) -> Callable[[], object]:
        """One call of `direction` by `algorithm`; ``torch`` is PyTorch's own layer."""
        layer = self._layer(algorithm, direction)
        if direction == "forward":
            return self._forward(layer)
        x = self._x.detach().requires_grad_(direction == "input")
        targets = [x] if direction == "input" else list(layer.parameters())
        for parameter in layer.parameters():
            parameter.requires_grad_(direction == "weight")
        y = layer(x)
        return lambda: torch.autograd.grad(y, targets, self._dy, retain_graph=True)

    def result(self, algorithm: str, direction: Direction) -> Tensor:
        """What `direction` computes by `algorithm`; of the weights' and the bias's gradients, the former."""
        found = self.runner(algorithm, direction)()
        return found if isinstance(found, Tensor) else found[0]  # type: ignore[index]

    def reference(self, direction: Direction) -> Tensor:
        """The same in float64, by PyTorch."""
        layer = self._layer("torch", direction).double()
        x = self._x.detach().double().requires_grad_()
        y: Tensor = layer(x)
        if direction == "forward":
            return y.detach()
        return torch.autograd.grad(y, x if direction == "input" else layer.weight, self._dy.double())[0]

    def tensors(self, direction: Direction) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Input, weights, bias and the output's gradient, for another library; what `direction` asks for wants one."""
        layer = self._layer("torch", direction)
        x = self._x.detach().requires_grad_(direction == "input")
        for parameter in layer.parameters():
            parameter.requires_grad_(direction == "weight")
        return x, layer.weight, layer.bias, self._dy

    def _forward(self, layer: nn.Conv2d) -> Callable[[], object]:
        x = self._x.detach().requires_grad_(self.case.is_training and "input" in self.case.directions)
        for parameter in layer.parameters():
            parameter.requires_grad_(self.case.is_training)
        if self.case.is_training:
            return lambda: layer(x)

        def infer() -> Tensor:
            with torch.inference_mode():
                found: Tensor = layer(x)
            return found

        return infer

    def _layer(self, algorithm: str, direction: Direction) -> nn.Conv2d:
        # A copy each: whether a parameter wants a gradient is set per runner.
        with torch.random.fork_rng(devices=[]):
            conv = plain_conv(self.case)
        conv.weight = nn.Parameter(self._conv.weight.detach().clone(memory_format=torch.preserve_format))
        if self._conv.bias is not None:
            conv.bias = nn.Parameter(self._conv.bias.detach().clone())
        if algorithm == "torch":
            return conv
        return Conv2d.from_torch(conv, algorithm=str(ConvChoice(**{direction: algorithm})))


def plain_conv(case: ConvCase) -> nn.Conv2d:
    """PyTorch's layer for a case with symmetric padding; other padding is added to no side."""
    shape = case.shape
    top, _, left, _ = shape.padding
    return nn.Conv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel,
        stride=shape.stride,
        padding=(top, left) if shape.padding == (top, top, left, left) else "same",
        dilation=shape.dilation,
        groups=shape.groups,
        bias=case.bias,
    )
