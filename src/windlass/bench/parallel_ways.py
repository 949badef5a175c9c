"""One step of training under each placement, and under PyTorch's DDP: the rivals of `windlass.bench.parallel`.

- ``data`` is what ``windlass train --parallel data`` does: the whole network on every rank, gradients summed in buckets
  while the backward pass goes on (`engine.gradients` over `engine.allreduce`).
- The other placements are `parallel.apply`'s; what of their gradients is summed goes the same way.
- ``ddp`` is PyTorch's DistributedDataParallel over Gloo, as its users write it.

All begin with the same weights and have the same samples, so their losses are the same but for rounding, where the
network draws nothing at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn import functional

from windlass.bench.exposed import Clock, TimedTransport, timed
from windlass.engine.allreduce import Allreduce
from windlass.engine.gradients import GradientAverager
from windlass.engine.world import World, crosses_hosts
from windlass.objective import has_own_loss, loss_of, main_output
from windlass.optim.build import build_optimizer
from windlass.optim.rules import UpdateRule
from windlass.parallel.placed import PlacedModule
from windlass.parallel.rounds import Rounds
from windlass.parallel.trace import Traced, trace
from windlass.plan.derive import Derived, derive
from windlass.plan.layout import Split, bounds, extents
from windlass.plan.pick import AUTO
from windlass.plan.placements import by_name
from windlass.tuning.cluster import tuned_chooser

DDP, DATA = "ddp", "data"
RULE = UpdateRule(name="momentum", lr=0.01)
BUCKET_BYTES = 4 << 20
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Setting:
    """What all rivals have in common.

    Attributes:
        world, groups: the ranks; PyTorch's process groups by backend.
        build: makes the network, with the same weights every time.
        input_shape: of the whole batch.
        num_classes: of the labels.
        memory_format: of images and weights.
    """

    world: World
    groups: Mapping[str, Any]
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    num_classes: int
    memory_format: torch.memory_format

    @property
    def batch(self) -> int:
        """Samples of all ranks together."""
        return self.input_shape[0]

    def samples(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels, made up from each sample's number."""
        images, labels = [], []
        for number in range(start, stop):
            random = torch.Generator().manual_seed(number)
            images.append(torch.randn(self.input_shape[1:], generator=random))
            labels.append(torch.randint(0, self.num_classes, (), generator=random))
        stacked = torch.stack(images) if images else torch.empty(0, *self.input_shape[1:])
        chosen = torch.stack(labels) if labels else torch.empty(0, dtype=torch.int64)
        return stacked.contiguous(memory_format=self.memory_format), chosen


class Way:
    """A rival, ready to train.

    Attributes:
        images, labels: this rank's.
        exposed_s: seconds since `reset` in calls that move data to other ranks or wait for them; None: not known.
    """

    images: torch.Tensor
    labels: torch.Tensor
    exposed_s: float | None = 0.0

    def step(self, number: int) -> float:
        """One step of training; this rank's addend of the mean loss."""
        raise NotImplementedError

    def reset(self) -> None:
        """Counts from zero."""

    def sent(self) -> tuple[int, int] | None:
        """Bytes sent since `reset`: all, and those for fully connected layers; None: not known."""
        return None

    def tensors(self) -> Iterable[torch.Tensor]:
        """All that is held between steps."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees what others must free too."""


class _Summed(Way):
    """A module whose gradients are summed as training does it, in two parts to count them apart."""

    def __init__(
        self, setting: Setting, module: nn.Module, keys: Mapping[str, str | tuple[()]], clock: Clock, *, overlap: bool
    ) -> None:
        self.setting, self.module, self.clock = setting, module, clock
        chooser = tuned_chooser(setting.world)
        used = sorted({key for key in keys.values() if isinstance(key, str)})
        self.sums = {key: Allreduce(setting.world, AUTO, choose=chooser) for key in used}
        self.averager = GradientAverager(
            module, start_sum=setting.world.start_sum, bucket_bytes=BUCKET_BYTES, overlap=overlap, alone=False,
            background=crosses_hosts(setting.world),
            keys=keys, start_sums={key: timed(allreduce.start, clock) for key, allreduce in self.sums.items()},
        )  # fmt: skip
        self.optimizer = build_optimizer(RULE, [group.parameter for group in self.averager.groups])
        module.train()

    def step(self, number: int) -> float:
        """See `Way`."""
        self.averager.begin()
        loss = self.backward(number)
        self.averager.finish_backward()
        self.averager.wait()
        self.optimizer.step()
        self.exposed_s = self.clock.seconds
        return loss

    def backward(self, number: int) -> float:
        """Forward and backward pass."""
        raise NotImplementedError

    def reset(self) -> None:
        """See `Way`."""
        self.clock.seconds = 0.0
        for allreduce in self.sums.values():
            allreduce.new_bytes()

    def sent(self) -> tuple[int, int] | None:
        """See `Way`."""
        counted = {key: allreduce.new_bytes()[0] for key, allreduce in self.sums.items()}
        return sum(counted.values()), counted.get("head", 0)

    def tensors(self) -> Iterable[torch.Tensor]:
        """See `Way`."""
        for group in self.averager.groups:
            yield from (group.parameter, group.own, group.gradient)
        yield from (*self.module.buffers(), *_state(self.optimizer), self.images, self.labels)

    def close(self) -> None:
        """See `Way`."""
        for allreduce in self.sums.values():
            allreduce.close()


class DataWay(_Summed):
    """The whole network on every rank."""

    def __init__(self, setting: Setting, traced: Traced) -> None:
        module = setting.build().to(memory_format=setting.memory_format)  # type: ignore[call-overload]
        head = parameters_of(traced, head_of(traced))
        keys = {name: "head" if name in head else "trunk" for name, _ in module.named_parameters()}
        super().__init__(setting, module, keys, Clock(), overlap=True)
        self.images, self.labels = own_samples(setting)

    def backward(self, number: int) -> float:
        """See `_Summed`."""
        torch.manual_seed(number)
        outputs = self.module(self.images)
        loss = loss_of(self.module, outputs, self.images, self.labels)[0] / self.setting.batch
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()


class PlacedWay(_Summed):
    """This rank's part of the network under a placement."""

    def __init__(self, setting: Setting, traced: Traced, derived: Derived) -> None:
        clock = Clock()
        self.transport = TimedTransport(derived.placement.mesh, clock)
        self.placed = PlacedModule(setting.build(), traced, derived, self.transport)
        self.placed.to(memory_format=setting.memory_format)  # type: ignore[call-overload]
        head = parameters_of(traced, head_of(traced))
        layouts = self.placed.parameter_layouts
        keys: dict[str, str | tuple[()]] = {
            name: (("head" if name in head else "trunk") if layouts[name].sum_axes else ())
            for name, _ in self.placed.named_parameters()
        }
        handover = derived.placement.handover
        in_rounds = handover is not None and handover.scheme != "a"
        super().__init__(setting, self.placed, keys, clock, overlap=not in_rounds)
        self.rounds = Rounds(self.placed, handover, self._sum_loss) if in_rounds and handover is not None else None
        self.images, self.labels = _placed_samples(setting, derived)
        self.head = head_of(traced)
        divided = Split("batch") in derived.input or has_own_loss(self.placed)
        self.counts = divided or setting.world.rank == 0  # one of several that compute the same

    def backward(self, number: int) -> float:
        """See `_Summed`."""
        if self.rounds is not None:
            return float(self.rounds.step(self.images, self.labels, seed=number, batch=self.setting.batch)[0])
        self.placed.begin_step(number, self.setting.batch)
        outputs = self.placed(self.images)
        loss = loss_of(self.placed, outputs, self.images, self.labels)[0] / self.setting.batch
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item() if self.counts else 0.0

    def _sum_loss(self, output: int, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        weight = getattr(self.placed, "auxiliary_weight", 0.3) if output else 1.0
        right = float((logits.detach().argmax(dim=1) == labels).sum())
        return weight * functional.cross_entropy(logits, labels, reduction="sum"), 0.0 if output else right

    def step(self, number: int) -> float:
        """See `Way`."""
        loss = super().step(number)
        self.exposed_s = self.clock.seconds + self.transport.waited_s
        return loss

    def reset(self) -> None:
        """See `Way`."""
        super().reset()
        self.transport.reset()

    def sent(self) -> tuple[int, int] | None:
        """See `Way`."""
        everything, head = super().sent() or (0, 0)
        for (tag, _), traffic in self.transport.counters.items():
            everything += traffic.sent
            head += traffic.sent if is_of_head(tag, self.head) else 0
        return everything, head


class DdpWay(Way):
    """PyTorch's DistributedDataParallel over Gloo."""

    exposed_s = None

    def __init__(self, setting: Setting) -> None:
        from torch.nn.parallel import DistributedDataParallel

        module = setting.build().to(memory_format=setting.memory_format)  # type: ignore[call-overload]
        self.size = setting.world.size
        self.ddp = DistributedDataParallel(module, process_group=setting.groups["gloo"], gradient_as_bucket_view=True)
        self.optimizer = build_optimizer(RULE, list(self.ddp.parameters()))
        self.images, self.labels = own_samples(setting)
        self.share = len(self.labels) * self.size / setting.batch  # DDP takes the mean of the ranks' means

    def step(self, number: int) -> float:
        """See `Way`."""
        torch.manual_seed(number)
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(main_output(self.ddp(self.images)), self.labels) * self.share
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item() / self.size

    def tensors(self) -> Iterable[torch.Tensor]:
        """See `Way`."""
        grads = [parameter.grad for parameter in self.ddp.parameters() if parameter.grad is not None]
        held = [*self.ddp.parameters(), *self.ddp.buffers(), *grads]
        yield from (*held, *_state(self.optimizer), self.images, self.labels)


def make_way(name: str, setting: Setting, traced: Traced) -> Way:
    """A rival by its name; all ranks must ask."""
    if name == DDP:
        return DdpWay(setting)
    if name == DATA:
        return DataWay(setting, traced)
    return PlacedWay(setting, traced, derived_of(name, traced, setting.world.size))


def derived_of(name: str, traced: Traced, workers: int) -> Derived:
    """What follows from a placement of this name."""
    return derive(traced.ops, by_name(name, traced.ops, workers), outputs=traced.outputs)


def traced_of(setting: Setting) -> Traced:
    """The network's ops."""
    return trace(setting.build(), setting.input_shape)


# --- what belongs to fully connected layers -----------------------------------------------------------------


def head_of(traced: Traced) -> frozenset[str]:
    """The first fully connected layer, and all that is computed from it."""
    first = next((op.name for op in traced.ops if op.kind == "linear"), None)
    head = {first} if first is not None else set()
    for op in traced.ops:
        if head & set(op.inputs):
            head.add(op.name)
    return frozenset(name for name in head if name is not None)


def parameters_of(traced: Traced, ops: Iterable[str]) -> set[str]:
    """Full names of these ops' parameters."""
    chosen = set(ops)
    return {
        f"{traced.calls[op.name].path}.{name}".lstrip(".")
        for op in traced.ops
        if op.name in chosen
        for name, _ in op.parameters
    }


def is_of_head(tag: str, head: frozenset[str]) -> bool:
    """Whether bytes counted under this name are for fully connected layers.

    >>> is_of_head("loss of fc8", frozenset({"fc8"})), is_of_head("conv1", frozenset({"fc8"}))
    (True, False)
    """
    return tag in head or tag == "labels" or tag.removeprefix("loss of ") in head


# --- samples and tensors ------------------------------------------------------------------------------------


def own_samples(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's even part of the batch."""
    cuts = bounds(setting.batch, setting.world.size)
    return setting.samples(*cuts[setting.world.rank : setting.world.rank + 2])


def _placed_samples(setting: Setting, derived: Derived) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the batch as the placement cuts it; no more is made up than it needs."""
    box = extents(setting.input_shape, derived.input, derived.placement.mesh, setting.world.rank)
    images, labels = setting.samples(*box[0])
    part = images[(slice(None), *(slice(*span) for span in box[1:]))]
    return part.contiguous(memory_format=setting.memory_format), labels


def _state(optimizer: torch.optim.Optimizer) -> Sequence[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors' memory, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
