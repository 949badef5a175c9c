"""`windlass.accelerate` on small models: the same results and gradients, and nothing else changed."""

import copy
import json
import random
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import windlass
from windlass.errors import ConfigError
from windlass.layers import Conv2d
from windlass.tuning import accelerate as module_under_test
from windlass.tuning import convolution
from windlass.tuning.cache import TimesCache
from windlass.tuning.convolution import OnEvent, Tuner
from windlass.tuning.cost import Machine
from windlass.tuning.results import Settings

PREFERRED = ("winograd-4x4", "winograd-2x2", "fft-16", "direct")
"""Who wins where a test tells the times: the first that takes part."""


@pytest.fixture(autouse=True)
def told_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tuner]]:
    """Every tuner measures what `PREFERRED` says; the list holds those that were made."""
    made: list[Tuner] = []

    def make(settings: Settings, *, threads: int, on_event: OnEvent) -> Tuner:
        tuner = Tuner(
            settings=settings,
            machine=Machine(1e9, 1e12, threads),
            cache=TimesCache({}, warn=lambda message: None, folder=None),
            measure=lambda case, direction, names: {
                name: 1.0 if name == "torch" else 0.1 * (1 + PREFERRED.index(name)) if name in PREFERRED else 2.0
                for name in names
            },
            workspace=lambda name, direction, case: 0,
            on_event=on_event,
        )
        made.append(tuner)
        return tuner

    monkeypatch.setattr(module_under_test, "make_tuner", make)
    monkeypatch.setattr(convolution, "BEHIND", 1e9)
    monkeypatch.setattr(convolution, "HOPELESS", 1e9)  # all that can take part are measured
    monkeypatch.setattr(convolution, "MEASURED", 99)
    yield made


def small() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 16, 3, padding=1),
            relu=nn.ReLU(inplace=True),
            norm=nn.BatchNorm2d(16),
            second=nn.Conv2d(16, 8, 3, padding="same", bias=False),
            act=nn.ReLU(),
            third=nn.Conv2d(8, 8, 5, padding=2),
            drop=nn.Dropout(0.5),
            last=nn.Conv2d(8, 4, 3, stride=2),
        )
    )


def images(batch: int = 2, channels: int = 3, side: int = 12) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def results(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output, parameters' gradients, input's gradient."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, x.grad


def assert_same(found: Any, expected: Any) -> None:
    # Winograd F(4×4, 3×3) errs by a few 1e-6 of the largest output; gradients sum a hundred of them.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_results_and_gradients_are_the_model_s_own(training: bool, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = small().to(memory_format=layout)
    x = images().contiguous(memory_format=layout)
    expected = results(copy.deepcopy(model), x)
    fast = windlass.accelerate(model, x, training=training)
    assert fast is model
    assert isinstance(model.first, Conv2d) and isinstance(model.second, Conv2d)
    assert_same(results(model, x), expected)
    assert model(x).is_contiguous(memory_format=layout)


def test_choices_are_by_direction_and_pytorch_s_stay_pytorch_s() -> None:
    model = windlass.accelerate(small(), images())
    choices = {name: child.algorithm for name, child in model.named_modules() if isinstance(child, Conv2d)}
    assert choices == {
        "first": "winograd-4x4/torch/winograd-4x4",  # the network's input wants no gradient
        "second": "winograd-4x4",
        "third": "winograd-2x2",
        "last": "direct",
    }
    inference = windlass.accelerate(small(), images(), training=False)
    assert isinstance(inference.second, Conv2d) and inference.second.algorithm == "winograd-4x4/torch/torch"


def test_state_dicts_parameters_and_optimizers_stay() -> None:
    model = small()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    windlass.accelerate(model, images())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert list(model.state_dict()) == list(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    small().load_state_dict(model.state_dict())
    model.load_state_dict(small().state_dict())
    results(model, images())
    weight = model.first.weight.clone()
    optimizer.step()
    assert not torch.equal(model.first.weight, weight)


def test_random_generators_statistics_gradients_and_modes_stay() -> None:
    model = small()
    model.norm.eval()
    results(model, images())
    model.train()
    model.norm.eval()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    modes = {name: child.training for name, child in model.named_modules()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    windlass.accelerate(model, images())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert random.getstate() == states[2]
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1]), name
    assert len(gradients) == 9
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0] and torch.equal(gradients[name][0], gradients[name][1]), name
    assert {name: child.training for name, child in model.named_modules()} == modes


def test_statistics_stay_in_training_mode_too() -> None:
    model = small().train()
    windlass.accelerate(model, images())
    assert model.norm.num_batches_tracked == 0 and torch.equal(model.norm.running_mean, torch.zeros(16))


def test_relus_right_behind_are_fused_and_keys_stay() -> None:
    model = small()
    keys = list(dict(model.named_children()))
    windlass.accelerate(model, images())
    assert isinstance(model.first, Conv2d) and model.first.activation == "relu"
    assert isinstance(model.second, Conv2d) and model.second.activation == "relu"
    assert isinstance(model.third, Conv2d) and model.third.activation is None
    assert type(model.relu) is nn.Identity and type(model.act) is nn.Identity
    assert list(dict(model.named_children())) == keys


class Reads(nn.Module):
    """Goes through its Sequential by hand and reads between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        between: Tensor = self.body[0](x)
        y: Tensor = self.body[1](between) + between
        return y


class OwnForward(nn.Sequential):
    """Not what a Sequential does."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        z: Tensor = y - self[1](y)
        return z


class CallsBoth(nn.Module):
    """Calls the Sequential, and its convolution once more."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) + self.body[0](x)
        return y


def shared_relu() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), relu, nn.Conv2d(8, 8, 3, padding=1), relu)


def shared_convolution() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), conv)


def hooked(which: int, register: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        getattr(model[which], register)(lambda *arguments: None)
        return model

    return make


@pytest.mark.parametrize(
    "make",
    [
        Reads,
        lambda: OwnForward(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        CallsBoth,
        shared_convolution,
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU()),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Identity(), nn.ReLU()),
        hooked(0, "register_forward_hook"),
        hooked(1, "register_forward_hook"),
        hooked(1, "register_forward_pre_hook"),
        hooked(0, "register_full_backward_hook"),
    ],
)
def test_a_relu_is_left_where_somebody_else_may_read_the_convolution(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x = images()
    expected = results(copy.deepcopy(model), x)
    windlass.accelerate(model, x)
    found = [child for child in model.modules() if isinstance(child, Conv2d)]
    assert found and all(conv.activation is None for conv in found)
    assert_same(results(model, x), expected)


def test_a_relu_that_serves_two_convolutions_is_fused_with_both() -> None:
    torch.manual_seed(0)
    model = shared_relu()
    expected = results(copy.deepcopy(model), images())
    windlass.accelerate(model, images())
    assert [type(child).__name__ for child in model.children()] == ["Conv2d", "Identity", "Conv2d", "Identity"]
    assert_same(results(model, images()), expected)


def test_hooks_stay_and_their_handles_still_remove_them() -> None:
    model = small()
    seen: list[str] = []
    handle = model.second.register_forward_hook(lambda *arguments: seen.append("forward"))
    model.second.register_full_backward_hook(lambda *arguments: seen.append("backward"))
    windlass.accelerate(model, images())
    assert isinstance(model.second, Conv2d)
    seen.clear()
    results(model, images())
    assert seen == ["forward", "backward"]
    handle.remove()
    seen.clear()
    results(model, images())
    assert seen == ["backward"]


class Pyramid(nn.Module):
    """One convolution for two sizes, and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.alias = self.conv
        self.unused = nn.Conv2d(3, 3, 3)
        self.own = Own(3, 3, 3, padding=1)
        self.wide = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.alias(x)
        small = self.conv(nn.functional.avg_pool2d(x, 2))
        z: Tensor = self.wide(self.own(y)) + nn.functional.interpolate(small, scale_factor=2.0)
        return z


class Own(nn.Conv2d):
    """A subclass may compute anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_shared_modules_are_replaced_everywhere_and_what_must_stay_stays(told_times: list[Tuner]) -> None:
    torch.manual_seed(0)
    model: Any = Pyramid()
    x = images()
    expected = results(copy.deepcopy(model), x)
    windlass.accelerate(model, x)
    assert isinstance(model.conv, Conv2d) and model.alias is model.conv
    assert type(model.unused) is nn.Conv2d and type(model.own) is Own and type(model.wide) is nn.Conv2d
    plan = model.windlass_plan
    rows = {layer.name: layer for layer in plan.layers}
    assert list(rows) == ["conv", "unused", "wide"]
    assert [case.shape.height for case in rows["conv"].cases] == [12, 12, 6]
    assert rows["unused"].reason == "the example input does not reach it"
    assert rows["wide"].reason == "pads with circular, not with zeros"
    assert_same(results(model, x), expected)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda conv: conv.double(), "computes in float64, not in float32"),
        (lambda conv: setattr(conv, "forward", conv.forward), "its forward was replaced"),
        (lambda conv: nn.utils.spectral_norm(conv), "its weight is made by a hook"),
    ],
)
def test_other_convolutions_are_left_alone(spoil: Callable[[nn.Conv2d], object], why: str) -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spoil(model[0])
    windlass.accelerate(model, images().to(next(model.parameters()).dtype))
    assert type(model[0]) is nn.Conv2d
    assert model.windlass_plan.layers[0].reason == why


def test_parametrized_convolutions_are_no_longer_pytorch_s_own() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    windlass.accelerate(model, images())
    assert not isinstance(model[0], Conv2d)


@pytest.mark.parametrize("options", [{"accuracy": "exact"}, {"tune": "off"}])
def test_exact_and_off_change_nothing(options: dict[str, Any], told_times: list[Tuner]) -> None:
    model = small()
    expected = results(copy.deepcopy(model), images())
    windlass.accelerate(model, images(), **options)
    assert told_times == [], "nothing is even measured"
    assert not any(isinstance(child, Conv2d) for child in model.modules())
    found = results(model, images())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    assert all(str(layer.choice) == "torch" for layer in model.windlass_plan.layers)


def test_accuracy_and_workspace_reach_the_chooser(told_times: list[Tuner]) -> None:
    model = windlass.accelerate(small(), images(), accuracy="strict", workspace_mb=3, tune="measure")
    assert told_times[0].settings == Settings(accuracy="strict", workspace_mb=3)
    assert isinstance(model.second, Conv2d) and model.second.algorithm == "winograd-2x2"


def test_once_more_is_the_same() -> None:
    model = windlass.accelerate(small(), images())
    first = str(model)
    expected = results(copy.deepcopy(model), images())
    windlass.accelerate(model, images())
    assert str(model) == first
    assert torch.equal(results(model, images())[0], expected[0])


def test_a_model_may_be_a_convolution() -> None:
    conv: Any = nn.Conv2d(3, 8, 3)
    fast: Any = windlass.accelerate(conv, images())
    assert fast.windlass_plan.layers[0].name == ""
    assert isinstance(fast, Conv2d) and fast.weight is conv.weight


class TwoInputs(nn.Module):
    """Takes arguments by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = self.conv(x) * scale
        return y


@pytest.mark.parametrize("example", [images(), (images(), 2.0), {"x": images(), "scale": 2.0}])
def test_examples_are_a_tensor_a_tuple_or_a_mapping(example: object) -> None:
    assert isinstance(windlass.accelerate(TwoInputs(), example).conv, Conv2d)


def test_a_model_that_fails_on_the_example_is_left_as_it_was() -> None:
    model = small()
    before = str(model)
    with pytest.raises(ConfigError, match="the model fails on the example input: RuntimeError: "):
        windlass.accelerate(model, images(channels=4))
    assert str(model) == before
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


def test_the_plan_is_a_table_and_a_mapping() -> None:
    model = windlass.accelerate(small(), images())
    plan = model.windlass_plan
    lines = str(plan).splitlines()
    assert lines[0].split()[:3] == ["layer", "convolution", "direction"]
    assert any("winograd-4x4 + relu" in line and "10.00" in line and "first" in line for line in lines)
    assert any(line.startswith("4 of 4 convolutions by another algorithm") for line in lines)
    mapping = json.loads(json.dumps(plan.to_mapping()))
    assert [layer["name"] for layer in mapping["layers"]] == ["first", "second", "third", "last"]
    assert mapping["layers"][1]["convolution"] == "winograd-4x4"
    assert mapping["layers"][1]["directions"]["input"]["measured_s"]["torch"] == 1.0
    assert mapping["torch_seconds"] == 11.0


def test_channels_last_is_advised_not_done() -> None:
    model: Any = nn.Sequential(nn.Conv2d(64, 64, 1))
    x = images(channels=64)
    windlass.accelerate(model, x, tune="model")
    assert model[0].weight.is_contiguous()
    advice = model.windlass_plan.advice
    assert len(advice) == 1 and "channels_last" in advice[0]
    assert str(model.windlass_plan).splitlines()[-1] == advice[0]
    last: Any = nn.Sequential(nn.Conv2d(64, 64, 1))
    last.to(memory_format=torch.channels_last)
    windlass.accelerate(last, x.contiguous(memory_format=torch.channels_last), tune="model")
    assert last.windlass_plan.advice == ()


@pytest.mark.parametrize("options", [{"accuracy": "sloppy"}, {"tune": "guess"}, {"workspace_mb": -1}])
def test_unknown_options_are_refused_before_anything_runs(options: dict[str, Any]) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("the model ran")

    model = small()
    model.register_forward_pre_hook(fail)
    with pytest.raises(ConfigError):
        windlass.accelerate(model, images(), **options)


def test_import_windlass_brings_no_torch() -> None:
    program = (
        "import sys, windlass; assert 'torch' not in sys.modules and 'numba' not in sys.modules;"
        "assert 'accelerate' in windlass.__all__ and 'accelerate' in dir(windlass);"
        "windlass.accelerate; assert 'torch' in sys.modules;"
        "import contextlib\n"
        "with contextlib.suppress(AttributeError): windlass.acelerate; raise SystemExit('found')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path.home(), timeout=60)
