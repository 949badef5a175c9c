"""PyTorch's DistributedDataParallel on the backend ``windlass`` beside ``gloo``: the same model, batches and ranks."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from windlass.bench.allreduce import quartiles
from windlass.bench.ranks import enter
from windlass.engine.launch import Launcher, threads_per_rank

BACKENDS = ("windlass", "gloo")


@dataclass(frozen=True, kw_only=True)
class DdpRow:
    """One backend.

    Attributes:
        backend: its name.
        seconds, low_s, high_s: of a step at the slowest rank: median and quartiles over the turns.
        times_gloo: how many times as fast as Gloo, median over the turns.
        losses: of rank 0 in the first steps; both backends begin with the same weights and batches.
    """

    backend: str
    seconds: float
    low_s: float
    high_s: float
    times_gloo: float
    losses: tuple[float, ...]


def bench_ddp(
    network: str, *, workers: int, batch: int, image_size: int, turns: int, steps: int,
    on_event: Callable[[dict[str, Any]], None],
) -> list[DdpRow]:  # fmt: skip
    """Measures on this host, in turns of a few steps.

    Args:
        network: a built-in network.
        workers: ranks.
        batch: images of a rank and step.
        image_size: side of the made-up images.
        turns: of each backend.
        steps: of a turn.
        on_event: told of every turn.
    """
    from windlass.train import raise_outcome

    events: list[dict[str, Any]] = []

    def take(event: dict[str, Any]) -> None:
        events.append(event)
        on_event(event)

    spec = {"network": network, "batch": batch, "image_size": image_size, "turns": turns, "steps": steps}
    launcher = Launcher(
        "windlass.bench.ddp", ["--spec", json.dumps(spec)], num_ranks=workers, threads=threads_per_rank(workers),
        stall_s=600, on_event=take,
    )  # fmt: skip
    raise_outcome(launcher.run())
    samples = {name: [event["seconds"] for event in events if event["backend"] == name] for name in BACKENDS}
    losses = {
        name: [loss for event in events if event["backend"] == name for loss in event["losses"]] for name in BACKENDS
    }
    return [_row(name, samples, losses[name]) for name in BACKENDS]


def _row(name: str, samples: dict[str, list[float]], losses: Sequence[float]) -> DdpRow:
    low, middle, high = quartiles(samples[name])
    ratios = [gloo / ours for gloo, ours in zip(samples["gloo"], samples[name], strict=True)]
    return DdpRow(
        backend=name, seconds=middle, low_s=low, high_s=high, times_gloo=statistics.median(ratios),
        losses=tuple(losses[:5]),
    )  # fmt: skip


def rows_to_json(rows: Sequence[DdpRow], machine: dict[str, Any]) -> str:
    """The results with the machine, as JSON."""
    return json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def _rank_main() -> int:
    """One rank of the benchmark."""
    me = enter()

    import torch.distributed as dist

    from windlass.backend import register

    register()
    dist.init_process_group("windlass")
    groups = {"windlass": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    steps = {name: _trainer(me.spec, me.rank, group) for name, group in groups.items()}
    for turn in range(-1, me.spec["turns"]):
        for name in BACKENDS if turn % 2 else BACKENDS[::-1]:
            me.watchdog.note(name, turn)
            dist.barrier()
            started = time.perf_counter()
            losses = [steps[name]() for _ in range(me.spec["steps"])]
            dist.barrier()
            seconds = (time.perf_counter() - started) / me.spec["steps"]
            if turn >= 0:  # the first turn warms up
                me.say({"kind": "turn", "backend": name, "turn": turn, "seconds": seconds, "losses": losses})
        reasons: list[Any] = [None] * me.size
        dist.all_gather_object(reasons, me.stop.reason)
        if me.give_up(reasons):
            return 0
    me.channel.send({"kind": "bye", "code": 0})
    dist.barrier()
    os._exit(0)  # Gloo's destructors now and then wait for ever


def _trainer(spec: dict[str, Any], rank: int, group: Any) -> Callable[[], float]:
    """A step of SGD under DDP on this group; returns the loss."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from windlass.networks import build_network
    from windlass.objective import main_output

    torch.manual_seed(0)
    side = spec["image_size"]
    module = build_network(spec["network"], num_classes=10, in_channels=3, image_size=side)
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ddp = DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9, fused=True)
    random = torch.Generator().manual_seed(rank)
    images = torch.randn(spec["batch"], 3, side, side, generator=random).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (spec["batch"],), generator=random)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(main_output(ddp(images)), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    sys.exit(_rank_main())
