"""`Conv2d` beside `torch.nn.Conv2d`."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.layers import Conv2d

U = 2.0**-24
"""float32's unit roundoff."""

CASES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 4, "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    *({"kernel_size": 3, "padding": (1, 2), "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
]

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


def pair(arguments: dict[str, Any], algorithm: str = "direct") -> tuple[Conv2d, nn.Conv2d]:
    """The two layers with the same parameters."""
    torch.manual_seed(1)
    ours = Conv2d(4, 8, **arguments, algorithm=algorithm)
    torch.manual_seed(1)
    return ours, nn.Conv2d(4, 8, **arguments)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    # Sums of at most 2·8·9 products of numbers near 1, in another order: 144 roundings of the largest partial sum,
    # which is no more than a few times the largest result.
    assert (ours - theirs).abs().max() <= 4 * 144 * U * theirs.abs().max()


class TestParity:
    @pytest.mark.parametrize("arguments", CASES)
    @pytest.mark.parametrize("size", [(2, 4, 8, 9), (4, 8, 9)])
    def test_results_and_gradients(self, arguments: dict[str, Any], size: tuple[int, ...]) -> None:
        ours, theirs = pair(arguments)
        assert torch.equal(ours.weight, theirs.weight)  # the same numbers were drawn
        x = torch.randn(size, requires_grad=True)
        y, want = ours(x), theirs(x)
        assert type(y.grad_fn).__name__ != type(want.grad_fn).__name__ or len(size) == 3
        assert_close(y, want)
        grad = torch.randn_like(want)
        mine = torch.autograd.grad(y, (x, *ours.parameters()), grad)
        for a, b in zip(mine, torch.autograd.grad(want, (x, *theirs.parameters()), grad), strict=True):
            assert_close(a, b)

    @pytest.mark.parametrize("arguments", CASES)
    def test_pytorchs_own_is_exactly_pytorchs(self, arguments: dict[str, Any]) -> None:
        ours, theirs = pair(arguments, "torch")
        x = torch.randn(2, 4, 8, 9)
        y = ours(x)
        assert torch.equal(y, theirs(x))
        assert type(y.grad_fn).__name__ == "ConvolutionBackward0"

    def test_state_dicts_go_both_ways(self) -> None:
        ours, theirs = Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.weight, theirs.weight)
        theirs.load_state_dict(Conv2d(4, 8, 3).state_dict())
        assert not torch.equal(ours.weight, theirs.weight)

    def test_positional_arguments_are_pytorchs(self) -> None:
        ours = Conv2d(4, 8, 3, 2, 1, 1, 2, False, "reflect", "cpu", torch.float64)
        theirs = nn.Conv2d(4, 8, 3, 2, 1, 1, 2, False, "reflect", "cpu", torch.float64)
        for name in ("stride", "padding", "dilation", "groups", "bias", "padding_mode"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.weight.dtype == torch.float64

    @pytest.mark.parametrize(
        "arguments",
        [
            {"groups": 3},
            {"groups": 0},
            {"padding": "odd"},
            {"padding": "same", "stride": 2},
            {"padding_mode": "mirror"},
        ],
    )
    def test_wrong_arguments_raise_what_pytorch_raises(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(ValueError) as theirs:
            nn.Conv2d(4, 8, 3, **arguments)
        with pytest.raises(ValueError) as ours:
            Conv2d(4, 8, 3, **arguments)
        assert str(ours.value) == str(theirs.value)

    def test_an_input_of_other_channels(self) -> None:
        with pytest.raises(RuntimeError, match=r"expected input\[1, 3, 8, 8\] to have 4 channels, but got 3"):
            Conv2d(4, 8, 3, algorithm="direct")(torch.ones(1, 3, 8, 8))


class TestAlgorithm:
    @pytest.mark.parametrize("algorithm", ["winogard", "direct/torch", ""])
    def test_unknown_ones_are_refused_at_once(self, algorithm: str) -> None:
        with pytest.raises(ConfigError, match="algorithm"):
            Conv2d(4, 8, 3, algorithm=algorithm)

    def test_one_that_cannot_is_refused_when_called(self) -> None:
        layer = Conv2d(4, 8, 3, stride=2, algorithm="winograd-4x4")
        with pytest.raises(ConfigError, match="winograd-4x4: needs stride 1, got 2"):
            layer(torch.ones(1, 4, 8, 8))

    def test_unknown_activations_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="activation: needs None or 'relu', got 'gelu'"):
            Conv2d(4, 8, 3, activation="gelu")  # type: ignore[arg-type]

    def test_is_shown(self) -> None:
        assert repr(Conv2d(4, 8, 3, algorithm="winograd")).endswith("stride=(1, 1), algorithm=winograd)")
        assert "algorithm=auto, activation=relu" in repr(Conv2d(4, 8, 3, activation="relu"))

    def test_can_be_changed(self) -> None:
        layer = Conv2d(4, 8, 3)
        x = torch.randn(1, 4, 8, 8)
        assert type(layer(x).grad_fn).__name__ == "ConvolutionBackward0"
        layer.algorithm = "direct"
        assert type(layer(x).grad_fn).__name__ == "_Conv2dBackward"

    @pytest.mark.parametrize("algorithm", ["auto", "direct", "torch"])
    def test_activation(self, algorithm: str) -> None:
        layer = Conv2d(4, 8, 3, algorithm=algorithm, activation="relu")
        plain = Conv2d.from_torch(layer, algorithm=algorithm)
        x = torch.randn(1, 4, 8, 8)
        y = layer(x)
        assert (y == 0).any()
        assert torch.equal(y, plain(x).relu())


class TestFromTorch:
    def test_shares_parameters_and_keeps_the_rest(self) -> None:
        conv = nn.Conv2d(4, 8, (3, 4), padding="same", groups=2, padding_mode="circular").eval()
        conv.weight.requires_grad_(False)
        layer = Conv2d.from_torch(conv, algorithm="direct", activation="relu")
        assert layer.weight is conv.weight
        assert layer.bias is conv.bias
        assert not layer.training
        assert (layer.algorithm, layer.activation) == ("direct", "relu")
        x = torch.randn(2, 4, 8, 9)
        assert_close(layer(x), conv(x).relu())

    def test_keeps_hooks_and_their_handles(self) -> None:
        conv = nn.Conv2d(4, 8, 3)
        seen: list[Any] = []
        handle = conv.register_forward_hook(lambda module, args, out: seen.append(type(module)))
        layer = Conv2d.from_torch(conv)
        layer(torch.ones(1, 4, 8, 8))
        assert seen == [Conv2d]
        handle.remove()
        layer(torch.ones(1, 4, 8, 8))
        assert len(seen) == 1

    def test_keeps_dtype_and_attributes(self) -> None:
        conv = nn.Conv2d(4, 8, 3, dtype=torch.float64, bias=False)
        conv.tag = "stem"  # type: ignore[assignment]
        layer = Conv2d.from_torch(conv)
        assert layer.tag == "stem"
        assert layer.bias is None
        assert torch.equal(layer(torch.ones(1, 4, 8, 8).double()), conv(torch.ones(1, 4, 8, 8).double()))

    def test_leaves_the_original_alone(self) -> None:
        conv = nn.Conv2d(4, 8, 3)
        layer = Conv2d.from_torch(conv)
        weight = conv.weight
        layer.weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
        assert conv.weight is weight
        assert not hasattr(conv, "algorithm")

    def test_from_one_of_ours(self) -> None:
        layer = Conv2d.from_torch(Conv2d(4, 8, 3, algorithm="direct", activation="relu"), algorithm="im2col")
        assert (layer.algorithm, layer.activation) == ("im2col", None)

    def test_refuses_layers_that_may_compute_something_else(self) -> None:
        class Twice(nn.Conv2d):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        with pytest.raises(TypeError, match=r"needs a torch.nn.Conv2d itself, got Twice"):
            Conv2d.from_torch(Twice(4, 8, 3))
        normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3))
        with pytest.raises(TypeError, match="ParametrizedConv2d"):
            Conv2d.from_torch(normed)


class TestCopies:
    @pytest.fixture
    def layer(self) -> Conv2d:
        layer = Conv2d(4, 8, 3, padding="same", algorithm="direct", activation="relu")
        layer(torch.ones(1, 4, 8, 8))  # whatever is remembered is there
        return layer

    def assert_equal(self, copied: Conv2d, layer: Conv2d) -> None:
        x = torch.randn(2, 4, 8, 8)
        assert type(copied) is Conv2d
        assert repr(copied) == repr(layer)
        assert copied.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(copied(x), layer(x))

    def test_deepcopy(self, layer: Conv2d) -> None:
        self.assert_equal(copy.deepcopy(layer), layer)

    def test_pickle(self, layer: Conv2d) -> None:
        self.assert_equal(pickle.loads(pickle.dumps(layer)), layer)

    def test_torch_save(self, layer: Conv2d) -> None:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        self.assert_equal(torch.load(file, weights_only=False), layer)

    def test_to_another_dtype_and_format(self, layer: Conv2d) -> None:
        x = torch.randn(2, 4, 8, 8)
        want = layer(x)
        wide = copy.deepcopy(layer).double()
        assert_close(wide(x.double()).float(), want)
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its signature leaves it out
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("algorithm", "fused"), [*itertools.product(["direct", "winograd"], [False, True])])
def test_training_follows_pytorchs(algorithm: str, fused: bool) -> None:
    """Ten steps of SGD on a small network end at the same parameters."""

    def network(ours: bool) -> nn.Sequential:
        torch.manual_seed(2)
        first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        layers: list[nn.Module] = [first, nn.ReLU(), second, nn.Flatten(), nn.Linear(8 * 16, 5)]
        if ours:
            layers[0] = Conv2d.from_torch(first, algorithm=algorithm, activation="relu" if fused else None)
            layers[1] = nn.Identity() if fused else layers[1]
            layers[2] = Conv2d.from_torch(second, algorithm="direct")
        return nn.Sequential(*layers)

    ends = []
    for ours in (True, False):
        model = network(ours)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        ends.append([parameter.detach() for parameter in model.parameters()])
    for mine, other in zip(*ends, strict=True):
        # A step adds a gradient that is off by some 144 · 5 · U of its size; ten steps of stable descent add up.
        assert (mine - other).abs().max() <= 10 * 144 * 5 * U * other.abs().max()
