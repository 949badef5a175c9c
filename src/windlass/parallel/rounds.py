"""A step in rounds: the head of a hybrid network computes on one part of the batch while the next is on its way.

Source: A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997v2, 2014,
section 4, schemes (b) and (c); `windlass.plan.handover` says who sends what in which round.

Theory of operation.  The trunk runs once, on the worker's own samples.  Its last tensor is cut off the autograd graph
there, and for every round

1. the round's samples, sent while the round before was computed, are there; the next ones leave;
2. the head runs forward and backward on them, and its weights' gradients add up;
3. the members' addends of the samples' gradient leave for the samples' owners, who add them, in the order of members,
   when the next round is done.

At the end the trunk runs backward from the gradient so collected.  A worker holds one round of the head's activations
and two of its input, where scheme (a) holds the whole batch.

With a variable batch the head's weights are updated after every so many rounds (section 4.2): the head's gradient is
the mean over those samples, the trunk's is still the mean over the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from windlass.errors import ConfigError
from windlass.plan.handover import Round, make_rounds
from windlass.plan.head import handover_axis
from windlass.plan.layout import Split, bounds, extents
from windlass.plan.placement import Handover

if TYPE_CHECKING:
    from windlass.parallel.placed import PlacedModule
    from windlass.parallel.transport import Exchange

SumLoss = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, float]]
"""An output's number (0: the main one), logits and labels, to the weighted summed loss and how many are right."""
SAMPLES = Split("batch")


@dataclass(frozen=True)
class _Turn:
    """A round as all workers together see it.

    Attributes:
        own: the round along this worker's line.
        samples: the numbers of all lines' samples within the step, in the order in which the head has them.
        share: samples over which the head's gradient is the mean.
    """

    own: Round
    samples: tuple[int, ...]
    share: int


class Rounds:
    """The steps of a placed network whose batch is handed over in rounds.

    Args:
        placed: the network.
        handover: scheme b or c.
        sum_loss: see `SumLoss`.
        on_update: called on all workers when the head's weights are to be updated, with their gradients in ``.grad``;
            None: the head is updated with the rest, after the step.

    Raises:
        ConfigError: the tensor that crosses into the head is not cut by samples before and whole after, along exactly
            one axis.
    """

    def __init__(
        self, placed: PlacedModule, handover: Handover, sum_loss: SumLoss, on_update: Callable[[], None] | None = None
    ) -> None:
        self.placed, self.handover, self.on_update = placed, handover, on_update
        self._sum_loss = sum_loss
        self.trunk, self.head = placed.trunk_and_head(handover.before)
        derived = placed.derived
        first = next(op for op in derived.ops if op.op.name == handover.before)
        self.crossing = first.op.inputs[0]
        self._source = placed.layout_of(self.crossing)
        axis = handover_axis(self._source, first.needs[0])
        if axis is None:
            raise ConfigError(
                f"handover: {self.crossing} crosses into the head at {handover.before}, cut as {self._source} before "
                f"and {first.needs[0]} after; rounds need one axis that cuts samples before and neurons after"
            )
        self.axis = axis
        self._mesh, self._rank = derived.placement.mesh, placed.transport.rank
        self._members = self._mesh.extent(self.axis)
        self._place = self._mesh.coordinates(self._rank)[self.axis]
        self._numbers = {output.name: number for number, output in enumerate(derived.outputs)}

    def step(self, images: torch.Tensor, labels: torch.Tensor, *, seed: int, batch: int) -> tuple[torch.Tensor, float]:
        """Forward and backward of one step; gradients add up in ``.grad``, as after ``loss.backward()``.

        Args:
            images: this worker's part of the batch.
            labels: of its samples.
            seed: of the step's masks.
            batch: samples of all workers together.

        Returns:
            This worker's part of the mean loss, and how many samples of its part are right.
        """
        placed = self.placed
        placed.begin_step(seed, batch)
        values = placed.run(self.trunk, {"input": images}, batch=batch)
        crossing = values[self.crossing]
        own, gradient = crossing.detach(), torch.zeros_like(crossing)
        turns, everybodys = self._turns(batch), self._all_labels(labels, batch)
        loss, correct, returning = torch.zeros((), dtype=own.dtype), 0.0, None
        coming = self._send(own, turns[0].own)
        for number, turn in enumerate(turns):
            arrived = torch.cat(coming.wait()).requires_grad_()
            if number + 1 < len(turns):
                coming = self._send(own, turns[number + 1].own)
            placed.begin_step(seed, len(turn.samples), turn.samples)
            part, right = self._run_head(arrived, self._labels_of(everybodys, turn.own), turn)
            loss, correct = loss + part / batch, correct + right
            if returning is not None:
                self._add(gradient, *returning)
            assert arrived.grad is not None
            returning = (self._return(arrived.grad * (turn.share / batch), turn.own), turn.own)
            if turn.own.updates and self.on_update is not None:
                self.on_update()
        assert returning is not None
        self._add(gradient, *returning)
        placed.begin_step(seed, batch)
        return self._end(values, labels, gradient, batch, loss, correct)

    def _end(
        self, values: dict[str, torch.Tensor], labels: torch.Tensor, gradient: torch.Tensor, batch: int,
        loss: torch.Tensor, correct: float,
    ) -> tuple[torch.Tensor, float]:  # fmt: skip
        """The trunk's backward pass, from the samples' gradient and from outputs of its own (auxiliary heads)."""
        ends, gradients = [values[self.crossing]], [gradient]
        for name, number in self._numbers.items():
            if name in values and name != self.crossing:
                part, _ = self._sum_loss(number, values[name], labels)
                ends.append(part / batch)
                gradients.append(torch.ones_like(ends[-1]))
                loss = loss + ends[-1].detach()
        torch.autograd.backward(ends, gradients)
        return loss, correct

    def _run_head(self, arrived: torch.Tensor, labels: torch.Tensor, turn: _Turn) -> tuple[torch.Tensor, float]:
        """Forward and backward of the head; the summed loss of this worker's part of the round."""
        found = self.placed.run(self.head, {self.crossing: arrived}, batch=len(turn.samples), arrived=(self.crossing,))
        loss, correct = torch.zeros((), dtype=arrived.dtype), 0.0
        for name, number in self._numbers.items():
            if name in found:
                part, right = self._sum_loss(number, found[name], labels)
                loss, correct = loss + part, correct + right
        (loss / turn.share).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), correct

    # --- who has what ---

    def _lines(self) -> list[tuple[int, ...]]:
        """The ranks of every line along the axis that has samples of its own, in the order of their samples."""
        here = self._mesh.coordinates(self._rank)
        choices = [
            range(extent) if part == SAMPLES and axis != self.axis else (here[axis],)
            for axis, (extent, part) in enumerate(zip(self._mesh.shape, self._source, strict=True))
        ]
        return [self._mesh.group(self._mesh.rank(place), self.axis) for place in itertools.product(*choices)]

    def _own_line(self) -> tuple[int, ...]:
        return self._mesh.group(self._rank, self.axis)

    def _spans(self, line: tuple[int, ...], batch: int) -> list[tuple[int, int]]:
        """Which of the step's samples each member of a line has."""
        return [extents((batch,), self._source, self._mesh, rank)[0] for rank in line]

    def _turns(self, batch: int) -> list[_Turn]:
        lines = self._lines()
        spans = [self._spans(line, batch) for line in lines]
        rounds = [make_rounds(self.handover, [stop - start for start, stop in line]) for line in spans]
        own = lines.index(self._own_line())
        return [
            _Turn(turns[own], _numbers(turns, spans), sum(turn.share for turn in turns))
            for turns in zip(*rounds, strict=True)
        ]

    def _all_labels(self, labels: torch.Tensor, batch: int) -> list[torch.Tensor]:
        """The labels of every member of this worker's line; every member needs those of the samples it computes."""
        shapes = [(stop - start,) for start, stop in self._spans(self._own_line(), batch)]
        return self.placed.transport.exchange(self.axis, [labels] * self._members, shapes, tag=("labels", "forward"))

    def _labels_of(self, everybodys: list[torch.Tensor], turn: Round) -> torch.Tensor:
        """Those of the samples whose logits this worker gets: the even part of the round's."""
        whole = torch.cat([labels[slice(*span)] for labels, span in zip(everybodys, turn.spans, strict=True)])
        cuts = bounds(turn.size, self._members)
        return whole[cuts[self._place] : cuts[self._place + 1]]

    # --- what travels ---

    def _send(self, own: torch.Tensor, turn: Round) -> Exchange:
        """Starts sending this worker's samples of a round to all members, and receiving theirs."""
        mine = own[slice(*turn.spans[self._place])]
        shapes = [(stop - start, *own.shape[1:]) for start, stop in turn.spans]
        tag = (self.handover.before, "forward")
        return self.placed.transport.start_exchange(self.axis, [mine] * self._members, shapes, tag=tag)

    def _return(self, addend: torch.Tensor, turn: Round) -> Exchange:
        """Starts sending the addends of the samples' gradient to their owners."""
        sizes = [stop - start for start, stop in turn.spans]
        shapes = [(sizes[self._place], *addend.shape[1:])] * self._members
        tag = (self.handover.before, "backward")
        return self.placed.transport.start_exchange(self.axis, torch.split(addend, sizes), shapes, tag=tag)

    def _add(self, gradient: torch.Tensor, returning: Exchange, turn: Round) -> None:
        """Adds what has come back for this worker's samples, in the order of members."""
        place = gradient[slice(*turn.spans[self._place])]
        for addend in returning.wait():
            place += addend


def _numbers(turns: Sequence[Round], spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, ...]:
    """The samples of a round: line by line, member by member."""
    return tuple(
        first + sample
        for turn, line in zip(turns, spans, strict=True)
        for (first, _), (start, stop) in zip(line, turn.spans, strict=True)
        for sample in range(start, stop)
    )
