"""Placed networks beside plain ones: ``equivalence.py BACKEND NET...``; rank 0 writes a line for each placement."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from leave import leave
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from placement_cases import NETS, PLACEMENTS, build, input_shape, placements_of

from windlass.parallel import NullTransport, PlacedModule, apply, trace
from windlass.parallel.moves import part_of
from windlass.plan.mesh import Mesh

dist: Any = torch.distributed
STEPS = 3
TOLERANCE = 1e-9
"""Of a tensor's largest element, in float64: sums of up to 10^5 terms in another order differ by 10^5 2^-53 = 10^-11 of
their terms' sizes, over some twenty layers and three steps."""

Record = list[tuple[float, dict[str, Tensor]]]
"""The loss and the whole gradients of every step."""


def batch_of(net: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(input_shape(net), generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 10, (len(images),), generator=generator)


def summed_loss(network: Any, outputs: Any, labels: Tensor, images: Tensor) -> Any:
    """Auxiliary outputs count 0.3."""
    if hasattr(network, "own_loss"):
        return network.own_loss(outputs, images)
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [functional.cross_entropy(output, labels, reduction="sum") for output in several]
    return losses[0] + 0.3 * sum(losses[1:], torch.zeros((), dtype=torch.float64))


def descend(network: nn.Module, rate: float) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            assert parameter.grad is not None
            parameter.sub_(rate * parameter.grad)
            parameter.grad = None


def plain(net: str) -> tuple[Record, dict[str, Tensor], Tensor]:
    """The run of the network as it is: records, state, logits in evaluation.  With dropout: placed on one worker."""
    network: Any = build(net).train()
    alone = net.endswith("dropout")
    if alone:
        network = apply(network, "data", input_shape=input_shape(net), transport=NullTransport(Mesh((("one", 1),)), 0))
    record = []
    for step in range(STEPS):
        images, labels = batch_of(net, step)
        if alone:
            network.begin_step(step, len(images))
        loss: Any = summed_loss(network, network(images), labels, images) / len(images)
        loss.backward()
        record.append(
            (loss.item(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
        )
        descend(network, NETS[net].rate)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    out = network.eval()(batch_of(net, STEPS)[0])
    return record, state, out[0] if isinstance(out, tuple) else out


def placed(net: str, model: PlacedModule) -> Record:
    model.train()
    record: Record = []
    ours = counts_here(model)
    for step in range(STEPS):
        images, labels = batch_of(net, step)
        model.begin_step(step, len(images))
        own = model.local_images(images)
        loss = summed_loss(model, model(own), model.local_labels(labels), own) / len(images)
        loss.backward()
        model.sum_gradients()
        if step == 0:
            check_bytes(model, len(images))
        whole = loss.detach() * ours
        dist.all_reduce(whole)
        record.append((whole.item(), model.gather_gradients()))
        descend(model, NETS[net].rate)
    return record


def counts_here(model: PlacedModule) -> float:
    """Workers with the same outputs compute the same loss: the first of them counts."""
    places = model.transport.mesh.coordinates(model.transport.rank)
    need = model.derived.outputs[0].need
    return float(all(part != "whole" or place == 0 for part, place in zip(need, places, strict=True)))


def check_bytes(model: PlacedModule, batch: int) -> None:
    """What went over the transport is what the placement said, layer by layer."""
    predicted = {row.name: row for row in model.derived.traffic(RANK, batch=batch, itemsize=8)}
    for (name, phase), found in model.transport.counted.items():
        row = predicted[name]
        assert found == (getattr(row, f"{phase}_sent"), getattr(row, f"{phase}_received")), (name, phase, found, row)
    assert sum(sent for sent, _ in model.transport.counted.values()) == sum(row.sent for row in predicted.values())


def check_case(net: str, name: str) -> float:
    """The largest difference between the placed and the plain run, relative to each tensor's largest element."""
    made = PLACEMENTS[name][1](TRACED.ops, SIZE)
    model = apply(NETWORK, made, input_shape=input_shape(net), group=GROUP)
    record, worst = placed(net, model), 0.0
    if RANK == 0:
        worst = compare(net, model, record)
    else:
        model.full_state_dict()
        check_evaluation(net, model.eval(), None)
    same_on_all(model.full_state_dict())
    return worst


def compare(net: str, model: PlacedModule, record: Record) -> float:
    worst = 0.0
    wanted, state, logits = PLAIN
    for (loss, grads), (wanted_loss, wanted_grads) in zip(record, wanted, strict=True):
        worst = max(worst, abs(loss - wanted_loss) / abs(wanted_loss))
        assert grads.keys() == wanted_grads.keys()
        worst = max(worst, *(relative(grads[key], wanted_grads[key]) for key in grads))
    found = model.full_state_dict()
    assert found.keys() == state.keys()
    worst = max(worst, *(relative(found[key], state[key]) for key in state))
    return max(worst, check_evaluation(net, model.eval(), logits))


def check_evaluation(net: str, model: PlacedModule, logits: Tensor | None) -> float:
    """The first output alone, or all of a network with an objective of its own."""
    images, _ = batch_of(net, STEPS)
    out = model(model.local_images(images))
    assert isinstance(out, tuple) == hasattr(model, "own_loss")
    main = out[0] if isinstance(out, tuple) else out
    if logits is None:
        return 0.0
    return relative(main, part_of(logits, model.derived.outputs[0].need, model.transport.mesh, RANK))


def relative(found: Tensor, wanted: Tensor) -> float:
    if found.numel() == 0:
        return 0.0
    return float((found - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-12)


def same_on_all(state: dict[str, Tensor]) -> None:
    """Copies of one tensor on several workers have the same bits."""
    mine = torch.stack([tensor.double().sum() for tensor in state.values()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


if __name__ == "__main__":
    dist.init_process_group("windlass")
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    GROUP = dist.new_group(backend="gloo") if sys.argv[1] == "gloo" else None
    for net in sys.argv[2:]:
        NETWORK = build(net).train()
        TRACED = trace(NETWORK, input_shape(net))
        if RANK == 0:
            PLAIN = plain(net)
        for name in placements_of(net, SIZE):
            difference = check_case(net, name)
            if RANK == 0:
                sys.stdout.write(f"{net} {name} {difference:.1e}\n")
                sys.stdout.flush()
            assert difference < TOLERANCE, f"{net} {name}: {difference}"
    dist.destroy_process_group()
    leave()
