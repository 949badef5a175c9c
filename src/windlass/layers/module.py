"""`torch.nn.Conv2d` by algorithm."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from windlass.errors import ConfigError
from windlass.layers.choice import AUTO, check_text
from windlass.layers.convolution import conv2d

ACTIVATIONS = (None, "relu")


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` whose convolution is computed by `algorithm`.

    Parameters, buffers, their names and their initial values are PyTorch's, so state dicts go both ways.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as `torch.nn.Conv2d`.
        algorithm: as `windlass.layers.conv2d`; "auto" is resolved for every size of input, and remembered.
        activation: "relu" returns max(y, 0), for less than a layer of its own would cost.

    Raises:
        ConfigError: there is no such algorithm or activation.  An algorithm that cannot compute the
            convolution is refused when the layer is called.
        ValueError: as `torch.nn.Conv2d`.

    >>> Conv2d(3, 8, 3, padding="same", algorithm="direct", activation="relu")
    Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=same, algorithm=direct, activation=relu)
    """

    algorithm: str
    activation: Literal["relu"] | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        algorithm: str = AUTO,
        activation: Literal["relu"] | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._set(algorithm, activation)

    @classmethod
    def from_torch(cls, conv: nn.Conv2d, *, algorithm: str = AUTO, activation: Literal["relu"] | None = None) -> Conv2d:
        """The layer `conv` by algorithm: same parameters (shared, not copied), hooks, training flag, attributes.

        Raises:
            TypeError: `conv` is of a class derived from `nn.Conv2d`, which may compute something else.
            ConfigError: there is no such algorithm or activation.
        """
        if type(conv) not in (nn.Conv2d, Conv2d):
            raise TypeError(f"needs a torch.nn.Conv2d itself, got {type(conv).__name__}")
        new = cls.__new__(cls)
        new.__dict__.update(conv.__dict__)
        # Parameters set in one of the two later are its own.  The hooks' tables stay shared, so that the
        # handles given out before still remove them.
        for table in ("_parameters", "_buffers", "_modules"):
            new.__dict__[table] = conv.__dict__[table].copy()
        new._set(algorithm, activation)
        return new

    def _set(self, algorithm: str, activation: Literal["relu"] | None) -> None:
        check_text(algorithm)
        if activation not in ACTIVATIONS:
            raise ConfigError(f"convolution: activation: needs None or 'relu', got {activation!r}")
        self.algorithm, self.activation = algorithm, activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, self.algorithm,
            relu=self.activation == "relu",
        )  # fmt: skip

    def extra_repr(self) -> str:
        """As PyTorch's, with the algorithm."""
        text = f"{super().extra_repr()}, algorithm={self.algorithm}"  # type: ignore[no-untyped-call]
        return text if self.activation is None else f"{text}, activation={self.activation}"
