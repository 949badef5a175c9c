"""What PyTorch builds on a process group: ``training.py CASE...``, over this backend and beside Gloo."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook as power_sgd
from leave import leave
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import windlass.backend
from windlass.backend import Int16State, bf16_compress_hook, int16_stochastic_hook

dist: Any = torch.distributed  # its annotations allow None everywhere
BATCH = 12
STEPS = 5
TOLERANCE = 1e-6
"""Means of BATCH float32 losses in another order: some units of 2^-24 of numbers near one."""


def convnet() -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(6, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 3 * 3, 10),
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 1, 12, 12, generator=generator)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, size: int) -> list[float]:
    """The loss of each step on this rank's share."""
    losses = []
    for step in range(STEPS):
        images, labels = batch(step)
        share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        optimizer.zero_grad()
        loss: Any = torch.nn.functional.cross_entropy(net(images[share]), labels[share])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone() -> list[torch.Tensor]:
    """The parameters after training in one process."""
    net = convnet()
    train(net, sgd(net), 0, 1)
    return [parameter.detach() for parameter in net.parameters()]


def sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def distance(found: Any, wanted: Any) -> float:
    """The largest difference between two lists of parameters."""
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(found, wanted, strict=True))


def ddp_equals_one_process() -> None:
    results = {}
    for name, group in {"windlass": None, "gloo": dist.new_group(backend="gloo")}.items():
        net = DistributedDataParallel(convnet(), process_group=group, bucket_cap_mb=0.005)
        results[name] = train(net, sgd(net), RANK, SIZE)
        assert distance(net.parameters(), alone()) < TOLERANCE
    assert max(abs(a - b) for a, b in zip(results["windlass"], results["gloo"], strict=True)) < TOLERANCE


def ddp_options() -> None:
    choices: list[dict[str, Any]] = [
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"broadcast_buffers": False},
    ]
    for options in choices:
        net = DistributedDataParallel(convnet(), **options)
        train(net, sgd(net), RANK, SIZE)
        assert distance(net.parameters(), alone()) < TOLERANCE
    normed = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    net = DistributedDataParallel(normed)
    for _ in range(3):
        net(torch.randn(5, 4)).sum().backward()
    with net.no_sync():
        net(torch.randn(5, 4)).sum().backward()


def fixed_order() -> None:
    """The same bits whatever order MPI would take: contributions whose sum depends on it."""
    group = dist.new_group(pg_options=windlass.backend.Options(fixed_order=True))
    values = torch.tensor([1.0, 1e8, -1e8, 3.0])[torch.arange(4096) % 4].roll(RANK) * (1 + RANK / 7)
    everyone = [torch.tensor([1.0, 1e8, -1e8, 3.0])[torch.arange(4096) % 4].roll(r) * (1 + r / 7) for r in range(SIZE)]
    wanted = everyone[0].clone()
    for other in everyone[1:]:
        wanted += other
    dist.all_reduce(values, group=group)
    assert torch.equal(values, wanted)


def hooks() -> None:
    wanted = alone()
    for state, hook, tolerance in (
        (None, default_hooks.allreduce_hook, TOLERANCE),
        (None, default_hooks.fp16_compress_hook, 2e-3),
        (None, bf16_compress_hook, 2e-2),
        (Int16State(seed=5), int16_stochastic_hook, 1e-3),
    ):
        net = DistributedDataParallel(convnet(), bucket_cap_mb=0.005)
        net.register_comm_hook(state, hook)
        train(net, sgd(net), RANK, SIZE)
        assert distance(net.parameters(), wanted) < tolerance, hook.__name__
        same_on_all_ranks(net)


def power() -> None:
    net = DistributedDataParallel(convnet(), bucket_cap_mb=0.005)
    state = power_sgd.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.5)
    net.register_comm_hook(state, power_sgd.powerSGD_hook)
    train(net, sgd(net), RANK, SIZE)
    same_on_all_ranks(net)


def same_on_all_ranks(net: torch.nn.Module) -> None:
    for parameter in net.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, parameter)


def zero_redundancy() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = DistributedDataParallel(convnet())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    train(net, optimizer, RANK, SIZE)
    assert distance(net.parameters(), alone()) < TOLERANCE


def fully_sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    net = convnet()
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(net)
    train(net, sgd(net), RANK, SIZE)
    assert distance([parameter.full_tensor() for parameter in net.parameters()], alone()) < TOLERANCE


def tensor_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (SIZE,))
    torch.manual_seed(0)
    net: Any = torch.nn.Sequential(torch.nn.Linear(6, 4 * SIZE), torch.nn.ReLU(), torch.nn.Linear(4 * SIZE, 5))
    images = torch.randn(3, 6)
    wanted = net(images)
    wanted.square().sum().backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    parallel: Any = parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found = parallel(images)
    found.square().sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(parallel[0].weight.grad.full_tensor(), gradient)
    whole = torch.arange(4.0 * SIZE).view(2 * SIZE, 2)
    rows = distribute_tensor(whole, mesh, [Shard(0)])
    product: Any = rows @ distribute_tensor(whole.T, mesh, [Replicate()])
    moved = product.redistribute(mesh, [Shard(1)]).redistribute(mesh, [Replicate()])
    assert torch.equal(moved.to_local(), whole @ whole.T)


def two_dimensional_mesh() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("replicate", "shard"))
    net = convnet()
    fully_shard(net, mesh=mesh)
    train(net, sgd(net), RANK, SIZE)
    assert distance([parameter.full_tensor() for parameter in net.parameters()], alone()) < TOLERANCE


def checkpoint() -> None:
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    shared = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(shared, 0)
    folder = Path(str(shared[0])) / "saved"
    net: Any = fully_shard(convnet())
    state_dict_saver.save({"model": get_model_state_dict(net)}, checkpoint_id=folder)
    saved = [parameter.full_tensor() for parameter in net.parameters()]
    other: Any = fully_shard(convnet())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = {"model": get_model_state_dict(other)}
    state_dict_loader.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    assert distance([parameter.full_tensor() for parameter in other.parameters()], saved) == 0.0


def uneven_inputs() -> None:
    net = DistributedDataParallel(torch.nn.Linear(3, 1))
    with Join([net]):
        for _ in range(2 + RANK):
            net(torch.ones(1, 3)).sum().backward()
    dist.barrier()


def functional() -> None:
    import torch.distributed._functional_collectives as funcol

    total = funcol.all_reduce(torch.ones(3), "sum", dist.group.WORLD)
    assert (total + 0).tolist() == [float(SIZE)] * 3
    gathered = funcol.all_gather_tensor(torch.full((2,), float(RANK)), 0, dist.group.WORLD)
    assert (gathered + 0).tolist() == [float(rank) for rank in range(SIZE) for _ in range(2)]


CASES = {name: value for name, value in list(globals().items()) if callable(value) and name in (
    "ddp_equals_one_process", "ddp_options", "fixed_order", "hooks", "power", "zero_redundancy", "fully_sharded",
    "tensor_parallel", "two_dimensional_mesh", "checkpoint", "uneven_inputs", "functional",
)}  # fmt: skip

if __name__ == "__main__":
    dist.init_process_group("windlass")
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    for name in sys.argv[1:] or CASES:
        CASES[name]()
        sys.stdout.write(f"{RANK}: {name}\n")
        sys.stdout.flush()
    dist.destroy_process_group()
    leave()
