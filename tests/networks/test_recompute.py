"""Blocks that are computed again: the same numbers, statistics once, and the memory that is predicted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from measured_steps import step_peak
from torch import nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.networks import NETWORKS, build_network
from windlass.networks.capture import capture
from windlass.networks.recompute import recompute_blocks

NETS = {"alexnet": 64, "vgg11": 32, "googlenet": 80, "resnet18": 32}
"""Networks, and a side of their images that is quick."""


def build(name: str, *, side: int) -> nn.Module:
    torch.manual_seed(3)
    return build_network(name, num_classes=10, in_channels=3, image_size=side)


def gradients(module: nn.Module, side: int, *, steps: int = 2) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of some steps of plain descent, and then all gradients, buffers and one number at random."""
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        module.zero_grad()
        x, y = torch.randn(4, 3, side, side), torch.randint(0, 10, (4,))
        outputs: Any = module(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = torch.stack([functional.cross_entropy(output, y) for output in outputs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=0.01)
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return losses, [*found, *module.buffers(), torch.rand(1)]


@pytest.mark.parametrize("name", NETS)
def test_every_bit_is_the_same_with_dropout_and_statistics(name: str) -> None:
    side = NETS[name]
    plain = build(name, side=side)
    again = copy.deepcopy(plain)
    keys = list(again.state_dict())
    assert recompute_blocks(again)
    assert list(again.state_dict()) == keys
    (losses, tensors), (losses_again, tensors_again) = gradients(plain, side), gradients(again, side)
    assert losses == losses_again
    for one, other in zip(tensors, tensors_again, strict=True):
        assert one.equal(other)


def test_a_copy_is_no_alias() -> None:
    """The shadowed forward of a copied network is the copy's own."""
    module = build("resnet18", side=32)
    recompute_blocks(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    x = torch.randn(2, 3, 32, 32)
    assert not module.eval()(x).equal(twin.eval()(x))


def test_blocks_are_stages_residual_blocks_and_inceptions() -> None:
    assert recompute_blocks(build("alexnet", side=64)) == (
        "features.0..2", "features.3..5", "features.6..12", "classifier.0..7",
    )  # fmt: skip
    resnet = recompute_blocks(build("resnet18", side=32))
    assert resnet == ("stem.0..2", *(f"layer{stage}.{block}" for stage in range(1, 5) for block in (0, 1)))
    googlenet = recompute_blocks(build("googlenet", side=80))
    assert googlenet[:5] == ("stem.0..1", "stem.2..6", "inception3.0", "inception3.1..2", "inception4a")


def test_a_wrapped_network_falls_into_the_same_blocks_and_twice_is_once() -> None:
    module = nn.ModuleDict({"net": build("resnet18", side=32)})
    assert recompute_blocks(module) == tuple(f"net.{path}" for path in recompute_blocks(build("resnet18", side=32)))
    layers = [layer for layer in module["net"].modules() if "forward" in vars(layer)]
    before = [layer.forward for layer in layers]
    recompute_blocks(module)
    assert [layer.forward for layer in layers] == before


def test_no_block_begins_with_a_layer_that_overwrites_its_input() -> None:
    layers = [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1)]
    assert recompute_blocks(nn.Sequential(*layers)) == ("0..3", "4")


@pytest.mark.parametrize("name", NETS)
def test_predicted_memory_is_what_pytorch_held(name: str) -> None:
    """Within 5 %, as without; and less than without."""
    side, batch = NETS[name], 16
    module = build(name, side=side)
    shape = (batch, 3, side, side)
    plain = capture(module, shape, name=name, num_classes=10)
    recompute_blocks(module)
    graph = capture(module, shape, name=name, num_classes=10)
    assert graph.digest() == plain.digest()
    assert graph.forward_macs == plain.forward_macs and graph.backward_macs == plain.backward_macs
    assert graph.peak_bytes == pytest.approx(step_peak(module, shape, 10), rel=0.05)
    assert graph.memories()["D"] == kept_bytes(module, shape)
    assert graph.memories()["D"] < plain.memories()["D"] and graph.peak_bytes < plain.peak_bytes
    assert 0.5 * graph.forward_macs < graph.recomputed_macs <= graph.forward_macs


def kept_bytes(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes of the tensors, parameters and buffers left out, that autograd holds after a forward pass."""
    owned = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    x = torch.randn(shape)
    owned.add(x.untyped_storage()._cdata)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = module(x)
    assert outputs is not None
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in owned)


def test_a_network_without_blocks_is_refused() -> None:
    entry = NETWORKS["lenet5"]
    module = build_network("lenet5", num_classes=10, in_channels=entry.in_channels, image_size=32)
    with pytest.raises(ConfigError, match="recompute: network 'lenet5' has no blocks: all its layers stand in one"):
        recompute_blocks(module, name="lenet5")
