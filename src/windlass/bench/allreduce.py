"""Allreduce by every algorithm beside the MPI library's own and Gloo through PyTorch, in turns, in the same ranks."""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from windlass.bench.ranks import enter
from windlass.engine.launch import Launcher
from windlass.errors import ConfigError
from windlass.plan.pick import ALLREDUCE_NAMES, LIBRARY, Pick

CHOSEN, BACKEND, GLOO, COPY = "chosen", "backend", "gloo", "copy"
"""What the chooser takes; the same through PyTorch's backend ``windlass``; its Gloo; a plain copy of the buffer, for
scale."""


@dataclass(frozen=True, kw_only=True)
class AllreduceRow:
    """One algorithm at one size.

    Attributes:
        ranks, num_bytes: how many ranks sum a buffer of how many bytes.
        by: the algorithm, or a rival.
        picked: for ``chosen``, what the chooser took.
        turns: how many turns were measured.
        seconds, low_s, high_s: median and quartiles of a call, at the slowest rank.
        times_gloo, times_library: how many times as fast as these, median over the turns; 0 where unknown.
    """

    ranks: int
    num_bytes: int
    by: str
    picked: str
    turns: int
    seconds: float
    low_s: float
    high_s: float
    times_gloo: float
    times_library: float


def bench_allreduce(
    ranks: Sequence[int], sizes: Sequence[int], *, algorithms: Sequence[str], turns: int,
    on_event: Callable[[dict[str, Any]], None],
) -> list[AllreduceRow]:  # fmt: skip
    """Measures on this host.

    Args:
        ranks: numbers of ranks, one job each.
        sizes: bytes of the float32 buffers.
        algorithms: names as `Pick.parse` reads them.
        turns: of every rival.
        on_event: told of every size that is done.
    """
    from windlass.train import raise_outcome

    rows: list[AllreduceRow] = []
    for size in ranks:
        events: list[dict[str, Any]] = []

        def take(event: dict[str, Any], events: list[dict[str, Any]] = events) -> None:
            events.append(event)
            on_event(event)

        spec = {"sizes": list(sizes), "algorithms": list(algorithms), "turns": turns}
        launcher = Launcher(
            "windlass.bench.allreduce", ["--spec", json.dumps(spec)], num_ranks=size, threads=1, stall_s=600,
            on_event=take,
        )  # fmt: skip
        raise_outcome(launcher.run())
        for event in events:
            rows += _rows(event, size)
    return rows


def check_algorithms(names: Sequence[str]) -> None:
    """Refuses what cannot be measured on one host.

    Raises:
        ConfigError: names it.
    """
    for name in names:
        Pick.parse(name)
    if not names:
        raise ConfigError(f"--algorithms: needs some of {', '.join(ALLREDUCE_NAMES)}")


def _rows(event: dict[str, Any], ranks: int) -> list[AllreduceRow]:
    found: dict[str, list[float]] = event["seconds"]

    def ratio(by: str, rival: str) -> float:
        pairs = zip(found.get(rival, []), found[by], strict=False)
        return statistics.median([theirs / ours for theirs, ours in pairs] or [0.0])

    rows = []
    for by, samples in found.items():
        low, middle, high = quartiles(samples)
        rows.append(
            AllreduceRow(
                ranks=ranks,
                num_bytes=event["num_bytes"],
                by=by,
                picked=event["picked"] if by == CHOSEN else by,
                turns=len(samples),
                seconds=middle,
                low_s=low,
                high_s=high,
                times_gloo=ratio(by, GLOO),
                times_library=ratio(by, LIBRARY),
            )
        )
    return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; the only value thrice."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rows_to_json(rows: Sequence[AllreduceRow], machine: dict[str, Any]) -> str:
    """The results with the machine, as JSON."""
    return json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def _rank_main() -> int:
    """One rank of the benchmark."""
    from windlass.engine.world import join_world

    me = enter()
    world = join_world(me.size)
    rivals = _Rivals(me.spec["algorithms"])
    for number, num_bytes in enumerate(me.spec["sizes"]):
        me.watchdog.note("allreduce", number)
        event = {"kind": "size", "ranks": me.size, "num_bytes": num_bytes, "picked": str(rivals.picked(num_bytes))}
        me.say(event | {"seconds": rivals.measure(num_bytes, turns=me.spec["turns"])})
        if me.give_up(world.gather(me.stop.reason)):
            return 0
    me.channel.send({"kind": "bye", "code": 0})
    world.barrier()
    from mpi4py import MPI

    MPI.Finalize()
    os._exit(0)  # Gloo's destructors now and then wait for ever


class _Rivals:
    """Everything that is measured, in one rank."""

    def __init__(self, algorithms: Sequence[str]) -> None:
        import torch
        import torch.distributed as dist
        from mpi4py import MPI
        from torch._C._distributed_c10d import TCPStore

        from windlass.engine.collectives import Collectives

        torch.set_num_threads(1)
        self._comm = MPI.COMM_WORLD
        self._collectives = Collectives(self._comm)
        self._algorithms = algorithms
        master = self._comm.Get_rank() == 0
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if master else None
        port = self._comm.bcast(store.port if store is not None else None)
        store = store or TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=self._comm.Get_rank(), world_size=self._comm.Get_size())
        self._store = store
        self._windlass = dist.new_group(backend="windlass")
        cores = sorted(os.sched_getaffinity(0))
        if self._comm.Get_size() <= len(cores):
            # Blocking rivals are woken on their waker's core: without this two ranks end up on one, for all alike.
            os.sched_setaffinity(0, {cores[self._comm.Get_rank()]})

    def picked(self, num_bytes: int) -> Pick:
        return self._collectives.choose_prepared(num_bytes)

    def measure(self, num_bytes: int, *, turns: int) -> dict[str, list[float]]:
        import numpy as np
        import torch

        from windlass.tuning.collective_measure import time_turns

        length = max(1, num_bytes // 4)
        send, receive = np.ones(length, dtype=np.float32), np.ones(length, dtype=np.float32)
        tensor = torch.from_numpy(np.ones(length, dtype=np.float32))

        def action(name: str) -> Callable[[], object]:
            if name == CHOSEN:
                return self._collectives.prepare_allreduce(send, receive)
            if name == LIBRARY:  # as its users call it
                return lambda: self._comm.Allreduce(send, receive)
            pick = Pick.parse(name)
            return lambda: self._collectives.allreduce(send, receive, pick=pick)

        rivals: dict[str, Callable[[], object]] = {name: action(name) for name in (CHOSEN, *self._algorithms)}
        for name, one, group in ((BACKEND, tensor.clone(), self._windlass), (GLOO, tensor, None)):
            rivals[name] = functools.partial(_sum_by_torch, one, group)
        rivals[COPY] = lambda: np.copyto(receive, send)
        return time_turns(self._comm, rivals, turns=turns)


def _sum_by_torch(tensor: Any, group: Any) -> None:
    """``all_reduce`` in place; begins again before sums of sums overflow."""
    import torch.distributed as dist

    dist.all_reduce(tensor, group=group)
    if tensor[0] > 1e30:
        tensor.fill_(1.0)


if __name__ == "__main__":
    sys.exit(_rank_main())
