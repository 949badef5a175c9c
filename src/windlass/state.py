"""A training run's state, to and from the tensors of a checkpoint.

Optimizers see flat tensors (`engine.gradients`); a checkpoint holds each parameter's part under the
parameter's name, so that it can be read whatever the flat order.  Random states and buffers (BatchNorm's
running statistics differ from rank to rank) are kept for every rank.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from windlass.engine.gradients import FlatGroup
from windlass.engine.world import World, sum_array

Tensors = dict[str, torch.Tensor]


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """A 63-bit seed for one rank's step (splitmix64), so that a step's randomness needs no history."""
    value = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (value ^ (value >> 31)) >> 1


def optimizer_tensors(optimizer: torch.optim.Optimizer, groups: list[FlatGroup]) -> Tensors:
    """The optimizer's state by parameter name: ``optimizer/momentum_buffer/conv1.weight``."""
    tensors: Tensors = {}
    for number, group in enumerate(groups):
        for key, value in optimizer.state.get(group.parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape == group.parameter.shape:
                tensors |= {f"optimizer/{key}/{name}": part for name, part in group.split(value)}
            else:
                tensors[f"optimizer/{key}#{number}"] = value
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, groups: list[FlatGroup], tensors: Tensors) -> None:
    """Puts back what `optimizer_tensors` took."""
    for number, group in enumerate(groups):
        state: dict[str, torch.Tensor] = {}
        for index, name in enumerate(group.names):
            for key, value in tensors.items():
                kind, _, rest = key.removeprefix("optimizer/").partition("/")
                if key.startswith("optimizer/") and rest == name:
                    flat = state.setdefault(kind, torch.zeros_like(group.parameter.data))
                    group.view(flat, index).copy_(value)
        for key, value in tensors.items():
            kind, mark, of = key.removeprefix("optimizer/").rpartition("#")
            if key.startswith("optimizer/") and mark and of == _number_in(tensors, kind, number):
                state[kind] = value.clone()
        optimizer.state[group.parameter] = state


def _number_in(tensors: Tensors, kind: str, number: int) -> str:
    """The group whose counter is taken: that of the first where fewer groups were saved."""
    return str(number) if f"optimizer/{kind}#{number}" in tensors else "0"


def rank_tensors(module: torch.nn.Module) -> Tensors:
    """This rank's random states and buffers."""
    return random_tensors() | {f"buffer/{name}": buffer.detach().clone() for name, buffer in module.named_buffers()}


def random_tensors() -> Tensors:
    """This rank's random states."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    version, words, next_gauss = random.getstate()
    assert version == 3
    return {
        "rng/torch": torch.get_rng_state(),
        "rng/numpy": torch.tensor([*map(float, keys), position, has_gauss, gauss], dtype=torch.float64),
        "rng/python": torch.tensor([*words, next_gauss is not None, next_gauss or 0.0], dtype=torch.float64),
    }


def load_rank(module: torch.nn.Module, tensors: Tensors) -> None:
    """Puts back what `rank_tensors` took."""
    load_random(tensors)
    for name, buffer in module.named_buffers():
        buffer.copy_(tensors[f"buffer/{name}"])


def load_random(tensors: Tensors) -> None:
    """Puts back the random states of `random_tensors`."""
    torch.set_rng_state(tensors["rng/torch"])
    *keys, position, has_gauss, gauss = tensors["rng/numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    *words, has_next, next_gauss = tensors["rng/python"].tolist()
    random.setstate((3, tuple(int(word) for word in words), next_gauss if has_next else None))


def seed_rank(seed: int, *, step: int, rank: int) -> None:
    """Fresh random states for a rank that has none saved: at the start, and on another number of ranks."""
    value = step_seed(seed, step=step, rank=rank)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def give_weights(parameters: Iterable[torch.Tensor], world: World) -> None:
    """Gives rank 0's parameters to all: zero elsewhere, then the sum."""
    for parameter in parameters:
        own = parameter.detach().contiguous().numpy()
        total = sum_array(world, own if world.rank == 0 else np.zeros_like(own))
        parameter.data.copy_(torch.from_numpy(total))


def average_buffers(module: torch.nn.Module, world: World) -> None:
    """Averages floating-point buffers over the ranks: running statistics then speak for all shards."""
    if world.size == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            total = sum_array(world, buffer.detach().contiguous().numpy())
            buffer.copy_(torch.from_numpy(total) / world.size)


def gather_rank_tensors(module: torch.nn.Module, world: World) -> Tensors:
    """Every rank's random states and buffers, by ``rank0/…``; on every rank."""
    return gather_tensors(rank_tensors(module), world)


def gather_tensors(tensors: Tensors, world: World) -> Tensors:
    """Every rank's tensors, by ``rank0/…``; on every rank."""
    own: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    return {
        f"rank{rank}/{name}": torch.from_numpy(np.array(array))
        for rank, tensors in enumerate(world.gather(own))
        for name, array in tensors.items()
    }


def tensors_of_rank(state: Tensors, rank: int) -> Tensors:
    """The part of a checkpoint's state that `gather_rank_tensors` wrote for this rank."""
    prefix = f"rank{rank}/"
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def mean_buffers(module: torch.nn.Module, state: Tensors, num_ranks: int) -> None:
    """Sets floating-point buffers to the mean over the ranks that wrote the checkpoint."""
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            parts = [state[f"rank{rank}/buffer/{name}"] for rank in range(num_ranks)]
            buffer.copy_(torch.stack(parts).mean(dim=0))
