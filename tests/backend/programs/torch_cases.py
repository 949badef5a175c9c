"""PyTorch's own cases for process groups (``torch.testing._internal.distributed.distributed_test``) over this backend.

``torch_cases.py [--all | NAME...]``: each case runs on the ranks that MPI started instead of processes that the case
would start, in a fresh default group.  Rank 0 writes a line of JSON for each case and a last one with the counts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import unittest
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from mpi4py import MPI

WORLD = MPI.COMM_WORLD
CASE_S = 40
GROUP_S = 10
"""After so long a rank stops waiting for one whose case has failed."""

# The cases ask for their backend's name to know what it can do: ours can do what Gloo can.
os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(WORLD.size), "RANK": str(WORLD.rank)}
os.environ["TEMP_DIR"] = WORLD.bcast(tempfile.mkdtemp() if WORLD.rank == 0 else None)
for folder in ("barrier", "test_dir", "init_dir"):
    (Path(os.environ["TEMP_DIR"]) / folder).mkdir(exist_ok=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from leave import leave  # noqa: E402
from torch.testing._internal.common_distributed import TEST_SKIPS  # noqa: E402
from torch.testing._internal.distributed import distributed_test  # noqa: E402

import windlass  # noqa: E402, F401

BARRIER: Any = distributed_test.Barrier


class Cases(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
    """The cases; `_run` of PyTorch's class would start processes."""

    @property
    def init_method(self) -> str:
        """MPI's ranks have met."""
        return "env://"


def names() -> list[str]:
    return sorted(name for name in dir(Cases) if name.startswith("test_"))


QUICK = [
    "test_DistributedDataParallel_requires_grad",
    "test_all_gather",
    "test_all_gather_coalesced_simple",
    "test_all_gather_object_default_pg",
    "test_all_reduce_coalesced_sum",
    "test_all_reduce_complex_unsupported_ops",
    "test_all_reduce_full_group_max",
    "test_all_reduce_sum_async",
    "test_all_to_all_single_unequal_split",
    "test_barrier",
    "test_batch_isend_irecv_gloo",
    "test_broadcast",
    "test_gather",
    "test_gather_object",
    "test_irecv",
    "test_reduce_sum",
    "test_scatter",
    "test_scatter_object_list",
    "test_send_recv_any_source",
]


def run(name: str) -> str:
    """What came of a case: ``ok``, ``skip: …`` or ``fail: …``."""
    case: Any = Cases(name)
    case.rank, case.file_name = WORLD.rank, ""
    dist.init_process_group("windlass", timeout=timedelta(seconds=GROUP_S))
    if WORLD.rank == 0:
        BARRIER.init()
    BARRIER.barrier_id = 0
    WORLD.Barrier()
    torch.manual_seed(0)  # forked processes would begin with equal states
    signal.alarm(CASE_S)
    try:
        getattr(case, name)()
        return "ok"
    except unittest.SkipTest as skip:
        return f"skip: {skip}"
    except SystemExit as left:
        reasons = [skip.message for skip in TEST_SKIPS.values() if skip.exit_code == left.code]
        return f"skip: {reasons[0]}" if reasons else f"fail: exit {left.code}"
    except Exception as error:
        return f"fail: {type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
        if dist.is_initialized():
            dist.destroy_process_group()


def on_alarm(_: int, __: FrameType | None) -> None:
    raise TimeoutError(f"the case ran longer than {CASE_S} s")


def main(wanted: list[str]) -> None:
    signal.signal(signal.SIGALRM, on_alarm)
    counts = {"ok": 0, "skip": 0, "fail": 0}
    for name in names() if wanted == ["--all"] else wanted or QUICK:
        if not hasattr(Cases, name):
            continue
        outcomes = WORLD.allgather(run(name))
        worst = min(outcomes, key=lambda outcome: ("fail", "skip", "ok").index(outcome.split(":")[0]))
        counts[worst.split(":")[0]] += 1
        if WORLD.rank == 0:
            sys.stdout.write(json.dumps({"case": name, "outcome": worst}) + "\n")
            sys.stdout.flush()
    if WORLD.rank == 0:
        sys.stdout.write(json.dumps(counts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
    leave()
