"""Layers of Coates et al.'s sparse autoencoder: untied receptive fields, L2 pooling, contrast normalisation.

Sources: A. Coates et al., "Deep learning with COTS HPC systems", ICML 2013 (the network, and untied filters as
dense blocks); Q. Le et al., "Building high-level features using large scale unsupervised learning", ICML 2012
(the three layers of a stage); K. Jarrett et al., "What is the best multi-stage architecture for object
recognition?", ICCV 2009, section 2.1 (local contrast normalisation).

Every position of an untied layer has filters of its own, so its weight matrix is sparse.  Neurons that share a
receptive field are the maps at one position: there the matrix has one dense block, (maps, field elements).  The
layer is then one batched product over positions, ``Y[p] = W[p] X[p]`` with the field's elements of all samples in
the columns of X[p].

All sizes are read at the call: a module whose weight is ``weight[r0:r1, c0:c1]`` computes those output rows and
columns from the input rows and columns that they see, and a copy with ``padding = (0, 0)`` takes an input that is
padded already.  This is how a network is cut into spatial tiles.  Padding is with zeros everywhere.

Legend: N samples, C channels, H rows and W columns of the input; P rows and Q columns of positions, K maps there;
R, S rows and columns of a receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.errors import ConfigError, unknown

Pair = tuple[int, int]


def pair(value: int | Pair) -> Pair:
    """Rows and columns from one number for both, or from both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def num_positions(length: int, *, kernel: int, stride: int, padding: int) -> int:
    """How many windows fit along one dimension.

    >>> num_positions(16, kernel=8, stride=2, padding=0)
    5
    """
    return max(0, (length + 2 * padding - kernel) // stride + 1)


class LocallyConnected2d(nn.Module):
    """Filters that every position of the output has for itself: a convolution without shared weights, without bias.

    Args:
        in_channels: C.
        out_channels: maps K.
        kernel_size: rows and columns of a receptive field.
        input_size: rows and columns (H, W) of the images.
        stride: step from field to field.
        padding: zeros around the images.
        reconstruct: the output has one map more, the last: how badly the tied decoder gives back each receptive
            field, ``|W[p]ᵀ W[p] x[p] - x[p]|²`` (reconstruction ICA, Le et al., NIPS 2011).  A field's error needs
            nothing of its neighbours, so tiles need no exchange for it.

    Attributes:
        weight: (P, Q, K, C·R·S).

    Raises:
        ConfigError: the receptive field is larger than the image.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        input_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        reconstruct: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = pair(kernel_size), pair(stride), pair(padding)
        self.reconstruct = reconstruct
        positions = _positions(self, pair(input_size))
        if 0 in positions:
            raise ConfigError(
                f"a receptive field of {_times(self.kernel_size)} does not fit into images of "
                f"{_times(pair(input_size))} with padding {_times(self.padding)}"
            )
        features = in_channels * math.prod(self.kernel_size)
        self.weight = nn.Parameter(torch.empty(*positions, out_channels, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Filters of unit norm in random directions, as Coates et al. keep theirs."""
        with torch.no_grad():
            self.weight.normal_()
            self.weight.div_(self.weight.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K, P, Q), or (N, K + 1, P, Q) with the reconstruction's error.

        Raises:
            ConfigError: the weight is for another size of input.
        """
        fields = self.fields(x_NCHW)
        blocks = self.weight.flatten(0, 1)
        maps = torch.bmm(blocks, fields)
        if self.reconstruct:
            given_back = torch.bmm(blocks.mT, maps)
            error = (given_back - fields).square().sum(1, keepdim=True)
            maps = torch.cat((maps, error), 1)
        return maps.view(*self.weight.shape[:2], *maps.shape[1:]).permute(3, 2, 0, 1)

    def fields(self, x_NCHW: Tensor) -> Tensor:
        """Every position's receptive field of every sample: (P·Q, C·R·S, N)."""
        height, width = x_NCHW.shape[2:]
        positions, needed = _positions(self, (height, width)), tuple(self.weight.shape[:2])
        channels, features = x_NCHW.shape[1], self.weight.shape[3]
        if positions != needed or channels * math.prod(self.kernel_size) != features:
            raise ConfigError(
                f"locally connected filters of {_times(self.kernel_size)} for {_times(needed)} positions and "
                f"{features // math.prod(self.kernel_size)} channels got an input of shape {tuple(x_NCHW.shape)}, "
                f"which has {_times(positions)} positions and {channels} channels"
            )
        if 0 in needed:  # a tile without positions: no field, but a derivative of zeros
            return x_NCHW.reshape(-1)[:0].view(0, features, len(x_NCHW))
        rows, columns = self.padding
        x = functional.pad(x_NCHW, (columns, columns, rows, rows)) if rows or columns else x_NCHW
        windows = x.unfold(2, self.kernel_size[0], self.stride[0]).unfold(3, self.kernel_size[1], self.stride[1])
        return windows.permute(2, 3, 1, 4, 5, 0).reshape(math.prod(needed), features, len(x))

    def decode(self, maps_NKPQ: Tensor, size: int | Pair) -> Tensor:
        """The tied decoder: images (N, C, H, W) of `size`, each receptive field ``Wᵀ y`` added where it lies.

        It is the transpose of `forward` without reconstruction: ⟨W x, y⟩ = ⟨x, Wᵀ y⟩.
        """
        blocks = self.weight.flatten(0, 1)
        fields = torch.bmm(blocks.mT, maps_NKPQ.permute(2, 3, 1, 0).flatten(0, 1))
        return functional.fold(
            fields.permute(2, 1, 0), pair(size), self.kernel_size, padding=self.padding, stride=self.stride
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        rows, columns = self.weight.shape[:2]
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, positions=({rows}, {columns}), reconstruct={self.reconstruct}"
        )


class L2Pool2d(nn.Module):
    """The square root of the sum of squares over a window of `maps` adjacent maps and of neighbouring positions.

    Args:
        kernel_size: rows and columns of the window.
        stride: step from window to window; the window's size unless given.
        padding: zeros around the maps.
        maps: adjacent maps that are pooled together; the groups do not overlap.
        eps: added to the sum, so that the derivative is finite at 0.
    """

    def __init__(
        self,
        kernel_size: int | Pair,
        *,
        stride: int | Pair | None = None,
        padding: int | Pair = 0,
        maps: int = 1,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding = pair(kernel_size), pair(padding)
        self.stride = pair(kernel_size if stride is None else stride)
        self.maps, self.eps = maps, eps

    def forward(self, x_NKPQ: Tensor) -> Tensor:
        """Pooled maps (N, K / maps, …).

        Raises:
            ConfigError: `maps` does not divide K.
        """
        if x_NKPQ.shape[1] % self.maps:
            raise ConfigError(f"L2 pooling of {self.maps} adjacent maps cannot take {x_NKPQ.shape[1]} maps")
        squares = x_NKPQ.square()
        if self.maps > 1:
            samples, maps, *sides = squares.shape
            squares = squares.view(samples, maps // self.maps, self.maps, *sides).sum(2)
        sums = functional.avg_pool2d(squares, self.kernel_size, self.stride, self.padding, divisor_override=1)
        return (sums + self.eps).sqrt()

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, maps={self.maps}"


class _WindowNorm2d(nn.Module):
    """What both halves of contrast normalisation share: a weighted mean over all maps and a window around."""

    stride: Pair = (1, 1)

    def __init__(self, kernel_size: int, *, window: str = "gaussian") -> None:
        super().__init__()
        if window not in WINDOWS:
            raise ConfigError(unknown("window", window, WINDOWS))
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"a window around a position has an odd number of rows, got {kernel_size}")
        self.kernel_size, self.padding, self.window = pair(kernel_size), pair(kernel_size // 2), window

    def mean(self, x_NKPQ: Tensor) -> Tensor:
        """The weighted mean (N, 1, P, Q): weights of window and maps add up to 1, beyond the border lie zeros."""
        mean = x_NKPQ.mean(1, keepdim=True)
        for dim, shape in enumerate(((1, 1, -1, 1), (1, 1, 1, -1))):
            weights = WINDOWS[self.window](self.kernel_size[dim], mean)
            padding = (self.padding[0], 0) if dim == 0 else (0, self.padding[1])
            mean = functional.conv2d(mean, weights.view(shape), padding=padding)
        return mean

    def centre(self, x_NKPQ: Tensor) -> Tensor:
        """The part of the input that has an output: all of it, unless it came padded."""
        lost = [(k - 1) // 2 - p for k, p in zip(self.kernel_size, self.padding, strict=True)]
        height, width = x_NKPQ.shape[2:]
        return x_NKPQ[:, :, lost[0] : height - lost[0], lost[1] : width - lost[1]]

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"kernel_size={self.kernel_size}, padding={self.padding}, window={self.window!r}"


class SubtractiveNorm2d(_WindowNorm2d):
    """``v = x - Σ w x``: what a position is more than its neighbourhood (Jarrett et al. 2009)."""

    def forward(self, x_NKPQ: Tensor) -> Tensor:
        """Maps of the same shape."""
        return self.centre(x_NKPQ) - self.mean(x_NKPQ)


class DivisiveNorm2d(_WindowNorm2d):
    """``v / max(floor, (Σ w v²)^½)``: contrast made equal, but not that of almost empty places.

    Args:
        kernel_size: rows and columns of the window, odd.
        window: a key of `WINDOWS`.
        floor: the smallest divisor.  Jarrett et al. take the mean over the image; a constant needs no sum over it.
    """

    def __init__(self, kernel_size: int, *, window: str = "gaussian", floor: float = 0.01) -> None:
        super().__init__(kernel_size, window=window)
        if not floor > 0:
            raise ConfigError(f"the smallest divisor must be above 0, got {floor}")
        self.floor = floor

    def forward(self, x_NKPQ: Tensor) -> Tensor:
        """Maps of the same shape."""
        power = self.mean(x_NKPQ.square()).clamp_min(self.floor**2)
        return self.centre(x_NKPQ) / power.sqrt()


class LocalContrastNorm2d(nn.Sequential):
    """Local contrast normalisation: first subtractive, then divisive, with one window (Jarrett et al. 2009).

    Args:
        kernel_size: rows and columns of the window, odd.
        window: a key of `WINDOWS`.
        floor: the smallest divisor.
    """

    def __init__(self, kernel_size: int, *, window: str = "gaussian", floor: float = 0.01) -> None:
        super().__init__()
        self.subtract = SubtractiveNorm2d(kernel_size, window=window)
        self.divide = DivisiveNorm2d(kernel_size, window=window, floor=floor)


class Channels(nn.Module):
    """The maps `start` to `stop` of its input, as a view."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x_NKPQ: Tensor) -> Tensor:
        """(N, stop - start, …)."""
        return x_NKPQ[:, self.start : self.stop]

    def extra_repr(self) -> str:
        """Which, for ``print(module)``."""
        return f"{self.start}, {self.stop}"


class StopGradient(nn.Module):
    """Its input, of which no derivative is taken."""

    def forward(self, x: Tensor) -> Tensor:
        """The input, detached."""
        return x.detach()


def gaussian(length: int, like: Tensor) -> Tensor:
    """Weights of a window along one dimension, sum 1; two standard deviations reach to its ends."""
    deviation = max((length - 1) / 4, 1e-6)
    offsets = torch.arange(length, dtype=like.dtype, device=like.device) - (length - 1) / 2
    weights = torch.exp(-0.5 * (offsets / deviation).square())
    return weights / weights.sum()


def box(length: int, like: Tensor) -> Tensor:
    """Equal weights, sum 1."""
    return torch.full((length,), 1 / length, dtype=like.dtype, device=like.device)


WINDOWS: dict[str, Callable[[int, Tensor], Tensor]] = {"gaussian": gaussian, "box": box}
"""Windows of contrast normalisation; in two dimensions, the product of one along each."""


def _positions(layer: LocallyConnected2d, size: Pair) -> Pair:
    rows, columns = (
        num_positions(length, kernel=kernel, stride=stride, padding=padding)
        for length, kernel, stride, padding in zip(size, layer.kernel_size, layer.stride, layer.padding, strict=True)
    )
    return rows, columns


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))
