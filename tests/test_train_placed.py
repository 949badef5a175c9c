"""Whole runs under a placement: the losses of one worker, checkpoints that go on anywhere, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from conftest import Windlass, environment, losses_of, rows_of, steps_of
from windlass.config import config_from_layers
from windlass.engine.world import LocalWorld
from windlass.job import Job
from windlass.prepare import prepare
from windlass.runs.checkpoint import list_checkpoints, read_checkpoint

pytestmark = pytest.mark.mpi

EVERY = ("--quiet", "--epochs", "1", "--set", "data.augment=[]", "--tune", "off")
ALEXNET = ("alexnet", "--data", "synthetic:3x64x64:4:30", "--batch", "12", "--lr", "0.0003", *EVERY)
"""30 samples to train and 4 classes: batches of 12, 12 and 6, and dropout, whose masks are the samples' own."""
BY_HAND = {"mesh": "all:2", "layers": {"*": "batch"}}
"""Data parallelism as a placement."""


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One worker's run."""
    return started(tmp_path_factory.mktemp("lenet"), "lenet5", *EVERY)


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers' run with a placement from a file; dropout leaves nothing else to compare with."""
    folder = tmp_path_factory.mktemp("alexnet")
    (folder / "mine.yaml").write_text(yaml.safe_dump(BY_HAND))
    return started(folder, *ALEXNET, "--workers", "2", "--parallel", "mine.yaml")


def started(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, "-m", "windlass", "train", *arguments, "--out", "out"]
    subprocess.run(command, cwd=folder, env=environment(), timeout=120, check=True)
    return folder / "out"


def run(windlass: Windlass, out: Path, *arguments: str) -> Path:
    done = windlass("train", *arguments, "--out", str(out))
    assert done.code == 0, done.err
    return out


def epochs_of(folder: Path) -> list[tuple[float, float]]:
    return [(row["test_loss"], row["test_accuracy"]) for row in rows_of(folder) if row["kind"] == "epoch"]


def check_same(found: Path, reference: Path) -> None:
    """Float32 sums in another order, 6e-8 a sum, which two dozen steps let grow a hundredfold and more."""
    assert losses_of(found) == pytest.approx(losses_of(reference), rel=1e-4)
    for (loss, accuracy), (loss_there, accuracy_there) in zip(epochs_of(found), epochs_of(reference), strict=True):
        assert loss == pytest.approx(loss_there, rel=1e-4) and accuracy == pytest.approx(accuracy_there, abs=0.01)
    assert [row["images"] for row in steps_of(found)] == [row["images"] for row in steps_of(reference)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("placement", [pytest.param("model", marks=SLOW), "hybrid", pytest.param("tiles", marks=SLOW)])
def test_two_workers_give_the_losses_of_one_and_go_on_anywhere(
    windlass: Windlass, tmp_path: Path, lenet: Path, placement: str
) -> None:
    every = ("--workers", "2", "--parallel", placement, "--set", "checkpoint.every_steps=10")
    found = run(windlass, tmp_path / "out", "lenet5", *EVERY, *every, "--set", "checkpoint.keep_last=99")
    check_same(found, lenet)
    straight, again = losses_of(found), ("--resume-from", "step-00000010", "--quiet")
    assert losses_of(run(windlass, found, *again)) == straight, "on the same placement to the bit"
    moved = run(windlass, found, *again, "--parallel", "data", "--workers", "1")
    assert losses_of(moved) == pytest.approx(straight, rel=1e-4)


@SLOW
def test_a_checkpoint_of_one_worker_goes_on_under_a_placement(windlass: Windlass, tmp_path: Path) -> None:
    """Adam's counters and moments too; and every tensor in the checkpoint is whole."""
    every = ("--update", "adam", "--lr", "0.002", "--set", "checkpoint.every_steps=10")
    one = run(windlass, tmp_path / "one", "lenet5", *EVERY, *every, "--set", "checkpoint.keep_last=99")
    losses, last = losses_of(one), read_checkpoint(list_checkpoints(one / "checkpoints")[-1])
    moved = run(windlass, one, "--resume-from", "step-00000010", "--workers", "2", "--parallel", "hybrid", "--quiet")
    assert losses_of(moved) == pytest.approx(losses, rel=1e-3)
    found = read_checkpoint(list_checkpoints(moved / "checkpoints")[-1])
    shapes, shapes_there = ({name: t.shape for name, t in kept.weights.items()} for kept in (found, last))
    assert shapes == shapes_there
    names = {name for name in last.state if name.startswith("optimizer/exp_avg")}
    assert names and all(found.state[name].shape == last.state[name].shape for name in names)
    assert found.state["optimizer/step#0"].equal(last.state["optimizer/step#0"])


@pytest.mark.parametrize(
    ("workers", "placement"),
    [
        ("2", "model"),
        ("2", "tiles"),
        ("2", "hybrid:a"),
        ("2", "hybrid:b"),
        ("2", "hybrid:c"),
        pytest.param("3", "hybrid:c", marks=SLOW),
    ],
)
def test_every_placement_and_scheme_agrees(
    windlass: Windlass, tmp_path: Path, alexnet: Path, workers: str, placement: str
) -> None:
    check_same(run(windlass, tmp_path / "out", *ALEXNET, "--workers", workers, "--parallel", placement), alexnet)


@SLOW
def test_tiers_agree(windlass: Windlass, tmp_path: Path, alexnet: Path) -> None:
    tiers = ("--workers", "4", "--mesh", "node:2,device:2", "--parallel", "hybrid")
    check_same(run(windlass, tmp_path / "tiers", *ALEXNET, *tiers), alexnet)


@SLOW
def test_the_variable_batch_updates_the_head_more_often_and_resumes(
    windlass: Windlass, tmp_path: Path, alexnet: Path
) -> None:
    many = ("--workers", "2", "--set", "checkpoint.every_steps=2", "--set", "checkpoint.keep_last=99")
    found = run(windlass, tmp_path / "found", *ALEXNET, *many, "--parallel", "hybrid:c", "--batch", "12,6")
    losses = losses_of(found)
    assert losses[0] != pytest.approx(losses_of(alexnet)[0], rel=1e-5), "the second round sees updated weights"
    assert losses_of(run(windlass, found, "--resume-from", "step-00000002", "--quiet")) == losses


def test_the_variable_batch_is_the_loop_written_out(windlass: Windlass, tmp_path: Path) -> None:
    """Krizhevsky 2014, section 4: in each of two rounds half of both workers' samples, then the head is updated.

    The head's learning rate is that of its own batch.  Tolerance: float32 sums in another order, three steps.
    """
    given = {"network_args": {"dropout": 0.0}, "schedule": {"name": "constant"}, "update": {"scaling": "linear"}}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(given))
    options = ("--config", "given.yaml", "--workers", "2", "--parallel", "hybrid:c", "--batch", "12,6", "--lr", "0.05")
    found = losses_of(run(windlass, tmp_path / "out", *ALEXNET[:3], *EVERY, *options))
    layers = {**given, "network": "alexnet", "batch": 12, "tune": "off"}
    layers |= {"update": {"lr": 0.05, "scaling": "linear"}, "data": {"source": ALEXNET[2], "augment": []}}
    prepared = prepare(Job(config_from_layers([layers]), str(tmp_path / "none")), LocalWorld())
    trunk, head = prepared.module.features, prepared.module.classifier[2:]  # type: ignore[index]
    assert isinstance(trunk, torch.nn.Module) and isinstance(head, torch.nn.Module)
    updates = [
        torch.optim.SGD(part.parameters(), lr=0.05 * batch / 128, momentum=0.9, weight_decay=5e-4)
        for part, batch in ((trunk, 12), (head, 6))
    ]
    for step in range(len(found)):
        batch = prepared.train.fetch(0, step)
        crossing, total = trunk(batch.images).flatten(1), 0.0
        gradient = torch.zeros_like(crossing)
        halves = [np.array_split(share, 2) for share in np.array_split(np.arange(len(batch.labels)), 2)]
        for turn in range(2):
            ids = np.concatenate([half[turn] for half in halves])
            arrived = crossing[ids].detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(head(arrived), batch.labels[ids], reduction="sum")
            (loss / len(ids)).backward()  # type: ignore[no-untyped-call]
            assert arrived.grad is not None
            gradient[ids] = arrived.grad * len(ids) / len(batch.labels)
            updates[1].step()
            updates[1].zero_grad()
            total += loss.item() / len(batch.labels)
        crossing.backward(gradient)
        updates[0].step()
        updates[0].zero_grad()
        assert found[step] == pytest.approx(total, rel=1e-5), step


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("resnet18", "--parallel", "mine.yaml"), "placement mine.yaml: mesh: all:2 has 2 workers, but the run has 3"),
    (("lenet5", "--parallel", "hybrid:a", "--batch", "64,32"), "head_batch: parallel hybrid:a updates all weights at"),
    (("alexnet", "--parallel", "hybrid:b", "--batch", "60,20"), "--batch 60,20"),
    (("lenet5", "--parallel", "none.yaml"), "placement none.yaml: no such file"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    windlass: Windlass, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(BY_HAND))
    workers = "2" if "60,20" in arguments else "3"
    done: Any = windlass("train", *arguments, "--workers", workers, "--out", "out", "--quiet")
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "out" / "config.yaml").exists()


@SLOW
def test_a_network_that_one_worker_cannot_hold_trains_divided(
    windlass: Windlass, tmp_path: Path, alexnet: Path
) -> None:
    """57 MiB of weights, with gradients, their sums and momentum: data parallelism needs 390 MiB, the halves 157."""
    limit = (*ALEXNET, "--workers", "2", "--memory-limit", "200MiB")
    refused = windlass("train", *limit, "--out", "refused")
    assert refused.code == 2 and not (tmp_path / "refused" / "config.yaml").exists()
    assert "placement data does not fit 200.0 MiB a worker: worker 0 needs " in refused.err
    assert "--parallel model with more --workers" in refused.err
    check_same(run(windlass, tmp_path / "divided", *limit, "--parallel", "model"), alexnet)


def test_every_byte_between_layers_is_planned(alexnet: Path) -> None:
    rows = steps_of(alexnet)
    assert all(row["sent_bytes"] == row["planned_bytes"] > 0 for row in rows)
