"""A run's state to tensors and back: optimizers, random states, buffers."""

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from windlass.engine.gradients import FlatGroup, flatten_parameters
from windlass.engine.world import LocalWorld, Request
from windlass.optim.build import build_optimizer
from windlass.optim.rules import UPDATE_RULES, UpdateRule
from windlass.runs.checkpoint import read_checkpoint, write_checkpoint
from windlass.state import (
    average_buffers,
    gather_rank_tensors,
    load_optimizer,
    load_rank,
    mean_buffers,
    optimizer_tensors,
    rank_tensors,
    seed_rank,
    step_seed,
    tensors_of_rank,
)


@pytest.fixture(autouse=True)
def keep_random_states() -> Any:
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


class Small(nn.Module):
    """Two dtypes, a channels_last weight, a scalar, a shared weight, BatchNorm's three buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(5)
        self.precise = nn.Linear(5, 3).double()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.again = self.conv


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small()


def made(name: str, seed: int = 0) -> tuple[nn.Module, list[FlatGroup], torch.optim.Optimizer]:
    module = network(seed)
    groups = flatten_parameters(module)
    return module, groups, build_optimizer(UpdateRule(name=name), [group.parameter for group in groups])


def take_steps(groups: list[FlatGroup], optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for group in groups:
            for _, part in group.split(group.gradient):
                part.copy_(torch.randn(part.shape, generator=generator))
        optimizer.step()


# --- optimizers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_an_optimizer_that_is_put_back_goes_on_bit_for_bit(
    name: str, steps_before: int, through_file: bool, tmp_path: Path
) -> None:
    module, groups, optimizer = made(name)
    take_steps(groups, optimizer, range(steps_before))
    weights = copy.deepcopy(module.state_dict())
    tensors = {key: value.clone() for key, value in optimizer_tensors(optimizer, groups).items()}
    if through_file:
        path = write_checkpoint(tmp_path, weights=weights, state=tensors, manifest={"step": 1})
        tensors, weights = read_checkpoint(path).state, read_checkpoint(path).weights
    again, again_groups, again_optimizer = made(name, seed=1)
    take_steps(again_groups, again_optimizer, range(7, 9))  # a past that must go without a trace
    again.load_state_dict(weights)
    load_optimizer(again_optimizer, again_groups, tensors)
    take_steps(groups, optimizer, range(100, 103))
    take_steps(again_groups, again_optimizer, range(100, 103))
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


EXPECTED_STATE = {
    "sgd": set(),
    "momentum": {"momentum_buffer"},
    "nesterov": {"momentum_buffer"},
    "adagrad": {"sum", "step"},
    "adam": {"exp_avg", "exp_avg_sq", "step"},
    "adamw": {"exp_avg", "exp_avg_sq", "step"},
}


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_state_is_kept_by_the_parameters_names_and_shapes(name: str) -> None:
    module, groups, optimizer = made(name)
    take_steps(groups, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, groups)
    kinds = {key.split("/")[1].split("#")[0] for key in tensors}
    assert kinds == EXPECTED_STATE[name]
    for kind in kinds - {"step"}:
        for parameter_name, parameter in module.named_parameters():
            assert tensors[f"optimizer/{kind}/{parameter_name}"].shape == parameter.shape
    if "step" in kinds:
        assert {key for key in tensors if "step" in key} == {"optimizer/step#0", "optimizer/step#1"}


def test_state_is_that_of_the_parameter_it_is_named_after() -> None:
    module, groups, optimizer = made("momentum")
    take_steps(groups, optimizer, range(1))
    tensors = optimizer_tensors(optimizer, groups)
    gradients = {name: part for group in groups for name, part in group.split(group.gradient)}
    for name, _ in module.named_parameters():  # the first buffer is the first gradient
        assert torch.equal(tensors[f"optimizer/momentum_buffer/{name}"], gradients[name])


# --- random states ----------------------------------------------------------------------------------------


def draws() -> tuple[Any, ...]:
    return (
        torch.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
        np.random.randint(1 << 30, size=3).tolist(),
        [random.gauss(0, 1) for _ in range(3)],
        random.getrandbits(64),
    )


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 700])
def test_random_states_go_on_where_they_were(num_drawn: int, tmp_path: Path) -> None:
    module = network()
    seed_rank(3, step=5, rank=1)
    for _ in range(num_drawn):  # an odd number leaves the second of a pair of normal numbers waiting
        np.random.standard_normal()
        random.gauss(0, 1)
        torch.rand(1)
    has_gauss = tuple(np.random.get_state(legacy=True))[3]
    assert has_gauss == num_drawn % 2
    path = write_checkpoint(tmp_path, weights={}, state=rank_tensors(module), manifest={"step": 1})
    expected = draws()
    seed_rank(4, step=5, rank=1)
    np.random.standard_normal()
    assert draws() != expected
    load_rank(module, read_checkpoint(path).state)
    assert draws() == expected


def test_seeding_is_a_function_of_seed_step_and_rank_alone() -> None:
    found = []
    for seed, step, rank in [(1, 2, 3), (1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 2)]:
        np.random.standard_normal()
        random.gauss(0, 1)
        seed_rank(seed, step=step, rank=rank)
        found.append(draws())
    assert found[0] == found[1]
    assert all(
        a != b for first, second in itertools.combinations(found[1:], 2) for a, b in zip(first, second, strict=True)
    )


def test_every_step_of_every_rank_has_a_seed_of_its_own() -> None:
    seeds = [
        step_seed(seed, step=step, rank=rank)
        for seed in (*range(10), 2**31, 2**40)
        for step in (*range(300), 10**6, 10**7)
        for rank in (*range(9), 1023)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Every one of the 63 bits is set in about half of n seeds: within 6 standard deviations of n/2.
    for bit in range(63):
        share = sum(seed >> bit & 1 for seed in seeds) / len(seeds)
        assert abs(share - 0.5) < 6 * 0.5 / len(seeds) ** 0.5


# --- buffers ----------------------------------------------------------------------------------------------


def spoiled(module: nn.Module, value: float) -> nn.Module:
    for buffer in module.buffers():
        buffer.fill_(value)
    return module


class Rank:
    """One of several ranks whose others' values the test gives: sums add `other`, gathers put them behind."""

    rank, local_rank, host = 0, 0, "here"

    def __init__(self, size: int, *, other: float = 0.0, gathered: list[Any] | None = None) -> None:
        self.size = self.local_size = size
        self._other, self._gathered = other, gathered or []

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        assert send.flags.c_contiguous
        return LocalWorld().start_sum(send + np.asarray(self._other, send.dtype), receive)

    def gather(self, value: Any) -> list[Any]:
        return [value, *self._gathered]

    def broadcast(self, value: Any, *, root: int = 0) -> Any:
        return value

    def barrier(self) -> None: ...

    def abort(self, code: int) -> None:
        raise AssertionError(f"abort({code})")


def test_buffers_come_back_exactly() -> None:
    module = network()
    with torch.no_grad():
        module.get_submodule("norm")(torch.randn(2, 5, 3, 3))
    saved = rank_tensors(module)
    wanted = copy.deepcopy(dict(module.named_buffers()))
    spoiled(module, 9)
    assert not any(torch.equal(buffer, wanted[name]) for name, buffer in module.named_buffers())
    load_rank(module, saved)
    assert all(torch.equal(buffer, wanted[name]) for name, buffer in module.named_buffers())


def test_floating_point_buffers_are_averaged_over_the_ranks() -> None:
    module = spoiled(network(), 3)
    average_buffers(module, Rank(4, other=13))
    values = {name: set(buffer.flatten().tolist()) for name, buffer in module.named_buffers()}
    assert values == {"norm.running_mean": {4.0}, "norm.running_var": {4.0}, "norm.num_batches_tracked": {3}}


def test_alone_nothing_is_averaged() -> None:
    module = spoiled(network(), 3)
    average_buffers(module, Rank(1, other=13))
    assert all(set(buffer.flatten().tolist()) == {3} for buffer in module.buffers())


def test_every_ranks_part_is_kept_and_found_again() -> None:
    module = spoiled(network(), 1)
    others = []
    for rank in range(1, 12):  # rank1 and rank11 begin alike
        seed_rank(0, step=0, rank=rank)
        others.append({name: t.numpy() for name, t in rank_tensors(spoiled(network(), rank + 1)).items()})
    seed_rank(0, step=0, rank=0)
    spoiled(module, 1)
    state = gather_rank_tensors(module, Rank(12, gathered=others))
    for rank in range(12):
        own = tensors_of_rank(state, rank)
        assert set(own) == set(rank_tensors(module))
        load_rank(module, own)
        assert all(set(buffer.flatten().tolist()) == {rank + 1} for buffer in module.buffers())
        expected = draws()
        if rank:
            load_rank(module, {name: torch.from_numpy(np.array(a)) for name, a in others[rank - 1].items()})
        else:
            seed_rank(0, step=0, rank=0)
        assert draws() == expected


def test_on_another_number_of_ranks_buffers_are_the_mean_over_those_that_saved() -> None:
    parts = [{name: t.numpy() for name, t in rank_tensors(spoiled(network(), value)).items()} for value in (5, 9)]
    state = gather_rank_tensors(spoiled(network(), 1), Rank(3, gathered=parts))
    module = spoiled(network(), 77)
    mean_buffers(module, state, 3)
    values = {name: set(buffer.flatten().tolist()) for name, buffer in module.named_buffers()}
    assert values == {"norm.running_mean": {5.0}, "norm.running_var": {5.0}, "norm.num_batches_tracked": {77}}
