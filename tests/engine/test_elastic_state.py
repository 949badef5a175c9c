"""What survivors give one another, without ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from windlass.engine.elastic import Member, reseat
from windlass.engine.elastic_state import (
    BufferMark,
    Place,
    SampleLog,
    meet,
    missing_rows,
    pack_state,
    unpack_state,
)
from windlass.engine.gradients import flatten_parameters


def place(epoch: int, step: int, **values: Any) -> Place:
    return Place(**({"position": (epoch, step), "owed": None, "status": "done", "begun": 0, "rows": ()} | values))


NEW = Place(None, None, "done", 0, ())


def test_all_go_to_the_furthest_place() -> None:
    meeting = meet([place(0, 22, begun=64), place(1, 0, status="early"), NEW])
    assert meeting is not None
    assert (meeting.position, meeting.source, meeting.everyone_there) == ((1, 0), 1, False)
    assert (meeting.status, meeting.repeated) == ("early", 0)


def test_a_step_that_nobody_completed_is_counted_as_repeated() -> None:
    meeting = meet([place(0, 5, begun=64), place(0, 5, begun=0), place(0, 5, begun=64)])
    assert meeting is not None and meeting.everyone_there and meeting.repeated == 64


def test_a_checkpoint_stays_owed_where_the_furthest_owe_it() -> None:
    metrics = {"test_loss": 0.5}
    meeting = meet([place(1, 0), place(1, 0, owed=metrics), place(0, 23, owed={"test_loss": 9.0})])
    assert meeting is not None and meeting.owed == metrics


def test_spares_alone_know_nothing() -> None:
    assert meet([NEW, NEW]) is None


def test_the_fullest_rows_of_those_who_are_there_count() -> None:
    rows = ({"kind": "step", "step": 4}, {"kind": "step", "step": 5})
    meeting = meet([place(0, 5, rows=rows), place(0, 5, rows=rows[:1])])
    assert meeting is not None and meeting.rows == rows
    assert missing_rows([{"kind": "step", "step": 4}], list(rows)) == [rows[1]]


MEMBERS = tuple(Member(rank, f"host{rank % 2}", 100 + rank) for rank in range(6))


@pytest.mark.parametrize(
    ("seats", "living", "expected"),
    [
        ((0, 1, 2), (0, 1, 2), (0, 1, 2)),
        ((0, 1, 2), (0, 2), (0, 2)),
        ((0, 1, 2), (1, 2, 4), (4, 1, 2)),
        ((0, 1, 2), (2, 4, 5), (4, 5, 2)),
        ((0, 1, 2), (3, 4, 5), (3, 4, 5)),
        ((4, 1), (1, 3), (3, 1)),
        ((0, 1, 2), (1,), (1,)),
    ],
)
def test_spares_take_seats_in_order_and_the_living_keep_theirs(
    seats: tuple[int, ...], living: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    seated = reseat([MEMBERS[rank] for rank in seats], [MEMBERS[rank] for rank in living])
    assert tuple(member.rank for member in seated) == expected


def module_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def stepped(seed: int, *, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    module = module_of(seed)
    groups = flatten_parameters(module)
    optimizer = torch.optim.Adam([group.parameter for group in groups], lr=0.1)
    for _ in range(steps):
        for group in groups:
            group.gradient.copy_(torch.randn_like(group.gradient))
        module(torch.randn(5, 1, 4, 4))
        optimizer.step()
    return module, optimizer, groups


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("buffers", [False, True])
def test_a_state_that_was_handed_over_is_the_same(steps: int, buffers: bool) -> None:
    source, target = stepped(1, steps=steps), stepped(2, steps=1)
    before = {name: buffer.clone() for name, buffer in target[0].named_buffers()}
    state = json_like(pack_state(*source))
    unpack_state(state, *target, buffers=buffers)
    for (name, ours), theirs in zip(target[0].named_parameters(), source[0].parameters(), strict=True):
        assert ours.equal(theirs), name
    expected = dict(source[0].named_buffers()) if buffers else before
    assert all(buffer.equal(expected[name]) for name, buffer in target[0].named_buffers())
    for group, other in zip(target[2], source[2], strict=True):
        flat = group.parameter.untyped_storage().data_ptr()
        assert all(part.untyped_storage().data_ptr() == flat for part in group.parameters), "still one memory"
        ours, theirs = target[1].state[group.parameter], source[1].state.get(other.parameter, {})
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[key]) for key, value in ours.items())


def json_like(state: dict[str, Any]) -> dict[str, Any]:
    """A copy, as pickling makes one."""
    import pickle

    copied: dict[str, Any] = pickle.loads(pickle.dumps(state))
    return copied


def test_buffers_go_back_to_the_mark_until_it_is_forgotten() -> None:
    module = module_of(0)
    mark = BufferMark(module)
    mean = module[1].running_mean  # type: ignore[index]
    mark.mark()
    before = mean.clone()
    module(torch.randn(4, 1, 4, 4))
    assert not mean.equal(before)
    mark.roll_back()
    assert mean.equal(before) and int(module[1].num_batches_tracked) == 0  # type: ignore[index]
    mark.mark()
    module(torch.randn(4, 1, 4, 4))
    mark.forget()
    after = mean.clone()
    mark.roll_back()
    assert mean.equal(after), "what is complete stands"


def test_a_module_without_buffers_has_nothing_to_mark() -> None:
    mark = BufferMark(nn.Linear(2, 2))
    mark.mark()
    mark.roll_back()


def test_the_samples_of_a_step_are_on_their_way_to_the_disk_at_once(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, rank=3)
    log.write(step=1, epoch=0, generation=2, ids=np.array([5, 7]))
    log.close()
    text = (tmp_path / "samples" / "rank-3.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "epoch": 0, "world": 2, "ids": [5, 7]}
