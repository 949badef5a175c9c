"""Training on ranks: the same losses on any number of them, again, after a resume, and by any plan."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

from conftest import Windlass, losses_of, rows_of, run
from windlass.engine.launch import find_mpiexec, mpiexec_options

pytestmark = pytest.mark.mpi

DIGITS = ("train", "lenet5", "--data", "digits", "--batch", "60", "--quiet")

NETWORK = textwrap.dedent(
    """
    import random
    import numpy as np
    import torch
    from torch import nn

    class Net(nn.Module):
        '''BatchNorm's buffers differ from rank to rank; dropout, NumPy and random all draw numbers.'''
        def __init__(self, num_classes):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3, stride=2)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.3)
            self.fc = nn.Linear(8 * 9, num_classes)
        def forward(self, x):
            x = self.norm(self.conv(x)).relu().flatten(1)
            if self.training:
                x = x + 0.01 * (random.random() + float(np.random.standard_normal()))
            return self.fc(self.drop(x))
    """
)


def test_any_number_of_workers_gives_the_same_losses(windlass: Windlass, tmp_path: Path) -> None:
    """Three epochs of 24 steps on 1, 3 and 4 workers, each epoch's last step on a partial batch.

    Tolerance: ranks change only the order of float32 sums.  A gradient is a sum over 60 samples of sums over
    a 5x5 kernel's pixels, rounded about log2(60) + 25 times at eps = 6e-8: 2e-6 relative at worst.  Momentum
    0.9 adds up ten steps' errors of random sign, sqrt(10) times one step's, and a step that descends
    amplifies nothing: 6e-6, so 1e-5.  (A sample counted twice or left out would show at 1 / 60.)
    """
    losses = {}
    for workers in (1, 3, 4):
        folder = tmp_path / str(workers)
        run(windlass, folder, *DIGITS, "--epochs", "3", "--workers", str(workers))
        losses[workers] = losses_of(folder)
    assert len(losses[1]) == 72
    assert losses[1][-1] < losses[1][0] / 2
    for workers in (3, 4):
        assert losses[workers] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_equal_seeds_give_equal_losses_and_other_seeds_do_not(windlass: Windlass, tmp_path: Path) -> None:
    runs = [
        losses_of(run(windlass, tmp_path / name, *DIGITS, "--epochs", "1", "--workers", "2", "--seed", seed))
        for name, seed in (("a", "5"), ("b", "5"), ("c", "6"))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.slow
def test_small_buckets_and_overlap_change_nothing(windlass: Windlass, tmp_path: Path) -> None:
    """A sum of two numbers has one order, so any buckets give the same bits on two workers."""
    plan = tmp_path / "plan.yaml"
    done = windlass("plan", "lenet5", "--workers", "2", "--batch", "60", "-o", str(plan))
    assert done.code == 0, done.err
    default = run(windlass, tmp_path / "default", *DIGITS, "--epochs", "1", "--workers", "2")
    text = yaml.safe_load(plan.read_text())
    text["levers"]["bucket_bytes"] = 1024
    text["levers"]["overlap"] = True
    plan.write_text(yaml.safe_dump(text))
    edited = run(windlass, tmp_path / "edited", "train", "--quiet", "--epochs", "1", "--plan", str(plan))
    ran = yaml.safe_load((edited / "plan.yaml").read_text())
    assert ran["levers"]["bucket_bytes"]["value"] == 1024
    assert ran["levers"]["overlap"]["value"] is True
    assert losses_of(edited) == losses_of(default)


def resumed_from(folder: Path, name: str, target: Path) -> Path:
    """A copy of a run as a crash after the checkpoint `name` would have left it, later rows included."""
    shutil.copytree(folder, target, symlinks=True)
    for path in (target / "checkpoints").iterdir():
        if path.name != name:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    return target


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("step-00000007", marks=pytest.mark.slow),
        "step-00000023",
        pytest.param("step-00000028", marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact_to_the_bit(windlass: Windlass, tmp_path: Path, step: str) -> None:
    """Inside the first epoch, at its end, inside the second: losses and test metrics as in the straight run."""
    (tmp_path / "net.py").write_text(NETWORK)
    straight = run(
        windlass, tmp_path / "straight", "train", "net:Net", "--quiet", "--workers", "2", "--epochs", "3",
        "--set", "data.image_size=8", "--set", "checkpoint.every_steps=7", "--set", "checkpoint.keep_last=99",
        "--update", "adam",
    )  # fmt: skip
    again = resumed_from(straight, step, tmp_path / "again")
    done = windlass("train", "--out", str(again), "--resume", "--quiet")
    assert done.code == 0, done.err
    assert len(losses_of(straight)) == 69
    assert losses_of(again) == losses_of(straight)
    tests = [[(r["test_loss"], r["test_accuracy"], r["train_loss"]) for r in rows_of(f) if r["kind"] == "epoch"]
             for f in (straight, again)]  # fmt: skip
    assert tests[0] == tests[1]


@pytest.mark.slow
def test_resume_on_another_number_of_workers(windlass: Windlass, tmp_path: Path) -> None:
    """The same samples in the same batches; the tolerance is that of the first test."""
    arguments = ("--epochs", "2", "--set", "checkpoint.every_steps=10", "--set", "checkpoint.keep_last=99")
    straight = run(windlass, tmp_path / "straight", *DIGITS, "--workers", "2", *arguments)
    again = resumed_from(straight, "step-00000010", tmp_path / "again")
    done = windlass("train", "--out", str(again), "--resume", "--workers", "3", "--quiet")
    assert done.code == 0, done.err
    assert losses_of(again)[:10] == losses_of(straight)[:10]
    assert losses_of(again) == pytest.approx(losses_of(straight), rel=1e-5)
    assert {"kind": "resume", "step": 10, "workers": 3} in rows_of(again)


def test_under_mpiexec_the_processes_are_the_ranks(windlass: Windlass, tmp_path: Path) -> None:
    prefix = (find_mpiexec(), *mpiexec_options(2))
    ours = run(windlass, tmp_path / "ours", *DIGITS, "--epochs", "1", "--workers", "2")
    theirs = tmp_path / "theirs"
    done = windlass("train", "lenet5", "--batch", "60", "--epochs", "1", "--out", str(theirs), prefix=prefix)
    assert done.code == 0, done.err
    assert done.out.count("done after 24 steps") == 1
    assert losses_of(theirs) == losses_of(ours)
    wrong = windlass("train", "lenet5", "--workers", "3", "--out", str(tmp_path / "wrong"), prefix=prefix)
    assert wrong.code == 2
    assert wrong.err.count("mpiexec or srun started 2 ranks, --workers says 3") == 1
    assert not (tmp_path / "wrong").exists()


def test_mnist_reaches_98_percent(windlass: Windlass, tmp_path: Path) -> None:
    import os

    folder = Path(os.environ.get("WINDLASS_TEST_DATA", "/nonexistent")) / "mnist"
    if not folder.is_dir():
        pytest.skip("WINDLASS_TEST_DATA names no folder with mnist/ in it")
    out = run(windlass, tmp_path / "out", "train", "lenet5", "--data", f"mnist:{folder}", "--epochs", "10",
              "--workers", "2", "--quiet")  # fmt: skip
    epochs = [row for row in rows_of(out) if row["kind"] == "epoch"]
    assert len(epochs) == 10
    assert epochs[-1]["test_accuracy"] >= 0.98
