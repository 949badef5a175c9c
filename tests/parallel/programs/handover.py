"""Schemes b and c and the variable batch against a loop written out for one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from leave import leave
from torch import Tensor, nn
from torch.nn import functional

import windlass  # noqa: F401  registers the backend
from windlass.parallel.apply import apply
from windlass.parallel.placed import PlacedModule
from windlass.parallel.rounds import Rounds
from windlass.parallel.trace import trace
from windlass.plan.handover import num_rounds, variable_batch
from windlass.plan.mesh import Mesh
from windlass.plan.placements import by_name

RATE, HEAD_RATE = 0.05, 0.03
TOLERANCE = 1e-10
"""Float64 sums of a few hundred terms of size 1, in another order: 500 · 2^-53 · 3 steps, with room for the chain."""
SHAPE = (3, 12, 12)


class Network(nn.Module):
    """Convolutions, then fully connected layers whose widths no number of workers divides."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 3))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(96, 13), nn.ReLU(), nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 7)
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x_NCHW))
        return out


def batches(batch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, *SHAPE, generator=generator, dtype=torch.float64),
         torch.randint(0, 7, (size,), generator=generator))
        for size in (batch, batch, max(1, batch - 3))  # the last batch of an epoch is shorter
    ]  # fmt: skip


def network() -> Network:
    torch.manual_seed(3)
    return Network().double()


def reference(scheme: str, *, batch: int, workers: int, rounds: int, updates: int) -> tuple[list[float], list[Tensor]]:
    """One process: every round's samples by hand, the head updated `updates` times a step."""
    net, losses = network(), []
    for images, labels in batches(batch):
        blocks = np.array_split(np.arange(len(labels)), workers)
        cuts = [np.array_split(block, rounds) for block in blocks]
        parts = blocks if scheme == "b" else [np.concatenate([cut[turn] for cut in cuts]) for turn in range(rounds)]
        groups = [parts[first : first + rounds // updates] for first in range(0, rounds, rounds // updates)]
        crossing = net.features(images)
        own = crossing.detach().requires_grad_()
        gradient, total = torch.zeros_like(own), 0.0
        for group in groups:
            share = sum(len(part) for part in group)
            for part in group:
                loss = functional.cross_entropy(net.classifier(own[part]), labels[part], reduction="sum")
                (loss / share).backward()  # type: ignore[no-untyped-call]
                total += loss.item() / len(labels)
            assert own.grad is not None
            gradient += own.grad * (share / len(labels))
            own.grad = None
            descend(net.classifier, HEAD_RATE)
        torch.autograd.backward([crossing], [gradient])
        descend(net.features, RATE)
        losses.append(total)
    return losses, [parameter.detach() for parameter in net.parameters()]


@torch.no_grad()
def descend(module: nn.Module, rate: float) -> None:
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.sub_(rate * parameter.grad)
        parameter.grad = None


def sum_loss(number: int, logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    assert number == 0
    right = float((logits.detach().argmax(1) == labels).sum())
    return functional.cross_entropy(logits, labels, reduction="sum"), right


def placed_run(
    scheme: str, *, batch: int, head_batch: int, mesh: str = ""
) -> tuple[list[float], dict[str, Tensor], int, int]:
    """The same through the workers."""
    net = network()
    ops = trace(net, (batch, *SHAPE)).ops
    placement = by_name(f"hybrid:{scheme}", ops, dist.get_world_size(), **({"mesh": Mesh.parse(mesh)} if mesh else {}))
    assert placement.handover is not None
    members = placement.mesh.shape[-1]
    handover = variable_batch(scheme, placement.handover.before, batch=batch, head_batch=head_batch, members=members)
    placed = apply(net, replace(placement, handover=handover), input_shape=(batch, *SHAPE))
    named = dict(placed.named_parameters())
    head = {name: parameter for name, parameter in named.items() if name.startswith("classifier.")}

    def update(names: Mapping[str, Tensor], rate: float) -> None:
        placed.sum_gradients(names)
        with torch.no_grad():
            for parameter in names.values():
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
                parameter.grad = None

    rounds = Rounds(placed, handover, sum_loss, on_update=lambda: update(head, HEAD_RATE))
    losses, right = [], 0.0
    for images, labels in batches(batch):
        placed.transport.counters.clear()
        mine = placed.local_images(images)
        own_labels = placed.local_labels(labels)
        loss, correct = rounds.step(mine, own_labels, seed=0, batch=len(labels))
        update({name: parameter for name, parameter in named.items() if name not in head}, RATE)
        check_bytes(placed, len(labels))
        total = torch.tensor([loss.item(), correct], dtype=torch.float64)
        dist.all_reduce(total)
        losses.append(total[0].item())
        right += total[1].item()
    number = num_rounds(handover, members)
    return losses, placed.full_state_dict(), number, number // (handover.update_every or number)


def check_bytes(placed: PlacedModule, batch: int) -> None:
    """What was handed over in a step, by layer and phase, is what the plan says."""
    rows = {row.name: row for row in placed.derived.traffic(dist.get_rank(), batch=batch, itemsize=8)}
    counted = placed.transport.counted
    for (name, phase), found in counted.items():
        wanted = (getattr(rows[name], f"{phase}_sent"), getattr(rows[name], f"{phase}_received"))
        assert found == wanted, (name, phase, found, wanted)
    assert sum(sent for sent, _ in counted.values()) == sum(row.sent for row in rows.values())


def check(scheme: str, *, batch: int, head_batch: int, mesh: str = "") -> None:
    losses, state, rounds, updates = placed_run(scheme, batch=batch, head_batch=head_batch, mesh=mesh)
    wanted, weights = reference(scheme, batch=batch, workers=dist.get_world_size(), rounds=rounds, updates=updates)
    assert np.allclose(losses, wanted, rtol=0, atol=TOLERANCE), (scheme, batch, head_batch, losses, wanted)
    for (name, _), weight in zip(network().named_parameters(), weights, strict=True):
        difference = float((state[name] - weight).abs().max())
        assert difference < TOLERANCE, (scheme, batch, head_batch, name, difference)


if __name__ == "__main__":
    dist.init_process_group(os.environ.get("WINDLASS_TEST_BACKEND", "windlass"))
    SIZE = dist.get_world_size()
    torch.set_num_threads(1)
    for scheme in "bc":
        check(scheme, batch=4 * SIZE, head_batch=4 * SIZE)
        check(scheme, batch=4 * SIZE + 1, head_batch=4 * SIZE + 1)
        check(scheme, batch=4 * SIZE, head_batch=4)
    check("c", batch=24, head_batch=6)
    if SIZE == 4:
        check("c", batch=16, head_batch=16, mesh="node:2,device:2")
    if dist.get_rank() == 0:
        sys.stdout.write("all passed\n")
    dist.barrier()
    dist.destroy_process_group()
    leave()
