"""`conv2d` against PyTorch's: PyTorch's own cases, errors, memory formats, dtypes and the fused maximum."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import windlass.functional
import windlass.layers
from windlass.errors import ConfigError
from windlass.kernels import convolve
from windlass.layers.aten import is_channels_last, memory_format
from windlass.plan.convolution import CONV_ALGORITHMS

U = 2.0**-24
"""float32's unit roundoff."""

# The tests pass lists of arguments, in which the type checker cannot tell tensors from numbers.
conv2d: Any = windlass.layers.conv2d
pytorch: Any = F.conv2d

# PyTorch warns where it has to copy the input for an uneven "same".
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same numbers, and one thread: on images this small threads only wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operator_case() -> Any:
    # PyTorch's test utilities import it; it is no part of PyTorch.
    pytest.importorskip("expecttest")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Fail to import hypothesis", ImportWarning)  # no part of PyTorch either
        from torch.testing._internal.common_methods_invocations import op_db

    return next(case for case in op_db if case.name == "nn.functional.conv2d")


def assert_close(ours: Tensor, theirs: Tensor, magnitude: Tensor, *, terms: int, factor: float = 1.0) -> None:
    """Two sums of `terms` products of floats, each in its own order.

    Every product and every addition rounds by at most U relative to the sum of absolute products, `magnitude`,
    so each result is off by at most `terms` · U · magnitude and the two differ by at most twice that.  Transforms
    lose `factor` times as much (windlass.plan.convolution); they mix neighbours, so the largest magnitude counts.
    """
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    if ours.numel():
        worst = (ours.detach().double() - theirs.detach().double()).abs().max().item()
        assert worst <= 2 * (terms + 1) * U * factor * magnitude.abs().max().item()


def gradients(function: Callable[..., Tensor], tensors: list[Tensor | None], grad: Tensor | None = None) -> Any:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return y, torch.autograd.grad(y, given, torch.ones_like(y) if grad is None else grad)


def compare(tensors: list[Tensor | None], arguments: dict[str, Any], algorithm: str, *, factor: float = 1.0) -> None:
    """Forward pass and all gradients of `conv2d` and of PyTorch's function."""
    with torch.no_grad():
        grad = torch.randn_like(pytorch(*tensors, **arguments))
    y, ours = gradients(lambda *t: conv2d(*t, **arguments, algorithm=algorithm), tensors, grad)
    want, theirs = gradients(lambda *t: pytorch(*t, **arguments), tensors, grad)
    absolute: list[Tensor | None] = [None if t is None else t.abs() for t in tensors]
    size, sizes = gradients(lambda *t: pytorch(*t, **arguments), absolute, grad.abs())
    weight = tensors[1]
    assert weight is not None
    assert y.stride() == want.stride()
    per_output = weight[0].numel() + 1
    per_weight = grad.numel() // weight.shape[0]
    per_input = weight.numel() // arguments.get("groups", 1)
    assert_close(y, want, size, terms=per_output, factor=factor)
    for mine, other, most, terms in zip(ours, theirs, sizes, (per_input, per_weight, per_weight), strict=False):
        assert_close(mine, other, most, terms=terms, factor=factor)


class TestPyTorchsOwnCases:
    @pytest.mark.parametrize("algorithm", ["auto", "direct", "im2col", "torch", "winograd", "fft"])
    def test_float32(self, algorithm: str) -> None:
        computed = 0
        for sample in operator_case().sample_inputs("cpu", torch.float32, requires_grad=False):
            tensors = [sample.input, *sample.args]
            try:
                compare(tensors, sample.kwargs, algorithm, factor=21.0 if algorithm == "winograd" else 1.3)
            except ConfigError as refusal:
                assert algorithm in ("winograd", "fft")
                assert "needs" in str(refusal) or "does not take" in str(refusal)
            else:
                computed += 1
        # Of the 30 samples one pair is a 3x3 convolution of stride 1 in one group; no filter is large.
        assert computed == {"winograd": 2, "fft": 0}.get(algorithm, 30)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int64])
    @pytest.mark.parametrize("algorithm", ["auto", "direct"])
    def test_what_falls_through_is_pytorchs_result(self, dtype: torch.dtype, algorithm: str) -> None:
        if dtype is torch.bfloat16 and algorithm != "auto":
            pytest.skip("is computed by Windlass")
        for sample in operator_case().sample_inputs("cpu", dtype, requires_grad=False):
            ours = conv2d(sample.input, *sample.args, **sample.kwargs, algorithm=algorithm)
            assert torch.equal(ours, pytorch(sample.input, *sample.args, **sample.kwargs))

    @pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd", "fft"])
    def test_errors(self, algorithm: str) -> None:
        seen = 0
        for error in operator_case().error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                conv2d(sample.input, *sample.args, **sample.kwargs, algorithm=algorithm)
            seen += 1
        assert seen >= 9


X, W, B = (2, 4, 8, 8), (4, 4, 3, 3), (4,)


def wrong_calls() -> Iterator[tuple[Any, ...]]:
    x, w, b = torch.ones(X), torch.ones(W), torch.ones(B)
    yield x, w, b[:2]
    yield x, w, b.reshape(4, 1)
    yield x, w, b.double()
    yield x, w.double(), b
    yield x[:, :3], w, b
    yield x[0, 0], w
    yield x[None], w
    yield x, w[0]
    yield x, w[:0]
    yield x[:, :, :2, :2], w
    yield x[:, :, :0], w
    yield x[:, :, :0], w, b, 1, 2
    yield x, w, b, 0
    yield x, w, b, (1, 2, 3)
    yield x, w, b, 1, -1
    yield x, w, b, 1, "foo"
    yield x, w, b, 2, "same"
    yield x, w, b, 1, 0, 0
    yield x, w, b, 1, 0, 1, 2
    yield x, w, b, 1, 0, 1, 0
    yield x, w, b, "1"
    yield x, w, b, 1.0
    yield x, w, b, True
    yield x, w, b, None
    yield x, w, b, 1, 0, 1, 1.0
    yield None, w
    yield x, None
    yield [1.0], w


@pytest.mark.parametrize("call", [*wrong_calls()])
def test_wrong_calls_raise_what_pytorch_raises(call: tuple[Any, ...]) -> None:
    with pytest.raises(Exception) as theirs:
        pytorch(*call)
    with pytest.raises(type(theirs.value)) as ours:
        conv2d(*call, algorithm="direct")
    if theirs.type is not TypeError:  # those list the arguments, of which we pass more
        assert str(ours.value) == str(theirs.value)


class TestArguments:
    @pytest.mark.parametrize("stride", [2, (2,), [2, 1], torch.Size([1, 2]), np.int64(2), torch.tensor(2)])
    def test_numbers_in_every_form_reach_the_kernel(self, stride: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        forward = convolve.forward

        def spy(*args: Any, **kwargs: Any) -> None:
            calls.append(kwargs["threads"])
            forward(*args, **kwargs)

        monkeypatch.setattr(convolve, "forward", spy)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        x, w = torch.randn(X), torch.randn(W)
        assert conv2d(x, w, None, stride, algorithm="direct").shape == pytorch(x, w, None, stride).shape
        assert calls == [3]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"algorithm": "winograd-4x4", "stride": 2}, "winograd-4x4: needs stride 1, got 2"),
            ({"algorithm": "winograd", "dilation": 2}, "winograd-4x4: needs dilation 1, got 2"),
            ({"algorithm": "direct/fft/torch"}, "fft-16: needs filters with sides from 5, got 3x3"),
            ({"algorithm": "direct/torch"}, "needs one name, or three for forward/input/weight"),
            ({"algorithm": "winogard"}, "unknown convolution algorithm 'winogard'; did you mean 'winograd'"),
        ],
    )
    def test_algorithms_that_cannot_are_refused_by_name(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as error:
            conv2d(torch.ones(X), torch.ones(W), **arguments)
        assert message in str(error.value)

    def test_unknown_algorithms_are_refused_for_every_dtype(self) -> None:
        with pytest.raises(ConfigError, match="unknown convolution algorithm"):
            conv2d(torch.ones(X).double(), torch.ones(W).double(), algorithm="direkt")

    def test_functional_is_the_same_function(self) -> None:
        assert windlass.functional.conv2d is conv2d

    @pytest.mark.parametrize("algorithm", ["direct", "winograd", "direct/torch/im2col"])
    def test_an_image_without_a_batch(self, algorithm: str) -> None:
        x, w, b = torch.randn(X[1:]), torch.randn(W), torch.randn(B)
        compare([x, w, b], {"padding": "same"}, algorithm, factor=5.0)

    def test_defaults_of_the_user_do_not_leak_in(self) -> None:
        x, w = torch.randn(X), torch.randn(W)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                y = conv2d(x, w, algorithm="direct")
        finally:
            torch.set_default_dtype(torch.float32)
        assert (y.dtype, y.device.type) == (torch.float32, "cpu")


class TestEmpty:
    def test_no_images(self) -> None:
        compare([torch.ones(0, 4, 8, 8), torch.randn(W), torch.randn(B)], {"padding": 1}, "direct")

    def test_no_channels(self) -> None:
        x, w, b = torch.ones(2, 0, 8, 8), torch.ones(4, 0, 3, 3), torch.randn(B)
        assert torch.equal(conv2d(x, w, b, algorithm="direct"), pytorch(x, w, b))


SHAPES = {
    "3x3": ((2, 4, 6, 6), (4, 4, 3, 3)),
    "1x1": ((2, 4, 6, 6), (3, 4, 1, 1)),
    "one channel": ((2, 1, 6, 6), (4, 1, 3, 3)),
    "to one channel": ((2, 4, 6, 6), (1, 4, 3, 3)),
    "one pixel": ((2, 4, 1, 1), (3, 4, 1, 1)),
    "one image": ((1, 4, 6, 6), (4, 4, 3, 3)),
    "to one pixel": ((2, 4, 3, 3), (4, 4, 3, 3)),
}
FORMATS = (torch.contiguous_format, torch.channels_last)


class TestMemoryFormat:
    @pytest.mark.parametrize("name", [*SHAPES])
    @pytest.mark.parametrize(("x_format", "w_format"), [*itertools.product(FORMATS, FORMATS)])
    @pytest.mark.parametrize("algorithm", ["direct", "direct/torch/torch", "torch/direct/direct"])
    def test_results_are_laid_out_as_pytorchs(
        self, name: str, x_format: torch.memory_format, w_format: torch.memory_format, algorithm: str
    ) -> None:
        x_size, w_size = SHAPES[name]
        x = torch.randn(x_size).contiguous(memory_format=x_format).requires_grad_()
        w = torch.randn(w_size).contiguous(memory_format=w_format).requires_grad_()
        y, want = conv2d(x, w, algorithm=algorithm), pytorch(x, w)
        assert is_channels_last(y) == is_channels_last(want)
        assert y.is_contiguous() == want.is_contiguous()
        grad = torch.randn_like(want)
        dx, dw = torch.autograd.grad(y, (x, w), grad)
        theirs = torch.autograd.grad(want, (x, w), grad)
        assert is_channels_last(dx) == is_channels_last(theirs[0])
        # In the weight's format, so that a parameter's gradient needs no copy.
        assert dw.is_contiguous(memory_format=memory_format(is_channels_last(w)))
        terms = 36 * 36  # more than any sum here has
        assert_close(y, want, want, terms=terms)
        assert_close(dx, theirs[0], theirs[0], terms=terms)
        assert_close(dw, theirs[1], theirs[1], terms=terms)

    @pytest.mark.parametrize("algorithm", ["direct", "winograd"])
    def test_any_strides_are_read(self, algorithm: str) -> None:
        base = torch.randn(4, 12, 9, 10)
        w = torch.randn(4, 4, 3, 3)
        views = (
            base[1::2, 2::3, 1:, ::2],
            base[:, 0:4].transpose(2, 3),
            base[:1, :4].expand(3, -1, -1, -1),
            base[:, :4].contiguous(memory_format=torch.channels_last)[:, :, 1:, 1:],
        )
        for x in views:
            compare_views(x, w, algorithm)
            compare_views(x, w.transpose(0, 1), algorithm)

    def test_gradients_of_any_strides_are_read(self) -> None:
        x, w = torch.randn(X, requires_grad=True), torch.randn(W, requires_grad=True)
        for grad in (torch.ones(()).expand(2, 4, 6, 6), torch.randn(6, 6, 4, 2).permute(3, 2, 0, 1)):
            ours = torch.autograd.grad(conv2d(x, w, algorithm="direct"), (x, w), grad)
            theirs = torch.autograd.grad(pytorch(x, w), (x, w), grad)
            for mine, other in zip(ours, theirs, strict=True):
                assert_close(mine, other, other, terms=144)


def compare_views(x: Tensor, w: Tensor, algorithm: str) -> None:
    ours, theirs = conv2d(x, w, padding=1, algorithm=algorithm), pytorch(x, w, padding=1)
    assert_close(ours, theirs, pytorch(x.abs(), w.abs(), padding=1), terms=36, factor=5.0)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("algorithm", ["direct", "winograd"])
    def test_is_computed_in_float32_and_rounded_once(self, dtype: torch.dtype, algorithm: str) -> None:
        x, w, b = (torch.randn(size).to(dtype) for size in (X, W, B))
        grad = torch.randn(2, 4, 6, 6).to(dtype)

        def run(*tensors: Tensor) -> Any:
            return conv2d(*tensors, algorithm=algorithm)

        y, (dx, dw, db) = gradients(run, [x, w, b], grad)
        y32, (dx32, dw32, _) = gradients(run, [x.float(), w.float(), b.float()], grad.float())
        assert torch.equal(y, y32.to(dtype))
        assert torch.equal(dx, dx32.to(dtype))
        assert torch.equal(dw, dw32.to(dtype))
        assert torch.equal(db, grad.sum((0, 2, 3)))

    def test_autocast_computes_in_its_dtype(self) -> None:
        x, w, b = torch.randn(X), torch.randn(W, requires_grad=True), torch.randn(B)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = conv2d(x, w, b, algorithm="direct")
            mixed = conv2d(x.bfloat16(), w, b, algorithm="direct")
            auto = conv2d(x, w, b)
            assert auto.dtype == pytorch(x, w, b).dtype == torch.bfloat16
        assert y.dtype == torch.bfloat16
        want = conv2d(x.bfloat16(), w.bfloat16(), b.bfloat16(), algorithm="direct")
        assert torch.equal(y, want)
        assert torch.equal(mixed, want)
        y.sum().backward()
        assert w.grad is not None
        assert w.grad.dtype == torch.float32


class TestRelu:
    @pytest.mark.parametrize("algorithm", ["direct", "winograd", "torch", "torch/direct/direct", "direct/torch/torch"])
    def test_is_the_maximum_of_the_result_and_zero(self, algorithm: str) -> None:
        tensors: list[Tensor | None] = [torch.randn(X), torch.randn(W), torch.randn(B)]
        grad = torch.randn(2, 4, 6, 6)
        y, ours = gradients(lambda *t: conv2d(*t, algorithm=algorithm, relu=True), tensors, grad)
        want, theirs = gradients(lambda *t: conv2d(*t, algorithm=algorithm).relu(), tensors, grad)
        assert 0.1 < (y == 0).float().mean() < 0.9  # both sides of the maximum are there
        assert torch.equal(y, want)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)

    @pytest.mark.parametrize("algorithm", ["direct", "torch"])
    def test_keeps_nan(self, algorithm: str) -> None:
        x = torch.ones(1, 1, 3, 3)
        x[0, 0, 1, 1] = torch.nan
        y = conv2d(x, -torch.ones(1, 1, 1, 1), algorithm=algorithm, relu=True)
        assert torch.isnan(y[0, 0, 1, 1])
        assert torch.equal(y.nan_to_num(0.0), torch.zeros(1, 1, 3, 3))


class TestGradientsComputed:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []

        def watch(name: str) -> None:
            kernel = getattr(convolve, name)

            def spy(*args: Any, **kwargs: Any) -> None:
                calls.append(name)
                kernel(*args, **kwargs)

            monkeypatch.setattr(convolve, name, spy)

        for name in ("forward", "backward_input", "backward_weight"):
            watch(name)
        return calls

    @pytest.mark.parametrize(
        ("needed", "kernels"),
        [
            ((True, False, False), ["forward", "backward_input"]),
            ((False, True, False), ["forward", "backward_weight"]),
            ((False, False, True), ["forward"]),
            ((True, True, True), ["forward", "backward_input", "backward_weight"]),
        ],
    )
    def test_only_those_needed(self, needed: tuple[bool, ...], kernels: list[str], calls: list[str]) -> None:
        tensors = [torch.randn(size, requires_grad=need) for size, need in zip((X, W, B), needed, strict=True)]
        conv2d(*tensors, algorithm="direct").sum().backward()
        assert calls == kernels
        for tensor, need in zip(tensors, needed, strict=True):
            assert (tensor.grad is not None) == need

    def test_without_gradients_only_the_forward_algorithm_counts(self, calls: list[str]) -> None:
        x, w = torch.randn(X), torch.randn(W, requires_grad=True)
        with torch.no_grad():
            with torch.profiler.profile() as profile:
                y = conv2d(x, w, algorithm="torch/direct/direct")
            assert not [event.name for event in profile.events() if event.name.startswith("windlass")]
            assert torch.equal(y, pytorch(x, w))
            conv2d(x, w, algorithm="direct/torch/torch")
        assert calls == ["forward"]

    def test_pytorchs_own_is_called_as_it_is(self, calls: list[str]) -> None:
        x, w = torch.randn(X, requires_grad=True), torch.randn(W)
        y = conv2d(x, w, algorithm="torch")
        assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
        assert not calls

    @pytest.mark.parametrize("needed", [0, 1])
    def test_only_what_the_gradients_need_is_kept(self, needed: int) -> None:
        x, w = torch.randn(X), torch.randn(W)
        (x, w)[needed].requires_grad_()
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            conv2d(x, w, algorithm="direct")
        assert [tensor.data_ptr() for tensor in kept] == [(w, x)[needed].data_ptr()]

    def test_a_weight_changed_before_the_backward_pass_is_noticed(self) -> None:
        x, w = torch.randn(X, requires_grad=True), torch.randn(W, requires_grad=True)
        y = conv2d(x, w, algorithm="direct")
        with torch.no_grad():
            w.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestOtherTensors:
    def test_another_device(self) -> None:
        y = conv2d(torch.ones(X, device="meta"), torch.ones(W, device="meta"), algorithm="direct")
        assert (y.device.type, tuple(y.shape)) == ("meta", (2, 4, 6, 6))

    @pytest.mark.skipif(not torch._C._has_mkldnn, reason="needs oneDNN")
    def test_another_layout(self) -> None:
        x, w = torch.randn(X), torch.randn(W)
        with torch.no_grad():
            y = conv2d(x.to_mkldnn(), w.to_mkldnn(), algorithm="direct")
        assert_close(y.to_dense(), pytorch(x, w), pytorch(x.abs(), w.abs()), terms=36)

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            x, w = torch.randn(X), torch.randn(W)
            assert_close(conv2d(x, w, algorithm="direct"), pytorch(x, w), pytorch(x.abs(), w.abs()), terms=36)

    def test_subclasses_see_the_call(self) -> None:
        class Traced(Tensor):
            seen: list[Any] = []  # noqa: RUF012

            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                cls.seen.append(func)
                parent: Any = super()
                return parent.__torch_function__(func, types, args, kwargs or {})

        y = conv2d(torch.randn(X).as_subclass(Traced), torch.randn(W), algorithm="direct")
        assert type(y) is Traced
        assert conv2d in Traced.seen


def test_every_algorithm_computes_what_it_takes() -> None:
    """The table is the list of what to test: a new algorithm is here by being there."""
    for name, algorithm in CONV_ALGORITHMS.items():
        kernel = 7 if algorithm.family == "fft" else 3
        if algorithm.family == "winograd" and algorithm.tile + kernel - 1 > 8:
            kernel = 2
        tensors: list[Tensor | None] = [torch.randn(2, 3, 9, 10), torch.randn(4, 3, kernel, kernel), torch.randn(4)]
        compare(tensors, {"padding": 1}, name, factor=25.0)
