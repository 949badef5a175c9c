"""Throughput of synchronous data-parallel training beside PyTorch's DistributedDataParallel over Gloo.

Both train the same network from the same weights on the same batches with the same optimizer settings, in
the same rank processes with the same threads, in turns of a few steps, so that whatever else the machine does
meets both alike.  The rival is DDP as its users write it; it is given every setting that helped it
(``gradient_as_bucket_view``, the fused optimizer, the plan's memory layout).
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from windlass.bench.ranks import enter
from windlass.config import TrainConfig, config_from_layers
from windlass.engine.launch import Launcher, threads_per_rank
from windlass.engine.world import World
from windlass.errors import ConfigError
from windlass.job import Job
from windlass.networks import NETWORKS


@dataclass(frozen=True)
class Case:
    """What is trained: a network on made-up images of this shape, with this global batch."""

    network: str
    shape: str
    classes: int
    batch: int
    steps: int
    """Steps of one turn."""

    def config(self, workers: int) -> TrainConfig:
        """The run's configuration."""
        source = f"synthetic:{self.shape}:{self.classes}:{max(512, 2 * self.batch)}"
        update = {"name": "momentum", "lr": 0.01}
        return config_from_layers(
            [{"network": self.network, "data": {"source": source}, "workers": workers, "batch": self.batch,
              "update": update, "epochs": 1_000_000, "schedule": {"name": "constant"}}]
        )  # fmt: skip


CASES: dict[str, Case] = {
    "lenet5": Case("lenet5", "1x32x32", 10, 64, 50),
    "resnet18": Case("resnet18", "3x32x32", 10, 64, 4),
}
"""What can be measured, by name; any other network name runs at CIFAR size with a batch of 64."""

RIVALS = ("windlass", "ddp")


@dataclass(frozen=True)
class Row:
    """One network's result: images/s of both, median over the turns, and the median of the turns' ratios."""

    network: str
    workers: int
    threads: int
    batch: int
    turns: int
    windlass_images_per_s: float
    ddp_images_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float


def bench_train(
    networks: list[str], *, workers: int, turns: int, on_turn: Callable[[dict[str, Any]], None]
) -> list[Row]:
    """Measures the networks one after the other.

    Args:
        networks: names of `CASES` or of networks.
        workers: ranks, on this host.
        turns: turns of each rival; the medians are over them.
        on_turn: called after every turn, for progress.
    """
    from windlass.train import raise_outcome

    rows = []
    for name in networks:
        case = CASES.get(name) or (Case(name, "3x32x32", 10, 64, 4) if name in NETWORKS or ":" in name else None)
        if case is None:
            raise ConfigError(f"--networks: there is no network {name!r}; there are: {', '.join(NETWORKS)}")
        job = Job(case.config(workers), "")
        spec = {"job": job.to_mapping(), "steps": case.steps, "turns": turns, "network": name}
        events: list[dict[str, Any]] = []

        def take(event: dict[str, Any], events: list[dict[str, Any]] = events) -> None:
            events.append(event)
            on_turn(event)

        launcher = Launcher(
            "windlass.bench.train",
            ["--spec", json.dumps(spec)],
            num_ranks=workers,
            threads=threads_per_rank(workers),
            stall_s=600,
            on_event=take,
        )
        raise_outcome(launcher.run())
        rows.append(_row(case, workers, turns, events))
    return rows


def _row(case: Case, workers: int, turns: int, events: list[dict[str, Any]]) -> Row:
    seconds = {rival: [e["seconds"] for e in events if e.get("rival") == rival] for rival in RIVALS}
    images = case.steps * case.batch
    ratios = sorted(ddp / ours for ours, ddp in zip(seconds["windlass"], seconds["ddp"], strict=True))
    return Row(
        network=case.network,
        workers=workers,
        threads=threads_per_rank(workers),
        batch=case.batch,
        turns=turns,
        windlass_images_per_s=images / statistics.median(seconds["windlass"]),
        ddp_images_per_s=images / statistics.median(seconds["ddp"]),
        ratio=statistics.median(ratios),
        ratio_low=ratios[len(ratios) // 4],
        ratio_high=ratios[(3 * len(ratios)) // 4],
    )


def rows_to_json(rows: list[Row], machine: dict[str, Any]) -> str:
    """The results with the machine, as JSON."""
    return json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def _rank_main() -> int:
    """One rank of the benchmark."""
    from windlass.engine.world import join_world
    from windlass.prepare import prepare

    me = enter()
    world = join_world(me.size)
    prepared = prepare(Job.from_mapping(me.spec["job"]), world)
    weights = copy.deepcopy(prepared.module)
    batches = [prepared.train.fetch(0, step) for step in range(min(8, prepared.train.num_steps - 1))]
    turns = {"windlass": _windlass_turn(prepared, batches), "ddp": _ddp_turn(prepared, weights, batches)}
    for turn in range(-1, me.spec["turns"]):
        order = RIVALS if turn % 2 else RIVALS[::-1]
        for rival in order:
            me.watchdog.note(rival, turn)
            world.barrier()
            started = time.perf_counter()
            loss = turns[rival](me.spec["steps"])
            world.barrier()
            event = {"kind": "turn", "network": me.spec["network"], "rival": rival, "turn": turn}
            if turn >= 0:  # the first turn warms up
                seconds = time.perf_counter() - started
                me.say(event | {"seconds": seconds, "loss": loss, "turns": me.spec["turns"]})
            if me.give_up(world.gather(me.stop.reason)):
                return 0
    me.channel.send({"kind": "bye", "code": 0})
    _leave(world)
    return 0


def _leave(world: World) -> None:
    """Ends the rank without destructors: Gloo's now and then wait for ever when DDP's reducer goes last."""
    from mpi4py import MPI

    world.barrier()
    MPI.Finalize()
    os._exit(0)


def _windlass_turn(prepared: Any, batches: list[Any]) -> Callable[[int], float]:
    from windlass.engine.watch import StopRequest
    from windlass.loop import Trainer

    trainer = Trainer(prepared, emit=lambda event: None, stop=StopRequest(), note=lambda a, b: None, writer=None)
    trainer.module.train()

    def turn(steps: int) -> float:
        loss = 0.0
        for step in range(steps):
            loss = trainer.step(batches[step % len(batches)]).loss
        return loss

    return turn


def _ddp_turn(prepared: Any, module: Any, batches: list[Any]) -> Callable[[int], float]:
    """DDP's textbook loop over Gloo, on the same ranks."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    from windlass.loop import MEMORY_FORMATS
    from windlass.optim.build import build_optimizer

    world = prepared.world
    port = world.broadcast(_free_port() if world.rank == 0 else 0)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size)
    layout = MEMORY_FORMATS[str(prepared.plan.value("layout"))]
    model = DistributedDataParallel(module.to(memory_format=layout), gradient_as_bucket_view=True)
    optimizer = build_optimizer(prepared.job.config.update, list(model.parameters()))
    model.train()  # type: ignore[no-untyped-call]

    def turn(steps: int) -> float:
        loss = torch.zeros(())
        for step in range(steps):
            batch = batches[step % len(batches)]
            optimizer.zero_grad()
            outputs = model(batch.images.contiguous(memory_format=layout))
            loss = functional.cross_entropy(outputs, batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return float(loss)

    return turn


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(_rank_main())
