"""Bytes that a step hands to its transport, by layer and phase: what the placement says, to the byte."""

from typing import Any

import pytest
import torch
from placement_cases import NETS, PLACEMENTS, build, input_shape
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from windlass.parallel import NullTransport, PlacedModule, trace
from windlass.parallel.trace import Traced
from windlass.plan.derive import Derived, derive


def counted(
    network: nn.Module, derived: Derived, traced: Traced, rank: int, batch: int
) -> dict[tuple[str, str], tuple[int, int]]:
    """A step of one worker on tensors without elements."""
    mesh = derived.placement.mesh
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = PlacedModule(network, traced, derived, NullTransport(mesh, rank)).train()
        model.begin_step(0, batch)
        outputs = model(model.local_images(torch.empty(batch, *traced.input_shape[1:])))
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        loss: Any = torch.stack([output.sum() for output in several]).sum()
        loss.backward()
        model.sum_gradients()
    return model.transport.counted


def predicted(derived: Derived, rank: int, batch: int) -> dict[tuple[str, str], tuple[int, int]]:
    rows = derived.traffic(rank, batch=batch)
    return {
        (row.name, phase): (getattr(row, f"{phase}_sent"), getattr(row, f"{phase}_received"))
        for row in rows
        for phase in ("forward", "backward", "gradient")
    }


@pytest.mark.parametrize("net", ["lenet5", "alexnet", "googlenet", "resnet18", "coates"])
def test_bytes_are_those_of_the_placement(net: str) -> None:
    """On the last of the most workers, whose parts are the smallest, and a batch other than the traced one."""
    network = build(net, torch.float32)
    traced = trace(network, input_shape(net))
    for name in NETS[net].placements:
        sizes, make = PLACEMENTS[name]
        derived = derive(traced.ops, make(traced.ops, sizes[-1]), outputs=traced.outputs, own_loss=net == "coates")
        rank, batch = sizes[-1] - 1, NETS[net].batch + 2
        found, wanted = counted(network, derived, traced, rank, batch), predicted(derived, rank, batch)
        nothing = (0, 0)
        for key in found.keys() | wanted.keys():
            assert found.get(key, nothing) == wanted.get(key, nothing), (name, key)
        assert sum(sent for sent, _ in found.values()) > 0
