"""Networks and placements of the tests: the built-in networks on small images, each placement on 1 to 4 workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from windlass.networks import build_network
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Op, Placement
from windlass.plan.placements import BUILDERS, by_name


def small_alexnet() -> Any:
    """AlexNet on 67 pixels, its classifier of 75 and 50 neurons, which four workers cannot divide evenly."""
    network: Any = build_network("alexnet", num_classes=10, in_channels=3, image_size=67, local_response_norm=True)
    sizes = iter([(256, 75), (75, 50), (50, 10)])
    for place, layer in enumerate(network.classifier):
        if isinstance(layer, nn.Linear):
            network.classifier[place] = nn.Linear(*next(sizes))
    return network


def narrow_resnet() -> nn.Module:
    return build_network("resnet18", num_classes=10, in_channels=3, image_size=12, stem="cifar")


@dataclass(frozen=True)
class Net:
    """A network of the table: how it is made, its images (channels, side), the batch, the rate of its steps, and which
    placements it can have."""

    make: Callable[[], nn.Module]
    channels: int
    side: int
    batch: int
    rate: float
    placements: tuple[str, ...] = ("data", "model", "hybrid", "tiles", "inwards", "tiers", "mixture")


def _googlenet(side: int) -> nn.Module:
    return build_network("googlenet", num_classes=10, in_channels=3, image_size=side)


def _coates() -> nn.Module:
    return build_network("coates", num_classes=1, in_channels=3, image_size=24, layers=2, maps=4, field=5, norm=3)


NETS: dict[str, Net] = {
    "lenet5": Net(lambda: build_network("lenet5", num_classes=10, in_channels=1, image_size=32), 1, 32, 6, 0.02),
    "alexnet": Net(small_alexnet, 3, 67, 5, 0.05),
    "googlenet": Net(lambda: _googlenet(32), 3, 32, 5, 0.05),
    "resnet18": Net(narrow_resnet, 3, 12, 5, 0.05),
    "alexnet_dropout": Net(small_alexnet, 3, 67, 5, 0.05),
    "coates": Net(_coates, 3, 24, 5, 0.001, ("data", "tiles", "squares")),
    "googlenet_heads": Net(lambda: _googlenet(80), 3, 80, 4, 0.05),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network, without dropout unless its name says so: the plain module draws other masks than a placed one."""
    torch.manual_seed(7)
    network = NETS[name].make().to(dtype)
    for child in network.modules():
        if isinstance(child, nn.Dropout) and not name.endswith("dropout"):
            child.p = 0.0
    return network


def input_shape(name: str) -> tuple[int, int, int, int]:
    net = NETS[name]
    return net.batch, net.channels, net.side, net.side


def _mixture(ops: tuple[Op, ...]) -> Placement:
    """Rows and columns, then output and input channels, then both at once; what cannot is replicated."""
    turns = [("rows", "columns"), ("rows", "out"), ("in", "batch"), ("out", "in"), ("in", "out"), ("batch", "rows")]
    layers: dict[str, tuple[str, ...]] = {}
    leading = [op for op in ops if op.kind in ("conv2d", "linear")]
    for number, op in enumerate(leading):
        ways: tuple[str, ...] = turns[number % len(turns)]
        if op.kind == "linear":
            ways = tuple(way if way in ("batch", "out", "in") else "replicate" for way in ways)
        layers[op.name] = ways
    return Placement(Mesh.parse("first:2,second:2"), ("rows", "columns"), layers)


def _tiers(ops: tuple[Op, ...]) -> Placement:
    return by_name("hybrid", ops, 4, mesh=Mesh.parse("node:2,device:2"))


def _inwards(ops: tuple[Op, ...]) -> Placement:
    """Every other layer divided by its input channels: the sums that tensor parallelism knows."""
    leading = [op for op in ops if op.kind in ("conv2d", "linear")]
    layers = {op.name: (("out",), ("in",))[number % 2] for number, op in enumerate(leading)}
    return Placement(Mesh.parse("model:3"), ("whole",), layers)


def _squares(ops: tuple[Op, ...]) -> Placement:
    layers = {op.name: ("rows", "columns") for op in ops if op.kind == "locallyconnected2d"}
    return Placement(Mesh.parse("down:2,across:2"), ("rows", "columns"), layers)


def _named(name: str) -> Callable[[tuple[Op, ...], int], Placement]:
    return lambda ops, workers: BUILDERS[name](ops, workers)


PLACEMENTS: dict[str, tuple[tuple[int, ...], Callable[[tuple[Op, ...], int], Placement]]] = {
    **{name: ((1, 2, 3, 4), _named(name)) for name in ("data", "model", "hybrid", "tiles")},
    "inwards": ((3,), lambda ops, workers: _inwards(ops)),
    "tiers": ((4,), lambda ops, workers: _tiers(ops)),
    "mixture": ((4,), lambda ops, workers: _mixture(ops)),
    "squares": ((4,), lambda ops, workers: _squares(ops)),
}
"""Placements by name: on how many workers, and how they are made."""


def placements_of(net: str, workers: int) -> list[str]:
    """The placements that a network has on so many workers."""
    return [name for name in NETS[net].placements if workers in PLACEMENTS[name][0]]
