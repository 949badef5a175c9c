from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.layers import local
from windlass.precision import qtorch
from windlass.precision.lower import LAYER_TYPES
from windlass.precision.qtorch import FixedPoint, Quantizer, fixed_point_quantize, lower, sequential_lower

WAYS = [lower, sequential_lower]
KINDS = ["conv", "linear", "pool", "activation", "normalization"]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.heads = nn.ModuleDict({"main": nn.Linear(36, 5)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.heads["main"](self.body(self.conv(x)))
        return y


def network() -> Net:
    torch.manual_seed(2)
    return Net().eval()


def quantizers(model: nn.Module) -> int:
    return sum(isinstance(module, Quantizer) for module in model.modules())


def lowered(way: Callable[..., nn.Module], kinds: list[str], model: nn.Module | None = None, fl: int = 4) -> nn.Module:
    return way(model or network(), kinds, FixedPoint(8, fl), FixedPoint(8, 6), "nearest", "nearest")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kinds", "count"), [*(([kind], 1) for kind in KINDS), (KINDS, 5), ([], 0)])
def test_quantizers_stand_after_the_layers(way: Any, kinds: list[str], count: int) -> None:
    assert quantizers(lowered(way, kinds)) == count


@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_their_gradients_are_rounded(way: Any) -> None:
    def rounded(x: Tensor, fl: int) -> Tensor:
        return fixed_point_quantize(x, 8, fl, rounding="nearest")

    model, twin = lowered(way, ["conv", "linear"]), network()
    y = model(X)
    conv = rounded(twin.conv(X), 4).requires_grad_()
    expected = rounded(twin.heads["main"](twin.body(conv)), 4)
    assert torch.equal(y, expected) and not torch.equal(y, network()(X))

    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)) / 10
    y.backward(gradient)
    twin.heads["main"](twin.body(conv)).backward(rounded(gradient, 6))
    assert conv.grad is not None
    twin.conv(X).backward(rounded(conv.grad, 6))
    shown = [parameter.grad for parameter in model.parameters()]
    for grad, parameter in zip(shown, twin.parameters(), strict=True):
        assert grad is not None and parameter.grad is not None and torch.equal(grad, parameter.grad)


@pytest.mark.parametrize("way", WAYS)
def test_qpytorch_gives_the_same(way: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles itself as it is imported
        try:
            theirs, auto_low = importlib.import_module("qtorch"), importlib.import_module("qtorch.auto_low")
        except Exception as error:  # also of a compiler that is not there
            pytest.skip(f"QPyTorch cannot be imported: {error!r}"[:200])
    other = network()
    result = getattr(auto_low, way.__name__)(
        other, KINDS, theirs.FixedPoint(8, 4), theirs.FixedPoint(8, 6), "nearest", "nearest"
    )
    assert torch.equal((other if result is None else result)(X), lowered(way, KINDS)(X))


def test_lower_changes_the_model_and_keeps_its_names() -> None:
    model = network()
    assert lowered(lower, KINDS, model) is model
    assert model.state_dict().keys() == network().state_dict().keys()
    model.load_state_dict(network().state_dict())


def test_sequential_lower_leaves_the_model_alone() -> None:
    model = network()
    done = lowered(sequential_lower, ["conv"], model)
    assert quantizers(model) == 0 and "conv.0.weight" in done.state_dict()
    assert isinstance(done.conv, nn.Sequential) and isinstance(done.conv[1], Quantizer)
    assert torch.equal(model(X), network()(X))


@pytest.mark.parametrize("way", WAYS)
def test_a_second_rounding_comes_after_the_first(way: Any) -> None:
    coarse = lowered(way, ["linear"], lowered(way, ["linear"], fl=6), fl=1)
    assert quantizers(coarse) == 2
    assert torch.equal(coarse(X), lowered(way, ["linear"], fl=1)(X).mul(2).round().div(2))
    fine = lowered(way, ["linear"], lowered(way, ["linear"], fl=1), fl=6)
    assert torch.equal(fine(X), lowered(way, ["linear"], fl=1)(X).clamp(-2, 127 / 64))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_round_too(way: Any, again: Callable[[nn.Module], nn.Module]) -> None:
    model = lowered(way, KINDS)
    twin = again(model)
    assert quantizers(twin) == quantizers(model) and torch.equal(twin(X), model(X))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert model(X).abs().sum() > 0 and twin(X).abs().sum() == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_shared_layer_stays_one(way: Any) -> None:
    relu = nn.ReLU()
    model = lowered(way, ["activation"], nn.Sequential(relu, nn.Linear(4, 4), relu))
    assert model[0] is model[2] and quantizers(model) == 1  # type: ignore[index]


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_alone_and_layers_of_several_tensors(way: Any) -> None:
    model = lowered(way, ["conv"], nn.Conv2d(3, 2, 1))
    assert torch.equal(model(X) * 16, (model(X) * 16).round())
    y, indices = lowered(way, ["pool"], nn.MaxPool2d(2, return_indices=True))(X)
    assert torch.equal(y * 16, (y * 16).round()) and indices.dtype == torch.int64
    loss = lowered(way, ["loss"], nn.MSELoss())(X, X + 0.3)
    assert loss == 0.0625  # 0.09 in steps of 1/16


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_windlass_and_subclasses(way: Any) -> None:
    class Own(nn.Conv2d):
        pass

    norm = local.LocalContrastNorm2d(3)
    model = nn.Sequential(Own(3, 4, 1), local.LocallyConnected2d(4, 4, 3, input_size=8), local.L2Pool2d(2), norm)
    done = lowered(way, ["conv", "pool", "normalization"], model)
    assert quantizers(done) == 5
    assert torch.equal(done(X) * 16, (done(X) * 16).round())


@pytest.mark.parametrize("way", WAYS)
def test_attention_is_left_alone(way: Any) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    done = lowered(way, ["linear", "activation", "normalization"], model)
    assert quantizers(done) == 4  # two linear layers, two normalizations
    assert torch.isfinite(done(torch.randn(1, 3, 8))).all()


def test_every_listed_type_is_a_layer() -> None:
    assert set(KINDS) < set(LAYER_TYPES)
    assert all(issubclass(layer, nn.Module) for types in LAYER_TYPES.values() for layer in types)


def test_names_stand_where_qpytorch_has_them() -> None:
    assert all(hasattr(qtorch, name) for name in qtorch.__all__)
    assert qtorch.quant.Quantizer is Quantizer and qtorch.auto_low.lower is lower
    assert qtorch.optim.OptimLP is qtorch.OptimLP and qtorch.number.FixedPoint is FixedPoint


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_there_is_refused(way: Any) -> None:
    with pytest.raises(ConfigError, match="unknown layer type 'convs'; did you mean 'conv'"):
        lowered(way, ["convs"])
    with pytest.raises(ConfigError, match=r"layer_types is a list of conv, linear.* got 'conv'"):
        lowered(way, "conv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the model has no layer of type dropout, pad"):
        lowered(way, ["dropout", "pad"])
    with pytest.raises(ConfigError, match="a number is FixedPoint"):
        way(network(), ["conv"], forward_number=8)
    with pytest.raises(ConfigError, match="unknown rounding 'up'"):
        way(network(), ["conv"], forward_rounding="up")
