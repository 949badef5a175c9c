"""Runs that do not end as planned: stopped, killed, stalled, diverged, broken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TIMEOUT_S, Windlass, losses_of, ranks_of, rows_of

Start = Callable[..., "subprocess.Popen[str]"]

LONG = ("train", "lenet5", "--epochs", "2000", "--out", "out")


def wait_for(process: subprocess.Popen[str], condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no {what} in time"
        time.sleep(0.05)


def training(folder: Path) -> Callable[[], object]:
    """Whether at least one epoch is done."""
    return lambda: (folder / "metrics.csv").exists()


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid) for pid in pids)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@pytest.mark.mpi
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_leaves_a_checkpoint_and_75(
    start: Start, windlass: Windlass, tmp_path: Path, number: signal.Signals, workers: str
) -> None:
    process = start(*LONG, "--workers", workers)
    wait_for(process, training(tmp_path / "out"), "epoch")
    ranks = ranks_of(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75, err
    assert err.startswith(f"windlass: stopped on request ({number.name}) after step ")
    assert len(err.splitlines()) == 1
    assert len(ranks) == (2 if workers == "2" else 0)
    assert gone(ranks)
    rows = rows_of(tmp_path / "out")
    assert rows[-1]["status"] == "stopped"
    assert (tmp_path / "out" / "report.html").exists()
    stopped_at = rows[-1]["step"]
    assert (tmp_path / "out" / "checkpoints" / "last").resolve().name == f"step-{stopped_at:08d}"
    epochs = str(stopped_at // 23 + 1)
    done = windlass("train", "--out", "out", "--resume", "--epochs", epochs)
    assert done.code == 0, done.err
    assert f"resumed after step {stopped_at}" in done.out
    assert len(losses_of(tmp_path / "out")) == int(epochs) * 23


@pytest.mark.mpi
def test_a_killed_rank_ends_the_run_by_name(start: Start, tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(
        textwrap.dedent(
            """
            import sys
            from windlass.networks import build_network
            def net(**arguments):
                print("a line of mine", file=sys.stderr, flush=True)
                return build_network("lenet5", **arguments)
            """
        )
    )
    process = start("train", "talk:net", *LONG[2:], "--workers", "3", "--set", "data.image_size=32")
    wait_for(process, training(tmp_path / "out"), "epoch")
    ranks = ranks_of(process.pid)
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 6, err
    first, *rest = err.splitlines()
    assert f"on {socket.gethostname()} (pid {ranks[1]}) died, last seen in " in first
    assert "a line of mine" in "\n".join(rest)
    assert gone(ranks)


@pytest.mark.mpi
def test_a_stopped_rank_is_named_and_nobody_hangs(start: Start, tmp_path: Path) -> None:
    process = start(*LONG, "--workers", "2", "--set", "stall_s=4")
    wait_for(process, training(tmp_path / "out"), "epoch")
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 6, err
    assert "has not moved for" in err
    assert f"(pid {ranks[1]}) has been silent for" in err
    assert gone(ranks)


BAD = textwrap.dedent(
    """
    import os
    import torch
    from windlass.networks import build_network

    class Bad(torch.nn.Module):
        '''LeNet-5 that goes wrong on rank 1 in its third forward pass of training.'''
        def __init__(self, what, **arguments):
            super().__init__()
            self.net, self.what, self.calls = build_network("lenet5", **arguments), what, 0
        def forward(self, x):
            out = self.net(x)
            if type(x).__name__ == "FakeTensor":
                return out
            self.calls += 1
            if self.calls == 30 and os.environ.get("OMPI_COMM_WORLD_RANK", "0") == self.rank:
                if self.what == "raise":
                    raise RuntimeError("planted")
                if self.what == "die":
                    os.abort()
                return out * float(self.what)
            return out

    def on_one(what="nan", **arguments):
        net = Bad(what, **arguments)
        net.rank = "1"
        return net

    def alone(what="nan", **arguments):
        net = Bad(what, **arguments)
        net.rank = "0"
        return net
    """
)


@pytest.mark.mpi
@pytest.mark.parametrize("what", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_all_ranks(windlass: Windlass, tmp_path: Path, what: str) -> None:
    """Fetched as the 30th forward pass: step 24 of the second epoch at 23 steps and 6 of evaluation."""
    (tmp_path / "bad.py").write_text(BAD)
    done = windlass(
        "train", "bad:on_one", "--workers", "2", "--out", "out", "--set", "data.image_size=32",
        "--set", f"network_args.what={what}",
    )  # fmt: skip
    assert done.code == 4, done.err
    assert len(done.err.splitlines()) == 1
    assert "step 24 (epoch 2)" in done.err
    assert "on rank 1" in done.err
    assert "on rank 0" not in done.err
    assert "last good checkpoint: out/checkpoints/step-00000023" in done.err
    assert rows_of(tmp_path / "out")[-1]["status"] == "failed"
    assert len(losses_of(tmp_path / "out")) == 23


def test_a_loss_that_is_not_finite_stops_a_single_worker(windlass: Windlass, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    done = windlass("train", "bad:alone", "--out", "out", "--set", "data.image_size=32")
    assert done.code == 4, done.err
    assert "step 24 (epoch 2): loss nan on rank 0" in done.err


@pytest.mark.mpi
def test_an_exception_on_one_rank_ends_all_with_its_traceback(windlass: Windlass, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    done = windlass("train", "bad:on_one", "--workers", "2", "--out", "out", "--set", "data.image_size=32",
                    "--set", "network_args.what=raise")  # fmt: skip
    assert done.code == 1
    assert "internal error on rank 1" in done.err
    assert "RuntimeError: planted" in done.err


@pytest.mark.mpi
def test_a_crash_below_python_shows_where(windlass: Windlass, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    done = windlass("train", "bad:on_one", "--workers", "2", "--out", "out", "--set", "data.image_size=32",
                    "--set", "network_args.what=die")  # fmt: skip
    assert done.code == 6
    assert "rank 1 on " in done.err
    assert "Fatal Python error: Aborted" in done.err
    assert "bad.py" in done.err


def test_a_full_disk_is_5_and_the_old_checkpoint_survives(windlass: Windlass, tmp_path: Path) -> None:
    """The kernel refuses files over 600 kB: LeNet-5's state with Adam's moments is 480 kB and more."""
    first = windlass("train", "lenet5", "--epochs", "1", "--out", "out")
    assert first.code == 0, first.err
    limit = ("bash", "-c", 'ulimit -f 200; exec "$@"', "bash")
    done = windlass("train", "--out", "out", "--resume", "--epochs", "2", prefix=limit)
    assert done.code == 5, done.err
    assert "cannot write checkpoint out/checkpoints/step-00000046" in done.err
    assert "step-00000023 is whole" in done.err
    names = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["best", "last", "step-00000023"]
    assert windlass("train", "--out", "out", "--resume", "--epochs", "2").code == 0


@pytest.mark.mpi
def test_an_image_that_only_one_rank_reads_ends_all_with_3(windlass: Windlass, tmp_path: Path) -> None:
    """Found in the middle of an epoch by one rank; the other would wait for ever if it did not hear of it."""
    import numpy as np
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number:02d}.jpg")
    bad = tmp_path / "data" / "a" / "07.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    options = ("--set", "data.image_size=32", "--set", "data.holdout=0.1", "--epochs", "3", "--batch", "8")
    done = windlass("train", "lenet5", "--data", "folder:data", "--workers", "2", "--out", "out", *options)
    assert done.code == 3, done.err
    assert len(done.err.splitlines()) == 1
    assert f"{bad.name}: cannot be decoded" in done.err


@pytest.mark.mpi
def test_a_disk_that_fills_under_the_metrics_ends_all_with_5(windlass: Windlass, tmp_path: Path) -> None:
    """Rank 0's kernel refuses files over 40 kB after some steps; metrics.jsonl, a line a step, gets there first."""
    (tmp_path / "small.py").write_text(
        textwrap.dedent(
            """
            import os, resource
            from windlass.networks import build_network
            def net(**arguments):
                def limit(*_):
                    if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
                        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
                network = build_network("lenet5", **arguments)
                network.output.register_full_backward_hook(limit)
                return network
            """
        )
    )
    arguments = ("--set", "data.image_size=32", "--set", "checkpoint.every_epochs=0", "--epochs", "30")
    done = windlass("train", "small:net", *arguments, "--workers", "2", "--out", "out")
    assert done.code == 5, done.err
    assert done.err.splitlines()[-1].startswith("windlass: cannot write out/metrics.jsonl")
