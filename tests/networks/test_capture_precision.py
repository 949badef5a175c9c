"""A network captured under a recipe: bytes of every memory, and the peak beside PyTorch's own record of a real step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from measured_steps import allocated_peak, step_peak
from torch import nn
from torch.nn import functional

from windlass import precision
from windlass.errors import ConfigError
from windlass.networks import NETWORKS, build_network
from windlass.networks.capture import capture
from windlass.plan.graph import Graph, Layer
from windlass.plan.recipe import parse_recipe

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STEPS = [
    ("lenet5", 64, 32),
    ("lenet5", 256, 32),
    pytest.param("alexnet", 16, 224, marks=pytest.mark.slow),
    pytest.param("resnet18", 64, 32, marks=pytest.mark.slow),
    pytest.param("resnet18", 4, 224, marks=pytest.mark.slow),
]


def built(name: str, *, side: int, layout: str = "contiguous") -> nn.Module:
    entry = NETWORKS[name]
    torch.manual_seed(0)
    module = build_network(name, num_classes=entry.num_classes, in_channels=entry.in_channels, image_size=side)
    return module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload, no-any-return]


def captured(module: nn.Module, name: str, batch: int, side: int, recipe: str | None, share: float = 0.0) -> Graph:
    entry = NETWORKS[name]
    return capture(
        module, (batch, entry.in_channels, side, side), name=name, num_classes=entry.num_classes,
        recipe=None if recipe is None else parse_recipe(recipe), share=share,
    )  # fmt: skip


def step_peak_under(module: nn.Module, recipe: str, shape: tuple[int, ...], num_classes: int, layout: str) -> int:
    """Most bytes of tensors alive in a step with update, from the allocator's record."""
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    y = torch.randint(0, num_classes, shape[:1])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    lowered = precision.apply(module, optimizer, recipe, store_gradients=True)
    codes = [entry.codes for entry in lowered.stored]
    held = sum(t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers(), *codes, x, y))

    def step() -> None:
        outputs = module(x)
        loss = functional.cross_entropy(outputs, y)
        del outputs
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        optimizer.step()

    return held + allocated_peak(step)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "batch", "side"), STEPS)
def test_predicted_peak_is_what_pytorch_held(name: str, batch: int, side: int, layout: str) -> None:
    entry = NETWORKS[name]
    module = built(name, side=side, layout=layout)
    graph = captured(module, name, batch, side, "fixed16")
    shape = (batch, entry.in_channels, side, side)
    measured = step_peak_under(module, "fixed16", shape, entry.num_classes, layout)
    assert graph.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "recipe",
    ["bfloat16", "fixed16,activations=float32", "weights=<2,14>,updates=<2,14>", "fixed16,weights=<4,18>"],
)
def test_predicted_peak_of_other_recipes(recipe: str) -> None:
    module = built("lenet5", side=32)
    graph = captured(module, "lenet5", 64, 32, recipe)
    measured = step_peak_under(module, recipe, (64, 1, 32, 32), 10, "contiguous")
    assert graph.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("name", "batch", "side"), [("lenet5", 64, 32), ("resnet18", 8, 32)])
def test_predicted_peak_in_float32_and_channels_last(name: str, batch: int, side: int) -> None:
    entry = NETWORKS[name]
    module = built(name, side=side, layout="channels_last")
    graph = captured(module, name, batch, side, None)
    measured = step_peak(module, (batch, entry.in_channels, side, side), entry.num_classes)
    assert graph.peak_bytes == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_what_a_convolution_takes_for_a_moment_is_predicted(kernel: int, stride: int, layout: str) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, kernel, stride, kernel // 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    module = module.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    graph = capture(module, (8, 3, 32, 32), name="n", num_classes=10)
    assert graph.peak_bytes == pytest.approx(step_peak(module, (8, 3, 32, 32), 10), rel=0.05)


def without_bytes(layer: Layer) -> Layer:
    return replace(layer, kept_bytes=0, weight_bytes=0, output_grad_bytes=0, weight_grad_bytes=0)


@pytest.mark.parametrize(
    ("name", "batch", "side"), [("lenet5", 64, 32), ("alexnet", 8, 224), ("googlenet", 2, 64), ("resnet18", 8, 64)]
)
def test_memories_are_halved_and_the_network_is_the_same(name: str, batch: int, side: int) -> None:
    module = built(name, side=side)
    before, after = (captured(module, name, batch, side, recipe) for recipe in (None, "fixed16"))
    assert [without_bytes(layer) for layer in after.layers] == [without_bytes(layer) for layer in before.layers]
    assert (before.number_format, after.number_format) == ("float32", "fixed16")
    whole, half = before.memories(), after.memories()
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert half["∇D"] == whole["∇D"] / 2
    assert half["∇W"] == whole["∇W"] / 2
    assert half["W"] - buffers == (whole["W"] - buffers) / 2
    # a batch's statistics and other tensors of one dimension stay; indices of pooling and masks are below a half
    assert half["D"] < 0.505 * whole["D"]


def test_a_layer_s_own_formats_and_late_ones_are_counted() -> None:
    module = built("lenet5", side=32)
    plain, own = (captured(module, "lenet5", 64, 32, f"fixed16{more}") for more in ("", ",f6.weights=<4,18>"))
    for a, b in zip(plain.layers, own.layers, strict=True):
        assert b.weight_bytes == (2 if a.name == "f6" else 1) * a.weight_bytes
    begun, late = (captured(module, "lenet5", 64, 32, "fixed16,late=0.5:+4", share) for share in (0.4, 0.5))
    assert begun.memories() == plain.memories()
    assert late.memories()["∇W"] == 2 * plain.memories()["∇W"]
    assert late.peak_bytes > plain.peak_bytes


def test_the_update_can_be_the_peak() -> None:
    """One wide layer on one sample: nothing else takes memory."""
    graph = capture(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), (1, 1, 8, 8), name="n", num_classes=4,
        recipe=parse_recipe("weights=<2,14>"),
    )  # fmt: skip
    assert graph.peak_at.rpartition(" ")[2] in ("backward", "update")
    assert graph.memories()["W"] == 2 * (64 * 4 + 4)
    assert graph.memories()["∇W"] == 4 * (64 * 4 + 4)


def test_nothing_is_left_on_the_module() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    parameters = list(module.parameters())
    attributes = {name: dict(child.__dict__) for name, child in module.named_modules()}
    hooks = {name: {k: dict(v) for k, v in own.items() if "hooks" in k and v} for name, own in attributes.items()}
    seed = torch.get_rng_state()
    recipe = parse_recipe("fixed16")
    graph = capture(module, (4, 1, 8, 8), name="n", num_classes=3, recipe=recipe)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    for name, child in module.named_modules():
        assert set(child.__dict__) == set(attributes[name])
        assert {k: dict(v) for k, v in child.__dict__.items() if "hooks" in k and v} == hooks[name]
    assert torch.equal(seed, torch.get_rng_state())
    precision.apply(module, None, recipe).remove()
    assert capture(module, (4, 1, 8, 8), name="n", num_classes=3, recipe=recipe) == graph


def test_a_network_that_fails_is_left_as_it_was() -> None:
    module = built("lenet5", side=32)
    with pytest.raises(ConfigError, match="fails on an input of shape"):
        capture(module, (4, 1, 9, 9), name="lenet5", num_classes=10, recipe=parse_recipe("fixed16"))
    assert not any("forward" in vars(child) for child in module.modules())
    assert torch.isfinite(module(torch.zeros(1, 1, 32, 32))).all()


def test_deferred_gradients_stay_float32() -> None:
    module, recipe = built("lenet5", side=32), parse_recipe("fixed16")
    codes, wide = (
        capture(module, (1, 1, 32, 32), name="lenet5", num_classes=10, recipe=recipe, defer_gradients=deferred)
        for deferred in (False, True)
    )
    assert wide.memories() == {**codes.memories(), "∇W": 2 * codes.memories()["∇W"]}
    assert wide.peak_bytes > codes.peak_bytes


def test_evaluation_has_neither_errors_nor_updates() -> None:
    module = built("lenet5", side=32)
    graph = capture(
        module, (8, 1, 32, 32), name="lenet5", num_classes=10, training=False, recipe=parse_recipe("fixed16")
    )
    memories = graph.memories()
    assert (memories["D"], memories["∇D"], memories["∇W"]) == (0, 0, 0) and memories["W"] > 0
    assert graph.peak_at.endswith("forward")


def test_a_layer_that_is_not_there_is_named() -> None:
    module = built("lenet5", side=32)
    with pytest.raises(ConfigError, match=r"unknown layer 'c7'.*c1"):
        captured(module, "lenet5", 8, 32, "fixed16,c7.weights=<4,12>")
    captured(module, "lenet5", 8, 32, "fixed16")  # and nothing is left behind
