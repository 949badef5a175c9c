"""Ranks that die while an elastic run trains: every death here is a real signal to a real process."""

from __future__ import annotations

import json
import shutil
import socket
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import windlass as package
from conftest import Windlass, losses_of, rows_of, steps_of
from windlass.engine import launch
from windlass.errors import ConfigError
from windlass.runs.checkpoint import damage, list_checkpoints, read_checkpoint

pytestmark = pytest.mark.mpi

NUM_TRAIN = 1438
STEPS = 23
"""Of an epoch of digits at the default batch of 64."""

NETWORK = textwrap.dedent(
    """
    import os, signal
    from pathlib import Path
    import torch
    from windlass.networks import build_network

    RANK = os.environ.get("OMPI_COMM_WORLD_RANK", "0")

    class Planted(torch.nn.Module):
        '''A network that sends its own process a signal where PLANTS says: SIGNAL:RANK:PHASE:COUNT, ....'''
        def __init__(self, norm=False, **arguments):
            super().__init__()
            self.net = build_network("lenet5", **arguments)
            self.norm = torch.nn.BatchNorm2d(arguments["in_channels"]) if norm else torch.nn.Identity()
            self.counts = {"train": 0, "test": 0, "save": 0}
        def meet(self, phase):
            self.counts[phase] += 1
            for plant in filter(None, os.environ.get("PLANTS", "").split(",")):
                name, rank, where, count = plant.split(":")
                done = Path("planted-" + plant)
                if (rank, where, int(count)) == (RANK, phase, self.counts[phase]) and not done.exists():
                    done.touch()
                    os.kill(os.getpid(), getattr(signal, name))
        def forward(self, x):
            if type(x).__name__ != "FakeTensor":
                self.meet("train" if self.training else "test")
            return self.net(self.norm(x))
        def state_dict(self, *arguments, **named):
            if not arguments and not named:
                self.meet("save")
            return super().state_dict(*arguments, **named)
    """
)


class Elastic:
    """Runs of the planted network in one folder."""

    def __init__(self, windlass: Windlass, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._windlass, self.folder, self._monkeypatch = windlass, folder, monkeypatch
        (folder / "planted.py").write_text(NETWORK)

    def __call__(self, out: str, *arguments: str, plants: str = "", code: int = 0) -> Path:
        self._monkeypatch.setenv("PLANTS", plants)
        options = ("--quiet", "--epochs", "2", "--set", "data.image_size=32", "--lr", "0.05")
        first = () if "--resume" in arguments else ("planted:Planted", "--set", "data.augment=[shift:1]")
        done = self._windlass("train", *first, "--out", out, *options, *arguments)
        assert done.code == code, done.err
        self.err = done.err
        return self.folder / out


@pytest.fixture
def elastic(windlass: Windlass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elastic:
    return Elastic(windlass, tmp_path, monkeypatch)


RECORD = ("--elastic", "--set", "elastic.record_samples=true")


def lost(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder) if row["kind"] == "lost"]


def check_every_sample_counted_once(folder: Path, *, epochs: int = 2) -> None:
    """Joins what every process wrote before each sum with the generation in which the step was completed."""
    steps = steps_of(folder)
    assert [row["step"] for row in steps] == list(range(1, epochs * STEPS + 1)), "every step once, in order"
    completed = {(row["step"], row["world"]): row["epoch"] for row in steps}
    taken: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(epochs)}
    for path in (folder / "samples").iterdir():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if (row["step"], row["world"]) in completed:
                assert row["epoch"] == completed[(row["step"], row["world"])]
                taken[row["epoch"]].update(row["ids"])
    for counts in taken.values():
        assert sorted(counts) == list(range(NUM_TRAIN)), "every sample was taken"
        assert set(counts.values()) == {1}, "and once"
    assert [sum(row["images"] for row in steps if row["epoch"] == epoch) for epoch in range(epochs)] == (
        [NUM_TRAIN] * epochs
    )


def resumed(elastic: Elastic, folder: Path, step: int, *arguments: str) -> Path:
    """Another run, which begins from the checkpoint that the first wrote after `step`."""
    again = folder.with_name("again")
    shutil.copytree(folder, again, symlinks=True)
    for path in (again / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    return elastic("again", "--resume", "--set", "elastic.enabled=false", "--set", "elastic.spares=0", *arguments)


def check_same_bits(one: Path, other: Path) -> None:
    """Equal losses in every step, and equal weights and optimizer in the last checkpoint."""
    assert losses_of(one) == losses_of(other)
    first, second = (read_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (one, other))
    assert first.step == second.step == 2 * STEPS
    tensors = [
        first.weights | {name: t for name, t in first.state.items() if name.startswith("optimizer/")},
        second.weights | {name: t for name, t in second.state.items() if name.startswith("optimizer/")},
    ]
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) > len(first.weights)
    for name, tensor in tensors[0].items():
        assert tensor.equal(tensors[1][name]), name


def test_one_of_three_dies_and_two_go_on_as_if_they_had_resumed_there(elastic: Elastic) -> None:
    every = ("--set", "checkpoint.every_steps=10", "--set", "checkpoint.keep_last=99")
    out = elastic("out", "--workers", "3", *RECORD, *every, plants="SIGKILL:2:train:31")
    (row,) = lost(out)
    assert (row["ranks"], row["workers"], row["step"], row["promoted"], row["repeated"]) == ([2], 2, 30, [], 64)
    start = f"rank 2 on {socket.gethostname()} (pid {row['pids'][0]}) died at step 30; 2 ranks go on from step 30; "
    assert row["message"].startswith(start + "noticed after ")
    first, last = elastic.err.splitlines()
    assert first == row["message"]
    assert last == f"the run went on without rank 2 on {socket.gethostname()} (pid {row['pids'][0]})"
    check_every_sample_counted_once(out)
    assert rows_of(out)[-1]["status"] == "done" and (out / "report.html").exists()
    again = resumed(elastic, out, 30, "--workers", "2")
    check_same_bits(out, again)


def test_the_leading_rank_dies_then_the_next_until_one_is_left(elastic: Elastic) -> None:
    """Each leading rank takes the metrics over from a dead one; the last ends the run alone."""
    out = elastic("out", "--workers", "3", *RECORD, plants="SIGKILL:0:train:10,SIGKILL:1:train:28")
    assert [(row["ranks"], row["workers"], row["step"]) for row in lost(out)] == [([0], 2, 9), ([1], 1, 26)]
    check_every_sample_counted_once(out)
    assert [row["epoch"] for row in rows_of(out) if row["kind"] == "epoch"] == [0, 1]
    assert rows_of(out)[-1]["status"] == "done" and (out / "report.html").exists()


@pytest.mark.slow
def test_two_die_at_once(elastic: Elastic) -> None:
    out = elastic("out", "--workers", "4", *RECORD, plants="SIGKILL:0:train:30,SIGKILL:2:train:30")
    assert sorted(rank for row in lost(out) for rank in row["ranks"]) == [0, 2]
    assert lost(out)[-1]["workers"] == 2
    check_every_sample_counted_once(out)


@pytest.mark.parametrize("dies", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_spare_takes_the_place_and_no_bit_changes(elastic: Elastic, dies: str) -> None:
    """BatchNorm before the network: running statistics go on too, the loss of a spare's are its source's."""
    out = elastic("out", "--workers", "2", "--spares", "1", *RECORD, plants=f"SIGKILL:{dies}:train:31")
    (row,) = lost(out)
    assert (row["ranks"], row["promoted"], row["workers"], row["step"]) == ([int(dies)], [2], 2, 30)
    check_every_sample_counted_once(out)
    check_same_bits(out, elastic("straight", "--workers", "2"))


@pytest.mark.slow
def test_a_spare_that_nobody_needs_changes_nothing(elastic: Elastic) -> None:
    out = elastic("out", "--workers", "2", "--spares", "1", "--elastic")
    assert not lost(out) and elastic.err == ""
    check_same_bits(out, elastic("straight", "--workers", "2"))


def test_a_stopped_rank_is_killed_after_the_deadline_and_the_others_go_on(elastic: Elastic) -> None:
    out = elastic("out", "--workers", "3", *RECORD, "--set", "stall_s=4", plants="SIGSTOP:1:train:31")
    (row,) = lost(out)
    assert (row["ranks"], row["workers"], row["step"]) == ([1], 2, 30)
    check_every_sample_counted_once(out)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["0", "2"])
def test_a_death_during_the_evaluation_repeats_it(elastic: Elastic, dies: str) -> None:
    out = elastic("out", "--workers", "3", *RECORD, plants=f"SIGKILL:{dies}:test:3")
    (row,) = lost(out)
    assert (row["step"], row["repeated"]) == (STEPS, 0)
    check_every_sample_counted_once(out)
    epochs = [row for row in rows_of(out) if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs] == [0, 1]
    straight = elastic("straight", "--workers", "2")
    tests = [row["test_loss"] for row in rows_of(straight) if row["kind"] == "epoch"]
    # Other sums up to the death, by three ranks instead of two: float32 rounding over 23 steps.
    assert [row["test_loss"] for row in epochs] == pytest.approx(tests, rel=1e-3)


@pytest.mark.slow
def test_a_death_during_a_checkpoint_leaves_it_to_the_next(elastic: Elastic) -> None:
    out = elastic("out", "--workers", "2", *RECORD, plants="SIGKILL:0:save:1")
    (row,) = lost(out)
    assert row["step"] == STEPS
    check_every_sample_counted_once(out)
    saved = [row for row in rows_of(out) if row["kind"] == "checkpoint"]
    assert [row["step"] for row in saved] == [STEPS, 2 * STEPS]
    names = [path.name for path in list_checkpoints(out / "checkpoints")]
    assert names == [f"step-{STEPS:08d}", f"step-{2 * STEPS:08d}"]
    assert all(damage(path) is None for path in list_checkpoints(out / "checkpoints"))


@pytest.mark.slow
def test_statistics_of_a_step_that_nobody_completed_are_taken_back(elastic: Elastic) -> None:
    """With BatchNorm, a spare and no loss: test losses of the run with a death are those of its source's statistics.

    Training losses depend on no running statistics, so all their bits must be those of the undisturbed run.
    """
    norm = ("--set", "network_args.norm=true")
    out = elastic("out", "--workers", "2", "--spares", "1", *RECORD, *norm, plants="SIGKILL:1:train:40")
    assert losses_of(out) == losses_of(elastic("straight", "--workers", "2", *norm))
    checkpoint = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    assert checkpoint.weights["norm.num_batches_tracked"] == 2 * STEPS


@pytest.mark.slow
def test_an_mpi_without_fault_tolerance_starts_again_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher leaves the option out, as it does where mpiexec does not know it; the ranks notice that."""
    monkeypatch.setattr(launch, "fault_options", lambda: ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text(NETWORK)
    monkeypatch.setenv("PLANTS", "SIGKILL:1:train:31")
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    events: list[dict[str, Any]] = []
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = package.train(
        "planted:Planted", data={"image_size": 32}, workers=2, epochs=2, out="out", progress=False,
        elastic={"enabled": True}, on_event=events.append,
    )  # fmt: skip
    assert result.status == "done"
    said = [event["message"] for event in events if event["kind"] == "warning"]
    assert said[0].startswith("this MPI cannot go on without a lost rank")
    assert "rank 1 on " in said[1] and "died" in said[1]
    assert "starting again from step-00000023 (restart 1 of at most 3)" in said[1]
    assert losses_of(tmp_path / "out") and {"kind": "resume", "step": 23, "workers": 2} in rows_of(tmp_path / "out")
    assert [row["step"] for row in steps_of(tmp_path / "out")] == list(range(1, 2 * STEPS + 1))


def test_spares_need_elastic() -> None:
    with pytest.raises(ConfigError, match="add --elastic"):
        package.train(workers=2, elastic={"spares": 1})
