"""Shapes of convolutions, domains of algorithms and the table of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from windlass.errors import ConfigError
from windlass.plan.convolution import CONV_ALGORITHMS, ConvChoice, ConvShape, candidates


def shape(**changes: Any) -> ConvShape:
    sizes: dict[str, Any] = {
        "batch": 2, "in_channels": 32, "height": 14, "width": 15, "out_channels": 64, "kernel": (3, 3),
        "padding": (1, 1, 1, 1),
    }  # fmt: skip
    return ConvShape(**{**sizes, **changes})


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_output_sizes_are_pytorch_s(kernel: Any, stride: Any, dilation: Any) -> None:
    ours = shape(kernel=kernel, stride=stride, dilation=dilation, padding=(1, 1, 2, 2))
    y = torch.nn.functional.conv2d(
        torch.empty(2, 32, 14, 15), torch.empty(64, 32, *kernel), stride=stride, dilation=dilation, padding=(1, 2)
    )
    assert (ours.out_height, ours.out_width) == y.shape[2:]
    assert ours.macs == y.numel() * 32 * kernel[0] * kernel[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": -1}, "batch: needs at least 0, got -1"),
        ({"in_channels": 0}, "in_channels: needs at least 1, got 0"),
        ({"stride": (0, 1)}, "stride: needs at least 1, got"),
        ({"padding": (0, -1, 0, 0)}, "padding: needs at least 0"),
        ({"groups": 3}, "3 groups do not divide 32 input channels and 64 output channels"),
        ({"kernel": (20, 3)}, "the filter covers 20x3 pixels, the padded input has 16x17"),
    ],
)
def test_what_is_no_convolution_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shape(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("winograd-4x4", {"stride": (2, 2)}, "needs stride 1, got 2"),
        ("winograd-4x4", {"dilation": (2, 2)}, "needs dilation 1, got 2"),
        ("winograd-4x4", {"kernel": (3, 5)}, "needs a square filter, got 3x5"),
        ("winograd-4x4", {"kernel": (7, 7)}, r"needs m \+ r - 1 <= 8, got m = 4 and r = 7"),
        ("winograd-2x2", {"kernel": (1, 1)}, "needs filters with sides from 2 to 7, got 1x1"),
        ("winograd-2x2", {"groups": 32}, "does not take depthwise convolutions"),
        ("fft-16", {"kernel": (3, 3)}, "needs filters with sides from 5, got 3x3"),
        ("fft-16", {"kernel": (7, 7), "groups": 32}, "takes depthwise convolutions from side 15, got 7x7"),
        ("fft-16", {"kernel": (5, 5), "dilation": (4, 4), "height": 40, "width": 40}, "a filter smaller than its tile"),
    ],
)
def test_each_algorithm_says_what_it_would_need(name: str, changes: dict[str, Any], said: str) -> None:
    refusal = CONV_ALGORITHMS[name].refusal(shape(**changes))
    assert refusal is not None
    assert re.search(said, refusal)


def test_accuracies_are_nested_and_exact_is_pytorch_alone() -> None:
    names = {
        accuracy: {algorithm.name for algorithm in candidates(shape(), accuracy=accuracy)}
        for accuracy in ("exact", "strict", "standard", "fast")
    }
    assert names["exact"] == {"torch"}
    assert names["exact"] < names["strict"] < names["standard"] < names["fast"]
    assert "winograd-4x4" in names["standard"] - names["strict"]
    assert "winograd-6x6" in names["fast"] - names["standard"]
    with pytest.raises(ConfigError, match="unknown accuracy 'exakt'; did you mean 'exact'"):
        candidates(shape(), accuracy="exakt")


def test_choices_are_read_and_spelled() -> None:
    assert str(ConvChoice.parse("direct/torch/im2col")) == "direct/torch/im2col"
    assert ConvChoice.parse("direct").of("weight") == "direct"
    with pytest.raises(ConfigError, match="unknown convolution algorithm 'winograd-4x5'; did you mean"):
        ConvChoice.parse("winograd-4x5")
    with pytest.raises(ConfigError, match="needs one name, or three"):
        ConvChoice.parse("direct/torch")


def test_a_shape_reads_as_one_line() -> None:
    assert str(shape(stride=(2, 2), groups=2)) == "2x32x14x15 -> 64, 3x3, stride 2, pad 1, 2 groups"
