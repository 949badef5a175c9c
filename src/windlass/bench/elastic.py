"""How long training stands still when a rank is killed: Windlass going on, beside torchrun starting again.

Both train the same network on the same data with as many workers and threads.  A rank gets SIGKILL; measured,
by the clock that all processes of a host share, are the time until another rank has noticed and the time until
the next step is complete.  PyTorch's answer is the one its documentation gives: ``torchrun --max-restarts`` with
Gloo and a checkpoint every few steps (`bench.elastic_rival`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from windlass.config import config_from_layers
from windlass.engine.launch import Launcher, threads_per_rank
from windlass.errors import LostRankError
from windlass.job import Job

STEPS_BETWEEN = 40
"""Steps before the first kill and between two."""
CHECKPOINT_STEPS = 5
"""The rival writes a checkpoint so often."""
PATIENCE_S = 120.0
"""Longest wait for a step."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One kill.

    Attributes:
        by: ``windlass`` or ``torchrun``.
        noticed_s: from the kill until the first survivor's error.
        next_step_s: from the kill until the next step was complete.
        steps_again: complete steps that had to be done again.
        new_processes: how many processes were started for it.
    """

    by: str
    noticed_s: float
    next_step_s: float
    steps_again: int
    new_processes: int


@dataclass(frozen=True, kw_only=True)
class ElasticRow:
    """All kills of one rival: medians and the worst."""

    by: str
    workers: int
    kills: int
    noticed_s: float
    worst_noticed_s: float
    next_step_s: float
    worst_next_step_s: float
    steps_again: float
    new_processes: float


def bench_elastic(
    *, network: str, workers: int, kills: int, on_loss: Callable[[Loss], None]
) -> tuple[list[ElasticRow], list[Loss]]:
    """Measures both, one after the other.

    Args:
        network: a built-in name.
        workers: ranks on this host; one more than `kills` at least, since Windlass starts no new ones.
        kills: how many ranks are killed, one after the other.
        on_loss: told of every kill that is over.
    """
    losses = []
    for run in (windlass_losses, torchrun_losses):
        with tempfile.TemporaryDirectory(prefix="windlass-bench-") as folder:
            for loss in run(Path(folder), network=network, workers=workers, kills=kills):
                losses.append(loss)
                on_loss(loss)
    return [_row(by, workers, [loss for loss in losses if loss.by == by]) for by in ("windlass", "torchrun")], losses


def _row(by: str, workers: int, losses: list[Loss]) -> ElasticRow:
    return ElasticRow(
        by=by,
        workers=workers,
        kills=len(losses),
        noticed_s=statistics.median(loss.noticed_s for loss in losses),
        worst_noticed_s=max(loss.noticed_s for loss in losses),
        next_step_s=statistics.median(loss.next_step_s for loss in losses),
        worst_next_step_s=max(loss.next_step_s for loss in losses),
        steps_again=statistics.median(loss.steps_again for loss in losses),
        new_processes=statistics.median(loss.new_processes for loss in losses),
    )


def windlass_losses(folder: Path, *, network: str, workers: int, kills: int) -> list[Loss]:
    """Kills the ranks with the highest numbers of one elastic run."""
    layer = {
        "network": network, "workers": workers, "epochs": 100_000, "elastic": {"enabled": True},
        "schedule": {"name": "constant"}, "checkpoint": {"every_epochs": 0},
    }  # fmt: skip
    job = Job(config_from_layers([layer]), str(folder / "out"))
    losses: list[Loss] = []
    killed_at: list[float] = []
    resumed_at = 0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal resumed_at
        if event["kind"] == "lost":
            noticed_s, next_step_s = (event[name] - killed_at[-1] for name in ("noticed_at", "next_step_at"))
            losses.append(Loss(by="windlass", noticed_s=noticed_s, next_step_s=next_step_s, steps_again=0,
                               new_processes=0))  # fmt: skip
            resumed_at = event["step"]
        if event["kind"] == "step" and event["step"] > resumed_at + STEPS_BETWEEN and len(killed_at) == len(losses):
            if len(losses) == kills:
                launcher.stop("measured")
                launcher.stop("measured")  # asked twice, it writes no checkpoint
            else:
                victim = launcher.pid_of(workers - 1 - len(losses))
                killed_at.append(time.monotonic())
                os.kill(victim, signal.SIGKILL)

    launcher = Launcher(
        "windlass.worker",
        ["--job", json.dumps(job.to_mapping())],
        num_ranks=workers,
        threads=threads_per_rank(workers),
        stall_s=PATIENCE_S,
        on_event=on_event,
        elastic=True,
    )
    outcome = launcher.run()
    if len(losses) < kills:
        raise LostRankError(f"the elastic run ended after {len(losses)} of {kills} kills: {outcome.message}")
    return losses


def torchrun_losses(folder: Path, *, network: str, workers: int, kills: int) -> list[Loss]:
    """Kills the rank with the highest number, again and again."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}",
        f"--max-restarts={kills}", "-m", "windlass.bench.elastic_rival", "--folder", str(folder), "--network", network,
        "--every", str(CHECKPOINT_STEPS),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "PRTE"))}
    # With the agent's own store PyTorch 2.13's Gloo meets the addresses of the dead again and cannot start.
    environment |= {"OMP_NUM_THREADS": str(threads_per_rank(workers)), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (folder / "torchrun.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        return [_torchrun_loss(folder, process, workers=workers, start=start) for start in range(kills)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        for row in rows_of(folder):  # torchrun's workers are in sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(row["pid"], signal.SIGKILL)
        process.kill()
        process.wait()


def _torchrun_loss(folder: Path, process: subprocess.Popen[bytes], *, workers: int, start: int) -> Loss:
    def steps(number: int) -> list[dict[str, Any]]:
        return [row for row in rows_of(folder) if row["kind"] == "step" and row["start"] == number]

    _wait(folder, process, lambda: len(steps(start)) > STEPS_BETWEEN)
    victim = next(r["pid"] for r in rows_of(folder) if r["kind"] == "hello" and (r["start"], r["rank"]) == (
        start, workers - 1))  # fmt: skip
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    _wait(folder, process, lambda: steps(start + 1))
    before = [row for row in steps(start) if row["at"] < killed_at]
    errors = [row["at"] for row in rows_of(folder) if row["kind"] == "error" and row["start"] == start]
    first = steps(start + 1)[0]
    return Loss(
        by="torchrun",
        noticed_s=min(errors, default=float("nan")) - killed_at,
        next_step_s=first["at"] - killed_at,
        steps_again=before[-1]["step"] - first["step"] + 1,
        new_processes=workers,
    )


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """What the rival's ranks have written so far, whole lines only."""
    for path in folder.glob("rank-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _wait(folder: Path, process: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            last = (folder / "torchrun.log").read_text(errors="replace").splitlines()[-10:]
            raise LostRankError("torchrun did not get to its next step:\n" + "\n".join(last))
        time.sleep(0.01)


def rows_to_json(rows: list[ElasticRow], losses: list[Loss], machine: dict[str, Any]) -> str:
    """The results with the machine, as JSON."""
    content = {"machine": machine, "rows": [asdict(r) for r in rows], "losses": [asdict(loss) for loss in losses]}
    return json.dumps(content, indent=1) + "\n"
