"""The operators themselves: PyTorch's checks of them, their derivatives of all orders, `torch.func`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from windlass.kernels import convolve
from windlass.layers import aten, conv2d
from windlass.layers.operators import BACKWARD_INPUT, BACKWARD_WEIGHT, CONV2D, ELSEWHERE, KERNELS

U = 2.0**-24
"""float32's unit roundoff."""

GEOMETRIES: dict[str, tuple[Any, ...]] = {
    # x, weight, stride, padding (top, bottom, left, right), dilation, groups
    "plain": ((2, 2, 4, 3), (3, 2, 3, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "padded": ((1, 2, 4, 4), (2, 2, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "uneven": ((1, 2, 3, 4), (2, 2, 2, 3), (1, 1), (0, 1, 2, 1), (1, 1), 1),
    "strided": ((1, 2, 6, 5), (2, 2, 3, 2), (2, 3), (1, 0, 1, 1), (1, 1), 1),
    "dilated": ((1, 1, 6, 7), (2, 1, 2, 3), (1, 2), (1, 1, 2, 2), (2, 2), 1),
    "grouped": ((1, 4, 3, 3), (2, 2, 2, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    "depthwise": ((1, 2, 5, 5), (4, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 2),
    "one pixel": ((2, 2, 1, 1), (3, 2, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
}
# PyTorch's forward-mode derivatives script some of theirs when first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

SLOWLY = ("one pixel", "uneven")
"""Those whose derivatives are checked element by element; the others along a random direction."""

ALL = pytest.mark.parametrize("name", [*GEOMETRIES])


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same numbers, and one thread: on images this small threads only wait for each other."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    x, weight, *geometry = GEOMETRIES[name]
    return (
        torch.randn(x, dtype=dtype, requires_grad=True),
        torch.randn(weight, dtype=dtype, requires_grad=True),
        torch.randn(weight[0], dtype=dtype, requires_grad=True),
        tuple(geometry),
    )


def detached(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    x, weight, bias, geometry = tensors(name, dtype)
    return x.detach(), weight.detach(), bias.detach(), geometry


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
    stride, (top, bottom, left, right), dilation, groups = geometry
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)


class TestOpcheck:
    """PyTorch's own checks: schema, registration, fake tensors, tracing with changing sizes."""

    @ALL
    @pytest.mark.parametrize(("relu", "biased"), [(False, True), (True, False)])
    def test_conv2d(self, name: str, relu: bool, biased: bool) -> None:
        x, weight, bias, geometry = tensors(name)
        torch.library.opcheck(CONV2D, (x, weight, bias if biased else None, *geometry, "direct", relu))

    @pytest.mark.parametrize(
        ("name", "channels_last"), [*((name, False) for name in GEOMETRIES), ("uneven", True), ("grouped", True)]
    )
    def test_backward(self, name: str, channels_last: bool) -> None:
        x, weight, _, geometry = tensors(name)
        grad = torch.randn_like(CONV2D(x, weight, None, *geometry, "direct", False)).requires_grad_()
        rest = (*geometry, "direct", channels_last)
        torch.library.opcheck(BACKWARD_INPUT, (grad, weight, x.shape[2:], *rest))
        torch.library.opcheck(BACKWARD_WEIGHT, (x, grad, weight.shape[2:], *rest))

    @pytest.mark.parametrize("algorithm", ["torch", "auto", "winograd", "torch/direct/im2col"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_algorithms_dtypes_and_formats(self, algorithm: str, dtype: torch.dtype, channels_last: bool) -> None:
        x, weight, bias, geometry = tensors("padded", dtype)
        x = x.detach().contiguous(memory_format=aten.memory_format(channels_last)).requires_grad_()
        torch.library.opcheck(CONV2D, (x, weight, bias, *geometry, algorithm, True))

    @pytest.mark.parametrize("name", ["plain", "uneven"])
    def test_no_gradient_needed(self, name: str) -> None:
        x, weight, bias, geometry = tensors(name)
        torch.library.opcheck(CONV2D, (x.detach(), weight.detach(), bias.detach(), *geometry, "direct", False))


class TestDerivatives:
    """float64 is PyTorch's own convolution, so these check the formulas."""

    @ALL
    @pytest.mark.parametrize("relu", [False, True])
    def test_first(self, name: str, relu: bool) -> None:
        x, weight, bias, geometry = tensors(name, torch.float64)

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return CONV2D(x, weight, bias, *geometry, "direct", relu)

        assert torch.autograd.gradcheck(
            function, (x, weight, bias), check_forward_ad=True, fast_mode=name not in SLOWLY
        )

    @ALL
    @pytest.mark.parametrize("relu", [False, True])
    def test_second(self, name: str, relu: bool) -> None:
        x, weight, bias, geometry = tensors(name, torch.float64)

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            return CONV2D(x, weight, bias, *geometry, "direct", relu)

        assert torch.autograd.gradgradcheck(
            function, (x, weight, bias), check_fwd_over_rev=True, check_rev_over_rev=True
        )

    @ALL
    def test_of_the_gradients(self, name: str) -> None:
        x, weight, _, geometry = tensors(name, torch.float64)
        grad = torch.randn_like(CONV2D(x, weight, None, *geometry, "torch", False)).requires_grad_()

        def to_input(grad: Tensor, weight: Tensor) -> Any:
            return BACKWARD_INPUT(grad, weight, x.shape[2:], *geometry, "torch", False)

        def to_weight(x: Tensor, grad: Tensor) -> Any:
            return BACKWARD_WEIGHT(x, grad, weight.shape[2:], *geometry, "torch", False)

        for function, inputs in ((to_input, (grad, weight)), (to_weight, (x, grad))):
            assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True, rtol=1e-6)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)

    @ALL
    @pytest.mark.parametrize("algorithm", ["direct", "torch/direct/im2col", "direct/torch/torch"])
    def test_float32_agrees_with_float64(self, name: str, algorithm: str) -> None:
        """Forward, gradients and the gradient of the gradients, all through float32's own kernels."""

        def run(dtype: torch.dtype) -> list[Tensor]:
            torch.manual_seed(1)
            *leaves, geometry = tensors(name)
            x, weight, bias = (leaf.to(dtype) for leaf in leaves)
            y = CONV2D(x, weight, bias, *geometry, algorithm, False)
            first = torch.autograd.grad((y**2).sum(), (x, weight, bias), create_graph=True)
            second = torch.autograd.grad([(g**2).sum() for g in first], (x, weight))
            return [y, *first, *second]

        for ours, want in zip(run(torch.float32), run(torch.float64), strict=True):
            # Four convolutions in a row of at most 64 terms each, all of size 1 before the first: relative to the
            # largest result, which sums of squares make larger than any cancelled part, 4 · 64 roundings.
            assert (ours.double() - want).abs().max() <= 4 * 64 * U * want.abs().max()

    @ALL
    @pytest.mark.parametrize("algorithm", ["direct", "im2col", "torch"])
    def test_directions_are_adjoint(self, name: str, algorithm: str) -> None:
        """⟨conv(x, w), g⟩ = ⟨x, input(g, w)⟩ = ⟨w, weight(x, g)⟩."""
        x, weight, _, geometry = detached(name)
        y = CONV2D(x, weight, None, *geometry, algorithm, False)
        grad = torch.randn_like(y)
        dx = BACKWARD_INPUT(grad, weight, x.shape[2:], *geometry, algorithm, False)
        dw = BACKWARD_WEIGHT(x, grad, weight.shape[2:], *geometry, algorithm, False)
        products = [
            torch.dot(a.flatten().double(), b.flatten().double()) for a, b in ((y, grad), (x, dx), (weight, dw))
        ]
        # Each is the same sum of products x·w·g, of which a kernel rounds every partial sum: at most `terms` times.
        magnitude = torch.dot(by_pytorch(x.abs(), weight.abs(), None, geometry).flatten(), grad.abs().flatten())
        terms = max(weight[0].numel(), grad[:, 0].numel(), weight[:, 0].numel())
        assert abs(products[0] - products[1]) <= 2 * terms * U * magnitude
        assert abs(products[0] - products[2]) <= 2 * terms * U * magnitude

    @ALL
    def test_uneven_padding_is_zeros_first(self, name: str) -> None:
        x, weight, bias, geometry = tensors(name)
        for algorithm in ("direct", "torch"):
            y = CONV2D(x, weight, bias, *geometry, algorithm, False)
            want = by_pytorch(x, weight, bias, geometry)
            magnitude = by_pytorch(x.abs(), weight.abs(), bias.abs(), geometry).max()
            assert (y - want).abs().max() <= 2 * (weight[0].numel() + 1) * U * magnitude

    def test_the_gradient_of_a_padded_edge_is_there(self) -> None:
        """A pixel that only the last, one-sided zeros let the filter reach."""
        x = torch.zeros(1, 1, 2, 2, requires_grad=True)
        weight = torch.ones(1, 1, 2, 2)
        CONV2D(x, weight, None, (1, 1), (0, 1, 0, 1), (1, 1), 1, "direct", False)[0, 0, 1, 1].backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[[[0.0, 0.0], [0.0, 1.0]]]]


class TestDispatch:
    def test_float64_never_reaches_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(convolve, "forward", None)
        x, weight, bias, geometry = tensors("padded", torch.float64)
        CONV2D(x, weight, bias, *geometry, "direct", False)
        x, weight, bias, geometry = tensors("padded")
        with pytest.raises(TypeError):  # while float32 does
            CONV2D(x, weight, bias, *geometry, "direct", False)

    @ALL
    def test_other_devices_compute_the_same(self, name: str) -> None:
        """Their kernels are PyTorch's, and work on a CPU as well."""
        x, weight, bias, geometry = detached(name, torch.float64)
        grad = torch.randn_like(by_pytorch(x, weight, bias, geometry))
        cases: dict[str, tuple[Any, ...]] = {
            "conv2d": (x, weight, bias, *geometry, "direct", True),
            "conv2d_backward_input": (grad, weight, list(x.shape[2:]), *geometry, "direct", False),
            "conv2d_backward_weight": (x, grad, list(weight.shape[2:]), *geometry, "direct", False),
        }
        for operator, arguments in cases.items():
            assert torch.equal(ELSEWHERE[operator](*arguments), KERNELS[operator](*arguments))

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda x, w, b: (x[:, :1], w, b), "need 2 input channels, got 1"),
            (lambda x, w, b: (x[0], w, b), "needs 4-dimensional tensors"),
            (lambda x, w, b: (x, w, b[:1]), "needs a bias of 2 numbers, got"),
            (lambda x, w, b: (x[:, :, :0, :0], w, b), "Kernel size can't be greater than actual input size"),
            (lambda x, w, b: (x, w.new_ones(2, 2, 9, 9), b), "the filter covers 9x9 pixels, the padded input has 6x6"),
            (lambda x, w, b: (x, w.double(), b), "expected scalar type Float but found Double"),
        ],
    )
    def test_wrong_tensors_are_refused(self, spoil: Callable[..., Any], message: str) -> None:
        x, weight, bias, geometry = tensors("padded")
        with pytest.raises(RuntimeError, match=message):
            CONV2D(*spoil(x, weight, bias), *geometry, "direct", False)

    def test_gradients_of_another_size_are_refused(self) -> None:
        x, weight, _, geometry = tensors("padded")
        grad = torch.ones(1, 2, 3, 4)
        with pytest.raises(RuntimeError, match=r"needs gradients of \(1, 2, 4, 4\), got \(1, 2, 3, 4\)"):
            BACKWARD_INPUT(grad, weight, x.shape[2:], *geometry, "direct", False)
        with pytest.raises(RuntimeError, match=r"needs gradients of \(1, 2, 4, 4\), got \(1, 2, 3, 4\)"):
            BACKWARD_WEIGHT(x, grad, weight.shape[2:], *geometry, "direct", False)


Function = Callable[..., Tensor]


def both(algorithm: str, groups: int = 1, relu: bool = False) -> tuple[Function, Function]:
    """Windlass's convolution and PyTorch's."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv2d(x, weight, bias, 1, 1, 1, groups, algorithm, relu=relu)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, weight, bias, 1, 1, 1, groups)
        return y.relu() if relu else y

    return ours, theirs


def assert_same(ours: Any, theirs: Any) -> None:
    """Trees of float32 tensors, equal up to the order of their sums.

    At most three convolutions follow each other here, of at most 144 terms (2 images, 6×6 pixels, twice) each;
    Winograd's F(4×4, 3×3) loses 5 times as much.  Relative to the largest element that is 3 · 144 · 5 · U.
    """
    mine, others = torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs)
    for a, b in zip(mine, others, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 3 * 144 * 5 * U * b.abs().max() + 1e-30


DIMS = [dims for dims in itertools.product((0, None), repeat=3) if dims != (None, None, None)]


class TestFunc:
    """`torch.func` on the functional form: PyTorch's convolution says what is right."""

    @pytest.mark.parametrize("dims", DIMS)
    @pytest.mark.parametrize(("channels", "groups"), [(4, 1), (1, 1), (4, 2), (4, 4)])
    @pytest.mark.parametrize("algorithm", ["direct", "winograd"])
    def test_vmap(self, dims: tuple[int | None, ...], channels: int, groups: int, algorithm: str) -> None:
        if algorithm == "winograd" and groups == channels == 4:
            pytest.skip("does not take depthwise convolutions")
        sizes = (2, channels, 6, 6), (4, channels // groups, 3, 3), (4,)
        inputs = [torch.randn(size if dim is None else (3, *size)) for size, dim in zip(sizes, dims, strict=True)]
        for relu in (False, True):
            ours, theirs = both(algorithm, groups, relu)
            assert_same(torch.vmap(ours, dims)(*inputs), torch.vmap(theirs, dims)(*inputs))

            def losses(function: Function) -> Any:
                def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                    return (function(x, weight, bias) ** 2).sum()

                return torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), dims)(*inputs)

            assert_same(losses(ours), losses(theirs))

    @pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (2, 1)])
    @pytest.mark.parametrize(("channels", "groups"), [(4, 1), (1, 1), (4, 2)])
    @pytest.mark.parametrize("algorithm", ["direct", "winograd-2x2"])
    def test_vmap_of_the_gradients(
        self, dims: tuple[int | None, ...], channels: int, groups: int, algorithm: str
    ) -> None:
        """Against a loop over the samples."""
        x, weight, grad = (2, channels, 6, 6), (4, channels // groups, 3, 3), (2, 4, 4, 4)
        rest = ((1, 1), (0, 0, 0, 0), (1, 1), groups, algorithm, False)

        def to_input(grad: Tensor, weight: Tensor) -> Any:
            return BACKWARD_INPUT(grad, weight, x[2:], *rest)

        def to_weight(x: Tensor, grad: Tensor) -> Any:
            return BACKWARD_WEIGHT(x, grad, weight[2:], *rest)

        for function, sizes in ((to_input, (grad, weight)), (to_weight, (x, grad))):
            samples = [torch.randn(size if dim is None else (3, *size)) for size, dim in zip(sizes, dims, strict=True)]
            inputs = [t if dim is None else t.movedim(0, dim) for t, dim in zip(samples, dims, strict=True)]
            loop = [function(*(t if d is None else t[i] for t, d in zip(samples, dims, strict=True))) for i in range(3)]
            assert_same(torch.vmap(function, dims)(*inputs), torch.stack(loop))

    def test_vmap_takes_samples_into_one_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = []
        forward = convolve.forward

        def spy(*args: Any, **kwargs: Any) -> None:
            batches.append(kwargs["shape"].batch)
            forward(*args, **kwargs)

        monkeypatch.setattr(convolve, "forward", spy)
        ours, _ = both("direct")
        torch.vmap(ours, (0, None))(torch.randn(3, 2, 4, 6, 6), torch.randn(4, 4, 3, 3))
        assert batches == [6]

    @pytest.mark.parametrize("dim", [1, 2, 4, -1])
    def test_vmap_of_other_dims(self, dim: int) -> None:
        x, weight = torch.randn(3, 2, 4, 6, 6).movedim(0, dim), torch.randn(4, 4, 3, 3)
        ours, theirs = both("direct")
        assert_same(
            torch.vmap(ours, (dim, None), dim)(x, weight) if dim < 4 else torch.vmap(ours, (dim, None))(x, weight),
            torch.vmap(theirs, (dim, None), dim)(x, weight) if dim < 4 else torch.vmap(theirs, (dim, None))(x, weight),
        )

    def test_nested_vmap(self) -> None:
        x, weight = torch.randn(2, 3, 1, 4, 6, 6), torch.randn(3, 4, 4, 3, 3)
        ours, theirs = both("direct")
        assert_same(*(torch.vmap(torch.vmap(f), (0, None))(x, weight) for f in (ours, theirs)))

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("algorithm", ["direct", "winograd"])
    def test_grad_of_grad(self, algorithm: str, relu: bool) -> None:
        x, weight, bias = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4)

        def second(function: Function) -> Any:
            def slope(weight: Tensor) -> Any:
                inner = torch.func.grad(lambda x: (function(x, weight, bias) ** 2).sum())(x)
                return (inner**2).sum()

            return torch.func.grad(slope)(weight)

        ours, theirs = both(algorithm, relu=relu)
        assert_same(second(ours), second(theirs))

    @pytest.mark.parametrize("relu", [False, True])
    @pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
    def test_jvp(self, which: tuple[int, ...], relu: bool) -> None:
        inputs = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4)
        tangents = tuple(torch.randn_like(inputs[index]) for index in which)

        def push(function: Function) -> Any:
            def partial(*moved: Tensor) -> Tensor:
                given = dict(zip(which, moved, strict=True))
                return function(*(given.get(index, t) for index, t in enumerate(inputs)))

            return torch.func.jvp(partial, tuple(inputs[index] for index in which), tangents)

        ours, theirs = both("direct", relu=relu)
        assert_same(push(ours), push(theirs))

    def test_hessian_and_jacobians(self) -> None:
        x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
        ours, theirs = both("direct")
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            assert_same(*(transform(f, argnums=1)(x, weight) for f in (ours, theirs)))
        hessian = (torch.func.hessian(lambda w: (f(x, w) ** 3).sum())(weight) for f in (ours, theirs))  # noqa: B023
        assert_same(*[next(hessian), next(hessian)])

    def test_no_grad_inside(self) -> None:
        x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)

        def product(function: Function) -> Any:
            def inner(x: Tensor) -> Tensor:
                with torch.no_grad():
                    constant = function(x, weight)
                return (x * constant.mean()).sum()

            return torch.func.grad(inner)(x)

        ours, theirs = both("direct")
        assert_same(product(ours), product(theirs))
