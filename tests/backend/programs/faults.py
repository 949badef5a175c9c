"""Ranks that do not come, die, or ask for what cannot be: ``faults.py CASE``; rank 0 writes what it was told."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

import windlass.backend
from windlass.errors import WindlassError

dist: Any = torch.distributed  # its annotations allow None everywhere


def say(text: object) -> None:
    sys.stdout.write(f"{RANK}: {text}\n")
    sys.stdout.flush()


def error_of(action: Callable[[], object]) -> str:
    """The message of the error that `action` raises."""
    try:
        action()
    except (RuntimeError, WindlassError) as error:
        return f"{type(error).__name__} {error}"
    return "no error"


def wait_for_the_end() -> None:
    """Outlives the ranks that report: it is they who end the job."""
    time.sleep(20)


def barrier() -> None:
    if RANK == SIZE - 1:
        wait_for_the_end()
    say(error_of(lambda: windlass.backend.barrier(timeout_s=0.5)))
    say(error_of(dist.barrier))


def allreduce() -> None:
    """The missing rank waits elsewhere: for the default group's own timeout."""
    if RANK == 1:
        with contextlib.suppress(RuntimeError):
            dist.recv(torch.empty(1), 0)
        wait_for_the_end()
    say(error_of(lambda: dist.all_reduce(torch.ones(2))))


def future() -> None:
    """The error comes out of the future and of DDP's backward pass."""
    if RANK == 1:
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        wait_for_the_end()
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    loss: Any = net(torch.ones(1, 2)).sum()
    say(error_of(loss.backward))
    say(error_of(lambda: dist.all_reduce(torch.ones(1), async_op=True).get_future().wait()))


def short_wait() -> None:
    """A wait that gives up leaves the operation as it is."""
    if RANK == 1:
        time.sleep(1.0)
    value = torch.ones(1)
    work = dist.all_reduce(value, async_op=True)
    if RANK == 0:
        say(error_of(lambda: work.wait(timedelta(seconds=0.2))))
    work.wait()
    say(value.item())


def message() -> None:
    if RANK == 0:
        say(error_of(lambda: dist.recv(torch.empty(1), 1)))
    else:
        wait_for_the_end()


def gather() -> None:
    if RANK == 1:
        wait_for_the_end()
    if RANK == 0:
        say(error_of(lambda: dist.gather(torch.ones(1), [torch.ones(1) for _ in range(SIZE)])))
    else:
        dist.gather(torch.ones(1))
        wait_for_the_end()


def killed() -> None:
    """A rank dies while the others wait for it; they go on without it."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    say(error_of(lambda: dist.all_reduce(torch.ones(2))))
    say(error_of(lambda: dist.all_reduce(torch.ones(2))))
    survivors = dist.new_group([rank for rank in range(SIZE) if rank != 1], use_local_synchronization=True)
    value = torch.tensor([float(RANK)])
    dist.all_reduce(value, group=survivors)
    say(f"survivors' sum {value.item()}")
    dist.destroy_process_group(survivors)


def uncaught() -> None:
    if RANK == 1:
        raise ValueError("a bug of the program")
    dist.barrier()


def refused() -> None:
    coordinates = torch.ones(2, 2).to_sparse()
    say(error_of(lambda: dist.group.WORLD.allreduce([coordinates])))
    say(error_of(lambda: dist.all_reduce(torch.empty(2, device="meta"))))
    say(error_of(lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.BAND)))
    say(error_of(lambda: dist.group.WORLD.all_gather_single(torch.empty(5), torch.empty(4))))
    say(error_of(lambda: dist.all_to_all_single(torch.empty(3), torch.empty(3), [1], [3])))
    dist.barrier()
    group = dist.group.WORLD
    dist.destroy_process_group()
    say(error_of(group.barrier))


if __name__ == "__main__":
    dist.init_process_group("windlass", timeout=timedelta(seconds=1))
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    globals()[sys.argv[1]]()
    if dist.is_initialized():
        dist.destroy_process_group()
