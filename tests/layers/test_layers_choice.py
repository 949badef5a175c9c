"""How a text becomes algorithms: families, the rule of thumb, the chooser's hook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from windlass.errors import ConfigError
from windlass.layers import Conv2d, Layout, choice_for, conv2d, resolve, set_chooser
from windlass.layers.choice import rule_of_thumb
from windlass.layers.operators import CONV2D
from windlass.plan.convolution import CONV_ALGORITHMS, ConvChoice, ConvShape


def shape(**changes: Any) -> ConvShape:
    sizes: dict[str, Any] = {
        "batch": 1, "in_channels": 32, "height": 32, "width": 32, "out_channels": 32, "kernel": (3, 3),
        "padding": (1, 1, 1, 1),
    }  # fmt: skip
    return ConvShape(**(sizes | changes))


class Recorder:
    """A chooser that says `choice` and remembers what it was asked."""

    def __init__(self, choice: ConvChoice) -> None:
        self.choice = choice
        self.asked: list[tuple[ConvShape, Layout, bool]] = []

    def __call__(self, shape: ConvShape, *, layout: Layout, grad: bool) -> ConvChoice:
        self.asked.append((shape, layout, grad))
        return self.choice


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    chooser = Recorder(ConvChoice.parse("direct"))
    set_chooser(chooser)
    yield chooser
    set_chooser(None)


class TestRuleOfThumb:
    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            ({}, "winograd-4x4"),  # 64 tiles of 4x4 in 32x32 pixels
            ({"height": 28}, "torch"),  # 56 tiles
            ({"height": 28, "batch": 2}, "winograd-4x4"),
            ({"in_channels": 31}, "torch"),
            ({"out_channels": 31}, "torch"),
            ({"groups": 2}, "torch"),  # 16 channels in a group
            ({"groups": 2, "in_channels": 64, "out_channels": 64}, "winograd-4x4"),
            ({"stride": (2, 2), "height": 128, "width": 128}, "torch"),
            ({"dilation": (2, 2), "padding": (2, 2, 2, 2)}, "torch"),
            ({"kernel": (1, 1)}, "torch"),
            ({"kernel": (5, 5)}, "torch"),
            ({"kernel": (7, 7)}, "fft-16"),
            ({"kernel": (7, 9)}, "fft-32"),
            ({"kernel": (5, 9)}, "torch"),
            ({"kernel": (7, 7), "in_channels": 3}, "torch"),
            ({"kernel": (7, 7), "stride": (2, 2)}, "torch"),
            ({"kernel": (17, 17)}, "fft-64"),
            ({"kernel": (65, 65), "height": 80, "width": 80}, "torch"),
            ({"kernel": (15, 15), "groups": 32}, "fft-32"),
            ({"kernel": (13, 13), "groups": 32}, "torch"),
        ],
    )
    def test_thresholds(self, changes: dict[str, Any], name: str) -> None:
        assert rule_of_thumb(shape(**changes)) == ConvChoice.parse(name)
        assert choice_for(shape(**changes)) == ConvChoice.parse(name)


class TestFamilies:
    @pytest.mark.parametrize(
        ("text", "kernel", "name"),
        [
            ("winograd", (2, 2), "winograd-4x4"),
            ("winograd", (3, 3), "winograd-4x4"),
            ("winograd", (4, 4), "winograd-2x2"),  # F(4x4, 4x4) loses a factor 12, over the 8 of standard accuracy
            ("winograd", (5, 5), "winograd-2x2"),
            ("fft", (5, 5), "fft-16"),
            ("fft", (8, 8), "fft-16"),
            ("fft", (9, 5), "fft-32"),
            ("fft", (16, 16), "fft-32"),
            ("fft", (17, 17), "fft-64"),
        ],
    )
    def test_members(self, text: str, kernel: tuple[int, int], name: str) -> None:
        assert resolve(text, shape(kernel=kernel)) == ConvChoice.parse(name)

    def test_dilation_counts_in_the_extent(self) -> None:
        assert str(resolve("fft", shape(kernel=(5, 5), dilation=(2, 2)))) == "fft-32"

    def test_in_one_direction(self) -> None:
        assert resolve("winograd/torch/fft", shape(kernel=(5, 5))) == ConvChoice("winograd-2x2", "torch", "fft-16")

    @pytest.mark.parametrize("name", [*CONV_ALGORITHMS])
    def test_names_stand_for_themselves(self, name: str) -> None:
        kernel = (5, 5) if CONV_ALGORITHMS[name].family == "fft" else (3, 3)
        assert str(resolve(name, shape(kernel=kernel))) == name


class TestChooser:
    def test_is_asked_once_for_each_size(self, recorder: Recorder) -> None:
        x, w = torch.randn(2, 3, 5, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
        for _ in range(3):
            assert type(conv2d(x, w, padding=(1, 0)).grad_fn).__name__ == "_Conv2dBackward"
        with torch.no_grad():
            conv2d(x.contiguous(memory_format=torch.channels_last), w, padding=(1, 0))
        asked = ConvShape(
            batch=2, in_channels=3, height=5, width=6, out_channels=4, kernel=(3, 3), padding=(1, 1, 0, 0)
        )
        assert recorder.asked == [(asked, "contiguous", True), (asked, "channels_last", False)]

    def test_is_forgotten(self, recorder: Recorder) -> None:
        x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
        conv2d(x, w)
        set_chooser(None)
        assert type(conv2d(x, w).grad_fn).__name__ == "ConvolutionBackward0"
        assert len(recorder.asked) == 1

    def test_is_asked_by_layers(self, recorder: Recorder) -> None:
        layer = Conv2d(3, 4, 3)
        layer(torch.randn(1, 3, 5, 5))
        layer(torch.randn(2, 3, 5, 5))
        layer(torch.randn(1, 3, 5, 5))
        assert [shape.batch for shape, _, _ in recorder.asked] == [1, 2]

    def test_is_not_asked_for_named_algorithms_or_half_precision(self, recorder: Recorder) -> None:
        x, w = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
        conv2d(x, w, algorithm="im2col")
        conv2d(x.bfloat16(), w.bfloat16())
        leaves = x.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()
        y = CONV2D(*leaves, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "auto", False)
        torch.autograd.grad(y.sum(), leaves)
        assert not recorder.asked

    def test_is_asked_by_the_operators_for_each_direction(self, recorder: Recorder) -> None:
        """As in a graph that was traced before its sizes were known."""
        x, w = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
        y = CONV2D(x, w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "auto", False)
        torch.autograd.grad(y.sum(), (x, w))
        assert len(recorder.asked) == 3
        assert len(set(recorder.asked)) == 1

    def test_an_impossible_answer_is_refused(self, recorder: Recorder) -> None:
        recorder.choice = ConvChoice.parse("winograd-4x4")
        with pytest.raises(ConfigError, match="winograd-4x4: needs stride 1, got 2"):
            conv2d(torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), stride=2)

    def test_may_compute_while_tensors_are_fake(self) -> None:
        made = []

        def chooser(shape: ConvShape, *, layout: Layout, grad: bool) -> ConvChoice:
            made.append(type(torch.ones(2)))
            return ConvChoice.parse("direct")

        set_chooser(chooser)
        try:
            with FakeTensorMode():
                y = conv2d(torch.ones(1, 3, 5, 5), torch.ones(4, 3, 3, 3))
        finally:
            set_chooser(None)
        assert made == [torch.Tensor]
        assert tuple(y.shape) == (1, 4, 3, 3)
