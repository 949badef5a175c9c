"""What a convolution is, and what each algorithm for it can do: shapes, directions, domains and accuracy.

An algorithm states its domain and its error as data.  The chooser asks these tables, the kernels implement
them (`windlass.kernels.convolve`), tests and benchmarks loop over them.

Legend: N batch, C input channels, H × W input, K output channels, R × S filter, P × Q output, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from windlass.errors import ConfigError, unknown

Direction = Literal["forward", "input", "weight"]
"""The convolution itself, the gradient of its input, the gradient of its weights."""

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvShape:
    """All sizes of one 2-D convolution (cross-correlation, as PyTorch has it).

    Attributes:
        batch, in_channels, height, width: N, C, H, W of the input.
        out_channels: K.
        kernel: (R, S).
        stride, dilation: vertical, horizontal.
        padding: zeros at (top, bottom, left, right).
        groups: G; divides C and K.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        """Refuses what is not a convolution, saying what is needed and what came."""
        for name, lowest in (("batch", 0), ("in_channels", 1), ("out_channels", 1), ("groups", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"convolution: {name}: needs at least {lowest}, got {getattr(self, name)}")
        for name, lowest in (("kernel", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
            if min(getattr(self, name)) < lowest:
                raise ConfigError(f"convolution: {name}: needs at least {lowest}, got {getattr(self, name)}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ConfigError(
                f"convolution: {self.groups} groups do not divide {self.in_channels} input channels "
                f"and {self.out_channels} output channels"
            )
        if self.out_height < 1 or self.out_width < 1:
            top, bottom, left, right = self.padding
            extent = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
            raise ConfigError(
                f"convolution: the filter covers {extent[0]}x{extent[1]} pixels, the padded input has "
                f"{self.height + top + bottom}x{self.width + left + right}"
            )

    @property
    def out_height(self) -> int:
        """P, the output's height."""
        extent = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.height + self.padding[0] + self.padding[1] - extent) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Q, the output's width."""
        extent = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.width + self.padding[2] + self.padding[3] - extent) // self.stride[1] + 1

    @property
    def group_in(self) -> int:
        """Input channels of a group, C / G."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of a group, K / G."""
        return self.out_channels // self.groups

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel sees one input channel, and there are several of them."""
        return self.groups > 1 and self.group_in == 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the definition, those with padding included; the same in all three directions."""
        taps = self.kernel[0] * self.kernel[1]
        return self.batch * self.out_height * self.out_width * self.out_channels * self.group_in * taps

    @property
    def num_weights(self) -> int:
        """Numbers in the weights, K × C/G × R × S."""
        return self.out_channels * self.group_in * self.kernel[0] * self.kernel[1]

    def __str__(self) -> str:
        """One line for a person, e.g. ``8x64x224x224 -> 64, 3x3, pad 1``."""
        text = f"{self.batch}x{self.in_channels}x{self.height}x{self.width} -> {self.out_channels}, "
        text += f"{self.kernel[0]}x{self.kernel[1]}"
        if self.stride != (1, 1):
            text += f", stride {_short(self.stride)}"
        if any(self.padding):
            text += f", pad {_short(self.padding)}"
        if self.dilation != (1, 1):
            text += f", dilation {_short(self.dilation)}"
        return text + (f", {self.groups} groups" if self.groups > 1 else "")


def _short(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Where an algorithm can be used.

    Attributes:
        min_kernel, max_kernel: bounds of the filter's sides.
        square: whether the filter must be square.
        unit_stride, unit_dilation: whether only stride 1, only dilation 1.
        min_depthwise_kernel: the smallest side from which depthwise convolutions are taken; 0: never.
    """

    min_kernel: int = 1
    max_kernel: int | None = None
    square: bool = False
    unit_stride: bool = False
    unit_dilation: bool = False
    min_depthwise_kernel: int = 1

    def refusal(self, shape: ConvShape) -> str | None:
        """What the algorithm would need instead, or None where it can be used."""
        low, high = min(shape.kernel), max(shape.kernel)
        spelled = f"{shape.kernel[0]}x{shape.kernel[1]}"
        if self.square and low != high:
            return f"needs a square filter, got {spelled}"
        if low < self.min_kernel or (self.max_kernel is not None and high > self.max_kernel):
            bounds = f"from {self.min_kernel}" + (f" to {self.max_kernel}" if self.max_kernel else "")
            return f"needs filters with sides {bounds}, got {spelled}"
        if self.unit_stride and shape.stride != (1, 1):
            return f"needs stride 1, got {_short(shape.stride)}"
        if self.unit_dilation and shape.dilation != (1, 1):
            return f"needs dilation 1, got {_short(shape.dilation)}"
        if shape.is_depthwise and not self.min_depthwise_kernel:
            return "does not take depthwise convolutions"
        if shape.is_depthwise and low < self.min_depthwise_kernel:
            return f"takes depthwise convolutions from side {self.min_depthwise_kernel}, got {spelled}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvAlgorithm:
    """One algorithm: its name, family, domain and accuracy.

    Attributes:
        name: as in plans and on the command line.
        family: torch, direct, im2col, winograd or fft.
        domain: where it can be used.
        tile: m of Winograd's F(m×m, r×r), or N of the Fourier tile; 0 for the others.
    """

    name: str
    family: str
    domain: Domain
    tile: int = 0

    def error_factor(self, shape: ConvShape) -> float:
        """How many times direct convolution's relative error to expect (docs/convolution.md, Accuracy)."""
        if self.family == "winograd":
            return WINOGRAD_ERRORS[self.tile + shape.kernel[0] - 1]
        return 1.3 if self.family == "fft" else 1.0

    def refusal(self, shape: ConvShape) -> str | None:
        """Why the algorithm cannot compute `shape`, or None."""
        if self.family == "winograd" and self.tile + max(shape.kernel) - 1 > MAX_WINOGRAD_TILE:
            return f"needs m + r - 1 <= {MAX_WINOGRAD_TILE}, got m = {self.tile} and r = {max(shape.kernel)}"
        if self.family == "fft":
            extent = max(d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel, strict=True))
            if extent >= self.tile:
                return f"needs a filter smaller than its tile of {self.tile}, got {extent}"
        return self.domain.refusal(shape)


MAX_WINOGRAD_TILE = 8
"""Largest m + r - 1: with more interpolation points float32 is not accurate enough."""

WINOGRAD_ERRORS: dict[int, float] = {3: 1.8, 4: 1.8, 5: 3.0, 6: 5.0, 7: 12.0, 8: 21.0}
"""Error against direct convolution's by m + r - 1, at 512 channels."""

ACCURACIES: dict[str, float] = {"exact": 0.0, "strict": 2.0, "standard": 8.0, "fast": 25.0}
"""The largest `error_factor` that each accuracy allows; "exact" leaves PyTorch's own kernels alone."""

Accuracy = Literal["exact", "strict", "standard", "fast"]

_WINOGRAD = Domain(
    min_kernel=2, max_kernel=7, square=True, unit_stride=True, unit_dilation=True, min_depthwise_kernel=0
)
_FFT = Domain(min_kernel=5, min_depthwise_kernel=15, unit_stride=True)

CONV_ALGORITHMS: dict[str, ConvAlgorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        ConvAlgorithm(name="torch", family="torch", domain=Domain()),
        ConvAlgorithm(name="direct", family="direct", domain=Domain()),
        ConvAlgorithm(name="im2col", family="im2col", domain=Domain()),
        ConvAlgorithm(name="winograd-2x2", family="winograd", domain=_WINOGRAD, tile=2),
        ConvAlgorithm(name="winograd-4x4", family="winograd", domain=_WINOGRAD, tile=4),
        ConvAlgorithm(name="winograd-6x6", family="winograd", domain=_WINOGRAD, tile=6),
        ConvAlgorithm(name="fft-16", family="fft", domain=_FFT, tile=16),
        ConvAlgorithm(name="fft-32", family="fft", domain=_FFT, tile=32),
        ConvAlgorithm(name="fft-64", family="fft", domain=_FFT, tile=64),
    )
}
"""Every algorithm by name."""


def candidates(shape: ConvShape, *, accuracy: str = "standard") -> tuple[ConvAlgorithm, ...]:
    """The algorithms that can compute `shape` at this accuracy; PyTorch's own is always among them.

    >>> shape = ConvShape(batch=1, in_channels=64, height=8, width=8, out_channels=64, kernel=(3, 3))
    >>> [algorithm.name for algorithm in candidates(shape)]
    ['torch', 'direct', 'im2col', 'winograd-2x2', 'winograd-4x4']

    Raises:
        ConfigError: there is no such accuracy.
    """
    if accuracy not in ACCURACIES:
        raise ConfigError(unknown("accuracy", accuracy, ACCURACIES))
    limit = ACCURACIES[accuracy]
    return tuple(
        algorithm
        for algorithm in CONV_ALGORITHMS.values()
        if algorithm.family == "torch" or (algorithm.refusal(shape) is None and algorithm.error_factor(shape) <= limit)
    )


@dataclass(frozen=True, slots=True)
class ConvChoice:
    """The algorithm of each direction of one convolution.

    >>> str(ConvChoice("winograd-4x4", "winograd-4x4", "torch"))
    'winograd-4x4/winograd-4x4/torch'
    >>> ConvChoice.parse("direct") == ConvChoice("direct", "direct", "direct")
    True
    """

    forward: str = "torch"
    input: str = "torch"
    weight: str = "torch"

    @classmethod
    def parse(cls, text: str) -> ConvChoice:
        """Reads ``NAME`` (the same in all directions) or ``FORWARD/INPUT/WEIGHT``.

        Raises:
            ConfigError: there is no such algorithm.
        """
        names = text.split("/")
        for name in names:
            if name not in CONV_ALGORITHMS:
                raise ConfigError(unknown("convolution algorithm", name, CONV_ALGORITHMS))
        if len(names) not in (1, 3):
            raise ConfigError(f"convolution algorithm {text!r}: needs one name, or three for forward/input/weight")
        return cls(*names) if len(names) == 3 else cls(names[0], names[0], names[0])

    def of(self, direction: Direction) -> str:
        """The algorithm of one direction."""
        return str(getattr(self, direction))

    def __str__(self) -> str:
        """One name where all directions agree."""
        names = (self.forward, self.input, self.weight)
        return names[0] if len(set(names)) == 1 else "/".join(names)
