"""Bucketed gradients against ordinary autograd, with sums that the test writes itself."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from windlass.engine.gradients import ALIGN, FlatGroup, GradientAverager, flatten_parameters

BUCKET_BYTES = [1, 200, 700, 1 << 20]
"""Every parameter alone, a few together, more together, all together."""


class Small(nn.Module):
    """Shared, unused, frozen, channels_last and float64 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.tied
        self.unused = nn.Linear(5, 3)
        self.frozen = nn.Conv2d(4, 4, 1)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm2d(4)
        self.precise = nn.Linear(4, 3).double()
        self.scale = nn.Parameter(torch.tensor(1.25))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        x_NCHW = torch.relu(self.first(x_NCHW))
        x_NCHW = self.again(torch.relu(self.tied(x_NCHW)))
        x_NCHW = self.norm(self.frozen(x_NCHW)) * self.scale
        out: torch.Tensor = self.precise(x_NCHW.mean(dim=(2, 3)).double())
        return out


def network(layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(3)
    module: nn.Module = Small().to(memory_format=layout)  # type: ignore[call-overload]
    return module


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def loss_of(module: nn.Module, seed: int = 0) -> torch.Tensor:
    out: torch.Tensor = module(images(seed)).square().sum() / 7
    return out


def plain_gradients(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """What autograd gives without any of this; zero where the loss does not reach."""
    own = copy.deepcopy(module)
    loss_of(own, seed).backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in own.named_parameters()
        if parameter.requires_grad
    }


@dataclass
class Sum:
    """A sum under way that arrives only when it is waited for."""

    send: NDArray[Any]
    receive: NDArray[Any]
    other: NDArray[Any] | float
    waited: int = 0

    def test(self) -> bool:
        return False

    def wait(self) -> None:
        self.waited += 1
        self.receive[...] = self.send + self.other


@dataclass
class Ranks:
    """Stands for the other ranks: records every sum and adds what they would send, in their order."""

    others: list[NDArray[Any]] = field(default_factory=list)
    started: list[Sum] = field(default_factory=list)
    during_backward: int = 0

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Sum:
        assert send.flags.c_contiguous and receive.flags.c_contiguous
        assert (send.shape, send.dtype) == (receive.shape, receive.dtype)
        other = self.others[len(self.started)] if self.others else 0.0
        self.started.append(Sum(send, receive, other))
        return self.started[-1]


def averager_of(
    module: nn.Module, ranks: Ranks, *, bucket_bytes: int, overlap: bool, alone: bool = False
) -> GradientAverager:
    return GradientAverager(module, start_sum=ranks.start_sum, bucket_bytes=bucket_bytes, overlap=overlap, alone=alone)


def run(averager: GradientAverager, module: nn.Module, ranks: Ranks, seed: int = 0) -> bool:
    averager.begin()
    loss_of(module, seed).backward()  # type: ignore[no-untyped-call]
    ranks.during_backward = len(ranks.started)
    finite = averager.finish_backward()
    averager.wait()
    return finite


def gradients(groups: list[FlatGroup]) -> dict[str, torch.Tensor]:
    return {name: part for group in groups for name, part in group.split(group.gradient)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype and torch.equal(found[name], gradient), name


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", BUCKET_BYTES)
def test_flat_gradients_are_those_of_autograd_step_after_step(
    bucket_bytes: int, overlap: bool, alone: bool, layout: torch.memory_format
) -> None:
    module, ranks = network(layout), Ranks()
    expected = [plain_gradients(module, seed) for seed in range(3)]
    assert not expected[0]["unused.weight"].any() and expected[0]["tied.weight"].any()
    averager = averager_of(module, ranks, bucket_bytes=bucket_bytes, overlap=overlap, alone=alone)
    for seed in range(3):  # nothing may be left over from the step before
        assert run(averager, module, ranks, seed)
        # The same kernels on the same numbers: bit for bit.
        assert_same(gradients(averager.groups), expected[seed])
        assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("overlap", [False, True])
def test_a_parameter_that_this_step_does_not_reach_counts_zero(overlap: bool) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(3, 1)

    module, ranks = Gate(), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=1, overlap=overlap)
    for part, other in ((module.a, "b"), (module.b, "a")):
        averager.begin()
        part(torch.ones(1, 3)).sum().backward()
        assert averager.finish_backward()
        averager.wait()
        found = gradients(averager.groups)
        assert not found[f"{other}.weight"].any()
        assert sum(int(gradient.any()) for gradient in found.values()) == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rank_without_samples_takes_part_with_zeros(overlap: bool) -> None:
    module, ranks = network(), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=200, overlap=overlap)
    run(averager, module, ranks)
    ranks.started.clear()
    averager.begin()
    assert averager.finish_backward()
    averager.wait()
    assert len(ranks.started) == averager.num_buckets
    assert not any(gradient.any() for gradient in gradients(averager.groups).values())


# --- buckets ----------------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Lists its layers in the order `listed` and runs them in the order a, b, c, d."""

    def __init__(self, listed: str) -> None:
        super().__init__()
        made = {name: nn.Linear(4, 4) for name in "abcd"}
        for name in listed:
            self.add_module(name, made[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in "abcd":
            x = torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize("listed", ["abcd", "dcba", "bdac", "cadb"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 200, 1 << 20])
def test_every_bucket_starts_once_and_in_ascending_order(listed: str, overlap: bool, bucket_bytes: int) -> None:
    torch.manual_seed(1)
    module, ranks = Crossed(listed), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=bucket_bytes, overlap=overlap)
    (group,) = averager.groups
    averager.begin()
    module(torch.ones(2, 4)).sum().backward()
    during = len(ranks.started)
    averager.finish_backward()
    averager.wait()
    starts = [(one.send.ctypes.data - group.own.data_ptr()) // 4 for one in ranks.started]
    stops = [start + one.send.size for start, one in zip(starts, ranks.started, strict=True)]
    assert len(starts) == averager.num_buckets
    assert starts == [0, *stops[:-1]] and stops[-1] == group.own.numel()  # ascending, without gap or overlap
    assert all(one.send.size * 4 >= bucket_bytes for one in ranks.started[:-1])
    assert all(one.waited == 1 for one in ranks.started)
    if not overlap or averager.num_buckets == 1:
        assert during == 0
    else:  # the last gradients complete the first bucket at the latest, and all that wait follow
        assert during == averager.num_buckets


def test_buckets_start_while_the_backward_pass_goes_on() -> None:
    module, ranks = Crossed("abcd"), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=1, overlap=True)
    seen: list[int] = []
    module.get_submodule("a").register_full_backward_hook(lambda *_: seen.append(len(ranks.started)))
    averager.begin()
    module(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert averager.num_buckets == 8
    assert seen and seen[0] >= 6  # those of b, c and d


def test_an_unused_parameter_holds_back_its_bucket_and_what_follows_until_the_end() -> None:
    module, ranks = network(), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=1, overlap=True)
    run(averager, module, ranks)
    names = [name for group in averager.groups for name in group.names]
    before = min(names.index("unused.weight"), names.index("unused.bias"))
    assert 0 < before == ranks.during_backward < averager.num_buckets == len(names) == len(ranks.started)


def test_one_bucket_is_summed_after_the_backward_pass() -> None:
    module, ranks = Crossed("abcd"), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=1 << 20, overlap=True)
    run_loss = module(torch.ones(2, 4)).sum()
    averager.begin()
    run_loss.backward()
    assert averager.num_buckets == 1 and ranks.started == []
    averager.finish_backward()
    assert len(ranks.started) == 1


# --- sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", BUCKET_BYTES)
def test_two_ranks_give_the_sum_of_their_gradients(bucket_bytes: int, overlap: bool) -> None:
    module = network()
    ours, theirs = plain_gradients(module, 0), plain_gradients(module, 1)
    second, recorded = copy.deepcopy(module), Ranks()
    run(averager_of(second, recorded, bucket_bytes=bucket_bytes, overlap=overlap), second, recorded, seed=1)
    ranks = Ranks(others=[one.send.copy() for one in recorded.started])
    averager = averager_of(module, ranks, bucket_bytes=bucket_bytes, overlap=overlap)
    assert run(averager, module, ranks, seed=0)
    assert_same(gradients(averager.groups), {name: ours[name] + theirs[name] for name in ours})


def test_what_this_rank_sends_stays_its_own_while_the_sum_arrives() -> None:
    module = network()
    ours = plain_gradients(module)
    ranks = Ranks()
    averager = averager_of(module, ranks, bucket_bytes=200, overlap=True)
    ranks.others = [np.full(1, 3.0)] * averager.num_buckets
    run(averager, module, ranks)
    own = {name: part for group in averager.groups for name, part in group.split(group.own)}
    assert_same(own, ours)
    assert_same(gradients(averager.groups), {name: gradient + 3 for name, gradient in ours.items()})


def test_alone_the_sum_needs_no_memory_of_its_own() -> None:
    for alone in (True, False):
        for group in flatten_parameters(network(), alone=alone):
            assert (group.own.data_ptr() == group.gradient.data_ptr()) is alone
            assert group.parameter.grad is not None
            assert group.parameter.grad.data_ptr() == group.gradient.data_ptr()


# --- numbers that are not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 20])
def test_one_bad_number_in_any_bucket_is_seen(bad: float, overlap: bool, bucket_bytes: int) -> None:
    module = network()
    averager = averager_of(module, Ranks(), bucket_bytes=bucket_bytes, overlap=overlap)
    reached = [(name, p) for name, p in module.named_parameters() if p.requires_grad and "unused" not in name]
    assert len(reached) == 9
    for _, parameter in reached:

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[-1] = bad
            return gradient

        handle = parameter.register_hook(spoil)  # type: ignore[no-untyped-call]
        assert run(averager, module, Ranks()) is False
        handle.remove()
        assert run(averager, module, Ranks()) is True


def test_bad_numbers_of_both_signs_do_not_cancel() -> None:
    module = nn.Linear(2, 1)
    averager = averager_of(module, Ranks(), bucket_bytes=1, overlap=False)
    averager.begin()
    module(torch.tensor([[math.inf, -math.inf]])).sum().backward()
    assert averager.finish_backward() is False


# --- the flat tensor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parameters_become_views_of_one_tensor_per_dtype(layout: torch.memory_format) -> None:
    module, before = network(layout), network(layout)
    groups = flatten_parameters(module)
    assert [group.parameter.dtype for group in groups] == [torch.float32, torch.float64]
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert sorted(name for group in groups for name in group.names) == sorted(trainable)
    for group in groups:
        for index, (name, view) in enumerate(group.split(group.parameter.data)):
            parameter, original = trainable[name], before.get_parameter(name)
            assert torch.equal(parameter, original)
            assert parameter.stride() == original.stride()
            assert parameter.data_ptr() == view.data_ptr()
            assert parameter.untyped_storage().data_ptr() == group.parameter.untyped_storage().data_ptr()
            assert group.offsets[index] % ALIGN == 0
            view.fill_(index)
        for index, parameter in enumerate(group.parameters):  # no two share a place
            assert bool((parameter == index).all())
    assert module.again.weight is module.tied.weight  # type: ignore[union-attr]


def test_parameters_stand_in_reverse_order() -> None:
    groups = flatten_parameters(Crossed("abcd"))
    listed = [name for name, _ in Crossed("abcd").named_parameters()]
    assert groups[0].names == listed[::-1]


def test_a_parameter_with_holes_is_made_contiguous() -> None:
    module = nn.Module()
    module.sparse = nn.Parameter(torch.arange(12.0)[::3])
    module.wide = nn.Parameter(torch.ones(1).expand(4).detach())
    flatten_parameters(module)
    assert module.sparse.tolist() == [0.0, 3.0, 6.0, 9.0] and module.sparse.stride() == (1,)
    assert module.wide.tolist() == [1.0] * 4 and module.wide.stride() == (1,)


def test_without_trainable_parameters_there_is_nothing_to_do() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    averager = averager_of(module, Ranks(), bucket_bytes=1, overlap=True)
    averager.begin()
    assert (averager.num_buckets, averager.groups, averager.finish_backward()) == (0, [], True)
    averager.wait()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("overlap", [False, True])
def test_steps_of_momentum_on_the_flat_tensor_are_those_on_every_parameter(
    overlap: bool, layout: torch.memory_format
) -> None:
    module, plain = network(layout), network(layout)
    averager = averager_of(module, Ranks(), bucket_bytes=200, overlap=overlap)
    # Powers of two make every product exact: PyTorch's vector code fuses multiply and add and its code for the
    # last few elements does not, and which elements are the last differs.
    options: dict[str, Any] = {"lr": 0.125, "momentum": 0.5, "weight_decay": 2.0**-7, "fused": True}
    flat = torch.optim.SGD([group.parameter for group in averager.groups], **options)
    own = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], **options)
    for seed in range(4):
        assert run(averager, module, Ranks(), seed)
        flat.step()
        own.zero_grad(set_to_none=False)
        (loss_of(plain, seed) + 0 * sum(p.sum() for p in plain.parameters())).backward()  # type: ignore[no-untyped-call]
        own.step()
        for name, parameter in plain.named_parameters():
            assert torch.equal(module.get_parameter(name), parameter), name


def test_padding_stays_zero() -> None:
    module, ranks = network(), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=200, overlap=True)
    optimizer = torch.optim.SGD([group.parameter for group in averager.groups], 0.1, 0.9, weight_decay=0.1, fused=True)
    for seed in range(2):
        run(averager, module, ranks, seed)
        optimizer.step()
    for group in averager.groups:
        flat = group.parameter.data.clone()
        for _, part in group.split(flat):
            part.zero_()
        assert not flat.any() and flat.numel() % ALIGN == 0


# --- micro-batches and keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_gradients_of_micro_batches_add_up_and_sums_begin_with_the_last(bucket_bytes: int, overlap: bool) -> None:
    """Three backward passes; the order of addition is fixed, so the bits are those of autograd's own adding up."""
    module, ranks = network(), Ranks()
    own = copy.deepcopy(module)
    for seed in range(3):
        loss_of(own, seed).backward()  # type: ignore[no-untyped-call]
    expected = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in own.named_parameters()
        if parameter.requires_grad
    }
    averager = averager_of(module, ranks, bucket_bytes=bucket_bytes, overlap=overlap)
    for _ in range(2):
        ranks.started.clear()
        averager.begin()
        for seed in range(2):
            averager.hold()
            loss_of(module, seed).backward()  # type: ignore[no-untyped-call]
            averager.add()
            assert not ranks.started
        loss_of(module, 2).backward()  # type: ignore[no-untyped-call]
        assert bool(ranks.started) == (averager._overlap and bucket_bytes == 1)
        averager.finish_backward()
        averager.wait()
        assert len(ranks.started) == averager.num_buckets
        assert_same(gradients(averager.groups), expected)


def test_a_parameter_that_only_the_first_micro_batch_reaches_keeps_its_gradient() -> None:
    module, ranks = network(), Ranks()
    averager = averager_of(module, ranks, bucket_bytes=1, overlap=True)
    averager.begin()
    averager.hold()
    module.unused.weight.sum().backward()  # type: ignore[operator, union-attr]
    averager.add()
    loss_of(module).backward()  # type: ignore[no-untyped-call]
    averager.finish_backward()
    averager.wait()
    assert gradients(averager.groups)["unused.weight"].equal(torch.ones(3, 5))


def test_every_key_has_its_own_sum_and_no_key_none() -> None:
    module = network()
    expected = plain_gradients(module)
    keys: dict[str, Any] = dict.fromkeys(expected, (0,)) | {"first.weight": (), "tied.weight": (1,), "tied.bias": (1,)}
    del keys["scale"]
    sums = {key: Ranks() for key in ((0,), (1,))}
    averager = GradientAverager(
        module, start_sum=Ranks().start_sum, bucket_bytes=1 << 20, overlap=True, alone=False, keys=keys,
        start_sums={key: ranks.start_sum for key, ranks in sums.items()},
    )  # fmt: skip
    averager.begin()
    loss_of(module).backward()  # type: ignore[no-untyped-call]
    averager.finish_backward()
    averager.wait()
    del expected["scale"]
    assert_same(gradients(averager.groups), expected)
    named = {group.key: set(group.names) for group in averager.groups if group.key != (0,)}
    assert named == {(): {"first.weight"}, (1,): {"tied.weight", "tied.bias"}}
    assert [len(ranks.started) for ranks in sums.values()] == [2, 1], "two dtypes; what has no key is left alone"
    assert all(group.own is group.gradient for group in averager.groups if group.key == ())
