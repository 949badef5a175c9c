"""What the survivors of a loss give one another, so that all stand at the same place of a run.

Synchronous ranks hold the same parameters after every step, so whoever has taken the last step can hand its
state to whoever has not, and nobody needs to undo one: a sum that is complete on one rank holds every rank's
part.  What does differ from rank to rank is what a forward pass leaves in buffers (BatchNorm's running
statistics); that of a step which nobody completed is taken back (`BufferMark`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from windlass.engine.gradients import FlatGroup

Arrays = dict[str, NDArray[Any]]
Position = tuple[int, int]
"""Epoch, and steps of it that are done."""


class Place(NamedTuple):
    """Where a rank stands when it meets the others after a loss.

    Attributes:
        position: None for a spare that knows nothing yet.
        owed: metrics of a checkpoint that was begun and not ended; None where there is none.
        status: how the run would end now.
        begun: samples of the step that was under way, 0 between two steps.
        rows: the last rows of metrics, which the one who writes them may have taken with it.
    """

    position: Position | None
    owed: dict[str, float] | None
    status: str
    begun: int
    rows: tuple[dict[str, Any], ...]


class Meeting(NamedTuple):
    """What follows from all ranks' places: the furthest position and who has it; the rest as in `Place`."""

    position: Position
    source: int
    everyone_there: bool
    owed: dict[str, float] | None
    status: str
    repeated: int
    rows: tuple[dict[str, Any], ...]


def meet(places: Sequence[Place]) -> Meeting | None:
    """Where all go on; None where nobody knows anything.

    >>> behind, ahead = Place((0, 4), None, "done", 64, ()), Place((0, 5), None, "done", 0, ())
    >>> meet([behind, ahead, behind])[:3]
    ((0, 5), 1, False)
    """
    known = [place.position for place in places if place.position is not None]
    if not known:
        return None
    furthest = max(known)
    there = [place for place in places if place.position == furthest]
    source = next(rank for rank, place in enumerate(places) if place.position == furthest)
    return Meeting(
        position=furthest,
        source=source,
        everyone_there=len(there) == len(places),
        owed=next((place.owed for place in there if place.owed is not None), None),
        status=there[0].status,
        repeated=max(place.begun for place in there),
        rows=max((place.rows for place in there), key=lambda rows: [row.get("step", 0) for row in rows]),
    )


class BufferMark:
    """A module's buffers as they stood at the last mark."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._copies = [buffer.detach().clone() for buffer in self._buffers]
        self._is_set = False

    def mark(self) -> None:
        """Remembers the buffers."""
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._buffers)
        self._is_set = True

    def forget(self) -> None:
        """What the buffers hold now stands."""
        self._is_set = False

    def roll_back(self) -> None:
        """Puts the buffers back to the mark, if one stands."""
        if self._is_set and self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._buffers, self._copies)
        self._is_set = False


def pack_state(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: Iterable[FlatGroup]
) -> dict[str, Any]:
    """Parameters, buffers and the optimizer's state, as arrays that pickle."""
    return {
        "parameters": {name: parameter.detach().numpy() for name, parameter in module.named_parameters()},
        "buffers": {name: buffer.detach().numpy() for name, buffer in module.named_buffers()},
        "optimizer": [_optimizer_arrays(optimizer, group) for group in groups],
    }


def _optimizer_arrays(optimizer: torch.optim.Optimizer, group: FlatGroup) -> Arrays:
    state: Mapping[str, Any] = optimizer.state.get(group.parameter, {})
    return {key: value.detach().numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}


def unpack_state(
    state: Mapping[str, Any],
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Iterable[FlatGroup],
    *,
    buffers: bool,
) -> None:
    """Takes over what another rank has packed; its buffers only where this rank has none of its own."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(state["parameters"][name]))
        for name, buffer in module.named_buffers() if buffers else ():
            buffer.copy_(torch.from_numpy(state["buffers"][name]))
    for group, arrays in zip(groups, state["optimizer"], strict=True):
        optimizer.state[group.parameter] = {key: torch.from_numpy(np.array(value)) for key, value in arrays.items()}


def missing_rows(present: Sequence[Mapping[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that whoever wrote metrics before did not get to write."""
    written = {(row.get("kind"), row.get("step")) for row in present}
    return [row for row in rows if (row.get("kind"), row.get("step")) not in written]


class SampleLog:
    """Which samples this process took, a line for every step it began: ``samples/rank-N.jsonl``.

    A line is on its way to the disk before the samples count, so that a rank's death loses none.  The step row
    of the metrics says in which generation of ranks a step was completed; lines of another one do not count.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        self._file = (folder / "samples" / f"rank-{rank}.jsonl").open("a", buffering=1)

    def write(self, *, step: int, epoch: int, generation: int, ids: NDArray[np.int64]) -> None:
        """One line."""
        row = {"step": step, "epoch": epoch, "world": generation, "ids": ids.tolist()}
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """No more steps."""
        self._file.close()
