"""A trainer whose workers divide the network, not only the batch among them: a placement in the plan, trained.

What differs from the loop: the module is a worker's part of the network (`parallel`); the samples that a worker gets
follow from how the placement lays the input out; workers that compute the same loss count it once; a gradient is
summed along those axes of the mesh over which it is an addend (`engine.keyed`); and checkpoints hold whole tensors, so
that a run may go on under another placement or under none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import distributed, nn

from windlass.backend.options import Options
from windlass.backend.register import backend_for
from windlass.data.serving import Batch, BatchServer
from windlass.engine.gradients import FlatGroup, GradientAverager
from windlass.engine.keyed import Axes, KeyedSums
from windlass.engine.world import MpiWorld, crosses_hosts
from windlass.errors import ConfigError, DataError
from windlass.loop import Trainer
from windlass.objective import has_own_loss
from windlass.optim.build import build_optimizer, set_learning_rate
from windlass.optim.rules import UpdateRule
from windlass.parallel.apply import apply
from windlass.parallel.moves import part_of
from windlass.parallel.placed import PlacedModule
from windlass.parallel.rounds import Rounds
from windlass.parallel.transport import TorchTransport
from windlass.placing import global_shape
from windlass.plan.layout import WHOLE, Layout, Split, extents
from windlass.prepare import allreduce_for
from windlass.progress import Agreed, Progress
from windlass.state import (
    Tensors,
    gather_tensors,
    give_weights,
    load_optimizer,
    load_random,
    optimizer_tensors,
    random_tensors,
    seed_rank,
    step_seed,
    tensors_of_rank,
)

ROUNDS = ("b", "c")
"""Schemes of a handover that take rounds."""
PHASES = ("forward", "backward")
"""Phases of a step in which tensors travel between layers."""


class Head:
    """The model-parallel head of a network whose weights are updated more often than the rest's.

    Args:
        averager: of the head's gradients.
        rule: its update rule, for its batch.
    """

    def __init__(self, averager: GradientAverager, rule: UpdateRule) -> None:
        self.averager, self.rule = averager, rule
        self.optimizer = build_optimizer(rule, [group.parameter for group in averager.groups])
        self.finite = True

    def update(self, lr: float) -> None:
        """Updates the weights by the gradients in ``.grad``, unless something was not finite since `finite` was set."""
        self.averager.begin()
        self.finite &= self.averager.finish_backward()
        self.averager.wait()
        if self.finite:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()


class PlacedTrainer(Trainer):
    """Trains one prepared run on one worker of a placement; see `Trainer`."""

    module: PlacedModule

    def _build(self) -> None:
        prepared, plan, world = self.prepared, self.prepared.plan, self.world
        assert isinstance(world, MpiWorld) and prepared.placement is not None
        if not distributed.is_initialized():
            backend = backend_for(next(prepared.module.parameters()).device.type)
            distributed.init_process_group(backend, pg_options=Options() if backend == "windlass" else None)
        if prepared.checkpoint is None:
            give_weights(prepared.module.parameters(), world)
        placement = prepared.placement
        self._transport = TorchTransport(placement.mesh)
        shape = global_shape(prepared)
        placed = apply(prepared.module, placement, input_shape=shape, transport=self._transport)
        self.module = placed.to(memory_format=self._layout)  # type: ignore[call-overload]
        prepared.module = self.module  # the whole network is let go
        self._mesh = placement.mesh
        self._planned: dict[int, int] = {}
        self._begun = 0
        self._divide_samples(placed.derived.input)
        keys = {name: self._key(name) for name in placed.parameter_layouts}
        self.allreduce = KeyedSums(
            world, self._mesh, sorted(set(keys.values())), lambda ranks: allreduce_for(ranks, plan)
        )
        self._rounds, self._head = self._make_rounds(keys)
        trunk = keys if self._head is None else {name: keys[name] for name in keys if name not in self._head_names()}
        steady = self._rounds is None or self._head is not None  # else gradients of the head come in every round
        self.averager = self._averager(trunk, overlap=bool(plan.value("overlap")) and steady)

    def _key(self, name: str) -> Axes:
        axes = self.module.parameter_layouts[name].sum_axes
        return tuple(sorted(axis for axis in axes if self._mesh.extent(axis) > 1))

    def _averager(self, keys: Mapping[str, Axes], *, overlap: bool) -> GradientAverager:
        assert isinstance(self.allreduce, KeyedSums)
        return GradientAverager(
            self.module,
            start_sum=self.allreduce.start,
            alone=False,
            bucket_bytes=int(self.prepared.plan.value("bucket_bytes")),
            overlap=overlap,
            background=crosses_hosts(self.world),
            keys=keys,
            start_sums=self.allreduce.start_sums,
        )

    # --- rounds and the head ---

    def _make_rounds(self, keys: Mapping[str, Axes]) -> tuple[Rounds | None, Head | None]:
        placement = self.prepared.placement
        handover = placement.handover if placement is not None else None
        if handover is None or handover.scheme not in ROUNDS:
            return None, None
        rounds = Rounds(self.module, handover, self._sum_loss, self._update_head if handover.update_every else None)
        if not handover.update_every:
            return rounds, None
        self._rounds = rounds
        names = self._head_names()
        averager = self._averager({name: keys[name] for name in keys if name in names}, overlap=False)
        return rounds, Head(averager, self.config.update.for_batch(self.config.head_batch))

    def _head_names(self) -> set[str]:
        """The head's parameters by name."""
        assert self._rounds is not None
        head = set(self._rounds.head)
        return {name for name in self.module.parameter_layouts if self.module.owner(name) in head}

    def _sum_loss(self, number: int, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The weighted summed loss of one of the network's outputs, and how many are right in the main one."""
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        if number:
            return float(getattr(self.module, "auxiliary_weight", 0.3)) * loss, 0.0
        return loss, float((logits.detach().argmax(dim=1) == labels).sum())

    def _update_head(self) -> None:
        assert self._head is not None
        self._head.update(self._rate(self._head.rule))

    # --- a step ---

    def step(self, batch: Batch) -> Agreed:
        """See `Trainer.step`."""
        if self._head is not None:
            self._head.finite = True
        self._begun = batch.global_count
        self._transport.reset()
        return super().step(batch)

    def _forward_backward(self, batch: Batch) -> tuple[float, float]:
        timer, number = self._timer, self.progress.step + 1
        seed = step_seed(self.config.seed, step=self.progress.step, rank=0)
        if self._rounds is not None:
            with timer.part("forward"):
                self._note("the rounds of a step", number)
                images = batch.images.contiguous(memory_format=self._layout)
                loss, correct = self._rounds.step(images, batch.labels, seed=seed, batch=batch.global_count)
            return loss.item(), correct
        self.module.begin_step(seed, batch.global_count)
        with timer.part("forward"):
            self._note("forward", number)
            loss, correct = self._forward(batch)
        with timer.part("backward"):
            self._note("backward", number)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), correct

    def _agree(self, loss: float, correct: float, seen: int, finite: bool) -> Agreed:
        finite = finite and math.isfinite(loss) and (self._head is None or self._head.finite)
        counts_loss, counts_samples = self._counts()
        return super()._agree(loss * counts_loss if finite else 0.0, correct * counts_samples, seen * counts_samples,
                              finite)  # fmt: skip

    def _counts(self) -> tuple[bool, bool]:
        """Whether this worker's loss counts, and whether its samples do: of those that are the same, the first's."""
        places = self._mesh.coordinates(self.world.rank)
        others = [place for place, part in zip(places, self.module.derived.input, strict=True) if _is_not_batch(part)]
        samples = not any(others)
        if not has_own_loss(self.module):
            return samples, samples
        same = [place for place, part in zip(places, self.module.derived.input, strict=True) if part == WHOLE]
        return not any(same), samples

    def _score(self, batch: Batch) -> tuple[float, float, float]:
        self.module.begin_step(0, batch.global_count)
        loss, correct = self._forward(batch)
        counts_loss, counts_samples = self._counts()
        found = loss.item() * batch.global_count * counts_loss
        return found, correct * counts_samples, float(len(batch.labels) * counts_samples)

    def _traffic(self) -> dict[str, float]:
        """Bytes of gradients and of what travels between layers, as counted and as planned; seconds of waiting."""
        transport, found = self._transport, super()._traffic()
        exchanged = sum(sent for (_, phase), (sent, _) in transport.counted.items() if phase in PHASES)
        found["sent_bytes"] += exchanged
        found["planned_bytes"] += self._planned_bytes(self._begun)
        found["exchange_s"] = transport.waited_s
        transport.reset()
        return found

    def _planned_bytes(self, batch: int) -> int:
        """What the placement says that this worker sends between layers in a step of so many samples."""
        if batch not in self._planned:
            rows = self.module.derived.traffic(self.world.rank, batch=batch)
            self._planned[batch] = sum(row.forward_sent + row.backward_sent for row in rows)
        return self._planned[batch]

    def _average_buffers(self) -> None:
        """Statistics are everybody's already."""

    # --- samples ---

    def _divide_samples(self, layout: Layout) -> None:
        self._tile = tuple(WHOLE if part == Split("batch") else part for part in layout)
        samples = tuple(WHOLE if _is_not_batch(part) else part for part in layout)
        for server in (self.prepared.train, self.prepared.test):
            server.divide(lambda count: extents((count,), samples, self._mesh, self.world.rank)[0])

    def serve(self, server: BatchServer, epoch: int, step: int) -> Batch:
        """This worker's part of a step; zeros where its data is bad, since the others' exchanges need its part."""
        try:
            batch = server.fetch(epoch, step)
        except DataError as error:
            self._failure = error
            batch = _blank(server, step)
        return batch._replace(images=part_of(batch.images, self._tile, self._mesh, self.world.rank))

    # --- checkpoints ---

    def _gather_state(self) -> Callable[[], tuple[Tensors, Tensors]]:
        weights = self.module.full_state_dict()
        found = {name: self._whole_state(name, tensor) for name, tensor in sorted(self._own_state().items())}
        buffers = {f"buffer/{name}": self.module.whole(name, tensor) for name, tensor in self.module.named_buffers()}
        state = found | gather_tensors(random_tensors(), self.world)
        for rank in range(self.world.size):
            state |= {f"rank{rank}/{name}": tensor.clone() for name, tensor in buffers.items()}
        return lambda: (weights, state)

    def _parts(self) -> list[tuple[torch.optim.Optimizer, list[FlatGroup], str]]:
        """Every optimizer, what it updates, and how its counters are marked in a checkpoint."""
        rest = [] if self._head is None else [(self._head.optimizer, self._head.averager.groups, "head/")]
        return [(self.optimizer, self.averager.groups, ""), *rest]

    def _own_state(self) -> Tensors:
        found: Tensors = {}
        for optimizer, groups, mark in self._parts():
            for name, tensor in optimizer_tensors(optimizer, groups).items():
                found[f"{mark}{name}" if "#" in name else name] = tensor
        return found

    def _whole_state(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the optimizer as it stands in a checkpoint: whole, where it belongs to a parameter."""
        return tensor if "#" in key else self.module.whole(key.split("/", 2)[2], tensor)

    def _restore(self) -> None:
        checkpoint = self.prepared.checkpoint
        if checkpoint is None:
            seed_rank(self.config.seed, step=0, rank=self.world.rank)
            return
        num_ranks = int(checkpoint.manifest["world_size"])
        weights = _mean_buffers(checkpoint.weights, checkpoint.state, num_ranks)
        try:
            self.module.load_full_state_dict(weights)
        except ConfigError as error:
            raise DataError(f"checkpoint {checkpoint.path} does not fit the network: {error}") from None
        state = {name: self._part_of_state(name, tensor) for name, tensor in checkpoint.state.items()}
        for optimizer, groups, mark in self._parts():
            marked = {name.removeprefix(mark): tensor for name, tensor in state.items() if name.startswith(mark)}
            load_optimizer(optimizer, groups, state | marked)
        self.progress = Progress(**checkpoint.manifest["progress"])
        self._first_step = self.progress.step
        if num_ranks == self.world.size:
            load_random(tensors_of_rank(checkpoint.state, self.world.rank))
        else:
            seed_rank(self.config.seed, step=self.progress.step, rank=self.world.rank)

    def _part_of_state(self, key: str, whole: torch.Tensor) -> torch.Tensor:
        name = key.split("/", 2)[-1]
        known = key.startswith("optimizer/") and name in self.module.parameter_layouts
        return self.module.part(name, whole) if known else whole


def _is_not_batch(part: Split | str) -> bool:
    return part != Split("batch")


def _blank(server: BatchServer, step: int) -> Batch:
    """A step's samples of this worker without what is in them."""
    count = server.num_of_step(step)
    first, last = server.own_span(count)
    labels = torch.zeros(last - first, dtype=torch.int64)
    images = torch.zeros(last - first, server.num_channels, server.image_size, server.image_size)
    return Batch(images, labels, count, labels.numpy())


def _mean_buffers(weights: Tensors, state: Tensors, num_ranks: int) -> Tensors:
    """The weights, with running statistics that speak for all ranks that wrote the checkpoint."""
    found = dict(weights)
    for name, tensor in weights.items():
        parts = [state.get(f"rank{rank}/buffer/{name}", tensor) for rank in range(num_ranks)]
        if tensor.is_floating_point() and not all(part.equal(tensor) for part in parts):
            found[name] = torch.stack(parts).mean(dim=0)
    return found
